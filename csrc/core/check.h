// Error reporting: every failure is a C++ exception whose text carries the operation and the values.
//
//   OPTIMUS_CHECK(head_dim == 64, "[block_attention] head_dim must be 64, got ", head_dim);
//
// Bad arguments throw std::invalid_argument (ValueError in Python); states that cannot happen unless
// Optimus itself is wrong throw std::logic_error (RuntimeError). Nothing here prints or exits.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace optimus {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace optimus

#define OPTIMUS_CHECK(condition, ...)                                              \
  do {                                                                             \
    if (!(condition)) throw std::invalid_argument(::optimus::concat(__VA_ARGS__)); \
  } while (false)

#define OPTIMUS_INVARIANT(condition, ...)                                                   \
  do {                                                                                      \
    if (!(condition)) throw std::logic_error(::optimus::concat("internal: ", __VA_ARGS__)); \
  } while (false)

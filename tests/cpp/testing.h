// Helpers shared by the C++ tests: typed arrays with guards, random fill, comparisons.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/parallel.h"
#include "kernels/cpu/simd.h"

namespace optimus::testing {

using Rng = std::mt19937;

inline int random_int(Rng& rng, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(rng);
}

inline std::vector<int32_t> random_permutation(Rng& rng, int count) {
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), rng);
  return order;
}

// A heap array of fp32 or bf16 with a guard on both sides; starts out as all NaN, so that elements
// an op forgot to write, or read without cause, show.
class Tensor {
 public:
  Tensor(DType dtype, size_t count)
      : dtype_(dtype), count_(count), bytes_(count * dtype_size(dtype) + 2 * kGuard, kGuardByte) {
    for (size_t i = 0; i < count; ++i) set(i, std::numeric_limits<float>::quiet_NaN());
  }

  void* data() { return bytes_.data() + kGuard; }
  const void* data() const { return bytes_.data() + kGuard; }
  size_t size() const { return count_; }
  DType dtype() const { return dtype_; }

  float get(size_t i) const {
    if (dtype_ == DType::bfloat16) return to_float(read<bfloat16>(i));
    return read<float>(i);
  }
  void set(size_t i, float value) {
    if (dtype_ == DType::bfloat16) {
      write(i, to_bfloat16(value));
    } else {
      write(i, value);
    }
  }

  bool guards_intact() const {
    auto is_guard = [](unsigned char byte) { return byte == kGuardByte; };
    return std::all_of(bytes_.begin(), bytes_.begin() + kGuard, is_guard) &&
           std::all_of(bytes_.end() - kGuard, bytes_.end(), is_guard);
  }
  bool same_bits(size_t i, const Tensor& other, size_t j) const {
    size_t size = dtype_size(dtype_);
    return dtype_ == other.dtype_ &&
           std::memcmp(&bytes_[kGuard + i * size], &other.bytes_[kGuard + j * size], size) == 0;
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr unsigned char kGuardByte = 0xa5;

  template <class T>
  T read(size_t i) const {
    T value;
    std::memcpy(&value, &bytes_[kGuard + i * sizeof(T)], sizeof(T));
    return value;
  }
  template <class T>
  void write(size_t i, T value) {
    std::memcpy(&bytes_[kGuard + i * sizeof(T)], &value, sizeof(T));
  }

  DType dtype_;
  size_t count_;
  std::vector<unsigned char> bytes_;
};

inline Tensor random_tensor(Rng& rng, DType dtype, size_t count, float scale = 1.0f) {
  Tensor tensor(dtype, count);
  std::normal_distribution<float> normal(0.0f, scale);
  for (size_t i = 0; i < count; ++i) tensor.set(i, normal(rng));
  return tensor;
}

// 1e-5 in fp32 and 1e-2 in bf16, relative to the element plus the typical element.
inline void expect_close(const Tensor& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  ASSERT_TRUE(actual.guards_intact()) << "written outside of the output";
  double squares = 0;
  for (double value : expected) squares += value * value;
  double typical = std::sqrt(squares / std::max<size_t>(1, expected.size()));
  double tolerance = actual.dtype() == DType::float32 ? 1e-5 : 1e-2;
  for (size_t i = 0; i < expected.size(); ++i) {
    double allowed = tolerance * (std::abs(expected[i]) + typical);
    ASSERT_LE(std::abs(actual.get(i) - expected[i]), allowed)
        << "element " << i << ": got " << actual.get(i) << ", expected " << expected[i];
  }
}

inline void expect_same_bits(const Tensor& a, size_t a_first, const Tensor& b, size_t b_first,
                             size_t count) {
  for (size_t i = 0; i < count; ++i) {
    ASSERT_TRUE(a.same_bits(a_first + i, b, b_first + i))
        << "element " << i << ": " << a.get(a_first + i) << " and " << b.get(b_first + i);
  }
}

// Runs body(dtype) for both dtypes under every instruction set of this machine.
template <class Body>
void for_each_isa_and_dtype(const Body& body) {
  for (int isa = 0; isa <= static_cast<int>(cpu::best_isa()); ++isa) {
    cpu::set_active_isa(static_cast<cpu::Isa>(isa));
    for (DType dtype : {DType::float32, DType::bfloat16}) {
      SCOPED_TRACE(std::string(cpu::isa_name(cpu::active_isa())) + " " + dtype_name(dtype));
      body(dtype);
      if (::testing::Test::HasFatalFailure()) break;
    }
  }
  cpu::set_active_isa(cpu::best_isa());
}

// Runs `call` and expects std::invalid_argument whose text contains `text`.
template <class Call>
void expect_invalid(const Call& call, const std::string& text) {
  try {
    call();
    ADD_FAILURE() << "expected an exception with: " << text;
  } catch (const std::invalid_argument& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr(text));
  }
}

}  // namespace optimus::testing

// Element types. bf16 is storage only on the CPU: arithmetic widens to fp32 and rounds once on store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "core/check.h"

namespace optimus {

enum class DType : uint8_t { float32, bfloat16 };

inline size_t dtype_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
inline const char* dtype_name(DType dtype) {
  return dtype == DType::float32 ? "float32" : "bfloat16";
}
inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  throw std::invalid_argument("[dtype] must be float32 or bfloat16, got " + name);
}

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) {
  uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

// Round to nearest, ties to even; NaN stays NaN (a plain rounding add could turn it into infinity).
inline bfloat16 to_bfloat16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  if ((wide & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((wide >> 16) | 0x40u)};
  wide += 0x7fffu + ((wide >> 16) & 1u);
  return {static_cast<uint16_t>(wide >> 16)};
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bfloat16 from_float<bfloat16>(float value) {
  return to_bfloat16(value);
}

// Calls `body(T{})` with T = float or bfloat16.
template <class Body>
void dispatch_dtype(DType dtype, Body&& body) {
  if (dtype == DType::float32) {
    body(float{});
  } else {
    body(bfloat16{});
  }
}

}  // namespace optimus

// Chunks of 8 elements in fp32 registers, loaded and stored 16 bytes at a time; single elements for
// shapes that chunks do not fit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "core/dtype.h"

namespace optimus::cuda {

constexpr int kChunk = 8;

// The device's type of an element of storage type float or bfloat16.
template <class T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<bfloat16> {
  using type = __nv_bfloat16;
};

__device__ __forceinline__ float load_element(const float* p) { return *p; }
__device__ __forceinline__ float load_element(const __nv_bfloat16* p) {
  return __bfloat162float(*p);
}
__device__ __forceinline__ void store_element(float* p, float value) { *p = value; }
__device__ __forceinline__ void store_element(__nv_bfloat16* p, float value) {
  *p = __float2bfloat16_rn(value);
}

// `value` as the storage type holds it.
__device__ __forceinline__ float round_to(float value, const float*) { return value; }
__device__ __forceinline__ float round_to(float value, const __nv_bfloat16*) {
  return __bfloat162float(__float2bfloat16_rn(value));
}

__device__ __forceinline__ void widen(uint32_t pair, float& low, float& high) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ uint32_t narrow(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

// As read from memory: what to keep in registers while loads are in flight.
template <class T>
struct RawChunk;
template <>
struct RawChunk<__nv_bfloat16> {
  uint4 bits;
};
template <>
struct RawChunk<float> {
  float4 low, high;
};

__device__ __forceinline__ RawChunk<__nv_bfloat16> load_chunk(const __nv_bfloat16* p) {
  return {*reinterpret_cast<const uint4*>(p)};
}
__device__ __forceinline__ RawChunk<float> load_chunk(const float* p) {
  const float4* vectors = reinterpret_cast<const float4*>(p);
  return {vectors[0], vectors[1]};
}
__device__ __forceinline__ void store_chunk(__nv_bfloat16* p,
                                            const RawChunk<__nv_bfloat16>& chunk) {
  *reinterpret_cast<uint4*>(p) = chunk.bits;
}
__device__ __forceinline__ void store_chunk(float* p, const RawChunk<float>& chunk) {
  float4* vectors = reinterpret_cast<float4*>(p);
  vectors[0] = chunk.low;
  vectors[1] = chunk.high;
}

__device__ __forceinline__ void unpack(const RawChunk<__nv_bfloat16>& raw, float (&out)[kChunk]) {
  widen(raw.bits.x, out[0], out[1]);
  widen(raw.bits.y, out[2], out[3]);
  widen(raw.bits.z, out[4], out[5]);
  widen(raw.bits.w, out[6], out[7]);
}
__device__ __forceinline__ void unpack(const RawChunk<float>& raw, float (&out)[kChunk]) {
  out[0] = raw.low.x, out[1] = raw.low.y, out[2] = raw.low.z, out[3] = raw.low.w;
  out[4] = raw.high.x, out[5] = raw.high.y, out[6] = raw.high.z, out[7] = raw.high.w;
}
__device__ __forceinline__ void pack(const float (&in)[kChunk], RawChunk<__nv_bfloat16>& raw) {
  raw.bits.x = narrow(in[0], in[1]);
  raw.bits.y = narrow(in[2], in[3]);
  raw.bits.z = narrow(in[4], in[5]);
  raw.bits.w = narrow(in[6], in[7]);
}
__device__ __forceinline__ void pack(const float (&in)[kChunk], RawChunk<float>& raw) {
  raw.low = make_float4(in[0], in[1], in[2], in[3]);
  raw.high = make_float4(in[4], in[5], in[6], in[7]);
}
template <class T>
__device__ __forceinline__ void store_chunk(T* p, const float (&in)[kChunk]) {
  RawChunk<T> raw;
  pack(in, raw);
  store_chunk(p, raw);
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls `body(T{})` with T = float or __nv_bfloat16.
template <class Body>
void dispatch_device_dtype(DType dtype, Body&& body) {
  if (dtype == DType::float32) {
    body(float{});
  } else {
    body(__nv_bfloat16{});
  }
}

}  // namespace optimus::cuda

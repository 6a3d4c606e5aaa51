// Counter-based sampling noise, the same on every backend.
//
// A token is sampled by Gumbel-max: argmax over the allowed set of logit / temperature + g, where g
// is a pure function of (seed, position, denoise step, token). No generator state exists, so a
// request draws the same noise alone, in a batch, or after preemption; and the argmax does not
// depend on the order in which the vocabulary is scanned, so CPU and CUDA pick the same token.
//
//   key = mix(mix(mix(seed) ^ position) ^ denoise_step)          64-bit, once per logits row
//   u   = ((mix(key ^ token) >> 41) + 0.5) * 2^-23               in (0, 1), exact in fp32
//   g   = -log(-log(u))                                           fp32 logf
//
// mix(z): z += 0x9e3779b97f4a7c15; z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
//         z = (z ^ (z >> 27)) * 0x94d049bb133111eb; return z ^ (z >> 31).
// Source: splitmix64 (Steele, Lea, Flood, OOPSLA 2014); Gumbel-max (Maddison et al., 2014).
// `position` is absolute; `denoise_step` counts the steps spent on the position's block, from 0.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define OPTIMUS_HOST_DEVICE __host__ __device__
#else
#define OPTIMUS_HOST_DEVICE
#endif

namespace optimus {

OPTIMUS_HOST_DEVICE inline uint64_t mix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

OPTIMUS_HOST_DEVICE inline uint64_t noise_key(uint64_t seed, int32_t position,
                                              int32_t denoise_step) {
  uint64_t key = mix64(seed) ^ static_cast<uint32_t>(position);
  return mix64(mix64(key) ^ static_cast<uint32_t>(denoise_step));
}

OPTIMUS_HOST_DEVICE inline float gumbel_noise(uint64_t key, int32_t token) {
  uint64_t bits = mix64(key ^ static_cast<uint32_t>(token)) >> 41;
  float uniform = (static_cast<float>(bits) + 0.5f) * 0x1p-23f;
  return -logf(-logf(uniform));
}

}  // namespace optimus

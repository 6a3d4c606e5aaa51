// The vectorised inner routines of the CPU kernels, compiled once per instruction set in simd.cpp
// and chosen at run time, so that one binary built with plain flags runs on any machine.
//
// The ops (gemm.cpp, block_attention.cpp, ...) own shapes, threads and memory; the routines here
// own arithmetic, and with it the rule that makes the ops batch-invariant: each output element is
// one chain of operations in a fixed order, whatever tile its row falls into. AVX2 and AVX-512 use
// the same 16 logical lanes, so they agree bit for bit; the portable path may round differently.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace optimus::cpu {

constexpr int kLanes = 16;  // floats in a logical vector, on every instruction set

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

enum class Isa : uint8_t { portable, avx2, avx512 };
const char* isa_name(Isa isa);
Isa best_isa();            // of this machine
Isa active_isa();          // best_isa() unless set_active_isa was called
void set_active_isa(Isa);  // for tests and benchmarks; throws if this machine lacks it

// Online softmax over key tiles for up to kAttentionLanes query rows at once ("lanes": rows x GQA
// group of one KV head). Keys of a tile are contiguous fp32 copies. All pointers 64-byte aligned.
constexpr int kAttentionLanes = 32;
constexpr int kAttentionKeys = 64;
struct AttentionTile {
  const float* q;         // [head_dim, kAttentionLanes] transposed, times the softmax scale
  const float* k;         // [kAttentionKeys, head_stride]
  const float* v;         // [kAttentionKeys, head_stride]
  const int32_t* limits;  // [kAttentionLanes] a lane sees keys below it
  float* scores;          // [kAttentionKeys, kAttentionLanes] scratch
  float* transposed;      // [head_dim, kAttentionKeys] scratch
  float* max;             // [kAttentionLanes] running maximum, -inf at first
  float* sum;             // [kAttentionLanes] running sum of exponentials, 0 at first
  float* out;             // [kAttentionLanes, head_stride] running weighted sum of v, 0 at first
  int lanes;              // in use
  int head_dim;
  int head_stride;  // head_dim rounded up to kLanes; the padding of v is 0
  int first_key;    // position of k[0] in its request
  int num_keys;     // in this tile
};

// What softmax(logits * scale) and its entropy are made of.
struct SoftmaxSums {
  float max;            // of logits * scale
  int argmax;           // the first element that reaches it
  double sum;           // of exp(logits * scale - max)
  double weighted_sum;  // of exp(logits * scale - max) * (logits * scale - max)
};

// T is the storage type; arithmetic is fp32.
template <class T>
struct SimdKernels {
  // out[r, c] = sum_i x[r * x_stride + i] * panel[i, c] for the 32 columns of one packed panel.
  void (*gemm_panel)(const float* x, ptrdiff_t x_stride, int rows, const T* panel, int k,
                     float* out, ptrdiff_t out_stride);
  void (*attention_tile)(const AttentionTile& tile);
  void (*widen)(const T* in, float* out, int count);
  void (*narrow)(const float* in, T* out, int count);
  // out = x / rms(x) * weight; with residual (else null): residual += x, and that is normed.
  void (*rms_norm)(const T* x, T* residual, const T* weight, T* out, int count, float eps);
  // In place, on fp32: head = head / rms(head) * weight.
  void (*norm_head)(float* head, const T* weight, int count, float eps);
  // In place, on fp32: rotates (head[j], head[j + half]) by the angle whose cosine and sine are
  // given.
  void (*rotate_head)(float* head, const float* cosine, const float* sine, int half);
  void (*silu_mul)(const T* gate, const T* up, T* out, int count);
  SoftmaxSums (*softmax_sums)(const T* logits, int count, float scale);
};

template <class T>
const SimdKernels<T>& simd_kernels();  // of active_isa()

}  // namespace optimus::cpu

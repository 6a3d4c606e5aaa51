// Splits the fused qkv rows: q is normed, rotated and stored densely; k likewise into its KV page;
// v goes to its page as it is. A head is widened to fp32 once and rounded once.
#include <cmath>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace optimus::cpu {
namespace {

constexpr int kMaxHeadDim = 512;
constexpr int64_t kMinElementsPerThread = 8 * 1024;

void check(const QkNormRopeKvWriteParams& params) {
  OPTIMUS_CHECK(params.rows >= 0 && params.num_q_heads >= 1 && params.num_kv_heads >= 1 &&
                    params.page_size >= 1,
                "[qk_norm_rope_kv_write] need rows >= 0 and num_q_heads, num_kv_heads, page_size "
                ">= 1, got ",
                params.rows, ", ", params.num_q_heads, ", ", params.num_kv_heads, ", ",
                params.page_size);
  OPTIMUS_CHECK(params.head_dim >= 1 && params.head_dim <= kMaxHeadDim,
                "[qk_norm_rope_kv_write] head_dim must be in 1..", kMaxHeadDim, ", got ",
                params.head_dim);
  OPTIMUS_CHECK(
      params.rotary_dim >= 0 && params.rotary_dim % 2 == 0 && params.rotary_dim <= params.head_dim,
      "[qk_norm_rope_kv_write] rotary_dim must be even and in 0..head_dim (", params.head_dim,
      "), got ", params.rotary_dim);
  OPTIMUS_CHECK(params.eps >= 0, "[qk_norm_rope_kv_write] eps must be >= 0, got ", params.eps);
  if (params.rows == 0) return;
  OPTIMUS_CHECK(params.qkv != nullptr && params.positions != nullptr &&
                    params.kv_slots != nullptr && params.q != nullptr &&
                    params.k_pages != nullptr && params.v_pages != nullptr &&
                    (params.inv_freq != nullptr || params.rotary_dim == 0),
                "[qk_norm_rope_kv_write] null pointer for qkv, inv_freq, positions, kv_slots, q, "
                "k_pages or v_pages");
  for (int i = 0; i < params.rows; ++i) {
    OPTIMUS_CHECK(params.positions[i] >= 0, "[qk_norm_rope_kv_write] row ", i,
                  " needs a position >= 0, got ", params.positions[i]);
  }
}

// The angle is rounded to fp32, as the models were trained.
struct Rotation {
  float cosine[kMaxHeadDim / 2], sine[kMaxHeadDim / 2];

  void set(const QkNormRopeKvWriteParams& params, int32_t position) {
    for (int j = 0; j < params.rotary_dim / 2; ++j) {
      float angle = static_cast<float>(position) * params.inv_freq[j];
      cosine[j] = std::cos(angle);
      sine[j] = std::sin(angle);
    }
  }
};

template <class T>
void norm_and_rotate(const QkNormRopeKvWriteParams& params, const Rotation& rotation,
                     const void* weight, const T* in, T* out) {
  const SimdKernels<T>& simd = simd_kernels<T>();
  alignas(64) float head[kMaxHeadDim];
  simd.widen(in, head, params.head_dim);
  if (weight != nullptr) {
    simd.norm_head(head, static_cast<const T*>(weight), params.head_dim, params.eps);
  }
  simd.rotate_head(head, rotation.cosine, rotation.sine, params.rotary_dim / 2);
  simd.narrow(head, out, params.head_dim);
}

template <class T>
void run_row(const QkNormRopeKvWriteParams& params, int64_t row) {
  const size_t head_dim = params.head_dim;
  const int num_q = params.num_q_heads, num_kv = params.num_kv_heads;
  const T* in = static_cast<const T*>(params.qkv) + row * (num_q + 2 * num_kv) * head_dim;
  Rotation rotation;
  rotation.set(params, params.positions[row]);
  T* q = static_cast<T*>(params.q) + row * num_q * head_dim;
  for (int h = 0; h < num_q; ++h, in += head_dim, q += head_dim) {
    norm_and_rotate(params, rotation, params.q_norm_weight, in, q);
  }
  if (params.kv_slots[row] < 0) return;  // padding
  const size_t page = params.kv_slots[row] / params.page_size;
  const size_t entry = params.kv_slots[row] % params.page_size;
  for (int h = 0; h < num_kv; ++h, in += head_dim) {
    size_t at = ((page * num_kv + h) * params.page_size + entry) * head_dim;
    norm_and_rotate(params, rotation, params.k_norm_weight, in,
                    static_cast<T*>(params.k_pages) + at);
    std::memcpy(static_cast<T*>(params.v_pages) + at, in + num_kv * head_dim, head_dim * sizeof(T));
  }
}

}  // namespace

void qk_norm_rope_kv_write(const QkNormRopeKvWriteParams& params, ThreadPool& threads) {
  check(params);
  int64_t width = (params.num_q_heads + 2 * params.num_kv_heads) * params.head_dim;
  dispatch_dtype(params.dtype, [&](auto zero) {
    threads.parallel_for(params.rows, 1 + kMinElementsPerThread / width,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i) {
                             run_row<decltype(zero)>(params, i);
                           }
                         });
  });
}

}  // namespace optimus::cpu

// Splits the fused qkv rows: q is normed, rotated and stored densely; k likewise into its KV page;
// v goes to its page as it is. A head is widened to fp32 once and rounded once.
//
// A head is worked on by a group of kLanes neighbouring lanes. A *unit* is two stretches of kWidth
// elements that belong to one lane: in the rotated part the two partners of a rotation (element j
// and j + rotary_dim / 2), behind it two neighbours. So the rotation needs no exchange between
// lanes, and the norm only a sum over the group. The lanes of a group work on kHeads heads of the
// same row one after another, with the same angles.
#include "core/check.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace optimus::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxHeadDim = 512;

template <class T>
struct Args {
  const T* qkv;
  const T* q_norm_weight;
  const T* k_norm_weight;
  const float* inv_freq;
  const int32_t* positions;
  const int32_t* kv_slots;
  T* q;
  T* k_pages;
  T* v_pages;
  int num_q_heads, num_kv_heads, head_dim, rotary_dim, page_size;
  float eps;
};

template <class T, int kWidth>
__device__ __forceinline__ void load(const T* p, float (&out)[kWidth]) {
  if constexpr (kWidth == kChunk) {
    unpack(load_chunk(p), out);
  } else {
    out[0] = load_element(p);
  }
}
template <class T, int kWidth>
__device__ __forceinline__ void store(T* p, const float (&in)[kWidth]) {
  if constexpr (kWidth == kChunk) {
    store_chunk(p, in);
  } else {
    store_element(p, in[0]);
  }
}

// Where a unit's two stretches start within the head.
struct UnitPlace {
  int first, second;
  bool rotated;
};
template <int kWidth>
__device__ __forceinline__ UnitPlace place_of(int unit, int rotary_dim) {
  const int half = rotary_dim / 2, rotated_units = half / kWidth;
  if (unit < rotated_units) return {unit * kWidth, half + unit * kWidth, true};
  int first = rotary_dim + (unit - rotated_units) * 2 * kWidth;
  return {first, first + kWidth, false};
}

// Where the head of this row goes, or null. Heads are numbered as in the qkv row: q, k, v.
template <class T>
__device__ __forceinline__ T* destination(const Args<T>& args, int row, int head, int kv_slot) {
  if (head < args.num_q_heads) {
    return args.q + (size_t(row) * args.num_q_heads + head) * args.head_dim;
  }
  if (kv_slot < 0) return nullptr;
  const int kv_head = (head - args.num_q_heads) % args.num_kv_heads;
  const bool is_v = head - args.num_q_heads >= args.num_kv_heads;
  const size_t page = kv_slot / args.page_size, entry = kv_slot % args.page_size;
  const size_t at = ((page * args.num_kv_heads + kv_head) * args.page_size + entry) * args.head_dim;
  return (is_v ? args.v_pages : args.k_pages) + at;
}

// Grid: (rows, shares of the heads). kUnits: units per lane (1 in the vectorised form).
template <class T, int kWidth, int kLanes, int kUnits, int kHeads>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_kv_write_kernel(Args<T> args) {
  constexpr int kGroups = kThreads / kLanes;
  wait_for_previous_kernel();
  const int row = blockIdx.x, lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int num_heads = args.num_q_heads + 2 * args.num_kv_heads;
  const int units = args.head_dim / (2 * kWidth);
  const T* in = args.qkv + size_t(row) * num_heads * args.head_dim;
  const int first_head = blockIdx.y * kGroups * kHeads + group;
  // Uniform over a warp's groups up to the last heads: all lanes stay for the shuffles.
  const float position = static_cast<float>(args.positions[row]);
  const int kv_slot = args.kv_slots[row];

  float a[kHeads][kUnits][kWidth], b[kHeads][kUnits][kWidth];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int head = first_head + h * kGroups;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = u * kLanes + lane;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) a[h][u][j] = b[h][u][j] = 0.0f;
      if (head >= num_heads || unit >= units) continue;
      UnitPlace place = place_of<kWidth>(unit, args.rotary_dim);
      load<T, kWidth>(in + size_t(head) * args.head_dim + place.first, a[h][u]);
      load<T, kWidth>(in + size_t(head) * args.head_dim + place.second, b[h][u]);
    }
  }

  // The angle is rounded to fp32, as the models were trained. Unrotated units turn by 0.
  float cosine[kUnits][kWidth], sine[kUnits][kWidth];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int unit = u * kLanes + lane;
    UnitPlace place = place_of<kWidth>(unit, args.rotary_dim);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      cosine[u][j] = 1.0f;
      sine[u][j] = 0.0f;
      if (unit < units && place.rotated) {
        sincosf(position * args.inv_freq[place.first + j], &sine[u][j], &cosine[u][j]);
      }
    }
  }

#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int head = first_head + h * kGroups;
    const bool is_q = head < args.num_q_heads;
    const bool is_v = head >= args.num_q_heads + args.num_kv_heads;
    float squares = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        squares += a[h][u][j] * a[h][u][j] + b[h][u][j] * b[h][u][j];
      }
    }
    squares = reduce_lanes<kLanes>(squares, Sum());
    T* out = head < num_heads ? destination(args, row, head, kv_slot) : nullptr;
    if (out == nullptr) continue;
    const T* weight = is_v ? nullptr : is_q ? args.q_norm_weight : args.k_norm_weight;
    const float scale = rsqrtf(squares / static_cast<float>(args.head_dim) + args.eps);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = u * kLanes + lane;
      if (unit >= units) continue;
      UnitPlace place = place_of<kWidth>(unit, args.rotary_dim);
      if (weight != nullptr) {
        float wa[kWidth], wb[kWidth];
        load<T, kWidth>(weight + place.first, wa);
        load<T, kWidth>(weight + place.second, wb);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          a[h][u][j] *= scale * wa[j];
          b[h][u][j] *= scale * wb[j];
        }
      }
      if (!is_v) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          float x = a[h][u][j], y = b[h][u][j];
          a[h][u][j] = x * cosine[u][j] - y * sine[u][j];
          b[h][u][j] = y * cosine[u][j] + x * sine[u][j];
        }
      }
      store<T, kWidth>(out + place.first, a[h][u]);
      store<T, kWidth>(out + place.second, b[h][u]);
    }
  }
}

template <class T, int kWidth, int kLanes, int kUnits>
void start(const QkNormRopeKvWriteParams& params, const Args<T>& args, cudaStream_t stream) {
  constexpr int kGroups = kThreads / kLanes;
  const int num_heads = params.num_q_heads + 2 * params.num_kv_heads;
  auto grid = [&](int heads_per_group) {
    return dim3(params.rows, ceil_div(num_heads, kGroups * heads_per_group));
  };
  // With few rows spread the heads; with many, share the angles and have more loads in flight.
  constexpr int kHeads = kWidth == 1 ? 1 : 4;
  const int64_t ctas = int64_t(params.rows) * ceil_div(num_heads, kGroups);
  if (kHeads == 1 || ctas <= 4 * device_properties().num_sms) {
    launch(qk_norm_rope_kv_write_kernel<T, kWidth, kLanes, kUnits, 1>, {grid(1), dim3(kThreads)},
           stream, args);
  } else {
    launch(qk_norm_rope_kv_write_kernel<T, kWidth, kLanes, kUnits, kHeads>,
           {grid(kHeads), dim3(kThreads)}, stream, args);
  }
}

template <class T>
void run(const QkNormRopeKvWriteParams& params, cudaStream_t stream) {
  auto typed = [](const void* p) { return static_cast<const T*>(p); };
  Args<T> args{typed(params.qkv),
               typed(params.q_norm_weight),
               typed(params.k_norm_weight),
               params.inv_freq,
               params.positions,
               params.kv_slots,
               static_cast<T*>(params.q),
               static_cast<T*>(params.k_pages),
               static_cast<T*>(params.v_pages),
               params.num_q_heads,
               params.num_kv_heads,
               params.head_dim,
               params.rotary_dim,
               params.page_size,
               params.eps};
  const int units = params.head_dim / (2 * kChunk);
  bool fits = params.head_dim % (2 * kChunk) == 0 && params.rotary_dim % (2 * kChunk) == 0 &&
              is_aligned(args.qkv) && is_aligned(args.q) && is_aligned(args.k_pages) &&
              is_aligned(args.v_pages) && is_aligned(args.q_norm_weight) &&
              is_aligned(args.k_norm_weight);
  if (fits && units <= 4) {  // head_dim 64
    start<T, kChunk, 4, 1>(params, args, stream);
  } else if (fits && units <= 8) {  // 96, 128
    start<T, kChunk, 8, 1>(params, args, stream);
  } else if (fits && units <= 16) {  // 192, 256
    start<T, kChunk, 16, 1>(params, args, stream);
  } else {
    start<T, 1, kWarp, kMaxHeadDim / 2 / kWarp>(params, args, stream);
  }
}

}  // namespace

void qk_norm_rope_kv_write(const QkNormRopeKvWriteParams& params, cudaStream_t stream) {
  OPTIMUS_CHECK(params.rows >= 0 && params.num_q_heads >= 1 && params.num_kv_heads >= 1 &&
                    params.page_size >= 1,
                "[qk_norm_rope_kv_write] need rows >= 0 and num_q_heads, num_kv_heads, page_size "
                ">= 1, got ",
                params.rows, ", ", params.num_q_heads, ", ", params.num_kv_heads, ", ",
                params.page_size);
  OPTIMUS_CHECK(params.head_dim >= 2 && params.head_dim <= kMaxHeadDim && params.head_dim % 2 == 0,
                "[qk_norm_rope_kv_write] head_dim must be even and in 2..", kMaxHeadDim, ", got ",
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
  dispatch_device_dtype(params.dtype, [&](auto zero) { run<decltype(zero)>(params, stream); });
}

}  // namespace optimus::cuda

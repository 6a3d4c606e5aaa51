// Splits the fused qkv rows: q is normed, rotated and stored densely; k likewise into its KV page;
// v goes to its page as it is. A head is widened to fp32 once and rounded once.
//
// A head is worked on by a group of kLanes neighbouring lanes. A *unit* is two stretches of kWidth
// elements that belong to one lane: in the rotated part the two partners of a rotation (element j
// and j + rotary_dim / 2), behind it two neighbours. So the rotation needs no exchange between
// lanes, and the norm only a sum over the group. Groups are numbered over all heads of all rows.
#include "core/check.h"
#include "core/launch.cuh"
#include "kernels/cuda/kernels.h"
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
  int rows, num_q_heads, num_kv_heads, head_dim, rotary_dim, page_size;
  float inverse_head_dim, eps;
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

// Sine and cosine of an angle of any size: brought into [-pi, pi] by two exact steps (the difference
// of the first fits into fp32), then by the fast functions, which err by 2^-21 there.
__device__ __forceinline__ void sine_cosine(float angle, float& sine, float& cosine) {
  constexpr float kTwoPi = 6.28318548f, kTwoPiRest = -1.74845553e-7f, kInverse = 0.159154943f;
  const float turns = rintf(angle * kInverse);
  const float rest = fmaf(-turns, kTwoPiRest, fmaf(-turns, kTwoPi, angle));
  sine = __sinf(rest);
  cosine = __cosf(rest);
}

// One lane's part of a head.
template <int kWidth, int kUnits>
struct HeadPart {
  float a[kUnits][kWidth], b[kUnits][kWidth];  // first and second stretch of each unit
  float weight_a[kUnits][kWidth], weight_b[kUnits][kWidth], frequency[kUnits][kWidth];
  float sine[kUnits][kWidth], cosine[kUnits][kWidth];

  template <class Body>
  __device__ __forceinline__ void for_each_unit(int lane, int lanes, int units, int rotary_dim,
                                                const Body& body) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = u * lanes + lane;
      if (unit < units) body(place_of<kWidth>(unit, rotary_dim), u);
    }
  }
  __device__ __forceinline__ float sum_of_squares() const {
    float squares = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) squares += a[u][j] * a[u][j] + b[u][j] * b[u][j];
    }
    return squares;
  }
};

// kUnits: units per lane (1 in the vectorised form).
template <class T, int kWidth, int kLanes, int kUnits>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_kv_write_kernel(Args<T> args) {
  const int num_heads = args.num_q_heads + 2 * args.num_kv_heads;
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kLanes;
  const bool exists = index < args.rows * num_heads;  // all lanes stay for the shuffles
  const int row = exists ? index / num_heads : 0, head = exists ? index % num_heads : 0;
  const int lane = threadIdx.x % kLanes, units = args.head_dim / (2 * kWidth);
  const bool is_q = head < args.num_q_heads;
  const bool is_v = head >= args.num_q_heads + args.num_kv_heads;
  const T* in = args.qkv + (size_t(row) * num_heads + head) * args.head_dim;
  const T* weight = is_v ? nullptr : is_q ? args.q_norm_weight : args.k_norm_weight;

  HeadPart<kWidth, kUnits> part{};
  auto for_each_unit = [&](const auto& body) {
    part.for_each_unit(lane, kLanes, units, args.rotary_dim, body);
  };
  let_next_kernel_start();
  // All but the heads, while the kernel before this one runs. Past the L1, which may hold another step's.
  const float position = static_cast<float>(__ldcg(args.positions + row));
  const int kv_slot = __ldcg(args.kv_slots + row);
  for_each_unit([&](UnitPlace place, int u) {
    if (weight != nullptr) {
      load<T, kWidth>(weight + place.first, part.weight_a[u]);
      load<T, kWidth>(weight + place.second, part.weight_b[u]);
    }
    if (!is_v && place.rotated) {
      load<float, kWidth>(args.inv_freq + place.first, part.frequency[u]);
    }
  });
  for_each_unit([&](UnitPlace place, int u) {
    if (is_v || !place.rotated) return;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      // The angle is rounded to fp32, as the models were trained.
      sine_cosine(position * part.frequency[u][j], part.sine[u][j], part.cosine[u][j]);
    }
  });
  T* out = exists ? destination(args, row, head, kv_slot) : nullptr;
  wait_until_previous_is_done();
  for_each_unit([&](UnitPlace place, int u) {
    load<T, kWidth>(in + place.first, part.a[u]);
    load<T, kWidth>(in + place.second, part.b[u]);
  });
  const float squares = reduce_lanes<kLanes>(part.sum_of_squares(), Sum());
  if (out == nullptr) return;
  const float scale = rsqrtf(squares * args.inverse_head_dim + args.eps);
  for_each_unit([&](UnitPlace place, int u) {
    auto &a = part.a[u], &b = part.b[u];
    if (weight != nullptr) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        a[j] *= scale * part.weight_a[u][j];
        b[j] *= scale * part.weight_b[u][j];
      }
    }
    if (!is_v && place.rotated) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        float x = a[j], y = b[j];
        a[j] = x * part.cosine[u][j] - y * part.sine[u][j];
        b[j] = y * part.cosine[u][j] + x * part.sine[u][j];
      }
    }
    store<T, kWidth>(out + place.first, a);
    store<T, kWidth>(out + place.second, b);
  });
}

template <class T, int kWidth, int kLanes, int kUnits>
void start(const Args<T>& args, cudaStream_t stream) {
  const int64_t heads = int64_t(args.rows) * (args.num_q_heads + 2 * args.num_kv_heads);
  launch(qk_norm_rope_kv_write_kernel<T, kWidth, kLanes, kUnits>,
         {dim3(ceil_div(heads * kLanes, kThreads)), dim3(kThreads)}, stream, args);
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
               params.rows,
               params.num_q_heads,
               params.num_kv_heads,
               params.head_dim,
               params.rotary_dim,
               params.page_size,
               1.0f / static_cast<float>(params.head_dim),
               params.eps};
  const int units = params.head_dim / (2 * kChunk);
  bool fits = params.head_dim % (2 * kChunk) == 0 && params.rotary_dim % (2 * kChunk) == 0 &&
              is_aligned(args.qkv) && is_aligned(args.q) && is_aligned(args.k_pages) &&
              is_aligned(args.v_pages) && is_aligned(args.q_norm_weight) &&
              is_aligned(args.k_norm_weight) && is_aligned(args.inv_freq);
  if (fits && units <= 4) {  // head_dim 64
    start<T, kChunk, 4, 1>(args, stream);
  } else if (fits && units <= 8) {  // 96, 128
    start<T, kChunk, 8, 1>(args, stream);
  } else if (fits && units <= 16) {  // 192, 256
    start<T, kChunk, 16, 1>(args, stream);
  } else {
    start<T, 1, kWarp, kMaxHeadDim / 2 / kWarp>(args, stream);
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

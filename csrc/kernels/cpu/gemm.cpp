// out = x weight^T over weights packed in panels of kGemmPanel columns.
//
// Work is cut into (row group x panel) items, so that one row and 512 rows both use every core. A
// thread copies the rows of its group to fp32 scratch once (bf16 widens, and rows 4 KiB apart would
// compete for the same cache sets), then streams its panels past them; a panel stays in L2 for all
// row tiles of the group. Threads never share a sum: its order depends on k alone.
#include <algorithm>

#include "core/buffer.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace optimus {
namespace {

int num_panels(int n) { return (n + kGemmPanel - 1) / kGemmPanel; }

template <class T>
void pack(const T* weight, T* packed, int n, int k) {
  for (int panel = 0; panel < num_panels(n); ++panel) {
    T* out = packed + static_cast<size_t>(panel) * k * kGemmPanel;
    int columns = std::min(kGemmPanel, n - panel * kGemmPanel);
    std::fill(out, out + static_cast<size_t>(k) * kGemmPanel, T{});
    for (int c = 0; c < columns; ++c) {
      const T* row = weight + static_cast<size_t>(panel * kGemmPanel + c) * k;
      for (int i = 0; i < k; ++i) out[static_cast<size_t>(i) * kGemmPanel + c] = row[i];
    }
  }
}

}  // namespace

size_t packed_gemm_weight_size(int n, int k) {
  OPTIMUS_CHECK(n >= 0 && k >= 0, "[packed_gemm_weight_size] n and k must be >= 0, got ", n, ", ",
                k);
  return static_cast<size_t>(num_panels(n)) * kGemmPanel * k;
}

void pack_gemm_weight(const void* weight, void* packed, int n, int k, DType dtype) {
  OPTIMUS_CHECK(n >= 1 && k >= 1, "[pack_gemm_weight] n and k must be >= 1, got ", n, ", ", k);
  OPTIMUS_CHECK(weight != nullptr && packed != nullptr, "[pack_gemm_weight] null pointer");
  dispatch_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    pack(static_cast<const T*>(weight), static_cast<T*>(packed), n, k);
  });
}

namespace cpu {
namespace {

constexpr int kMaxGroupRows = 64;
constexpr size_t kScratchFloats = 1 << 17;      // 512 KiB a thread: a row group of x
constexpr int64_t kMinFlopsPerThread = 100000;  // a few microseconds, what sharing costs

// Rows of x copied at once. The stride is odd in cache lines, to spread rows over cache sets.
struct RowGroups {
  int rows, stride, count;
};

RowGroups plan_groups(int rows, int k) {
  int stride = (round_up(k, kLanes) / kLanes | 1) * kLanes;
  int most = std::min<int>(kMaxGroupRows, static_cast<int>(kScratchFloats / stride));
  OPTIMUS_CHECK(most >= 1, "[gemm] k must be below ", kScratchFloats, ", got ", k);
  return {most, stride, (rows + most - 1) / most};
}

float* thread_scratch() {
  static thread_local Buffer<float> scratch(kScratchFloats);
  return scratch.data();
}

// Columns of one panel for one row group, from scratch to `out` in its type.
template <class T, class Out>
void run_panel(const GemmParams& params, const float* x, int stride, int first_row, int rows,
               int panel) {
  const SimdKernels<T>& simd = simd_kernels<T>();
  const T* weight = static_cast<const T*>(params.packed_weight) +
                    static_cast<size_t>(panel) * params.k * kGemmPanel;
  int first_column = panel * kGemmPanel;
  int columns = std::min(kGemmPanel, params.n - first_column);
  Out* out =
      static_cast<Out*>(params.out) + static_cast<size_t>(first_row) * params.n + first_column;
  if constexpr (std::is_same_v<Out, float>) {
    if (columns == kGemmPanel) {
      simd.gemm_panel(x, stride, rows, weight, params.k, out, params.n);
      return;
    }
  }
  alignas(64) float tile[kMaxGroupRows * kGemmPanel];
  simd.gemm_panel(x, stride, rows, weight, params.k, tile, kGemmPanel);
  for (int r = 0; r < rows; ++r) {
    simd_kernels<Out>().narrow(tile + r * kGemmPanel, out + static_cast<size_t>(r) * params.n,
                               columns);
  }
}

// Items are (row group, panel), panels fastest.
template <class T, class Out>
void run_items(const GemmParams& params, const RowGroups& groups, int64_t begin, int64_t end) {
  const int panels = num_panels(params.n);
  float* scratch = thread_scratch();
  while (begin < end) {
    int group = static_cast<int>(begin / panels);
    int64_t group_end = std::min<int64_t>(end, static_cast<int64_t>(group + 1) * panels);
    int first_row = static_cast<int>(static_cast<int64_t>(params.rows) * group / groups.count);
    int last_row = static_cast<int>(static_cast<int64_t>(params.rows) * (group + 1) / groups.count);
    int rows = last_row - first_row;
    const T* x = static_cast<const T*>(params.x) + static_cast<size_t>(first_row) * params.k;
    for (int r = 0; r < rows; ++r) {
      simd_kernels<T>().widen(x + static_cast<size_t>(r) * params.k, scratch + r * groups.stride,
                              params.k);
    }
    for (; begin < group_end; ++begin) {
      run_panel<T, Out>(params, scratch, groups.stride, first_row, rows,
                        static_cast<int>(begin % panels));
    }
  }
}

}  // namespace

void gemm(const GemmParams& params, ThreadPool& threads) {
  OPTIMUS_CHECK(!params.silu, "[gemm] silu is for CUDA alone");
  OPTIMUS_CHECK(params.rows >= 0 && params.n >= 1 && params.k >= 1,
                "[gemm] need rows >= 0, n >= 1, k >= 1, got rows ", params.rows, ", n ", params.n,
                ", k ", params.k);
  if (params.rows == 0) return;
  OPTIMUS_CHECK(params.x != nullptr && params.packed_weight != nullptr && params.out != nullptr,
                "[gemm] null pointer for x, packed_weight or out");
  RowGroups groups = plan_groups(params.rows, params.k);
  int64_t items = static_cast<int64_t>(groups.count) * num_panels(params.n);
  int64_t flops = 2ll * params.rows * params.k * params.n;
  int64_t grain = 1 + kMinFlopsPerThread * items / flops;
  dispatch_dtype(params.dtype, [&](auto in) {
    dispatch_dtype(params.out_dtype, [&](auto out) {
      threads.parallel_for(items, grain, [&](int64_t begin, int64_t end) {
        run_items<decltype(in), decltype(out)>(params, groups, begin, end);
      });
    });
  });
}

}  // namespace cpu
}  // namespace optimus

// gemm on the GPU: which kernel computes which shape, the library's or the streaming one.
//
// A kernel is chosen once per bucket of rows, n, k and types and kept; a call looks it up and launches.
// plan_gemms chooses by measurement: each candidate takes its turn in a chain of products as a step has
// them. Alone, kernels do not show what they cost there: the streaming one reads weights while its
// neighbours run, and the library's let nothing behind them start early.
#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <variant>
#include <vector>

#include "core/cuda_check.h"
#include "kernels/cuda/gemm_cublaslt.h"
#include "kernels/cuda/gemm_stream.h"
#include "kernels/cuda/kernels.h"

namespace optimus::cuda {
namespace {

using Choice = std::variant<CublasLtGemm, StreamGemm>;
using Shape =
    std::tuple<int, int, int, int, DType, DType, bool>;  // device, rows, n, k, dtypes, silu

// Rows that share a kernel: the buckets of captured graphs, coarser for prefill.
int rows_bucket(int rows) {
  int step = rows <= 8 ? 1 : rows <= 256 ? 8 : rows <= 1024 ? 64 : 512;
  return (rows + step - 1) / step * step;
}

Shape shape_of(const GemmParams& params, int rows) {
  int device = 0;
  OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
  return {device, rows, params.n, params.k, params.dtype, params.out_dtype, params.silu};
}

GemmParams with_rows(GemmParams params, int rows) {
  params.rows = rows;
  return params;
}

// False when what was chosen, for other rows or other pointers, does not take these.
bool launch(const GemmParams& params, const Choice& choice, cudaStream_t stream) {
  if (const auto* way = std::get_if<StreamGemm>(&choice)) {
    if (!stream_gemm_takes(params)) return false;
    stream_gemm(params, *way, stream);
    return true;
  }
  return cublaslt_gemm(params, std::get<CublasLtGemm>(choice), stream);
}

void check_params(const GemmParams& params) {
  OPTIMUS_CHECK(params.rows >= 0 && params.n >= 1 && params.k >= 1,
                "[gemm] need rows >= 0, n >= 1, k >= 1, got ", params.rows, ", ", params.n, ", ",
                params.k);
  OPTIMUS_CHECK(params.dtype == DType::bfloat16 || params.out_dtype == DType::float32,
                "[gemm] float32 inputs need a float32 output, got ", dtype_name(params.out_dtype));
  const size_t row_bytes = params.k * dtype_size(params.dtype);
  const size_t out_bytes = params.n * dtype_size(params.out_dtype);
  OPTIMUS_CHECK(row_bytes % kGemmAlignment == 0 && out_bytes % kGemmAlignment == 0,
                "[gemm] rows of x and out must be multiples of ", kGemmAlignment, " bytes, got ",
                row_bytes, " and ", out_bytes);
  if (params.rows == 0) return;
  OPTIMUS_CHECK(!params.silu || stream_gemm_takes(params), "[gemm] silu is not for rows ",
                params.rows, ", n ", params.n, ", k ", params.k, " here");
  OPTIMUS_CHECK(params.x != nullptr && params.packed_weight != nullptr && params.out != nullptr,
                "[gemm] null pointer for x, packed_weight or out");
}

// -------------------------------------------------------------------------------------- measurement

// A way to compute a product; if that is one with silu, with the activation or without.
struct Candidate {
  GemmParams product;
  bool silu;
  Choice choice;

  GemmParams params() const {
    GemmParams params = product;
    params.silu = silu;
    return params;
  }
};

// By itself; and a kernel's first launch takes long.
bool runs(const Candidate& candidate, cudaStream_t stream) {
  try {
    return launch(candidate.params(), candidate.choice, stream);
  } catch (const std::runtime_error&) {  // of the library
    return false;
  }
}

// Those that run.
std::vector<Candidate> candidates(const GemmParams& product, GemmKernels kernels,
                                  cudaStream_t stream) {
  std::vector<Candidate> found;
  const auto add = [&](bool silu, const Choice& choice) {
    if (runs({product, silu, choice}, stream)) found.push_back({product, silu, choice});
  };
  if (kernels != GemmKernels::library) {
    for (const StreamGemm& way : stream_gemm_candidates(product)) add(product.silu, way);
  }
  if (kernels != GemmKernels::stream) {
    for (const CublasLtGemm& way : cublaslt_gemm_candidates(product)) add(false, way);
  }
  OPTIMUS_CHECK(!found.empty(), "[gemm] no kernel of those allowed takes rows ", product.rows,
                ", n ", product.n, ", k ", product.k, " here");
  return found;
}

class Stopwatch {
 public:
  Stopwatch(const std::function<void()>& chain, cudaStream_t stream)
      : chain_(chain), stream_(stream) {
    OPTIMUS_CUDA_CHECK(cudaEventCreate(&begin_));
    OPTIMUS_CUDA_CHECK(cudaEventCreate(&end_));
  }
  ~Stopwatch() {
    static_cast<void>(cudaEventDestroy(begin_));
    static_cast<void>(cudaEventDestroy(end_));
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  // Milliseconds of the chain behind another run of it, which also gives the host a start.
  float time() {
    chain_();
    OPTIMUS_CUDA_CHECK(cudaEventRecord(begin_, stream_));
    chain_();
    OPTIMUS_CUDA_CHECK(cudaEventRecord(end_, stream_));
    OPTIMUS_CUDA_CHECK(cudaEventSynchronize(end_));
    float ms = 0;
    OPTIMUS_CUDA_CHECK(cudaEventElapsedTime(&ms, begin_, end_));
    return ms;
  }

 private:
  const std::function<void()>& chain_;
  cudaStream_t stream_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// --------------------------------------------------------------------------------------------- plans

class Plans {
 public:
  static Plans& instance() {
    static Plans plans;
    return plans;
  }

  void run(const GemmParams& params, cudaStream_t stream) {
    std::lock_guard lock(mutex_);
    const int bucket = rows_bucket(params.rows);
    if (launch(params, find(params, bucket, bucket), stream)) return;
    // The bucket's kernel does not take these: they get an algorithm of their own.
    const bool runs = launch(params, find(params, -params.rows, params.rows), stream);
    OPTIMUS_CHECK(runs, "[gemm] the library does not take rows ", params.rows, ", n ", params.n,
                  ", k ", params.k);
  }

  void plan(const std::vector<GemmParams>& products, const std::function<void()>& chain,
            cudaStream_t stream, GemmKernels kernels) {
    std::vector<std::vector<Candidate>> open;
    for (GemmParams product : products) {
      product.silu = product.silu && !stream_gemm_candidates(product).empty();
      check_params(product);
      if (product.rows == 0 || (kernels == GemmKernels::any && is_planned(product))) continue;
      open.push_back(candidates(product, kernels, stream));
    }
    if (open.empty()) return;
    for (const std::vector<Candidate>& found : open) keep(found.front());
    Stopwatch stopwatch(chain, stream);
    for (const std::vector<Candidate>& found : open) {
      keep(fastest(found, stopwatch));
      std::lock_guard lock(mutex_);
      planned_.insert(key(found.front().product));
    }
  }

  bool takes_silu(const GemmParams& params) {
    constexpr int kMostUnplannedRows = 128;  // beyond, the library is the better guess
    std::lock_guard lock(mutex_);
    auto [pays, is_new] = silu_pays_.try_emplace(key(params));
    if (is_new) {
      pays->second = params.rows <= kMostUnplannedRows && !stream_gemm_candidates(params).empty();
    }
    return pays->second;
  }

  std::string describe(const GemmParams& params) {
    std::lock_guard lock(mutex_);
    auto choice = choices_.find(key(params));
    if (choice == choices_.end()) return "unplanned";
    if (const auto* way = std::get_if<StreamGemm>(&choice->second)) return cuda::describe(*way);
    return concat("cuBLASLt ", std::get<CublasLtGemm>(choice->second).index);
  }

 private:
  static Shape key(const GemmParams& params) { return shape_of(params, rows_bucket(params.rows)); }

  bool is_planned(const GemmParams& product) {
    std::lock_guard lock(mutex_);
    return planned_.count(key(product)) > 0;
  }

  void keep(const Candidate& candidate) {
    std::lock_guard lock(mutex_);
    choices_.insert_or_assign(key(candidate.params()), candidate.choice);
    if (candidate.product.silu) silu_pays_[key(candidate.product)] = candidate.silu;
  }

  // The best of a product's candidates in the chain, the other products as they are. Leaves behind the
  // last that was tried.
  const Candidate& fastest(const std::vector<Candidate>& found, Stopwatch& stopwatch) {
    constexpr int kRounds = 7;
    constexpr size_t kFinalists = 5;
    std::vector<std::pair<float, const Candidate*>> ranked;
    for (const Candidate& candidate : found) {
      keep(candidate);
      ranked.emplace_back(stopwatch.time(), &candidate);
    }
    std::sort(ranked.begin(), ranked.end());
    ranked.resize(std::min(ranked.size(), kFinalists));
    std::vector<std::vector<float>> times(ranked.size());
    for (int round = 0; round < kRounds; ++round) {  // in turns: the clock may change
      for (size_t i = 0; i < ranked.size(); ++i) {
        keep(*ranked[i].second);
        times[i].push_back(stopwatch.time());
      }
    }
    for (size_t i = 0; i < ranked.size(); ++i) {
      std::nth_element(times[i].begin(), times[i].begin() + kRounds / 2, times[i].end());
      ranked[i].first = times[i][kRounds / 2];
    }
    return *std::min_element(ranked.begin(), ranked.end())->second;
  }

  // What `key` was planned with, or the library's first proposal for `rows`.
  const Choice& find(const GemmParams& params, int key, int rows) {
    const Shape shape = shape_of(params, key);
    auto choice = choices_.find(shape);
    if (choice == choices_.end()) {
      const GemmParams planned = with_rows(params, rows);
      choice = params.silu
                   ? choices_.emplace(shape, stream_gemm_candidates(planned).front()).first
                   : choices_.emplace(shape, cublaslt_gemm_candidates(planned).front()).first;
    }
    return choice->second;
  }

  std::mutex mutex_;
  std::map<Shape, Choice> choices_;  // by bucket; by negative exact rows where that fails
  std::map<Shape, bool> silu_pays_;  // by bucket, of products with it; a guess where unplanned
  std::set<Shape> planned_;
};

}  // namespace

void plan_gemms(const std::vector<GemmParams>& products, const std::function<void()>& chain,
                cudaStream_t stream, GemmKernels kernels) {
  Plans::instance().plan(products, chain, stream, kernels);
}

void gemm(const GemmParams& params, cudaStream_t stream) {
  check_params(params);
  if (params.rows > 0) Plans::instance().run(params, stream);
}

bool gemm_takes_silu(const GemmParams& params) {
  GemmParams with_silu = params;
  with_silu.silu = true;
  return stream_gemm_takes(with_silu) && Plans::instance().takes_silu(with_silu);
}

std::string describe_gemm(const GemmParams& params) { return Plans::instance().describe(params); }

}  // namespace optimus::cuda

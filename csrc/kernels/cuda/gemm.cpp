// gemm on the GPU: which kernel computes which shape, the library's or the streaming one.
//
// A kernel is chosen once per bucket of rows, n, k and types, by the library's heuristic or by
// measurement (plan_gemm), and kept; a later call looks it up and launches.
#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>
#include <variant>
#include <vector>

#include "core/device_buffer.h"
#include "kernels/cuda/evict_l2.h"
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

// -------------------------------------------------------------------------------------- measurement

// Times a kernel where a step has it: between small kernels, with its weight out of the L2 cache. The
// streaming kernel reads weights while its neighbours run, which a measurement of it alone would miss.
class Stopwatch {
 public:
  Stopwatch(const GemmParams& params, cudaStream_t stream)
      : params_(params),
        stream_(stream),
        evictor_(stream),
        scratch_(dtype_size(params.dtype) * params.rows * params.k) {
    OPTIMUS_CUDA_CHECK(cudaEventCreate(&begin_));
    OPTIMUS_CUDA_CHECK(cudaEventCreate(&end_));
  }
  ~Stopwatch() {
    static_cast<void>(cudaEventDestroy(begin_));
    static_cast<void>(cudaEventDestroy(end_));
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  // Milliseconds; infinite when the choice does not run.
  float time(const Choice& choice) {
    evictor_.evict(stream_);
    OPTIMUS_CUDA_CHECK(cudaEventRecord(begin_, stream_));
    neighbour();  // for the end of the product before
    neighbour();
    bool runs = false;
    try {
      runs = launch(params_, choice, stream_);
    } catch (const std::runtime_error&) {  // of the library
    }
    neighbour();
    OPTIMUS_CUDA_CHECK(cudaEventRecord(end_, stream_));
    OPTIMUS_CUDA_CHECK(cudaEventSynchronize(end_));
    float ms = 0;
    OPTIMUS_CUDA_CHECK(cudaEventElapsedTime(&ms, begin_, end_));
    return runs ? ms : HUGE_VALF;
  }

  float median(const Choice& choice, int repeats) {
    std::vector<float> ms(repeats);
    for (float& time_ms : ms) time_ms = time(choice);
    std::nth_element(ms.begin(), ms.begin() + repeats / 2, ms.end());
    return ms[repeats / 2];
  }

 private:
  void neighbour() {
    rms_norm({params_.x, nullptr, nullptr, params_.packed_weight, scratch_.data(), params_.rows,
              params_.k, 1e-6f, params_.dtype},
             stream_);
  }

  const GemmParams& params_;
  cudaStream_t stream_;
  L2Evictor evictor_;
  DeviceBuffer<char> scratch_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

Choice fastest(const GemmParams& params, const std::vector<Choice>& found, cudaStream_t stream) {
  constexpr int kScreening = 3, kRepeats = 9;
  constexpr size_t kFinalists = 5;
  Stopwatch stopwatch(params, stream);
  // A kernel of the library keeps those behind it from starting early, which no measurement of one
  // product shows: in chains of a layer's products it lost this much against equal times here.
  constexpr float kLibraryHandicap = 1.05f;
  // Nor that SMs without a tile are missed more in a step than alone: gate_up of 64 rows by 96 CTAs took
  // 55 us there, by 128 CTAs 47, and as long alone.
  constexpr float kIdleHandicap = 0.15f;
  auto handicap = [](const Choice& choice) {
    const auto* way = std::get_if<StreamGemm>(&choice);
    if (way == nullptr) return kLibraryHandicap;
    return way->splits > 1 ? 1.0f : 1 + kIdleHandicap * idle_sms(*way);
  };
  std::vector<std::pair<float, const Choice*>> ranked;
  for (const Choice& choice : found) {
    if (stopwatch.time(choice) == HUGE_VALF) continue;  // and a warm-up
    ranked.emplace_back(handicap(choice) * stopwatch.median(choice, kScreening), &choice);
  }
  if (ranked.empty()) return found.front();
  std::sort(ranked.begin(), ranked.end());
  ranked.resize(std::min(ranked.size(), kFinalists));
  for (auto& [ms, choice] : ranked) {
    ms = handicap(*choice) * stopwatch.median(*choice, kRepeats);
  }
  return *std::min_element(ranked.begin(), ranked.end())->second;
}

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

  void plan(const GemmParams& params, bool measure, cudaStream_t stream, GemmKernels kernels) {
    std::lock_guard lock(mutex_);
    const Shape bucket = shape_of(params, rows_bucket(params.rows));
    if (kernels == GemmKernels::any && choices_.count(bucket)) return;
    std::vector<Choice> found;
    if (kernels != GemmKernels::stream && !params.silu) {
      for (const CublasLtGemm& choice : cublaslt_gemm_candidates(params)) found.push_back(choice);
    }
    if (kernels == GemmKernels::stream || (kernels == GemmKernels::any && measure) || params.silu) {
      for (const StreamGemm& way : stream_gemm_candidates(params)) found.push_back(way);
    }
    OPTIMUS_CHECK(!found.empty(), "[gemm] the streaming kernel does not take rows ", params.rows,
                  ", n ", params.n, ", k ", params.k, " here");
    choices_.insert_or_assign(bucket, measure ? fastest(params, found, stream) : found.front());
  }

  std::string describe(const GemmParams& params) {
    std::lock_guard lock(mutex_);
    auto choice = choices_.find(shape_of(params, rows_bucket(params.rows)));
    if (choice == choices_.end()) return "unplanned";
    if (const auto* way = std::get_if<StreamGemm>(&choice->second)) return cuda::describe(*way);
    return concat("cuBLASLt ", std::get<CublasLtGemm>(choice->second).index);
  }

 private:
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
};

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

}  // namespace

void plan_gemm(const GemmParams& params, bool measure, cudaStream_t stream, GemmKernels kernels) {
  check_params(params);
  if (params.rows > 0) Plans::instance().plan(params, measure, stream, kernels);
}

void gemm(const GemmParams& params, cudaStream_t stream) {
  check_params(params);
  if (params.rows > 0) Plans::instance().run(params, stream);
}

bool gemm_takes_silu(const GemmParams& params) {
  GemmParams with_silu = params;
  with_silu.silu = true;
  return !stream_gemm_candidates(with_silu).empty();
}

std::string describe_gemm(const GemmParams& params) { return Plans::instance().describe(params); }

}  // namespace optimus::cuda

// out = x weight^T through cuBLASLt, the library that PyTorch's CUDA wheels bring along.
//
// The library is opened at run time and its few functions are declared here: a machine without a GPU
// compiles and links this file though it has neither the header nor the library (half a gigabyte),
// and inside Python the copy that PyTorch has loaded is found by its name. Declared is only what has
// been stable since CUDA 11: opaque handles, integer attributes, the 64 bytes of an algorithm.
//
// An algorithm is chosen once per bucket of rows, n, k and types, by the library's heuristic or by
// measurement (plan_gemm), and kept; a later call looks it up and launches. In the library's
// column-major words: D [n, rows] = A^T B with A = weight [k, n] and B = x [k, rows].
#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "core/device_buffer.h"
#include "kernels/cuda/kernels.h"

namespace optimus::cuda {
namespace {

// ------------------------------------------------------------------------------- the library's ABI

using Handle = void*;
using MatmulDesc = void*;
using Layout = void*;
using Preference = void*;
using Status = int;  // 0 = success

constexpr int kComputeFp32 = 68;          // CUBLAS_COMPUTE_32F
constexpr int kDescTransposeA = 3;        // CUBLASLT_MATMUL_DESC_TRANSA
constexpr int32_t kTransposed = 1;        // CUBLAS_OP_T
constexpr int kPreferenceWorkspace = 1;   // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
constexpr int kPreferenceAlignmentA = 5;  // ..._MIN_ALIGNMENT_A_BYTES; then B, C, D
constexpr uint32_t kAlignment = 16;       // of all pointers and rows, in bytes
constexpr Status kNotSupported = 15;      // CUBLAS_STATUS_NOT_SUPPORTED

struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

struct Library {
  Status (*create)(Handle*);
  Status (*desc_create)(MatmulDesc*, int compute_type, cudaDataType scale_type);
  Status (*desc_set)(MatmulDesc, int attribute, const void* value, size_t bytes);
  Status (*layout_create)(Layout*, cudaDataType, uint64_t rows, uint64_t columns, int64_t stride);
  Status (*preference_create)(Preference*);
  Status (*preference_set)(Preference, int attribute, const void* value, size_t bytes);
  Status (*preference_destroy)(Preference);
  Status (*heuristic)(Handle, MatmulDesc, Layout a, Layout b, Layout c, Layout d, Preference,
                      int requested, HeuristicResult*, int* found);
  Status (*matmul)(Handle, MatmulDesc, const void* alpha, const void* a, Layout, const void* b,
                   Layout, const void* beta, const void* c, Layout, void* d, Layout,
                   const Algorithm*, void* workspace, size_t workspace_bytes, cudaStream_t);
};

void check(Status status, const char* call) {
  if (status != 0) throw std::runtime_error(concat("[gemm] ", call, " answered ", status));
}

Library open_library() {
  void* file = nullptr;
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
    if (file == nullptr) file = dlopen(name, RTLD_LAZY);
  }
  if (file == nullptr) {
    throw std::runtime_error(
        concat("[gemm] libcublasLt was not found: import torch (its CUDA "
               "build) first, or put its folder on LD_LIBRARY_PATH; ",
               dlerror()));
  }
  Library library{};
  auto load = [file](auto& function, const char* name) {
    void* symbol = dlsym(file, name);
    if (symbol == nullptr) throw std::runtime_error(concat("[gemm] libcublasLt has no ", name));
    function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
  };
  load(library.create, "cublasLtCreate");
  load(library.desc_create, "cublasLtMatmulDescCreate");
  load(library.desc_set, "cublasLtMatmulDescSetAttribute");
  load(library.layout_create, "cublasLtMatrixLayoutCreate");
  load(library.preference_create, "cublasLtMatmulPreferenceCreate");
  load(library.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  load(library.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  load(library.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  load(library.matmul, "cublasLtMatmul");
  return library;
}

// ------------------------------------------------------------------------------------------- plans

// Rows that share an algorithm: the buckets of captured graphs, coarser for prefill.
int rows_bucket(int rows) {
  int step = rows <= 8 ? 1 : rows <= 256 ? 8 : rows <= 1024 ? 64 : 512;
  return (rows + step - 1) / step * step;
}

// Everything that the library calls "problem". Ordered as a key.
using Shape = std::tuple<int, int, int, int, DType, DType>;  // device, rows, n, k, dtypes

Shape shape_of(const GemmParams& params, int rows) {
  int device = 0;
  OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
  return {device, rows, params.n, params.k, params.dtype, params.out_dtype};
}

struct Layouts {
  Layout weight, x, out;
};

struct Choice {
  Algorithm algorithm;
  size_t workspace_bytes;
};

// Handles live as long as the process.
class Gemm {
 public:
  static Gemm& instance() {
    static Gemm gemm;
    return gemm;
  }

  void run(const GemmParams& params, cudaStream_t stream) {
    std::lock_guard lock(mutex_);
    const Shape bucket = shape_of(params, rows_bucket(params.rows));
    auto choice = choices_.find(bucket);
    if (choice == choices_.end()) {
      choice = choices_.emplace(bucket, candidates(params, std::get<1>(bucket)).front()).first;
    }
    Status status = launch(params, choice->second, stream);
    if (status == kNotSupported && params.rows != std::get<1>(bucket)) {
      // An algorithm of the bucket's rows does not take these: they get their own.
      const Shape exact = shape_of(params, -params.rows);
      auto own = choices_.find(exact);
      if (own == choices_.end()) {
        own = choices_.emplace(exact, candidates(params, params.rows).front()).first;
      }
      status = launch(params, own->second, stream);
    }
    check(status, "cublasLtMatmul");
  }

  void plan(const GemmParams& params, bool measure, cudaStream_t stream) {
    std::lock_guard lock(mutex_);
    const Shape bucket = shape_of(params, rows_bucket(params.rows));
    if (choices_.count(bucket)) return;
    std::vector<Choice> found = candidates(params, params.rows);
    choices_.emplace(bucket, measure ? fastest(params, found, stream) : found.front());
  }

 private:
  Gemm() : library_(open_library()) {
    const cudaDataType scale = CUDA_R_32F;
    check(library_.desc_create(&desc_, kComputeFp32, scale), "cublasLtMatmulDescCreate");
    check(library_.desc_set(desc_, kDescTransposeA, &kTransposed, sizeof(kTransposed)),
          "cublasLtMatmulDescSetAttribute");
  }

  Handle handle() {
    int device = 0;
    OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
    Handle& handle = handles_[device];
    if (handle == nullptr) check(library_.create(&handle), "cublasLtCreate");
    return handle;
  }

  const Layouts& layouts(const GemmParams& params, int rows) {
    auto [entry, is_new] = layouts_.try_emplace(shape_of(params, rows));
    if (is_new) {
      auto create = [&](Layout& layout, DType dtype, int columns, int stride) {
        cudaDataType type = dtype == DType::bfloat16 ? CUDA_R_16BF : CUDA_R_32F;
        check(library_.layout_create(&layout, type, stride, columns, stride),
              "cublasLtMatrixLayoutCreate");
      };
      create(entry->second.weight, params.dtype, params.n, params.k);
      create(entry->second.x, params.dtype, rows, params.k);
      create(entry->second.out, params.out_dtype, rows, params.n);
    }
    return entry->second;
  }

  // What the heuristic proposes for the given number of rows, best first; at least one.
  std::vector<Choice> candidates(const GemmParams& params, int rows) {
    Preference preference = nullptr;
    check(library_.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
    uint64_t workspace = params.workspace_bytes;
    library_.preference_set(preference, kPreferenceWorkspace, &workspace, sizeof(workspace));
    for (int operand = 0; operand < 4; ++operand) {
      library_.preference_set(preference, kPreferenceAlignmentA + operand, &kAlignment,
                              sizeof(kAlignment));
    }
    const Layouts& shapes = layouts(params, rows);
    std::array<HeuristicResult, 16> results{};
    int found = 0;
    Status status =
        library_.heuristic(handle(), desc_, shapes.weight, shapes.x, shapes.out, shapes.out,
                           preference, static_cast<int>(results.size()), results.data(), &found);
    library_.preference_destroy(preference);
    check(status, "cublasLtMatmulAlgoGetHeuristic");
    std::vector<Choice> choices;
    for (int i = 0; i < found; ++i) {
      if (results[i].state == 0) {
        choices.push_back({results[i].algorithm, results[i].workspace_bytes});
      }
    }
    OPTIMUS_CHECK(!choices.empty(), "[gemm] the library has no algorithm for rows ", rows, ", n ",
                  params.n, ", k ", params.k, " in ", dtype_name(params.dtype), " with ",
                  params.workspace_bytes, " bytes of workspace");
    return choices;
  }

  Status launch(const GemmParams& params, const Choice& choice, cudaStream_t stream) {
    OPTIMUS_CHECK(choice.workspace_bytes <= params.workspace_bytes, "[gemm] was planned with ",
                  choice.workspace_bytes, " bytes of workspace, got ", params.workspace_bytes);
    const float one = 1.0f, zero = 0.0f;
    const Layouts& shapes = layouts(params, params.rows);
    return library_.matmul(handle(), desc_, &one, params.packed_weight, shapes.weight, params.x,
                           shapes.x, &zero, params.out, shapes.out, params.out, shapes.out,
                           &choice.algorithm, params.workspace, params.workspace_bytes, stream);
  }

  // Times the candidates with a cold L2 cache, as a layer finds its weights.
  Choice fastest(const GemmParams& params, const std::vector<Choice>& found, cudaStream_t stream) {
    constexpr int kRepeats = 7;
    int device = 0, l2_bytes = 0;
    OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
    OPTIMUS_CUDA_CHECK(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device));
    DeviceBuffer<char> flush(size_t(2) * l2_bytes + 1);
    cudaEvent_t begin = nullptr, end = nullptr;
    OPTIMUS_CUDA_CHECK(cudaEventCreate(&begin));
    OPTIMUS_CUDA_CHECK(cudaEventCreate(&end));
    float best_ms = 0;
    const Choice* best = nullptr;
    for (const Choice& choice : found) {
      std::array<float, kRepeats> ms{};
      bool runs = launch(params, choice, stream) == 0;  // warm-up
      for (int i = 0; runs && i < kRepeats; ++i) {
        flush.fill_bytes(i, stream);
        OPTIMUS_CUDA_CHECK(cudaEventRecord(begin, stream));
        runs = launch(params, choice, stream) == 0;
        OPTIMUS_CUDA_CHECK(cudaEventRecord(end, stream));
        OPTIMUS_CUDA_CHECK(cudaEventSynchronize(end));
        OPTIMUS_CUDA_CHECK(cudaEventElapsedTime(&ms[i], begin, end));
      }
      std::nth_element(ms.begin(), ms.begin() + kRepeats / 2, ms.end());
      if (!runs || (best != nullptr && ms[kRepeats / 2] >= best_ms)) continue;
      best = &choice;
      best_ms = ms[kRepeats / 2];
    }
    OPTIMUS_CUDA_CHECK(cudaEventDestroy(begin));
    OPTIMUS_CUDA_CHECK(cudaEventDestroy(end));
    return best != nullptr ? *best : found.front();
  }

  Library library_;
  MatmulDesc desc_ = nullptr;
  std::mutex mutex_;
  std::map<int, Handle> handles_;     // by device
  std::map<Shape, Layouts> layouts_;  // by exact rows
  std::map<Shape, Choice> choices_;   // by bucket; by negative exact rows where that fails
};

void check_params(const GemmParams& params) {
  OPTIMUS_CHECK(params.rows >= 0 && params.n >= 1 && params.k >= 1,
                "[gemm] need rows >= 0, n >= 1, k >= 1, got ", params.rows, ", ", params.n, ", ",
                params.k);
  OPTIMUS_CHECK(params.dtype == DType::bfloat16 || params.out_dtype == DType::float32,
                "[gemm] float32 inputs need a float32 output, got ", dtype_name(params.out_dtype));
  const size_t row_bytes = params.k * dtype_size(params.dtype);
  const size_t out_bytes = params.n * dtype_size(params.out_dtype);
  OPTIMUS_CHECK(row_bytes % kAlignment == 0 && out_bytes % kAlignment == 0,
                "[gemm] rows of x and out must be multiples of ", kAlignment, " bytes, got ",
                row_bytes, " and ", out_bytes);
  if (params.rows == 0) return;
  OPTIMUS_CHECK(params.x != nullptr && params.packed_weight != nullptr && params.out != nullptr,
                "[gemm] null pointer for x, packed_weight or out");
}

}  // namespace

void plan_gemm(const GemmParams& params, bool measure, cudaStream_t stream) {
  check_params(params);
  if (params.rows > 0) Gemm::instance().plan(params, measure, stream);
}

void gemm(const GemmParams& params, cudaStream_t stream) {
  check_params(params);
  if (params.rows > 0) Gemm::instance().run(params, stream);
}

}  // namespace optimus::cuda

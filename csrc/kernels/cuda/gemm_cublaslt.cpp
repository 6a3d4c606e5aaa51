// out = x weight^T through cuBLASLt, the library that PyTorch's CUDA wheels bring along.
//
// The library is opened at run time and its few functions are declared here: a machine without a GPU
// compiles and links this file though it has neither the header nor the library (half a gigabyte),
// and inside Python the copy that PyTorch has loaded is found by its name. Declared is only what has
// been stable since CUDA 11: opaque handles, integer attributes, the 64 bytes of an algorithm.
//
// In the library's column-major words: D [n, rows] = A^T B with A = weight [k, n] and B = x [k, rows].
#include "kernels/cuda/gemm_cublaslt.h"

#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <array>
#include <map>
#include <tuple>

#include "core/cuda_check.h"

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
constexpr Status kNotSupported = 15;      // CUBLAS_STATUS_NOT_SUPPORTED

struct HeuristicResult {
  uint64_t algorithm[8];
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
                   const uint64_t* algorithm, void* workspace, size_t workspace_bytes,
                   cudaStream_t);
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

// ------------------------------------------------------------------------------------------ library

// Everything that the library calls "problem". Ordered as a key.
using Shape = std::tuple<int, int, int, int, DType, DType>;  // device, rows, n, k, dtypes

struct Layouts {
  Layout weight, x, out;
};

// Handles live as long as the process.
class Gemm {
 public:
  static Gemm& instance() {
    static Gemm gemm;
    return gemm;
  }

  // What the heuristic proposes, best first; at least one.
  std::vector<CublasLtGemm> candidates(const GemmParams& params) {
    Preference preference = nullptr;
    check(library_.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
    uint64_t workspace = params.workspace_bytes;
    library_.preference_set(preference, kPreferenceWorkspace, &workspace, sizeof(workspace));
    for (int operand = 0; operand < 4; ++operand) {
      library_.preference_set(preference, kPreferenceAlignmentA + operand, &kGemmAlignment,
                              sizeof(kGemmAlignment));
    }
    const Layouts& shapes = layouts(params);
    std::array<HeuristicResult, 16> results{};
    int found = 0;
    Status status =
        library_.heuristic(handle(), desc_, shapes.weight, shapes.x, shapes.out, shapes.out,
                           preference, static_cast<int>(results.size()), results.data(), &found);
    library_.preference_destroy(preference);
    check(status, "cublasLtMatmulAlgoGetHeuristic");
    std::vector<CublasLtGemm> choices;
    for (int i = 0; i < found; ++i) {
      if (results[i].state != 0) continue;
      CublasLtGemm& choice = choices.emplace_back();
      std::copy_n(results[i].algorithm, 8, choice.algorithm);
      choice.workspace_bytes = results[i].workspace_bytes;
      choice.index = i;
    }
    OPTIMUS_CHECK(!choices.empty(), "[gemm] the library has no algorithm for rows ", params.rows,
                  ", n ", params.n, ", k ", params.k, " in ", dtype_name(params.dtype), " with ",
                  params.workspace_bytes, " bytes of workspace");
    return choices;
  }

  bool launch(const GemmParams& params, const CublasLtGemm& choice, cudaStream_t stream) {
    OPTIMUS_CHECK(choice.workspace_bytes <= params.workspace_bytes, "[gemm] was planned with ",
                  choice.workspace_bytes, " bytes of workspace, got ", params.workspace_bytes);
    const float one = 1.0f, zero = 0.0f;
    const Layouts& shapes = layouts(params);
    Status status =
        library_.matmul(handle(), desc_, &one, params.packed_weight, shapes.weight, params.x,
                        shapes.x, &zero, params.out, shapes.out, params.out, shapes.out,
                        choice.algorithm, params.workspace, params.workspace_bytes, stream);
    if (status == kNotSupported) return false;
    check(status, "cublasLtMatmul");
    return true;
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

  const Layouts& layouts(const GemmParams& params) {
    int device = 0;
    OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
    auto [entry, is_new] = layouts_.try_emplace(
        Shape(device, params.rows, params.n, params.k, params.dtype, params.out_dtype));
    if (is_new) {
      auto create = [&](Layout& layout, DType dtype, int columns, int stride) {
        cudaDataType type = dtype == DType::bfloat16 ? CUDA_R_16BF : CUDA_R_32F;
        check(library_.layout_create(&layout, type, stride, columns, stride),
              "cublasLtMatrixLayoutCreate");
      };
      create(entry->second.weight, params.dtype, params.n, params.k);
      create(entry->second.x, params.dtype, params.rows, params.k);
      create(entry->second.out, params.out_dtype, params.rows, params.n);
    }
    return entry->second;
  }

  Library library_;
  MatmulDesc desc_ = nullptr;
  std::map<int, Handle> handles_;     // by device
  std::map<Shape, Layouts> layouts_;  // by exact rows
};

}  // namespace

std::vector<CublasLtGemm> cublaslt_gemm_candidates(const GemmParams& params) {
  return Gemm::instance().candidates(params);
}

bool cublaslt_gemm(const GemmParams& params, const CublasLtGemm& choice, cudaStream_t stream) {
  return Gemm::instance().launch(params, choice, stream);
}

}  // namespace optimus::cuda

// Everything simd.cpp compiles for one instruction set; included inside that set's namespace.
namespace {

// Each file uses the ones before it.
// clang-format off
#include "kernels/cpu/simd/vector.inl"
#include "kernels/cpu/simd/product.inl"
#include "kernels/cpu/simd/attention.inl"
#include "kernels/cpu/simd/rows.inl"
// clang-format on

template <class T>
constexpr SimdKernels<T> kernels = {
    gemm_panel<T>, attention_tile, widen<T>,    narrow<T>,       rms_norm<T>,
    norm_head<T>,  rotate_head,    silu_mul<T>, softmax_sums<T>,
};

}  // namespace

// Compiles the routines of simd/*.inl once per instruction set and picks one set at run time.
//
// Function pointers rather than ifuncs (target_clones): resolvers run before the sanitizers are up.
// The .inl files see `Part` (the widest hardware vector) and `part_multiply_add`, and nothing else
// of the instruction set. The multiply-add is an explicit instruction, not left to the compiler's
// contraction, which may differ between two instances of one template.
#include "kernels/cpu/simd.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/ops.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
namespace optimus::cpu::avx512 {
using Part = __m512;
inline Part part_multiply_add(Part a, Part b, Part c) { return _mm512_fmadd_ps(a, b, c); }
constexpr int kTileRows = 8, kTileVecs = 2;  // 16 accumulators of 32 registers
#include "kernels/cpu/simd/all.inl"
}  // namespace optimus::cpu::avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace optimus::cpu::avx2 {
using Part = __m256;
inline Part part_multiply_add(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
constexpr int kTileRows = 6, kTileVecs = 1;  // 12 accumulators of 16 registers
#include "kernels/cpu/simd/all.inl"
}  // namespace optimus::cpu::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

namespace optimus::cpu::portable {
typedef float Part __attribute__((vector_size(16)));
inline Part part_multiply_add(Part a, Part b, Part c) { return a * b + c; }
#if defined(__aarch64__)
constexpr int kTileRows = 6, kTileVecs = 1;  // 24 accumulators of 32 registers
#else
constexpr int kTileRows = 2, kTileVecs = 1;  // 8 accumulators of 16 registers
#endif
#include "kernels/cpu/simd/all.inl"
}  // namespace optimus::cpu::portable

namespace optimus::cpu {
namespace {

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_active_isa(Isa isa) {
  OPTIMUS_CHECK(isa <= best_isa(), "[simd] this machine has no ", isa_name(isa), ", only ",
                isa_name(best_isa()));
  active() = isa;
}

template <class T>
const SimdKernels<T>& simd_kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512:
      return avx512::kernels<T>;
    case Isa::avx2:
      return avx2::kernels<T>;
    default:
      break;
  }
#endif
  return portable::kernels<T>;
}

template const SimdKernels<float>& simd_kernels<float>();
template const SimdKernels<bfloat16>& simd_kernels<bfloat16>();

}  // namespace optimus::cpu

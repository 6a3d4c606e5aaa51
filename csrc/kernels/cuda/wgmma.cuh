// Warpgroup products (wgmma): 64 rows by N columns at a time, B from shared memory, A from registers or
// shared memory, fp32 sums in registers. sm_90a alone.
//
// The sums of a warp are 16 rows, in the layout of mma.sync: d[j] holds columns 8j + 2 (lane % 4) and
// the next, of rows lane / 4 (first two registers) and lane / 4 + 8.
#pragma once

#include "kernels/cuda/ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define OPTIMUS_WGMMA 1

namespace optimus::cuda {

// -------------------------------------------------------------------------------- order and operands

// A shared-memory operand in the 128-byte swizzle. `leading`: bytes to the next 64 columns (used when
// the operand is transposed), `stride`: bytes to the next 8 rows. The lower half moves on by a sixteenth
// of the bytes, so that the operands of a tile's products are one addition apart; the upper half is the
// same for all.
__device__ __forceinline__ uint32_t lower_operand(uint32_t address, int leading) {
  return (static_cast<uint32_t>(leading >> 4) << 16) | ((address & 0x3ffff) >> 4);
}
__device__ __forceinline__ uint64_t operand(uint32_t address, int leading, int stride) {
  return (uint64_t{1} << 62) | (static_cast<uint64_t>(stride >> 4) << 32) |
         lower_operand(address, leading);
}

// The operand `bytes` further on in shared memory.
__device__ __forceinline__ uint64_t ahead(uint64_t operand, int bytes) {
  return (operand & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(operand) + (bytes >> 4));
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending committed groups are unfinished; they finish in order.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps registers that a product in flight reads or writes from being used for anything else: stands
// behind the wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(registers[i][j])::"memory");
  }
}

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
  }
}

// The operands of a product, in the asm's lists: sums i, i + 1, ... of d, and the numbers of their
// registers, sixteen at a time.
#define OPTIMUS_SUMS_1(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define OPTIMUS_SUMS_2(d, i) OPTIMUS_SUMS_1(d, i), OPTIMUS_SUMS_1(d, i + 1)
#define OPTIMUS_SUMS_4(d, i) OPTIMUS_SUMS_2(d, i), OPTIMUS_SUMS_2(d, i + 2)
#define OPTIMUS_SUMS_8(d, i) OPTIMUS_SUMS_4(d, i), OPTIMUS_SUMS_4(d, i + 4)
#define OPTIMUS_SUMS_16(d, i) OPTIMUS_SUMS_8(d, i), OPTIMUS_SUMS_8(d, i + 8)
#define OPTIMUS_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define OPTIMUS_REGISTERS_1 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPTIMUS_REGISTERS_2 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define OPTIMUS_REGISTERS_3 \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPTIMUS_REGISTERS_4 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define OPTIMUS_REGISTERS_5 \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// ------------------------------------------------------------- products with A in registers

// The upper half of operand(address, leading, 1024).
constexpr uint32_t kUpperOperand = (1u << 30) | (1024 >> 4);

// d[64 x n] = (add ? d : 0) + a[64 x 16] b, `b` by its lower half. Plain: b is [n][16], as K is;
// transposed: [16][n], as V.
template <bool kTransposed>
__device__ __forceinline__ void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint32_t b,
                                      bool add) {
  asm volatile(
      "{ .reg .pred p; .reg .b64 b; setp.ne.b32 p, %37, 0; mov.b64 b, {%36, %39};"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" OPTIMUS_REGISTERS_0
      ", " OPTIMUS_REGISTERS_1
      "}, "
      "{%32, %33, %34, %35}, b, p, 1, 1, %38; }"
      : OPTIMUS_SUMS_8(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(static_cast<int>(add)),
        "n"(kTransposed ? 1 : 0), "n"(kUpperOperand));
}

template <bool kTransposed>
__device__ __forceinline__ void wgmma(float (&d)[16][4], const uint32_t (&a)[4], uint32_t b,
                                      bool add) {
  asm volatile(
      "{ .reg .pred p; .reg .b64 b; setp.ne.b32 p, %69, 0; mov.b64 b, {%68, %71};"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" OPTIMUS_REGISTERS_0
      ", " OPTIMUS_REGISTERS_1 ", " OPTIMUS_REGISTERS_2 ", " OPTIMUS_REGISTERS_3
      "}, "
      "{%64, %65, %66, %67}, b, p, 1, 1, %70; }"
      : OPTIMUS_SUMS_16(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(static_cast<int>(add)),
        "n"(kTransposed ? 1 : 0), "n"(kUpperOperand));
}

// ------------------------------------------------------------------- products of shared operands

// d[64 x n] = (add ? d : 0) + a[64 x 16] b[n x 16]^T, both in shared memory. The asm numbers its operands:
// `registers` are those of d's sums, which come last here; `a_at`, `b_at`, `add_at` follow them.
#define OPTIMUS_WGMMA_OF_SHARED(groups, n, registers, a_at, b_at, add_at, ...)                    \
  __device__ __forceinline__ void wgmma(float(&d)[groups][4], uint64_t a, uint64_t b, bool add) { \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " add_at                                         \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" registers       \
                 "}, " a_at ", " b_at ", p, 1, 1, 0, 0; }"                                        \
                 : __VA_ARGS__                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                   \
  }
OPTIMUS_WGMMA_OF_SHARED(1, "8", "%0, %1, %2, %3", "%4", "%5", "%6", OPTIMUS_SUMS_1(d, 0))
OPTIMUS_WGMMA_OF_SHARED(2, "16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10",
                        OPTIMUS_SUMS_2(d, 0))
OPTIMUS_WGMMA_OF_SHARED(4, "32", OPTIMUS_REGISTERS_0, "%16", "%17", "%18", OPTIMUS_SUMS_4(d, 0))
OPTIMUS_WGMMA_OF_SHARED(8, "64", OPTIMUS_REGISTERS_0 ", " OPTIMUS_REGISTERS_1, "%32", "%33", "%34",
                        OPTIMUS_SUMS_8(d, 0))
OPTIMUS_WGMMA_OF_SHARED(12, "96",
                        OPTIMUS_REGISTERS_0 ", " OPTIMUS_REGISTERS_1 ", " OPTIMUS_REGISTERS_2,
                        "%48", "%49", "%50", OPTIMUS_SUMS_8(d, 0), OPTIMUS_SUMS_4(d, 8))
OPTIMUS_WGMMA_OF_SHARED(16, "128",
                        OPTIMUS_REGISTERS_0 ", " OPTIMUS_REGISTERS_1 ", " OPTIMUS_REGISTERS_2
                                            ", " OPTIMUS_REGISTERS_3,
                        "%64", "%65", "%66", OPTIMUS_SUMS_16(d, 0))
OPTIMUS_WGMMA_OF_SHARED(20, "160",
                        OPTIMUS_REGISTERS_0 ", " OPTIMUS_REGISTERS_1 ", " OPTIMUS_REGISTERS_2
                                            ", " OPTIMUS_REGISTERS_3 ", " OPTIMUS_REGISTERS_4,
                        "%80", "%81", "%82", OPTIMUS_SUMS_16(d, 0), OPTIMUS_SUMS_4(d, 16))
OPTIMUS_WGMMA_OF_SHARED(24, "192",
                        OPTIMUS_REGISTERS_0 ", " OPTIMUS_REGISTERS_1 ", " OPTIMUS_REGISTERS_2
                                            ", " OPTIMUS_REGISTERS_3 ", " OPTIMUS_REGISTERS_4
                                            ", " OPTIMUS_REGISTERS_5,
                        "%96", "%97", "%98", OPTIMUS_SUMS_16(d, 0), OPTIMUS_SUMS_8(d, 16))
#undef OPTIMUS_WGMMA_OF_SHARED

#undef OPTIMUS_SUMS_1
#undef OPTIMUS_SUMS_2
#undef OPTIMUS_SUMS_4
#undef OPTIMUS_SUMS_8
#undef OPTIMUS_SUMS_16
#undef OPTIMUS_REGISTERS_0
#undef OPTIMUS_REGISTERS_1
#undef OPTIMUS_REGISTERS_2
#undef OPTIMUS_REGISTERS_3
#undef OPTIMUS_REGISTERS_4
#undef OPTIMUS_REGISTERS_5

}  // namespace optimus::cuda

#endif

// Microbenchmarks of the CPU kernels over the shapes of the demo model.
//
// Every line reports GFLOP/s or GB/s and the percentage of a peak that this binary measures first: a
// loop of multiply-adds in registers, and a copy of a buffer too large for the caches (both sides
// counted). Bytes are those an op must move once, so a working set that stays in cache can exceed
// 100% of the bandwidth. `gemm_cold` walks over more weights than the last-level cache holds, as a
// large model does; `gemm` keeps one weight warm. OPTIMUS_BENCH_THREADS sets the thread count;
// --benchmark_min_time=0.05 and --benchmark_filter shorten a run.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"

namespace optimus {
namespace {

constexpr int kHidden = 384, kIntermediate = 1024, kVocab = 2048;
constexpr int kQHeads = 6, kKvHeads = 3, kHeadDim = 64, kPageSize = 64;
constexpr int kQkvWidth = (kQHeads + 2 * kKvHeads) * kHeadDim;

ThreadPool& pool() {
  static const char* threads = std::getenv("OPTIMUS_BENCH_THREADS");
  static ThreadPool instance(threads != nullptr ? std::atoi(threads) : 0);
  return instance;
}

template <class Run>
double best_seconds(const Run& run) {
  double best = 1e9;
  for (int i = 0; i < 20; ++i) {
    auto start = std::chrono::steady_clock::now();
    run();
    std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::min(best, elapsed.count());
  }
  return best;
}

// The micro-kernel on operands that fit L1: multiply-adds and nothing else worth mentioning.
double peak_flops() {
  static const double peak = [] {
    constexpr int kRows = 8, kDepth = 64, kRepeats = 2000;
    double seconds = best_seconds([] {
      pool().parallel_for(pool().num_threads(), 1, [](int64_t, int64_t) {
        alignas(64) float x[kRows * kDepth] = {}, w[kDepth * kGemmPanel] = {};
        alignas(64) float out[kRows * kGemmPanel];
        for (int i = 0; i < kRepeats; ++i) {
          cpu::simd_kernels<float>().gemm_panel(x, kDepth, kRows, w, kDepth, out, kGemmPanel);
          benchmark::DoNotOptimize(out[0]);
        }
      });
    });
    return 2.0 * kRows * kDepth * kGemmPanel * kRepeats * pool().num_threads() / seconds;
  }();
  return peak;
}

double peak_bandwidth() {
  static const double peak = [] {
    constexpr size_t kBytes = 128 << 20;
    Buffer<char> from(kBytes, 1), to(kBytes, 2);
    double seconds = best_seconds([&] {
      pool().parallel_for(kBytes, 1 << 20, [&](int64_t begin, int64_t end) {
        std::memcpy(to.data() + begin, from.data() + begin, end - begin);
      });
    });
    return 2.0 * kBytes / seconds;
  }();
  return peak;
}

// Times run() and reports `amount` per call against `peak` per second. Not a benchmark::Counter rate:
// that would print "/s" behind the percentage.
template <class Run>
void measure(benchmark::State& state, double amount, const char* unit, double peak,
             const Run& run) {
  auto start = std::chrono::steady_clock::now();
  for (auto _ : state) run();
  std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  double rate = amount * static_cast<double>(state.iterations()) / elapsed.count();
  state.counters[unit] = rate * 1e-9;
  state.counters["%peak"] = rate / peak * 100;
}
template <class Run>
void measure_flops(benchmark::State& state, double flops, const Run& run) {
  measure(state, flops, "GFLOP/s", peak_flops(), run);
}
template <class Run>
void measure_bytes(benchmark::State& state, double bytes, const Run& run) {
  measure(state, bytes, "GB/s", peak_bandwidth(), run);
}

// Ordinary numbers of either dtype; zeros or denormals would not time the same.
Buffer<char> values(size_t count, DType dtype) {
  Buffer<char> bytes(count * dtype_size(dtype));
  for (size_t i = 0; i < count; ++i) {
    float value = static_cast<float>(i * 7919 % 1000) / 1000 - 0.5f;
    if (dtype == DType::float32) {
      std::memcpy(bytes.data() + i * sizeof(value), &value, sizeof(value));
    } else {
      bfloat16 half = to_bfloat16(value);
      std::memcpy(bytes.data() + i * sizeof(half), &half, sizeof(half));
    }
  }
  return bytes;
}

void run_gemm(benchmark::State& state, DType dtype, int num_weights) {
  int k = state.range(0), n = state.range(1), rows = state.range(2);
  size_t weight_size = packed_gemm_weight_size(n, k);
  Buffer<char> x = values(static_cast<size_t>(rows) * k, dtype);
  Buffer<char> weights = values(weight_size * num_weights, dtype);
  Buffer<float> out(static_cast<size_t>(rows) * n);
  int turn = 0;
  measure_flops(state, 2.0 * rows * n * k, [&] {
    const char* weight = weights.data() + weight_size * dtype_size(dtype) * (turn++ % num_weights);
    cpu::gemm({x.data(), weight, out.data(), rows, n, k, dtype, DType::float32}, pool());
  });
}

void gemm(benchmark::State& state, DType dtype) { run_gemm(state, dtype, 1); }

void gemm_cold(benchmark::State& state, DType dtype) {
  size_t bytes = packed_gemm_weight_size(state.range(1), state.range(0)) * dtype_size(dtype);
  run_gemm(state, dtype, static_cast<int>((256u << 20) / bytes));
}

void block_attention(benchmark::State& state, DType dtype) {
  int num_seqs = state.range(0), rows = state.range(1), kv_len = state.range(2);
  int pages = (kv_len + kPageSize - 1) / kPageSize;
  size_t pool_size = static_cast<size_t>(num_seqs) * pages * kKvHeads * kPageSize * kHeadDim;
  size_t q_size = static_cast<size_t>(num_seqs) * rows * kQHeads * kHeadDim;
  Buffer<char> q = values(q_size, dtype), k = values(pool_size, dtype),
               v = values(pool_size, dtype);
  Buffer<char> out = values(q_size, dtype);
  Buffer<int32_t> cu(num_seqs + 1), limits(num_seqs * rows, kv_len), table(num_seqs * pages);
  for (int s = 0; s <= num_seqs; ++s) cu[s] = s * rows;
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  BlockAttentionParams params{q.data(),     k.data(),   v.data(), cu.data(), limits.data(),
                              table.data(), out.data(), num_seqs, kQHeads,   kKvHeads,
                              kHeadDim,     kPageSize,  pages,    0.125f,    dtype};
  measure_flops(state, 4.0 * num_seqs * rows * kv_len * kQHeads * kHeadDim,
                [&] { cpu::block_attention(params, pool()); });
}

void embedding(benchmark::State& state, DType dtype) {
  int rows = state.range(0);
  Buffer<char> table = values(kVocab * kHidden, dtype), out = values(rows * kHidden, dtype);
  Buffer<int32_t> ids(rows);
  for (int i = 0; i < rows; ++i) ids[i] = i * 7919 % kVocab;
  measure_bytes(state, 2.0 * rows * kHidden * dtype_size(dtype), [&] {
    cpu::embedding({table.data(), ids.data(), out.data(), rows, kHidden, dtype}, pool());
  });
}

void rms_norm(benchmark::State& state, DType dtype) {
  int rows = state.range(0);
  Buffer<char> x = values(rows * kHidden, dtype), weight = values(kHidden, dtype);
  Buffer<char> residual = values(rows * kHidden, dtype), out = values(rows * kHidden, dtype);
  std::memset(x.data(), 0, x.size());  // the residual stays as it is over the iterations
  RmsNormParams params{x.data(), residual.data(), nullptr, weight.data(), out.data(),
                       rows,     kHidden,         1e-6f,   dtype};
  measure_bytes(state, 4.0 * rows * kHidden * dtype_size(dtype),
                [&] { cpu::rms_norm(params, pool()); });
}

void silu_mul(benchmark::State& state, DType dtype) {
  int rows = state.range(0);
  Buffer<char> gate_up = values(rows * 2 * kIntermediate, dtype);
  Buffer<char> out = values(rows * kIntermediate, dtype);
  measure_bytes(state, 3.0 * rows * kIntermediate * dtype_size(dtype), [&] {
    cpu::silu_mul({gate_up.data(), out.data(), rows, kIntermediate, dtype}, pool());
  });
}

void qk_norm_rope_kv_write(benchmark::State& state, DType dtype) {
  int rows = state.range(0), pages = (rows + kPageSize - 1) / kPageSize;
  size_t page_size = kKvHeads * kPageSize * kHeadDim;
  Buffer<char> qkv = values(rows * kQkvWidth, dtype), weight = values(kHeadDim, dtype);
  Buffer<char> q = values(rows * kQHeads * kHeadDim, dtype);
  Buffer<char> k = values(pages * page_size, dtype), v = values(pages * page_size, dtype);
  Buffer<float> inv_freq(kHeadDim / 2, 0.1f);
  Buffer<int32_t> positions(rows);
  for (int i = 0; i < rows; ++i) positions[i] = i;
  QkNormRopeKvWriteParams params{qkv.data(),
                                 weight.data(),
                                 weight.data(),
                                 inv_freq.data(),
                                 positions.data(),
                                 positions.data(),
                                 q.data(),
                                 k.data(),
                                 v.data(),
                                 rows,
                                 kQHeads,
                                 kKvHeads,
                                 kHeadDim,
                                 kHeadDim,
                                 kPageSize,
                                 1e-6f,
                                 dtype};
  measure_bytes(state, 2.0 * rows * kQkvWidth * dtype_size(dtype),
                [&] { cpu::qk_norm_rope_kv_write(params, pool()); });
}

void kv_copy(benchmark::State& state, DType dtype) {
  int copies = state.range(0);
  size_t page_bytes = kKvHeads * kPageSize * kHeadDim * dtype_size(dtype);
  Buffer<char> k(2 * copies * page_bytes, 1), v(2 * copies * page_bytes, 1);
  void *k_base = k.data(), *v_base = v.data();
  Buffer<int32_t> src(copies), dst(copies);
  for (int i = 0; i < copies; ++i) {
    src[i] = i;
    dst[i] = copies + i;
  }
  measure_bytes(state, 4.0 * copies * page_bytes, [&] {
    cpu::kv_copy({&k_base, &v_base, src.data(), dst.data(), 1, copies, page_bytes}, pool());
  });
}

void register_all() {
  const std::vector<int64_t> rows = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512};
  const std::pair<int64_t, int64_t> weights[] = {
      {kHidden, kQkvWidth},
      {kHidden, kHidden},
      {kHidden, kIntermediate},
      {kIntermediate, kHidden},
      {kHidden, 2 * kIntermediate}};  // qkv, o, one of gate and up, down, gate_up and lm_head
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    auto add = [&](const char* op, void (*run)(benchmark::State&, DType)) {
      std::string name = std::string(op) + "/" + dtype_name(dtype);
      auto call = [run, dtype](benchmark::State& state) { run(state, dtype); };
      return benchmark::RegisterBenchmark(name.c_str(), call)->UseRealTime();
    };
    for (auto [k, n] : weights) {
      add("gemm", gemm)->ArgNames({"k", "n", "rows"})->ArgsProduct({{k}, {n}, rows});
    }
    add("gemm_cold", gemm_cold)
        ->ArgNames({"k", "n", "rows"})
        ->ArgsProduct({{kHidden}, {2 * kIntermediate}, rows});
    add("block_attention", block_attention)
        ->ArgNames({"seqs", "rows", "kv"})
        ->ArgsProduct({{1, 8}, {1, 8, 32}, {256, 1024}});
    add("embedding", embedding)->ArgName("rows")->ArgsProduct({rows});
    add("rms_norm", rms_norm)->ArgName("rows")->ArgsProduct({rows});
    add("silu_mul", silu_mul)->ArgName("rows")->ArgsProduct({rows});
    add("qk_norm_rope_kv_write", qk_norm_rope_kv_write)->ArgName("rows")->ArgsProduct({rows});
    add("kv_copy", kv_copy)->ArgName("pages")->ArgsProduct({{1, 8, 64}});
  }
}

}  // namespace
}  // namespace optimus

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  using namespace optimus;
  std::printf("%s, %d threads: %.1f GFLOP/s, %.1f GB/s\n", cpu::isa_name(cpu::active_isa()),
              pool().num_threads(), peak_flops() * 1e-9, peak_bandwidth() * 1e-9);
  register_all();
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

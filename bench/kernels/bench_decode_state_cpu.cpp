// Microbenchmarks of the CPU kernels around the decode state: unmask over rows and vocabularies,
// and build_rows over requests in every mode.
//
// unmask reads the logits several times; `GB/s` counts them once. `ns/row` is the time to decide a
// row (unmask) or to write one (build_rows). The calls repeat themselves: unmask decides the first
// masks of blocks whose later masks stay, build_rows finds masks that are present already.
// OPTIMUS_BENCH_THREADS sets the thread count.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace optimus {
namespace {

constexpr int kBlockLength = 32, kPageSize = 64, kStride = 64, kChunk = 8;

ThreadPool& pool() {
  static const char* threads = std::getenv("OPTIMUS_BENCH_THREADS");
  static ThreadPool instance(threads != nullptr ? std::atoi(threads) : 0);
  return instance;
}

struct State {
  explicit State(int num_slots)
      : num_slots(num_slots),
        block_start(num_slots, 10 * kBlockLength),
        tokens(num_slots * 2 * kBlockLength, 1),
        status(num_slots * 2 * kBlockLength, kPresent),
        denoise_step(num_slots),
        page_table(num_slots * kStride),
        temperature(num_slots),
        top_k(num_slots),
        top_p(num_slots, 1.0f),
        threshold(num_slots, 0.9f),
        entropy_bound(num_slots, 0.3f),
        denoising_steps(num_slots, kBlockLength),
        strategy(num_slots, kLowConfidenceDynamic),
        seed(num_slots, 7),
        first_output(num_slots),
        end_position(num_slots, 1 << 30),
        stop_token_ids(num_slots * kMaxStopTokens, -1),
        ended(num_slots) {
    for (size_t i = 0; i < page_table.size(); ++i) page_table[i] = static_cast<int32_t>(i);
  }
  DecodeState view() {
    return {block_start.data(),
            tokens.data(),
            status.data(),
            denoise_step.data(),
            page_table.data(),
            temperature.data(),
            top_k.data(),
            top_p.data(),
            threshold.data(),
            entropy_bound.data(),
            denoising_steps.data(),
            strategy.data(),
            seed.data(),
            first_output.data(),
            end_position.data(),
            stop_token_ids.data(),
            ended.data(),
            num_slots,
            kBlockLength,
            kStride};
  }
  int num_slots;
  std::vector<int32_t> block_start, tokens;
  std::vector<uint8_t> status;
  std::vector<int32_t> denoise_step, page_table;
  std::vector<float> temperature;
  std::vector<int32_t> top_k;
  std::vector<float> top_p, threshold, entropy_bound;
  std::vector<int32_t> denoising_steps;
  std::vector<uint8_t> strategy;
  std::vector<uint64_t> seed;
  std::vector<int32_t> first_output, end_position, stop_token_ids;
  std::vector<uint8_t> ended;
};

template <class Run>
void measure(benchmark::State& state, int rows, double bytes, const Run& run) {
  auto start = std::chrono::steady_clock::now();
  for (auto _ : state) run();
  std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  double calls = static_cast<double>(state.iterations());
  state.counters["ns/row"] = elapsed.count() * 1e9 / (calls * rows);
  if (bytes > 0) state.counters["GB/s"] = bytes * calls / elapsed.count() * 1e-9;
}

std::vector<char> random_logits(size_t count, DType dtype) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> few(1 << 16);
  for (float& value : few) value = normal(rng);
  std::vector<char> bytes(count * dtype_size(dtype));
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    T* out = reinterpret_cast<T*>(bytes.data());
    for (size_t i = 0; i < count; ++i) out[i] = from_float<T>(few[i * 7 % few.size()]);
  });
  return bytes;
}

// `sampling`: 0 greedy, 1 temperature, 2 temperature and top-k, 3 temperature and top-p.
void unmask(benchmark::State& bench, DType dtype, int sampling) {
  const int rows = bench.range(0), vocab = bench.range(1);
  const int num_slots = (rows + kChunk - 1) / kChunk;
  State state(num_slots);
  for (int slot = 0; slot < num_slots; ++slot) {
    state.temperature[slot] = sampling > 0 ? 0.8f : 0.0f;
    state.top_k[slot] = sampling == 2 ? 50 : 0;
    state.top_p[slot] = sampling == 3 ? 0.95f : 1.0f;
  }
  std::vector<char> logits = random_logits(static_cast<size_t>(rows) * vocab, dtype);
  std::vector<int32_t> slots(rows), offsets(rows), ids(rows), fresh(num_slots), masked(num_slots);
  std::vector<float> confidence(rows), logprob(rows), entropy(rows);
  std::vector<uint8_t> committed(rows);
  for (int i = 0; i < rows; ++i) {
    slots[i] = i / kChunk;
    offsets[i] = i % kChunk;
  }
  Candidates out{ids.data(), confidence.data(), logprob.data(), entropy.data(), committed.data()};
  UnmaskParams params{logits.data(), slots.data(),   offsets.data(), state.view(),
                      out,           fresh.data(),   masked.data(),  rows,
                      vocab,         RowMode::chunk, dtype};
  measure(bench, rows, static_cast<double>(logits.size()), [&] { cpu::unmask(params, pool()); });
}

void build_rows(benchmark::State& bench, RowMode mode) {
  const int num_seqs = bench.range(0);
  const int max_rows = num_seqs * 2 * kBlockLength;
  State state(num_seqs);
  std::vector<int32_t> slots(num_seqs), chunks(num_seqs, kChunk), zeros(num_seqs);
  std::vector<uint8_t> refresh(num_seqs);
  for (int i = 0; i < num_seqs; ++i) slots[i] = i;
  std::vector<std::vector<int32_t>> per_row(7, std::vector<int32_t>(max_rows));
  std::vector<int32_t> cu(num_seqs + 1), table(num_seqs * kStride), counts(2);
  StepRows rows{per_row[0].data(), per_row[1].data(), per_row[2].data(), per_row[3].data(),
                cu.data(),         table.data(),      per_row[4].data(), per_row[5].data(),
                per_row[6].data(), counts.data()};
  DecodeState view = state.view();
  if (mode == RowMode::ar) view.block_length = 1;
  BuildRowsParams params{view,
                         slots.data(),
                         chunks.data(),
                         refresh.data(),
                         zeros.data(),
                         zeros.data(),
                         zeros.data(),
                         nullptr,
                         rows,
                         num_seqs,
                         max_rows,
                         kPageSize,
                         0,
                         false,
                         mode};
  cpu::build_rows(params, pool());
  measure(bench, counts[0], 0, [&] { cpu::build_rows(params, pool()); });
}

const int kRegistered = [] {
  const std::vector<int64_t> rows = {1, 8, 32, 128, 512};
  const char* kSampling[] = {"greedy", "temperature", "top_k", "top_p"};
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    for (int sampling = 0; sampling < 4; ++sampling) {
      std::string name = std::string("unmask/") + dtype_name(dtype) + "/" + kSampling[sampling];
      auto run = [=](benchmark::State& state) { unmask(state, dtype, sampling); };
      benchmark::RegisterBenchmark(name.c_str(), run)
          ->UseRealTime()
          ->ArgNames({"rows", "vocab"})
          ->ArgsProduct({rows, {2048, 151936}});
    }
  }
  for (auto [name, mode] :
       {std::pair("build_rows/chunk", RowMode::chunk),
        std::pair("build_rows/block", RowMode::block), std::pair("build_rows/ar", RowMode::ar)}) {
    RowMode row_mode = mode;
    auto run = [row_mode](benchmark::State& state) { build_rows(state, row_mode); };
    benchmark::RegisterBenchmark(name, run)->UseRealTime()->ArgName("seqs")->ArgsProduct(
        {{1, 8, 64, 512}});
  }
  return 0;
}();

}  // namespace
}  // namespace optimus

// Times block_attention on the GPU and compares it with a plain read of the same bytes.
//
//   bench_block_attention_cuda [--json FILE] [--only grid|short|ragged|shared|prefill] [--quick]
//                              [--case NAME] [--once]
//
// --case runs the one case of that name; --once calls it once, for a profiler.
//
// Every figure is the median over replays of one CUDA graph that holds several calls, each on other KV
// than the calls before it, so that nothing is found in the L2; pages lie in random order. `us` counts one schedule
// per call, `layer us` one schedule per graph (a step runs one schedule for all its layers).
// `floor us` is the fastest plain read of the call's K and V, replayed in the same way.
//
// Prompts and steps of kManyRows are replayed for a while, as is a product of two 8192 x 8192 matrices
// behind each prompt: the clock falls under such work, and these are compared at the clock that lasts.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/device_buffer.h"
#include "cuda_replay.h"
#include "kernels/cuda/kernels.h"
#include "memory_floor.h"

namespace optimus::bench {
namespace {

constexpr int kNumQHeads = 32, kNumKvHeads = 8, kHeadDim = 128, kPageSize = 64;
constexpr size_t kTokenBytes = size_t(2) * kNumKvHeads * kHeadDim * 2;  // K and V, bf16
constexpr size_t kPageBytes = kTokenBytes * kPageSize;
constexpr size_t kPoolBytes = size_t(4864) << 20;
constexpr size_t kRotatedBytes = size_t(512) << 20;  // beyond any L2
// Of a graph, whose launch counts among them.
constexpr int kLeastCalls = 12, kMaxCalls = 24;
constexpr double kSteadySeconds = 0.5;
constexpr int kManyRows = 1024;

struct Sequence {
  int rows, kv_len;
  int block;       // limits climb in blocks of this many rows up to kv_len; 0 = all rows see kv_len
  int shared = 0;  // the first keys, whole pages of them, are the first sequence's
};
using Batch = std::vector<Sequence>;

template <class T>
DeviceBuffer<T> upload(const std::vector<T>& host) {
  DeviceBuffer<T> device(host.size());
  OPTIMUS_CUDA_CHECK(
      cudaMemcpy(device.data(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

struct Result {
  std::string name;
  int rows = 0, seqs = 0;
  double kv_bytes = 0, flops = 0;
  double us = 0, layer_us = 0, floor_us = 0, schedule_us = 0;
  double gemm_tflops = 0;  // measured behind it, of prompts
};

class Bench {
 public:
  explicit Bench(int replays)
      : replays_(replays), k_(kPoolBytes / 4), v_(kPoolBytes / 4), sink_(1) {
    fill_random_bf16(k_.data(), k_.size(), 1, stream_);
    fill_random_bf16(v_.data(), v_.size(), 2, stream_);
    OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

  void print_peaks() {
    size_t bytes = k_.bytes();
    double copy = replay_us(
        stream_,
        [&] {
          OPTIMUS_CUDA_CHECK(
              cudaMemcpyAsync(v_.data(), k_.data(), bytes, cudaMemcpyDeviceToDevice, stream_));
        },
        10);
    copy_gbps = 2e-3 * bytes / copy;
    fill_random_bf16(v_.data(), v_.size(), 2, stream_);
    read_gbps = 1e-3 * bytes / floor_us(bytes / 2, 1);
    std::printf("device copy %.0f GB/s (read + written), plain read %.0f GB/s\n", copy_gbps,
                read_gbps);
    for (size_t mib : {4, 16, 64, 256, 1024}) {
      size_t size = mib << 20;
      double us = floor_us(size / 2, calls_for(size));
      std::printf("  read of %4zu MiB: %7.1f us, %5.0f GB/s\n", mib, us, 1e-3 * size / us);
    }
  }

  // Of a product of square matrices, at the clock that lasts.
  double gemm_tflops() {
    constexpr int kSize = 8192;
    constexpr size_t kElements = size_t(kSize) * kSize;
    if (product_.size() == 0) product_ = DeviceBuffer<uint16_t>(kElements);
    if (gemm_workspace_.size() == 0) gemm_workspace_ = DeviceBuffer<char>(kGemmWorkspaceBytes);
    const GemmParams params = {k_.data(),
                               v_.data(),
                               product_.data(),
                               kSize,
                               kSize,
                               kSize,
                               DType::bfloat16,
                               DType::bfloat16,
                               gemm_workspace_.data(),
                               gemm_workspace_.size()};
    const auto product = [&] { cuda::gemm(params, stream_); };
    cuda::plan_gemms({params}, product, stream_);
    const double us = replay_us(stream_, product, replays_, kSteadySeconds);
    return 2.0 * kSize * kElements / us * 1e-6;
  }

  // Many rows, and prompts, for as long as it takes the clock to settle; prompts beside a product.
  Result run(const std::string& name, const Batch& batch, bool is_prompt) {
    Result result;
    result.name = name;
    result.seqs = static_cast<int>(batch.size());
    std::vector<int32_t> cu = {0}, limits, positions;
    int stride = 1, pages = 0;
    for (const Sequence& seq : batch) {
      cu.push_back(cu.back() + seq.rows);
      for (int i = 0; i < seq.rows; ++i) {
        int below = seq.block == 0 ? 0 : (seq.rows - 1 - i) / seq.block * seq.block;
        limits.push_back(std::max(1, seq.kv_len - below));
        positions.push_back(std::max(0, seq.kv_len - seq.rows + i));
        result.flops += 4.0 * limits.back() * kNumQHeads * kHeadDim;
      }
      const int seq_pages = (seq.kv_len + kPageSize - 1) / kPageSize;
      const int shared = &seq == &batch.front() ? 0 : seq.shared;
      stride = std::max(stride, seq_pages);
      pages += seq_pages - shared / kPageSize;
      result.kv_bytes += double(seq.kv_len - shared) * kTokenBytes;
    }
    result.rows = cu.back();
    const double seconds = is_prompt || result.rows >= kManyRows ? kSteadySeconds : 0;
    int calls = calls_for(pages * kPageBytes);
    std::vector<DeviceBuffer<int32_t>> tables = page_tables(batch, calls, stride);
    DeviceBuffer<int32_t> device_cu = upload(cu), device_limits = upload(limits);
    DeviceBuffer<int32_t> device_positions = upload(positions);
    DeviceBuffer<uint16_t> q(size_t(result.rows) * kNumQHeads * kHeadDim), out(q.size());
    fill_random_bf16(q.data(), q.size(), 3, stream_);
    BlockAttentionParams params = {
        q.data(), k_.data(),  v_.data(),   device_cu.data(), device_limits.data(),
        nullptr,  out.data(), result.seqs, kNumQHeads,       kNumKvHeads,
        kHeadDim, kPageSize,  stride,      0.0883883f,       DType::bfloat16};
    params.max_rows = result.rows;
    params.positions = device_positions.data();
    DeviceBuffer<char> workspace(cuda::block_attention_workspace_bytes(params));
    params.workspace = workspace.data();
    params.workspace_bytes = workspace.size();
    auto attend = [&](int call) {
      params.page_table = tables[call].data();
      cuda::block_attention(params, stream_);
    };
    auto schedule = [&] { cuda::block_attention_schedule(params, stream_); };
    if (once) {
      schedule();
      attend(0);
      OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream_));
      return result;
    }
    result.schedule_us = replay_us(
                             stream_,
                             [&] {
                               for (int i = 0; i < 8; ++i) schedule();
                             },
                             replays_) /
                         8;
    result.us = replay_us(
                    stream_,
                    [&] {
                      for (int i = 0; i < calls; ++i) schedule(), attend(i);
                    },
                    replays_, seconds) /
                calls;
    result.layer_us = replay_us(
                          stream_,
                          [&] {
                            for (int i = 0; i < calls; ++i) attend(i);
                          },
                          replays_, seconds) /
                      calls;
    if (is_prompt) result.gemm_tflops = gemm_tflops();
    result.floor_us = floor_us(static_cast<size_t>(result.kv_bytes) / 2, calls);
    return result;
  }

  double copy_gbps = 0, read_gbps = 0;
  bool once = false;

 private:
  static int calls_for(size_t bytes) {
    size_t rotated = (kRotatedBytes + bytes - 1) / bytes, fit = kPoolBytes / bytes;
    return static_cast<int>(
        std::max(size_t{kLeastCalls}, std::min({rotated, fit, size_t{kMaxCalls}})));
  }

  std::vector<DeviceBuffer<int32_t>> page_tables(const Batch& batch, int calls, int stride) {
    std::vector<int32_t> order(kPoolBytes / kPageBytes);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng_);
    std::vector<DeviceBuffer<int32_t>> tables;
    size_t next = 0;
    for (int call = 0; call < calls; ++call) {
      std::vector<int32_t> table(batch.size() * stride, -1);
      for (size_t s = 0; s < batch.size(); ++s) {
        for (int i = 0; i * kPageSize < batch[s].kv_len; ++i) {
          const bool is_shared = s > 0 && i * kPageSize < batch[s].shared;
          table[s * stride + i] = is_shared ? table[i] : order[next++ % order.size()];
        }
      }
      tables.push_back(upload(table));
    }
    return tables;
  }

  // A read of `half` bytes of K and as many of V: the better of one, two and four CTAs per SM.
  double floor_us(size_t half, int calls) {
    half = half / 16 * 16;
    double best = 1e30;
    for (int ctas : {1, 2, 4}) {
      double us = replay_us(
          stream_,
          [&] {
            for (int call = 0; call < calls; ++call) {
              size_t offset = calls == 1 ? 0 : (k_.bytes() - half) / (calls - 1) / 16 * 16 * call;
              const char* k = reinterpret_cast<const char*>(k_.data()) + offset;
              // One kernel: the two halves of a call's bytes, from one pool at a time.
              read_plainly(k, std::min(2 * half, k_.bytes() - offset), ctas, sink_.data(), stream_);
              if (2 * half > k_.bytes() - offset) {
                read_plainly(v_.data(), 2 * half - (k_.bytes() - offset), ctas, sink_.data(),
                             stream_);
              }
            }
          },
          replays_);
      best = std::min(best, us / calls);
    }
    return best;
  }

  int replays_;
  Stream stream_;
  DeviceBuffer<uint16_t> k_, v_;
  DeviceBuffer<uint32_t> sink_;
  DeviceBuffer<uint16_t> product_;
  DeviceBuffer<char> gemm_workspace_;
  std::mt19937 rng_{7};
};

void print(const Result& r) {
  double gbps = 1e-3 * r.kv_bytes / r.layer_us;
  const double tflops = 1e-6 * r.flops / r.layer_us;
  std::printf("%-26s %6d %8.1f %8.1f %8.1f %6.1f%% %6.0f %7.1f %6.1f", r.name.c_str(), r.rows, r.us,
              r.layer_us, r.floor_us, 100 * r.floor_us / r.layer_us, gbps, tflops, r.schedule_us);
  if (r.gemm_tflops > 0) std::printf("  %.1f%% of a product", 100 * tflops / r.gemm_tflops);
  std::printf("\n");
  std::fflush(stdout);
}

void write_json(const std::string& path, const Bench& bench, const std::vector<Result>& results) {
  cudaDeviceProp device;
  OPTIMUS_CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  std::ofstream file(path);
  file << "{\"device\": \"" << device.name << "\", \"copy_gbps\": " << bench.copy_gbps
       << ", \"read_gbps\": " << bench.read_gbps << ",\n \"results\": [";
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    file << (i == 0 ? "\n" : ",\n") << "  {\"name\": \"" << r.name << "\", \"rows\": " << r.rows
         << ", \"seqs\": " << r.seqs << ", \"kv_bytes\": " << r.kv_bytes
         << ", \"flops\": " << r.flops << ", \"us\": " << r.us << ", \"layer_us\": " << r.layer_us
         << ", \"floor_us\": " << r.floor_us << ", \"schedule_us\": " << r.schedule_us;
    if (r.gemm_tflops > 0) file << ", \"gemm_tflops\": " << r.gemm_tflops;
    file << "}";
  }
  file << "\n]}\n";
}

Batch uniform(int seqs, int rows, int kv_len) { return Batch(seqs, Sequence{rows, kv_len, 0}); }

// Rows of 1 to 32 and lengths of 64 to 8 times as long as the mean, shuffled; about the bytes of a
// uniform batch of `kv_len`.
Batch mixed(int seqs, int kv_len) {
  std::mt19937 rng(11);
  Batch batch;
  double total = 0;
  std::exponential_distribution<double> length(1.0);
  for (int s = 0; s < seqs; ++s) {
    int rows = 1 << std::uniform_int_distribution<int>(0, 5)(rng);
    double len = std::min(8.0, length(rng) + 0.05);
    total += len;
    batch.push_back({rows, static_cast<int>(len * 1e4), 0});
  }
  for (Sequence& seq : batch) {
    seq.kv_len = std::max(64, static_cast<int>(seq.kv_len * 1e-4 * kv_len * seqs / total));
  }
  return batch;
}

int main_with(int argc, char** argv) {
  std::string json, only, wanted;
  int replays = 15;
  bool quick = false, once = false;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--json") && i + 1 < argc) json = argv[++i];
    if (!std::strcmp(argv[i], "--only") && i + 1 < argc) only = argv[++i];
    if (!std::strcmp(argv[i], "--case") && i + 1 < argc) wanted = argv[++i];
    if (!std::strcmp(argv[i], "--quick")) quick = true;
    if (!std::strcmp(argv[i], "--once")) once = true;
  }
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("no GPU\n");
    return 0;
  }
  Bench bench(replays);
  bench.once = once;
  if (!once) bench.print_peaks();
  std::vector<Result> results;
  auto add = [&](const std::string& name, const Batch& batch, bool is_prompt = false) {
    if (!wanted.empty() && name != wanted) return;
    results.push_back(bench.run(name, batch, is_prompt));
    print(results.back());
  };
  auto wants = [&](const char* part) { return only.empty() || only == part; };
  std::printf("%-26s %6s %8s %8s %8s %7s %6s %7s %6s\n", "case", "rows", "us", "layer us",
              "floor us", "of it", "GB/s", "TFLOP/s", "sched");
  if (wants("grid")) {
    for (int kv_len : {4096, 1024}) {
      for (int rows : {1, 2, 4, 8, 16, 32}) {
        for (int seqs : {1, 8, 32, 64, 128, 256}) {
          if (quick && (rows == 2 || rows == 4 || seqs == 64 || seqs == 256)) continue;
          add(concat("kv ", kv_len, " c ", rows, " b ", seqs), uniform(seqs, rows, kv_len));
        }
      }
    }
  }
  if (wants("short")) {
    for (int seqs : {1, 4, 8, 16, 32, 64}) add(concat("kv 64 c 8 b ", seqs), uniform(seqs, 8, 64));
  }
  if (wants("ragged")) {
    for (int seqs : {32, 128}) {
      Batch batch = mixed(seqs, 2048);
      int rows = 0, tokens = 0;
      for (const Sequence& seq : batch) rows += seq.rows, tokens += seq.kv_len;
      add(concat("uniform like mixed b ", seqs), uniform(seqs, rows / seqs, tokens / seqs));
      add(concat("mixed b ", seqs), batch);
    }
    for (int seqs : {64, 256}) {
      Batch rows(seqs, Sequence{1, 0, 0});
      for (int i = 0; i < seqs; ++i) rows[i].kv_len = 128 + i * 7919 % 1921;
      add(concat("rows of 128 to 2048 keys b ", seqs), rows);
    }
    Batch outlier(64, Sequence{8, 320, 0});
    outlier[17].kv_len = 32000;
    add("uniform like outlier", uniform(64, 8, (63 * 320 + 32000) / 64));
    add("one 100x longer", outlier);
  }
  if (wants("shared")) {
    for (int shared : {1024, 4096}) {
      for (int rows : {1, 4, 16}) {
        add(concat("shared ", shared, " + 512 c ", rows, " b 64"),
            Batch(64, Sequence{rows, shared + 512, 0, shared}));
      }
    }
  }
  if (wants("prefill")) {
    for (int rows : {512, 2048, 8192}) {
      add(concat("prefill ", rows), {{rows, rows, 32}}, true);
    }
    add("prefill 4 x 2048", Batch(4, Sequence{2048, 2048, 32}), true);
    add("prefill 2048 at 16384", {{2048, 16384, 32}}, true);
    Batch both = uniform(64, 8, 2048);
    both.push_back({1024, 4096, 32});
    add("decode 64 + prefill 1024", both, true);
  }
  if (!json.empty()) write_json(json, bench, results);
  return 0;
}

}  // namespace
}  // namespace optimus::bench

int main(int argc, char** argv) { return optimus::bench::main_with(argc, argv); }

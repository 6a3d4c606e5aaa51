// Microbenchmarks of the CUDA kernels over the shapes of the models they serve.
//
//   bench_kernels_cuda [--json FILE] [--only OP]
//
// `%` is the time that the ceilings allow over the measured time: bytes that must move over the copy
// bandwidth, or operations over the bf16 GEMM rate, whichever takes longer; both ceilings are
// measured first, by the same program: the best of a few ways to copy gigabytes and of a few large
// products. Small cases are bound by launching, not by either: `% of a copy` is the time of a plain
// copy kernel that moves as many bytes, over the measured time.
#include <cstring>
#include <map>

#include "cuda_timing.h"
#include "decode_state_cuda.h"
#include "kernels/cuda/kernels.h"
#include "memory_floor.h"

namespace optimus::bench {
namespace {

constexpr DType kType = DType::bfloat16;
constexpr size_t kElement = 2;
constexpr int kLaunches = 24;
constexpr int kRows[] = {1, 8, 32, 64, 128, 256, 512};
constexpr int kBlockLength = 32, kPageSize = 64, kChunk = 8;
constexpr int kVocabSize = 151936;  // of unmask

struct ModelShape {
  const char* name;
  int hidden, num_q_heads, num_kv_heads, head_dim, rotary_dim, intermediate, vocab_size, num_layers;
};
// The intermediate size of the mixtures of experts is that of the eight experts of a token (and of
// the dense first layer for LLaDA2.0).
constexpr ModelShape kModels[] = {
    {"SDAR-1.7B", 2048, 16, 8, 128, 128, 6144, 151936, 28},
    {"SDAR-4B", 2560, 32, 8, 128, 128, 9728, 151936, 36},
    {"SDAR-8B", 4096, 32, 8, 128, 128, 12288, 151936, 36},
    {"SDAR-30B-A3B", 2048, 32, 4, 128, 128, 6144, 151936, 48},
    {"LLaDA2.0-mini", 2048, 16, 4, 128, 64, 5120, 157184, 20},
};

class Bench {
 public:
  explicit Bench(std::string only)
      : only_(std::move(only)), arena_(size_t(3) << 30, stream_), workspace_(kGemmWorkspaceBytes) {
    measure_ceilings();
  }

  void run() {
    for (double megabytes : {0.1, 1.0, 4.0, 8.0, 16.0, 19.5, 64.0, 128.0}) copy(megabytes * 1e6);
    for (const ModelShape& model : kModels) {
      for (int rows : kRows) {
        embedding(model, rows);
        rms_norm(model, rows);
        qk_norm_rope_kv_write(model, rows);
        silu_mul(model, rows);
      }
      const int heads = model.num_q_heads + 2 * model.num_kv_heads;
      for (int rows : kRows) {
        gemm(model, "qkv", rows, heads * model.head_dim, model.hidden);
        gemm(model, "out", rows, model.hidden, model.num_q_heads * model.head_dim);
        gemm(model, "gate_up", rows, 2 * model.intermediate, model.hidden);
        gemm(model, "down", rows, model.hidden, model.intermediate);
        gemm(model, "lm_head", rows, model.vocab_size, model.hidden);
      }
    }
    // Beyond the L2 cache within one launch.
    for (int rows : {2048, 8192}) {
      rms_norm(kModels[2], rows);
      qk_norm_rope_kv_write(kModels[2], rows);
      silu_mul(kModels[2], rows);
    }
    arena_.refill();
    for (int rows : kRows) {
      read_logits(rows);
      unmask("greedy", rows, 0, 0, 1);
      unmask("temperature 0.6", rows, 0.6f, 0, 1);
      unmask("top_k 20, top_p 0.95", rows, 0.6f, 20, 0.95f);
      unmask("top_p 0.95", rows, 0.6f, 0, 0.95f);
      // A low temperature makes the flat logits as peaked as a model's.
      unmask("temperature 0.1", rows, 0.1f, 0, 1);
      unmask("temperature 0.1, top_p 0.95", rows, 0.1f, 0, 0.95f);
    }
    for (int num_seqs : {1, 8, 32, 128, 512}) build_rows(num_seqs);
    for (int num_copies : {1, 8, 64}) kv_copy(kModels[2], num_copies);
  }

  const Ceilings& ceilings() const { return ceilings_; }
  const std::vector<Result>& results() const { return results_; }

 private:
  void measure_ceilings() {
    int device = 0;
    cudaDeviceProp properties;
    OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
    OPTIMUS_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    ceilings_.device = properties.name;
    const size_t half = arena_.bytes() / 2;
    double us = time_us(stream_, 2, [&](int, cudaStream_t stream) {
      OPTIMUS_CUDA_CHECK(cudaMemcpyAsync(arena_.data() + half, arena_.data(), half,
                                         cudaMemcpyDeviceToDevice, stream));
    });
    ceilings_.copy_gb_s = 2.0 * half / std::min(us, time_copy(2.0 * half)) * 1e-3;
    for (int size : {4096, 8192}) {
      us = time_gemm(size, size, size);
      ceilings_.gemm_tflops = std::max(ceilings_.gemm_tflops, 2.0 * size * size * size / us * 1e-6);
    }
    std::printf("%s: copy %.0f GB/s (read + write), bf16 GEMM %.0f TFLOP/s\n",
                ceilings_.device.c_str(), ceilings_.copy_gb_s, ceilings_.gemm_tflops);
  }

  // A plain copy kernel that reads and writes `bytes` in all: one page of kv_copy.
  double time_copy(double bytes) {
    const size_t part = static_cast<size_t>(bytes / 4) / 16 * 16;
    std::vector<void*> k(kLaunches), v(kLaunches);
    for (int i = 0; i < kLaunches; ++i) {
      k[i] = arena_.part(i, 4 * part);
      v[i] = static_cast<char*>(k[i]) + 2 * part;
    }
    DeviceBuffer<void*> k_pools(kLaunches), v_pools(kLaunches);
    copy_to_device(k_pools.data(), k.data(), k.size(), stream_);
    copy_to_device(v_pools.data(), v.data(), v.size(), stream_);
    auto src = indices(1, [](int) { return 0; }), dst = indices(1, [](int) { return 1; });
    return time_us(stream_, bytes > 1e9 ? 2 : kLaunches, [&](int i, cudaStream_t stream) {
      cuda::kv_copy({k_pools.data() + i, v_pools.data() + i, src.data(), dst.data(), 1, 1, part},
                    stream);
    });
  }
  void copy(double bytes) {
    if (!wants("copy")) return;
    report("copy", concat(bytes * 1e-6, " MB moved"), 1, time_copy(bytes), bytes);
  }

  bool wants(const char* op) const { return only_.empty() || only_ == op; }

  void report(const char* op, const std::string& shape, int rows, double us, double bytes,
              double flops = 0, const std::string& kernel = "", double copy_us = 0) {
    results_.push_back(
        {op, shape, rows, us, bytes, flops, ceilings_.floor_us(bytes, flops), kernel, copy_us});
    print(results_.back());
  }

  void report_beside_copy(const char* op, const std::string& shape, int rows, double us,
                          double bytes) {
    double& copy_us = copy_us_[bytes];
    if (copy_us == 0) copy_us = time_copy(bytes);
    report(op, shape, rows, us, bytes, 0, "", copy_us);
  }

  DeviceBuffer<int32_t> indices(int count, const std::function<int(int)>& value) {
    std::vector<int32_t> host(count);
    for (int i = 0; i < count; ++i) host[i] = value(i);
    DeviceBuffer<int32_t> device(count);
    copy_to_device(device.data(), host.data(), host.size(), stream_);
    OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return device;
  }

  void embedding(const ModelShape& model, int rows) {
    if (!wants("embedding")) return;
    const size_t table = size_t(model.vocab_size) * model.hidden * kElement;
    const size_t out = size_t(rows) * model.hidden * kElement;
    auto ids = indices(kLaunches * rows, [&](int i) { return i * 7919ll % model.vocab_size; });
    double us = time_us(stream_, kLaunches, [&](int i, cudaStream_t stream) {
      cuda::embedding({arena_.data(), ids.data() + i * rows, arena_.data() + table + i * out, rows,
                       model.hidden, kType},
                      stream);
    });
    report_beside_copy("embedding", model.name, rows, us, 2.0 * out);
  }

  void rms_norm(const ModelShape& model, int rows) {
    if (!wants("rms_norm")) return;
    const size_t tensor = size_t(rows) * model.hidden * kElement;
    double us = time_us(stream_, kLaunches, [&](int i, cudaStream_t stream) {
      char* at = arena_.part(i, 3 * tensor);
      cuda::rms_norm({at, at + tensor, nullptr, arena_.data(), at + 2 * tensor, rows, model.hidden,
                      1e-6f, kType},
                     stream);
    });
    report_beside_copy("rms_norm", std::string(model.name) + " + residual", rows, us, 4.0 * tensor);
  }

  void silu_mul(const ModelShape& model, int rows) {
    if (!wants("silu_mul")) return;
    const size_t out = size_t(rows) * model.intermediate * kElement;
    double us = time_us(stream_, kLaunches, [&](int i, cudaStream_t stream) {
      char* at = arena_.part(i, 3 * out);
      cuda::silu_mul({at, at + 2 * out, rows, model.intermediate, kType}, stream);
    });
    report_beside_copy("silu_mul", model.name, rows, us, 3.0 * out);
  }

  void qk_norm_rope_kv_write(const ModelShape& model, int rows) {
    if (!wants("qk_norm_rope_kv_write")) return;
    const int heads = model.num_q_heads + 2 * model.num_kv_heads;
    const size_t head = model.head_dim * kElement;
    const size_t qkv = rows * heads * head, q = rows * model.num_q_heads * head;
    const int num_pages = (rows + kPageSize - 1) / kPageSize;
    const size_t pages = size_t(num_pages) * kPageSize * model.num_kv_heads * head;
    auto positions = indices(rows, [](int i) { return i * 37 % 32768; });
    auto slots = indices(rows, [](int i) { return i; });
    auto inv_freq = filled(model.rotary_dim / 2, 0.01f, stream_);
    double us = time_us(stream_, kLaunches, [&](int i, cudaStream_t stream) {
      char* at = arena_.part(i, qkv + q + 2 * pages);
      cuda::qk_norm_rope_kv_write(
          {at, arena_.data(), arena_.data(), inv_freq.data(), positions.data(), slots.data(),
           at + qkv, at + qkv + q, at + qkv + q + pages, rows, model.num_q_heads,
           model.num_kv_heads, model.head_dim, model.rotary_dim, kPageSize, 1e-6f, kType},
          stream);
    });
    report_beside_copy("qk_norm_rope_kv_write", model.name, rows, us, 2.0 * qkv);
  }

  double time_gemm(int rows, int n, int k) {
    const size_t weight = size_t(n) * k * kElement, x = size_t(rows) * k * kElement;
    const size_t out = size_t(rows) * n * kElement;
    const int launches = double(rows) * n * k > 1e11 ? 4 : 12;
    auto params = [&](int i) {
      char* at = arena_.part(i, weight + x + out + 512);
      auto align = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
      return GemmParams{at + align(weight),
                        at,
                        at + align(weight) + align(x),
                        rows,
                        n,
                        k,
                        kType,
                        kType,
                        workspace_.data(),
                        workspace_.size()};
    };
    const int planned =
        2 + static_cast<int>((size_t(128) << 20) / weight);  // more than caches hold
    cuda::plan_gemms(
        {params(0)},
        [&] {
          for (int i = 0; i < planned; ++i) cuda::gemm(params(i), stream_);
        },
        stream_);
    gemm_kernel_ = cuda::describe_gemm(params(0));
    return time_us(stream_, launches,
                   [&](int i, cudaStream_t stream) { cuda::gemm(params(i), stream); });
  }

  void gemm(const ModelShape& model, const char* which, int rows, int n, int k) {
    if (!wants("gemm")) return;
    double bytes = (double(n) * k + double(rows) * (n + k)) * kElement;
    const double us = time_gemm(rows, n, k);
    report("gemm", concat(model.name, " ", which, " ", n, "x", k), rows, us, bytes,
           2.0 * rows * n * k, gemm_kernel_);
  }

  // ------------------------------------------------------------------------------- decode state

  // What unmask cannot be faster than: a plain read of its logits, and one more kernel behind it that
  // has nothing to do.
  void read_logits(int rows) {
    if (!wants("read")) return;
    const size_t bytes = size_t(rows) * kVocabSize * kElement;
    DeviceBuffer<uint32_t> sink(1);
    for (bool followed : {false, true}) {
      double best = 1e30;
      for (int ctas : {1, 2, 4}) {
        const auto read = [&](int i, cudaStream_t stream) {
          read_plainly(arena_.part(i, bytes), bytes, ctas, sink.data(), stream);
          if (followed) read_plainly(arena_.data(), 0, 1, sink.data(), stream);
        };
        best = std::min(best, time_us(stream_, kLaunches, read));
      }
      report("read", concat(kVocabSize, followed ? " logits, an empty kernel" : " logits"), rows,
             best, double(bytes));
    }
  }

  // Every slot decides the first masks of its block over and over; the later masks stay. Logits are
  // normals: much flatter than a model's, so that no shortcut of sampling applies.
  void unmask(const char* sampling, int rows, float temperature, int top_k, float top_p) {
    if (!wants("unmask")) return;
    const int vocab_size = kVocabSize, num_slots = (rows + kChunk - 1) / kChunk;
    DeviceDecodeState state(num_slots, kBlockLength, {temperature, top_k, top_p}, stream_);
    auto slots = indices(rows, [](int i) { return i / kChunk; });
    auto offsets = indices(rows, [](int i) { return i % kChunk; });
    DeviceBuffer<int32_t> ids(rows), fresh(num_slots), masked(num_slots);
    DeviceBuffer<float> confidence(rows), logprob(rows), entropy(rows);
    DeviceBuffer<uint8_t> committed(rows);
    auto workspace = filled(unmask_workspace_bytes(rows, vocab_size), char{0}, stream_);
    const size_t logits = size_t(rows) * vocab_size * kElement;
    UnmaskParams params{
        nullptr,
        slots.data(),
        offsets.data(),
        state.view(),
        {ids.data(), confidence.data(), logprob.data(), entropy.data(), committed.data()},
        fresh.data(),
        masked.data(),
        rows,
        vocab_size,
        RowMode::chunk,
        kType};
    params.workspace = workspace.data();
    params.workspace_bytes = workspace.size();
    double us = time_us(stream_, kLaunches, [&](int i, cudaStream_t stream) {
      params.logits = arena_.part(i, logits);
      cuda::unmask(params, stream);
    });
    report_beside_copy("unmask", concat(kVocabSize, " ", sampling), rows, us, double(logits));
  }

  void build_rows(int num_seqs) {
    if (!wants("build_rows")) return;
    const int max_rows = num_seqs * 2 * kBlockLength;
    DeviceDecodeState state(num_seqs, kBlockLength, {0, 0, 1}, stream_);
    auto slots = indices(num_seqs, [](int i) { return i; });
    auto chunks = indices(num_seqs, [](int) { return kChunk; });
    auto zeros = indices(num_seqs, [](int) { return 0; });
    auto refresh = filled(num_seqs, uint8_t{0}, stream_);
    std::vector<DeviceBuffer<int32_t>> rows;
    for (int i = 0; i < 7; ++i) rows.emplace_back(max_rows);
    DeviceBuffer<int32_t> cu(num_seqs + 1), table(num_seqs * state.view().page_table_stride);
    DeviceBuffer<int32_t> counts(2);
    BuildRowsParams params{
        state.view(),
        slots.data(),
        chunks.data(),
        refresh.data(),
        zeros.data(),
        zeros.data(),
        zeros.data(),
        nullptr,
        {rows[0].data(), rows[1].data(), rows[2].data(), rows[3].data(), cu.data(), table.data(),
         rows[4].data(), rows[5].data(), rows[6].data(), counts.data()},
        num_seqs,
        max_rows,
        kPageSize,
        0,
        false,
        RowMode::chunk,
        num_seqs * kChunk,
        num_seqs};
    double us = time_us(stream_, kLaunches,
                        [&](int, cudaStream_t stream) { cuda::build_rows(params, stream); });
    report("build_rows", concat(num_seqs, " sequences, chunk 8"), num_seqs * kChunk, us, 0);
  }

  void kv_copy(const ModelShape& model, int num_copies) {
    if (!wants("kv_copy")) return;
    const size_t page = size_t(model.num_kv_heads) * kPageSize * model.head_dim * kElement;
    const int num_pages = 2 * num_copies;
    std::vector<void*> pools[2];
    for (int i = 0; i < 2 * model.num_layers; ++i) {
      pools[i % 2].push_back(arena_.part(i, page * num_pages));
    }
    DeviceBuffer<void*> k(pools[0].size()), v(pools[1].size());
    copy_to_device(k.data(), pools[0].data(), k.size(), stream_);
    copy_to_device(v.data(), pools[1].data(), v.size(), stream_);
    auto src = indices(num_copies, [](int i) { return 2 * i; });
    auto dst = indices(num_copies, [](int i) { return 2 * i + 1; });
    double us = time_us(stream_, 4, [&](int, cudaStream_t stream) {
      cuda::kv_copy(
          {k.data(), v.data(), src.data(), dst.data(), model.num_layers, num_copies, page}, stream);
    });
    report("kv_copy", concat(model.name, ", pages of 64, all layers"), num_copies, us,
           2.0 * 2.0 * model.num_layers * num_copies * page);
  }

  std::string only_;
  Stream stream_;
  Arena arena_;
  DeviceBuffer<char> workspace_;
  std::map<double, double> copy_us_;  // by bytes
  Ceilings ceilings_;
  std::string gemm_kernel_;  // of the last time_gemm
  std::vector<Result> results_;
};

}  // namespace
}  // namespace optimus::bench

int main(int argc, char** argv) {
  std::string json, only;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--json") == 0) json = argv[i + 1];
    if (std::strcmp(argv[i], "--only") == 0) only = argv[i + 1];
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "bench_kernels_cuda: no GPU\n");
    return 1;
  }
  try {
    optimus::bench::Bench bench(only);
    bench.run();
    if (!json.empty()) optimus::bench::write_json(json, bench.ceilings(), bench.results());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_kernels_cuda: %s\n", error.what());
    return 1;
  }
  return 0;
}

// The four products of an SDAR-8B layer as a step runs them: with the small kernels between, layer
// after layer over distinct weights, in one CUDA graph; by what plan_gemms chooses, by the streaming
// kernel alone and by the library's kernels alone. What a small kernel costs there, its neighbours'
// overlap included, is told by the chain without it.
//
//   bench_layer_chain_cuda [--json FILE]
//
// `%` is the time in which the weights could be read at the copy bandwidth, over the measured time of
// a layer.
#include <chrono>
#include <cstring>

#include "cuda_timing.h"
#include "kernels/cuda/kernels.h"
#include "memory_floor.h"

namespace optimus::bench {
namespace {

constexpr DType kType = DType::bfloat16;
constexpr size_t kElement = 2;
constexpr int kLayers = 6, kPlannedLayers = 3;
constexpr int kRows[] = {1, 8, 16, 32, 64, 96, 128, 144, 160, 192, 256};
constexpr int kMaxRows = 256;
constexpr int kHidden = 4096, kIntermediate = 12288, kPageSize = 64;
constexpr int kQHeads = 32, kKvHeads = 8, kHeadDim = 128;

struct Product {
  const char* name;
  int n, k;
  size_t bytes() const { return size_t(n) * k * kElement; }
};
constexpr int kProducts = 4;
constexpr int kGateUpProduct = 2;
constexpr unsigned kAllKernels = 0xf;
constexpr Product kLayer[kProducts] = {{"qkv", (kQHeads + 2 * kKvHeads) * kHeadDim, kHidden},
                                       {"out", kHidden, kQHeads* kHeadDim},
                                       {"gate_up", 2 * kIntermediate, kHidden},
                                       {"down", kHidden, kIntermediate}};

class Bench {
 public:
  Bench() : weights_(kLayers * layer_bytes(), stream_), workspace_(kGemmWorkspaceBytes) {
    for (int i = 0; i < kBuffers; ++i) {
      buffers_[i] = DeviceBuffer<char>(size_t(kMaxRows) * kColumns[i] * kElement);
      fill_random_bf16(buffers_[i].data(), buffers_[i].bytes() / kElement, i, stream_);
    }
    std::vector<int32_t> order(kMaxRows);
    for (int i = 0; i < kMaxRows; ++i) order[i] = i;
    copy_to_device(order_.data(), order.data(), order.size(), stream_);
    inv_freq_.fill_bytes(0, stream_);
    int device = 0;
    cudaDeviceProp properties;
    OPTIMUS_CUDA_CHECK(cudaGetDevice(&device));
    OPTIMUS_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    ceilings_.device = properties.name;
    ceilings_.copy_gb_s = copy_gb_s();
    std::printf("%s: copy %.0f GB/s (read + write)\n", ceilings_.device.c_str(),
                ceilings_.copy_gb_s);
  }

  void run() {
    for (int rows : kRows) {
      run(rows, "planned", cuda::GemmKernels::any);
      if (rows <= 192) run(rows, "streaming", cuda::GemmKernels::stream);
      run(rows, "cuBLASLt", cuda::GemmKernels::library);
    }
  }

  const Ceilings& ceilings() const { return ceilings_; }
  const std::vector<Result>& results() const { return results_; }

 private:
  enum { kHiddenStates, kResidual, kNormed, kQkv, kQ, kK, kV, kGateUp, kActivated, kBuffers };
  static constexpr int kColumns[kBuffers] = {kHidden,
                                             kHidden,
                                             kHidden,
                                             kLayer[0].n,
                                             kQHeads* kHeadDim,
                                             kKvHeads* kHeadDim,
                                             kKvHeads* kHeadDim,
                                             2 * kIntermediate,
                                             kIntermediate};

  static size_t layer_bytes() {
    size_t bytes = 0;
    for (const Product& product : kLayer) bytes += product.bytes();
    return bytes;
  }

  // Of a page of 64 MB of "K" and one of "V".
  double copy_gb_s() {
    constexpr size_t kPage = size_t(64) << 20;
    void* host_pools[] = {weights_.data(), weights_.data() + 2 * kPage};
    DeviceBuffer<void*> pools(2);
    DeviceBuffer<int32_t> pages(2);
    const int32_t host_pages[] = {0, 1};
    copy_to_device(pools.data(), host_pools, 2, stream_);
    copy_to_device(pages.data(), host_pages, 2, stream_);
    OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream_));
    double us = time_us(stream_, 4, [&](int, cudaStream_t stream) {
      cuda::kv_copy({pools.data(), pools.data() + 1, pages.data(), pages.data() + 1, 1, 1, kPage},
                    stream);
    });
    return 4.0 * kPage / us * 1e-3;  // K and V, read and written
  }

  // Whether gate_up gives the activation, so that silu_mul is not needed.
  bool gives_silu(int rows) {
    return cuda::gemm_takes_silu(params_of(kGateUpProduct, rows, weights_.data(), false));
  }
  GemmParams params(int product, int rows, char* weight) {
    return params_of(product, rows, weight, product == kGateUpProduct && gives_silu(rows));
  }
  GemmParams params_of(int product, int rows, char* weight, bool silu) {
    constexpr int kX[] = {kNormed, kQ, kNormed, kActivated};
    constexpr int kOut[] = {kQkv, kHiddenStates, kGateUp, kHiddenStates};
    return {buffers_[kX[product]].data(),
            weight,
            buffers_[silu ? kActivated : kOut[product]].data(),
            rows,
            kLayer[product].n,
            kLayer[product].k,
            kType,
            kType,
            workspace_.data(),
            workspace_.size(),
            silu};
  }

  void run(int rows, const char* whose, cuda::GemmKernels kernels) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<GemmParams> products;
    for (int i = 0; i < kProducts; ++i) {
      products.push_back(params_of(i, rows, weights_.data(), /*silu=*/false));
    }
    products[kGateUpProduct].silu = true;
    const auto chain = [&] {
      for (int layer = 0; layer < kPlannedLayers; ++layer)
        run_layer(layer, rows, kAllKernels, stream_);
    };
    cuda::plan_gemms(products, chain, stream_, kernels);
    const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - begin;
    std::string chosen;
    for (int i = 0; i < kProducts; ++i) {
      chosen += concat(" ", kLayer[i].name, " by ",
                       cuda::describe_gemm(params(i, rows, weights_.data())), ";");
    }
    time(concat(whose, ", products alone"), rows, 0);
    time(concat(whose, ", chain"), rows, kAllKernels);
    if (kernels == cuda::GemmKernels::any) {
      time("  without rms_norm", rows, kAllKernels & ~5u);
      time("  without qk_norm_rope_kv_write", rows, kAllKernels & ~2u);
      if (!gives_silu(rows)) time("  without silu_mul", rows, kAllKernels & ~8u);
    }
    std::printf("  planned in %.0f ms:%s\n", ms.count(), chosen.c_str());
  }

  // What runs before product `i` of a layer.
  void small_kernel(int i, int rows, cudaStream_t stream) {
    auto at = [&](int buffer) { return buffers_[buffer].data(); };
    const void* norm_weight = weights_.data();
    if (i == 0 || i == 2) {
      cuda::rms_norm({at(kHiddenStates), at(kResidual), nullptr, norm_weight, at(kNormed), rows,
                      kHidden, 1e-6f, kType},
                     stream);
    } else if (i == 1) {
      cuda::qk_norm_rope_kv_write({at(kQkv), norm_weight, norm_weight, inv_freq_.data(),
                                   order_.data(), order_.data(), at(kQ), at(kK), at(kV), rows,
                                   kQHeads, kKvHeads, kHeadDim, kHeadDim, kPageSize, 1e-6f, kType},
                                  stream);
    } else {
      cuda::silu_mul({at(kGateUp), at(kActivated), rows, kIntermediate, kType}, stream);
    }
  }

  // Bit i of `small_kernels`: with the one before product i.
  void run_layer(int layer, int rows, unsigned small_kernels, cudaStream_t stream) {
    char* weight = weights_.data() + layer * layer_bytes();
    for (int i = 0; i < kProducts; ++i) {
      if ((small_kernels >> i & 1) && !(i == 3 && gives_silu(rows))) small_kernel(i, rows, stream);
      cuda::gemm(params(i, rows, weight), stream);
      weight += kLayer[i].bytes();
    }
  }

  void time(const std::string& what, int rows, unsigned small_kernels) {
    double us = time_us(stream_, kLayers, [&](int layer, cudaStream_t stream) {
      run_layer(layer, rows, small_kernels, stream);
    });
    const double bytes = double(layer_bytes()), flops = bytes * rows;
    results_.push_back(
        {"layer_chain", what, rows, us, bytes, flops, bytes / ceilings_.copy_gb_s * 1e-3});
    print(results_.back());
  }

  Stream stream_;
  Arena weights_;
  DeviceBuffer<char> workspace_;
  DeviceBuffer<char> buffers_[kBuffers];
  DeviceBuffer<int32_t> order_{kMaxRows};
  DeviceBuffer<float> inv_freq_{kHeadDim / 2};
  Ceilings ceilings_;
  std::vector<Result> results_;
};

}  // namespace
}  // namespace optimus::bench

int main(int argc, char** argv) {
  std::string json;
  if (argc == 3 && std::strcmp(argv[1], "--json") == 0) json = argv[2];
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "bench_layer_chain_cuda: no GPU\n");
    return 1;
  }
  try {
    optimus::bench::Bench bench;
    bench.run();
    if (!json.empty()) optimus::bench::write_json(json, bench.ceilings(), bench.results());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_layer_chain_cuda: %s\n", error.what());
    return 1;
  }
  return 0;
}

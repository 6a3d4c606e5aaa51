// Timing of CUDA work for the benchmarks: a captured graph of many launches, so that the host is out
// of the picture, over rotating inputs, so that the L2 cache holds no more than it would in a model.
#pragma once

#include <algorithm>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "core/device_buffer.h"
#include "core/dtype.h"
#include "cuda_replay.h"

namespace optimus::bench {

// Median microseconds of one launch(i, stream): `launches` of them are captured in one graph, which
// is replayed a few times.
inline double time_us(cudaStream_t stream, int launches,
                      const std::function<void(int, cudaStream_t)>& launch) {
  launch(0, stream);  // outside of the graph: first-use set-up
  OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream));
  const auto body = [&] {
    for (int i = 0; i < launches; ++i) launch(i, stream);
  };
  return replay_us(stream, body, 7) / launches;
}

// `count` times `value`, on the device.
template <class T>
DeviceBuffer<T> filled(int count, T value, cudaStream_t stream) {
  std::vector<T> host(count, value);
  DeviceBuffer<T> device(count);
  copy_to_device(device.data(), host.data(), host.size(), stream);
  OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream));
  return device;
}

// Device memory full of random bf16 normals, from which launch i takes its own part.
class Arena {
 public:
  Arena(size_t bytes, cudaStream_t stream) : data_(bytes), stream_(stream) { refill(); }

  // Benchmarks write to the arena: those that care for values fill it again.
  void refill() {
    const size_t bytes = data_.bytes();
    std::mt19937 rng(1);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    std::vector<bfloat16> values(std::min(bytes, size_t(32) << 20) / sizeof(bfloat16));
    for (bfloat16& value : values) value = to_bfloat16(normal(rng));
    const size_t part = values.size() * sizeof(bfloat16);
    for (size_t at = 0; at < bytes; at += part) {
      OPTIMUS_CUDA_CHECK(cudaMemcpyAsync(data_.data() + at, values.data(),
                                         std::min(part, bytes - at), cudaMemcpyDefault, stream_));
    }
    OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

  char* data() { return data_.data(); }
  size_t bytes() const { return data_.bytes(); }
  // The part of launch i, `bytes` long; parts repeat when the arena is full.
  char* part(int i, size_t bytes) {
    const size_t aligned = (bytes + 255) / 256 * 256;
    const size_t parts = std::max<size_t>(1, data_.bytes() / aligned);
    return data_.data() + (i % parts) * aligned;
  }

 private:
  DeviceBuffer<char> data_;
  cudaStream_t stream_;
};

// One line of results; `floor` is the time that the machine's measured ceilings allow.
struct Result {
  std::string op, shape;
  int rows;
  double us, bytes, flops, floor_us;
  std::string kernel = {};  // the one that was chosen, where there is a choice
  double copy_us = 0;       // of a plain copy that moves as many bytes, where that is the measure
};

struct Ceilings {
  std::string device;
  double copy_gb_s = 0, gemm_tflops = 0;
  double floor_us(double bytes, double flops) const {
    return std::max(bytes / copy_gb_s * 1e-3, flops / gemm_tflops * 1e-6);
  }
};

inline void print(const Result& result) {
  std::printf("%-22s %-34s rows %5d %9.2f us %8.0f GB/s %7.1f TFLOP/s %5.1f %% %s",
              result.op.c_str(), result.shape.c_str(), result.rows, result.us,
              result.bytes / result.us * 1e-3, result.flops / result.us * 1e-6,
              100 * result.floor_us / result.us, result.kernel.c_str());
  if (result.copy_us > 0) std::printf("%5.1f %% of a copy", 100 * result.copy_us / result.us);
  std::printf("\n");
  std::fflush(stdout);
}

inline void write_json(const std::string& path, const Ceilings& ceilings,
                       const std::vector<Result>& results) {
  std::FILE* file = std::fopen(path.c_str(), "w");
  OPTIMUS_CHECK(file != nullptr, "[bench] cannot write ", path);
  std::fprintf(file,
               "{\"device\": \"%s\", \"copy_gb_s\": %.1f, \"gemm_bf16_tflops\": %.1f,\n"
               " \"results\": [\n",
               ceilings.device.c_str(), ceilings.copy_gb_s, ceilings.gemm_tflops);
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    std::fprintf(
        file,
        "  {\"op\": \"%s\", \"shape\": \"%s\", \"rows\": %d, \"us\": %.3f, "
        "\"gb_s\": %.1f, \"tflops\": %.2f, \"percent_of_ceiling\": %.1f%s%s}%s\n",
        r.op.c_str(), r.shape.c_str(), r.rows, r.us, r.bytes / r.us * 1e-3, r.flops / r.us * 1e-6,
        100 * r.floor_us / r.us,
        r.copy_us == 0 ? "" : concat(", \"percent_of_copy\": ", 100 * r.copy_us / r.us).c_str(),
        r.kernel.empty() ? "" : concat(", \"kernel\": \"", r.kernel, "\"").c_str(),
        i + 1 < results.size() ? "," : "");
  }
  std::fprintf(file, " ]}\n");
  std::fclose(file);
}

}  // namespace optimus::bench

// rms_norm on the GPU against the CPU twin: plain, with residual, with a gather of rows, in place.
#include "kernels/cuda/gpu_testing.h"

namespace optimus {
namespace {

using namespace testing;

constexpr float kEps = 1e-6f;

using CudaRmsNorm = GpuTest;

struct Variant {
  bool residual, gather;
};

void run_and_compare(Rng& rng, ThreadPool& pool, DType dtype, int rows, int hidden,
                     const Variant& variant) {
  SCOPED_TRACE(concat("rows ", rows, ", hidden ", hidden, variant.residual ? ", residual" : "",
                      variant.gather ? ", gather" : ""));
  const int inputs = variant.gather ? rows + 7 : rows;
  Tensor x = random_tensor(rng, dtype, size_t(inputs) * hidden, 3);
  Tensor residual = random_tensor(rng, dtype, size_t(inputs) * hidden, 2);
  Tensor weight = random_tensor(rng, dtype, hidden), out(dtype, size_t(rows) * hidden);
  auto row_idx = random_permutation(rng, inputs);
  DeviceTensor device_x(x), device_residual(residual), device_weight(weight), device_out(out);
  auto device_idx = upload(row_idx);
  cpu::rms_norm({x.data(), variant.residual ? residual.data() : nullptr,
                 variant.gather ? row_idx.data() : nullptr, weight.data(), out.data(), rows, hidden,
                 kEps, dtype},
                pool);
  RmsNormParams params{device_x.data(),
                       variant.residual ? device_residual.data() : nullptr,
                       variant.gather ? device_idx.data() : nullptr,
                       device_weight.data(),
                       device_out.data(),
                       rows,
                       hidden,
                       kEps,
                       dtype};
  cuda::rms_norm(params, nullptr);
  expect_near_twin(device_out.read(), out);
  expect_same_as_twin(device_residual.read(), residual);  // one rounding: the same bits
  if (variant.gather || variant.residual) return;
  params.out = device_x.data();  // in place
  cuda::rms_norm(params, nullptr);
  expect_near_twin(device_x.read(), out);
}

TEST_F(CudaRmsNorm, MatchesTheCpuTwin) {
  Rng rng(111);
  for_each_dtype([&](DType dtype) {
    for (int hidden : {1, 15, 64, 100, 384, 2048, 2560, 4096, 5000, 16384, 16392}) {
      for (int rows : {0, 1, 5, 33}) {
        for (Variant variant :
             {Variant{false, false}, {true, false}, {false, true}, {true, true}}) {
          run_and_compare(rng, pool, dtype, rows, hidden, variant);
        }
      }
    }
  });
}

TEST_F(CudaRmsNorm, RejectsBadArguments) {
  float data[8] = {};
  RmsNormParams params{data, nullptr, nullptr, data, data, 2, 4, -1, DType::float32};
  expect_invalid([&] { cuda::rms_norm(params, nullptr); }, "eps must be >= 0, got -1");
  params.hidden = 0;
  expect_invalid([&] { cuda::rms_norm(params, nullptr); }, "got rows 2, hidden 0");
}

}  // namespace
}  // namespace optimus

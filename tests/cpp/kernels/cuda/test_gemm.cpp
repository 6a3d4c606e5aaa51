// gemm on the GPU against a product in double precision, planned and not; skipped without the library.
#include <dlfcn.h>

#include "kernels/cuda/gemm_stream.h"
#include "kernels/cuda/gpu_testing.h"

namespace optimus {
namespace {

using namespace testing;

class CudaGemm : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
      if (dlopen(name, RTLD_LAZY) != nullptr) return;
    }
    GTEST_SKIP() << "no libcublasLt on the library path";
  }
};

TEST_F(CudaGemm, MatchesDoublePrecision) {
  Rng rng(151);
  DeviceBuffer<char> workspace(kGemmWorkspaceBytes);
  const int shapes[][2] = {{64, 64}, {200, 72}, {1032, 512}};
  const DType types[][2] = {{DType::bfloat16, DType::bfloat16},
                            {DType::bfloat16, DType::float32},
                            {DType::float32, DType::float32}};
  for (auto [n, k] : shapes) {
    Tensor weight32 = random_tensor(rng, DType::float32, size_t(n) * k);
    for (auto [dtype, out_dtype] : types) {
      for (int rows : {0, 1, 5, 17, 64, 100}) {
        SCOPED_TRACE(concat(dtype_name(dtype), ", rows ", rows, ", n ", n, ", k ", k));
        Tensor x = random_tensor(rng, dtype, size_t(rows) * k), weight(dtype, weight32.size());
        for (size_t i = 0; i < weight.size(); ++i) weight.set(i, weight32.get(i));
        Tensor expected(out_dtype, size_t(rows) * n);
        DeviceTensor device_x(x), device_weight(weight), device_out(expected);
        for (int r = 0; r < rows; ++r) {
          for (int c = 0; c < n; ++c) {
            double sum = 0;
            for (int i = 0; i < k; ++i) sum += double(x.get(r * k + i)) * weight.get(c * k + i);
            expected.set(size_t(r) * n + c, static_cast<float>(sum));
          }
        }
        GemmParams params{
            device_x.data(), device_weight.data(), device_out.data(), rows, n, k, dtype,
            out_dtype,       workspace.data(),     workspace.size()};
        // The first rows of a bucket are planned, by measurement or not; the others find the plan.
        if (rows % 2 == 1) cuda::plan_gemm(params, rows == 5, nullptr);
        cuda::gemm(params, nullptr);
        expect_near_twin(device_out.read(), expected);
      }
    }
  }
}

TEST_F(CudaGemm, EveryPlanGivesTheProduct) {
  Rng rng(152);
  DeviceBuffer<char> workspace(kGemmWorkspaceBytes);
  const int n = 1288, k = 776;
  Tensor weight = random_tensor(rng, DType::bfloat16, size_t(n) * k);
  DeviceTensor device_weight(weight);
  for (int rows : {1, 3, 27, 64, 128, 131, 256}) {
    Tensor x = random_tensor(rng, DType::bfloat16, size_t(rows) * k);
    Tensor packed(DType::bfloat16, packed_gemm_weight_size(n, k));
    Tensor expected(DType::bfloat16, size_t(rows) * n);
    pack_gemm_weight(weight.data(), packed.data(), n, k, DType::bfloat16);
    cpu::gemm(
        {x.data(), packed.data(), expected.data(), rows, n, k, DType::bfloat16, DType::bfloat16},
        pool);
    DeviceTensor device_x(x), device_out(expected);
    GemmParams params{
        device_x.data(), device_weight.data(), device_out.data(), rows, n, k, DType::bfloat16,
        DType::bfloat16, workspace.data(),     workspace.size()};
    const std::pair<cuda::GemmKernels, const char*> plans[] = {
        {cuda::GemmKernels::any, ""},
        {cuda::GemmKernels::library, "cuBLASLt"},
        {cuda::GemmKernels::stream, "stream"}};
    for (auto [kernels, name] : plans) {
      if (kernels == cuda::GemmKernels::stream && !cuda::stream_gemm_takes(params)) continue;
      cuda::plan_gemm(params, /*measure=*/rows != 27, nullptr, kernels);
      SCOPED_TRACE(concat("rows ", rows, ": ", cuda::describe_gemm(params)));
      EXPECT_THAT(cuda::describe_gemm(params), ::testing::StartsWith(name));
      DeviceTensor out(Tensor(DType::bfloat16, expected.size()));
      params.out = out.data();
      cuda::gemm(params, nullptr);
      expect_near_twin(out.read(), expected);
      params.out = device_out.data();
    }
  }
}

TEST_F(CudaGemm, RejectsBadArguments) {
  float data[8] = {};
  GemmParams params{data, data, data, 1, 4, 3, DType::float32, DType::float32};
  expect_invalid([&] { cuda::gemm(params, nullptr); }, "multiples of 16 bytes, got 12 and 16");
  params.k = 0;
  expect_invalid([&] { cuda::gemm(params, nullptr); }, "got 1, 4, 0");
}

}  // namespace
}  // namespace optimus

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
        // The first rows of a bucket are planned; the others find the plan.
        if (rows % 2 == 1) {
          cuda::plan_gemms({params}, [&] { cuda::gemm(params, nullptr); }, nullptr);
        }
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
      cuda::plan_gemms({params}, [&] { cuda::gemm(params, nullptr); }, nullptr, kernels);
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

// Of a product with silu: what gemm_takes_silu says is what the chain was fastest with, and either way
// gives the result.
TEST_F(CudaGemm, PlansDecideAboutSilu) {
  Rng rng(153);
  DeviceBuffer<char> workspace(kGemmWorkspaceBytes);
  const int rows = 40, intermediate = 328, n = 2 * intermediate, k = 520;
  Tensor x = random_tensor(rng, DType::bfloat16, size_t(rows) * k);
  Tensor weight = random_tensor(rng, DType::bfloat16, size_t(n) * k, 2 / std::sqrt(float(k)));
  Tensor packed(DType::bfloat16, packed_gemm_weight_size(n, k));
  Tensor products(DType::float32, size_t(rows) * n);
  Tensor twin(DType::float32, size_t(rows) * intermediate);
  pack_gemm_weight(weight.data(), packed.data(), n, k, DType::bfloat16);
  cpu::gemm({x.data(), packed.data(), products.data(), rows, n, k, DType::bfloat16, DType::float32},
            pool);
  cpu::silu_mul({products.data(), twin.data(), rows, intermediate, DType::float32, true}, pool);
  DeviceTensor device_x(x), device_weight(weight);
  DeviceTensor gate_up(Tensor(DType::bfloat16, products.size()));
  const Tensor poison(DType::bfloat16, twin.size());
  DeviceTensor scratch(poison);
  char* activated = scratch.data();
  GemmParams product{
      device_x.data(), device_weight.data(), gate_up.data(),   rows, n, k, DType::bfloat16,
      DType::bfloat16, workspace.data(),     workspace.size(), true};
  if (!cuda::stream_gemm_takes(product)) GTEST_SKIP() << "needs compute capability 9.0";
  int num_with = 0, num_without = 0;
  const auto chain = [&] {
    GemmParams params = product;
    params.silu = cuda::gemm_takes_silu(product);
    if (params.silu) params.out = activated;
    cuda::gemm(params, nullptr);
    ++(params.silu ? num_with : num_without);
    if (params.silu) return;
    cuda::silu_mul({gate_up.data(), activated, rows, intermediate, DType::bfloat16, true}, nullptr);
  };
  for (cuda::GemmKernels kernels :
       {cuda::GemmKernels::any, cuda::GemmKernels::library, cuda::GemmKernels::stream}) {
    SCOPED_TRACE(static_cast<int>(kernels));
    num_with = num_without = 0;
    cuda::plan_gemms({product}, chain, nullptr, kernels);
    EXPECT_EQ(num_with > 0, kernels != cuda::GemmKernels::library);
    EXPECT_EQ(num_without > 0, kernels != cuda::GemmKernels::stream);
    if (kernels != cuda::GemmKernels::any) {
      EXPECT_EQ(cuda::gemm_takes_silu(product), kernels == cuda::GemmKernels::stream);
    }
    DeviceTensor result(poison);
    activated = result.data();
    chain();
    activated = scratch.data();
    expect_near_twin(result.read(), twin);
  }
  // What is planned stays.
  num_with = num_without = 0;
  cuda::plan_gemms({product}, chain, nullptr);
  EXPECT_EQ(num_with + num_without, 0);
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

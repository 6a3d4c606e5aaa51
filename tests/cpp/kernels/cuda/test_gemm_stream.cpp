// The streaming gemm, in every way it would be planned with, against the CPU twin: values, same bits
// every time, and chains of kernels that start before their predecessors end.
#include <functional>

#include "kernels/cuda/gemm_stream.h"
#include "kernels/cuda/gpu_testing.h"

namespace optimus {
namespace {

using namespace testing;

class CudaGemmStream : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    DeviceBuffer<char> data(1 << 16);
    GemmParams params{data.data(), data.data(), data.data(),     1,
                      64,          64,          DType::bfloat16, DType::bfloat16};
    if (!cuda::stream_gemm_takes(params)) GTEST_SKIP() << "needs compute capability 9.0";
  }

  // The CPU twin's product.
  Tensor expected(const Tensor& x, const Tensor& weight, int rows, int n, int k, DType out_dtype) {
    Tensor packed(weight.dtype(), packed_gemm_weight_size(n, k));
    Tensor out(out_dtype, size_t(rows) * n);
    pack_gemm_weight(weight.data(), packed.data(), n, k, weight.dtype());
    cpu::gemm({x.data(), packed.data(), out.data(), rows, n, k, x.dtype(), out_dtype}, pool);
    return out;
  }

  void check_all_ways(Rng& rng, int rows, int n, int k, DType out_dtype) {
    Tensor x = random_tensor(rng, DType::bfloat16, size_t(rows) * k);
    Tensor weight = random_tensor(rng, DType::bfloat16, size_t(n) * k);
    Tensor twin = expected(x, weight, rows, n, k, out_dtype);
    DeviceTensor device_x(x), device_weight(weight);
    DeviceTensor probe(Tensor(out_dtype, twin.size()));
    GemmParams params{
        device_x.data(), device_weight.data(), probe.data(), rows, n, k, DType::bfloat16,
        out_dtype};
    std::vector<cuda::StreamGemm> ways = cuda::stream_gemm_candidates(params);
    for (const cuda::StreamGemm& way : ways) {
      SCOPED_TRACE(concat(describe(way), ", rows ", rows, ", n ", n, ", k ", k, " to ",
                          dtype_name(out_dtype)));
      DeviceTensor out(Tensor(out_dtype, twin.size())), again(Tensor(out_dtype, twin.size()));
      params.out = out.data();
      cuda::stream_gemm(params, way, nullptr);
      params.out = again.data();
      for (int i = 0; i < 3; ++i) cuda::stream_gemm(params, way, nullptr);
      Tensor result = out.read();
      expect_near_twin(result, twin);
      expect_same_as_twin(again.read(), result);
      if (HasFatalFailure()) return;
    }
    num_ways += ways.size();
  }

  // With the activation: near the CPU twin's activation of the CPU twin's product, and in every way
  // the same bits as that way's product followed by silu_mul.
  void check_silu(Rng& rng, int rows, int intermediate, int k) {
    const int n = 2 * intermediate;
    Tensor x = random_tensor(rng, DType::bfloat16, size_t(rows) * k);
    Tensor weight = random_tensor(rng, DType::bfloat16, size_t(n) * k, 2 / std::sqrt(float(k)));
    Tensor products = expected(x, weight, rows, n, k, DType::float32);
    Tensor twin(DType::float32, size_t(rows) * intermediate);
    cpu::silu_mul({products.data(), twin.data(), rows, intermediate, DType::float32, true}, pool);
    DeviceTensor device_x(x), device_weight(weight);
    const Tensor poison(DType::bfloat16, twin.size());
    DeviceTensor out(poison);
    GemmParams params{device_x.data(), device_weight.data(), out.data(), rows, n, k,
                      DType::bfloat16, DType::bfloat16};
    EXPECT_EQ(cuda::gemm_takes_silu(params), rows <= 128);  // unplanned
    params.silu = true;
    cuda::gemm(params, nullptr);
    expect_near_twin(out.read(), twin);
    const std::vector<cuda::StreamGemm> ways = cuda::stream_gemm_candidates(params);
    for (const cuda::StreamGemm& way : ways) {
      SCOPED_TRACE(concat(describe(way), ", rows ", rows, ", n ", n, ", k ", k));
      DeviceTensor gate_up(Tensor(DType::bfloat16, size_t(rows) * n));
      DeviceTensor activated(poison), result(poison);
      params.silu = false;
      params.out = gate_up.data();
      cuda::stream_gemm(params, way, nullptr);
      cuda::silu_mul({gate_up.data(), activated.data(), rows, intermediate, DType::bfloat16, true},
                     nullptr);
      params.silu = true;
      params.out = result.data();
      cuda::stream_gemm(params, way, nullptr);
      const Tensor actual = result.read();
      expect_near_twin(actual, twin);
      expect_same_as_twin(actual, activated.read());
      if (HasFatalFailure()) return;
      num_splits += way.splits > 1;
    }
    num_ways += ways.size();
  }

  size_t num_ways = 0, num_splits = 0;
};

// A test for each number of rows: a sanitizer takes minutes for all of them.
class CudaGemmStreamRows : public CudaGemmStream, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(CudaGemmStream, CudaGemmStreamRows,
                         ::testing::Values(1, 8, 13, 23, 33, 40, 64, 75, 97, 128, 150, 192));

TEST_P(CudaGemmStreamRows, EveryWayMatchesTheCpuTwin) {
  const int rows = GetParam();
  Rng rng(161 + rows);
  const int n = 8 * random_int(rng, 1, 150), k = 8 * random_int(rng, 1, 160);
  check_all_ways(rng, rows, n, k, DType::bfloat16);
  if (HasFatalFailure()) return;
  check_all_ways(rng, rows, n, k, DType::float32);
  EXPECT_GE(num_ways, 4u);
}

TEST_P(CudaGemmStreamRows, EdgesOfTilesAndStages) {
  const int rows = GetParam();
  Rng rng(162 + rows);
  const int shapes[][2] = {{8, 8},     {64, 64},    {72, 56},  {128, 128}, {136, 120},
                           {192, 192}, {200, 1032}, {1024, 8}, {56, 4096}, {384, 520}};
  for (auto [n, k] : shapes) {
    check_all_ways(rng, rows, n, k, DType::bfloat16);
    if (HasFatalFailure()) return;
  }
}

TEST_P(CudaGemmStreamRows, ManyTiles) {
  const int rows = GetParam();
  Rng rng(166 + rows);
  for (auto [n, k] : {std::pair(4096, 72), {1032, 512}, {9000, 136}, {17000, 64}}) {
    check_all_ways(rng, rows, n, k, DType::bfloat16);
    if (HasFatalFailure()) return;
  }
}

TEST_P(CudaGemmStreamRows, SiluOfGatesInTurn) {
  const int rows = GetParam();
  Rng rng(165 + rows);
  for (auto [intermediate, k] :
       {std::pair(8, 64), {96, 520}, {104, 4096}, {1288, 256}, {9000, 136}, {13000, 72}}) {
    check_silu(rng, rows, intermediate, k);
    if (HasFatalFailure()) return;
  }
  EXPECT_GE(num_ways, 8u);
  EXPECT_GE(num_splits, 4u);
}

TEST_F(CudaGemmStream, RejectsSiluOfTooManyRows) {
  DeviceBuffer<char> data(1 << 16);
  GemmParams params{data.data(), data.data(), data.data(),     193,
                    64,          64,          DType::bfloat16, DType::bfloat16};
  EXPECT_FALSE(cuda::gemm_takes_silu(params));
  params.silu = true;
  expect_invalid([&] { cuda::gemm(params, nullptr); }, "silu is not for rows 193");
}

// Rows are independent of one another: with NaN in one row of x, the others keep their bits.
TEST_F(CudaGemmStream, RowsDoNotDependOnOtherRows) {
  Rng rng(163);
  const int rows = 29, n = 264, k = 520;
  Tensor x = random_tensor(rng, DType::bfloat16, size_t(rows) * k);
  Tensor weight = random_tensor(rng, DType::bfloat16, size_t(n) * k);
  DeviceTensor device_weight(weight), clean_x(x);
  for (int i = 0; i < k; ++i) x.set(11 * k + i, std::numeric_limits<float>::quiet_NaN());
  DeviceTensor device_x(x), clean(Tensor(DType::bfloat16, rows * n));
  GemmParams params{clean_x.data(),  device_weight.data(), clean.data(), rows, n, k,
                    DType::bfloat16, DType::bfloat16};
  for (const cuda::StreamGemm& way : cuda::stream_gemm_candidates(params)) {
    SCOPED_TRACE(describe(way));
    DeviceTensor out(Tensor(DType::bfloat16, rows * n));
    params.x = clean_x.data();
    params.out = clean.data();
    cuda::stream_gemm(params, way, nullptr);
    params.x = device_x.data();
    params.out = out.data();
    cuda::stream_gemm(params, way, nullptr);
    Tensor a = clean.read(), b = out.read();
    expect_same_bits(a, 0, b, 0, 11 * n);
    expect_same_bits(a, 12 * n, b, 12 * n, (rows - 12) * n);
    for (int c = 0; c < n; ++c) EXPECT_TRUE(std::isnan(b.get(11 * n + c)));
    // Fewer rows than the way was made for.
    params.x = clean_x.data();
    params.rows = 18;
    cuda::stream_gemm(params, way, nullptr);
    params.rows = rows;
    expect_same_bits(a, 0, out.read(), 0, 18 * n);
  }
}

// norm -> product -> norm -> product -> silu -> product, layer after layer, every buffer used again by
// the next layer: the same bits in a graph, where kernels start early, as one at a time.
TEST_P(CudaGemmStreamRows, ChainsInAGraphEqualPlainLaunches) {
  constexpr int kLayers = 5;
  const int rows = GetParam();
  // Many rows of few columns: sanitizers need minutes for each way.
  const int hidden_size = rows > 128 ? 136 : rows > 64 ? 264 : 520;
  const int intermediate_size = rows > 128 ? 328 : rows > 64 ? 648 : 1288;
  Rng rng(164 + rows);
  Tensor norm_weight = random_tensor(rng, DType::bfloat16, hidden_size);
  DeviceTensor device_norm(norm_weight);
  std::vector<DeviceTensor> squares, gate_ups, downs;
  for (int i = 0; i < kLayers; ++i) {
    auto add = [&](std::vector<DeviceTensor>& to, int n, int k) {
      to.emplace_back(random_tensor(rng, DType::bfloat16, size_t(n) * k, 0.05f));
    };
    add(squares, hidden_size, hidden_size);
    add(gate_ups, 2 * intermediate_size, hidden_size);
    add(downs, hidden_size, intermediate_size);
  }
  cudaStream_t stream = nullptr;
  OPTIMUS_CUDA_CHECK(cudaStreamCreate(&stream));
  Tensor start = random_tensor(rng, DType::bfloat16, size_t(rows) * hidden_size);
  DeviceTensor hidden(start), residual(start);
  DeviceTensor normed(Tensor(DType::bfloat16, start.size()));
  DeviceTensor gate_up(Tensor(DType::bfloat16, size_t(rows) * 2 * intermediate_size));
  DeviceTensor activated(Tensor(DType::bfloat16, size_t(rows) * intermediate_size));
  // Every product in another way.
  size_t turn = 0;
  auto chain = [&](const std::function<void()>& after_each) {
    turn = 0;
    auto product = [&](DeviceTensor& x, DeviceTensor& weight, DeviceTensor& out, int n, int k) {
      GemmParams params{x.data(), weight.data(),   out.data(),     rows, n,
                        k,        DType::bfloat16, DType::bfloat16};
      auto ways = cuda::stream_gemm_candidates(params);
      cuda::stream_gemm(params, ways[turn++ % ways.size()], stream);
      after_each();
    };
    auto norm = [&] {
      cuda::rms_norm({hidden.data(), residual.data(), nullptr, device_norm.data(), normed.data(),
                      rows, hidden_size, 1e-6f, DType::bfloat16},
                     stream);
      after_each();
    };
    for (int i = 0; i < kLayers; ++i) {
      norm();
      product(normed, squares[i], hidden, hidden_size, hidden_size);
      norm();
      product(normed, gate_ups[i], gate_up, 2 * intermediate_size, hidden_size);
      cuda::silu_mul({gate_up.data(), activated.data(), rows, intermediate_size, DType::bfloat16},
                     stream);
      after_each();
      product(activated, downs[i], hidden, hidden_size, intermediate_size);
    }
  };
  auto reset = [&] {
    for (DeviceTensor* tensor : {&hidden, &residual}) {
      copy_to_device(tensor->data(), static_cast<const char*>(start.data()), start.size() * 2,
                     stream);
    }
  };
  reset();
  chain([&] { OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream)); });
  Tensor plain = hidden.read(), plain_residual = residual.read();
  for (size_t i = 0; i < plain.size(); ++i) ASSERT_TRUE(std::isfinite(plain.get(i)));

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  OPTIMUS_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  chain([] {});
  OPTIMUS_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  OPTIMUS_CUDA_CHECK(cudaGraphInstantiate(&replay, graph, 0));
  for (int i = 0; i < 10; ++i) {
    reset();
    OPTIMUS_CUDA_CHECK(cudaGraphLaunch(replay, stream));
    OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream));
    expect_same_as_twin(hidden.read(), plain);
    expect_same_as_twin(residual.read(), plain_residual);
    if (HasFatalFailure()) return;
  }
  OPTIMUS_CUDA_CHECK(cudaGraphExecDestroy(replay));
  OPTIMUS_CUDA_CHECK(cudaGraphDestroy(graph));
  OPTIMUS_CUDA_CHECK(cudaStreamDestroy(stream));
}

TEST_F(CudaGemmStream, LeavesAloneWhatItDoesNotTake) {
  DeviceBuffer<char> data(1 << 16);
  GemmParams params{data.data(), data.data(), data.data(),     8,
                    64,          64,          DType::bfloat16, DType::bfloat16};
  ASSERT_TRUE(cuda::stream_gemm_takes(params));
  const cuda::StreamGemm way = cuda::stream_gemm_candidates(params).front();
  auto refused = [&](GemmParams changed) {
    EXPECT_FALSE(cuda::stream_gemm_takes(changed));
    EXPECT_TRUE(cuda::stream_gemm_candidates(changed).empty());
    expect_invalid([&] { cuda::stream_gemm(changed, way, nullptr); }, "does not take rows");
  };
  GemmParams changed = params;
  changed.rows = cuda::kStreamGemmMaxRows + 1;
  refused(changed);
  changed = params;
  changed.k = 60;
  refused(changed);
  changed = params;
  changed.dtype = changed.out_dtype = DType::float32;
  refused(changed);
  changed = params;
  changed.x = data.data() + 8;
  refused(changed);
  // More rows than the way was made for.
  changed = params;
  changed.rows = 64;
  expect_invalid([&] { cuda::stream_gemm(changed, way, nullptr); }, "does not take rows 64");
}

}  // namespace
}  // namespace optimus

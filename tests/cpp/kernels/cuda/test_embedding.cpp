// embedding on the GPU: the same bits as the CPU twin.
#include "kernels/cuda/gpu_testing.h"

namespace optimus {
namespace {

using namespace testing;

using CudaEmbedding = GpuTest;

TEST_F(CudaEmbedding, MatchesTheCpuTwin) {
  Rng rng(101);
  for_each_dtype([&](DType dtype) {
    for (int hidden : {1, 7, 64, 100, 2560}) {
      for (int rows : {0, 1, 33}) {
        int vocab_size = 50;
        Tensor table = random_tensor(rng, dtype, size_t(vocab_size) * hidden);
        Tensor expected(dtype, size_t(rows) * hidden);
        std::vector<int32_t> ids(rows);
        for (auto& id : ids) id = random_int(rng, 0, vocab_size - 1);
        DeviceTensor device_table(table), out(expected);
        DeviceBuffer<int32_t> device_ids = upload(ids);
        cpu::embedding({table.data(), ids.data(), expected.data(), rows, hidden, dtype}, pool);
        cuda::embedding({device_table.data(), device_ids.data(), out.data(), rows, hidden, dtype},
                        nullptr);
        expect_same_as_twin(out.read(), expected);
      }
    }
  });
}

TEST_F(CudaEmbedding, RunsThroughTheDispatch) {
  Rng rng(102);
  Tensor table = random_tensor(rng, DType::bfloat16, 4 * 8), zeros(DType::bfloat16, 8);
  DeviceTensor device_table(table), out(zeros);
  DeviceBuffer<int32_t> ids = upload(std::vector<int32_t>{3});
  Execution execution{Device::cuda, nullptr, nullptr};
  embedding({device_table.data(), ids.data(), out.data(), 1, 8, DType::bfloat16}, execution);
  expect_same_bits(out.read(), 0, table, 3 * 8, 8);
}

}  // namespace
}  // namespace optimus

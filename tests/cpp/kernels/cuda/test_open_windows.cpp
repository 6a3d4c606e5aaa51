// open_windows on the GPU against its CPU twin, over windows that held something else before.
#include "kernels/cuda/gpu_decode_state.h"

namespace optimus {
namespace {

using namespace testing;

class CudaOpenWindows : public GpuTest {};

TEST_F(CudaOpenWindows, IsItsCpuTwin) {
  Rng rng(5);
  for (int length : {1, 8, 32, 160}) {
    const RowMode mode = length == 1 ? RowMode::ar : RowMode::chunk;
    DecodeStateArrays expected(6, length);
    for (int32_t& token : expected.tokens) token = random_int(rng, 0, 99);
    for (uint8_t& status : expected.status) status = static_cast<uint8_t>(random_int(rng, 0, 3));
    for (int32_t& step : expected.denoise_step) step = random_int(rng, 1, 9);
    for (uint8_t& ended : expected.ended) ended = 1;
    GpuDecodeState actual(expected);

    const std::vector<int32_t> slots = {4, 0, 5}, starts = {3 * length, length, 7 * length};
    const std::vector<int32_t> num_fresh = {length == 1 ? 1 : length / 2, length == 1 ? 1 : 0,
                                            length == 1 ? 1 : length - 1};
    std::vector<int32_t> tokens(slots.size() * length);
    for (int32_t& token : tokens) token = random_int(rng, 100, 199);
    cpu::open_windows(
        {expected.view(), slots.data(), starts.data(), num_fresh.data(), tokens.data(), 3, mode},
        pool);
    auto on_gpu = [](const std::vector<int32_t>& values) { return upload(values); };
    auto gpu_slots = on_gpu(slots), gpu_starts = on_gpu(starts), gpu_fresh = on_gpu(num_fresh),
         gpu_tokens = on_gpu(tokens);
    cuda::open_windows({actual.view(), gpu_slots.data(), gpu_starts.data(), gpu_fresh.data(),
                        gpu_tokens.data(), 3, mode},
                       nullptr);
    actual.expect_same(expected);
  }
}

}  // namespace
}  // namespace optimus

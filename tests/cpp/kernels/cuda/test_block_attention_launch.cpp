// block_attention on the GPU among other launches: replayed in a graph with other lengths, and started
// before the kernel ahead of it is done.
#include "kernels/cuda/block_attention_testing.h"

namespace optimus {
namespace {

using namespace testing;
using namespace testing::attention;

using CudaBlockAttentionLaunch = GpuTest;

// One graph, captured with one step's lengths, serves steps with others.
TEST_F(CudaBlockAttentionLaunch, AGraphServesOtherLengths) {
  Rng rng(308);
  constexpr int kPages = 400, kStride = 70, kMaxSeqs = 9, kMaxRows = 320;
  Fixture fixture(rng, {8, 2, 128, 64}, kPages, kStride, kMaxSeqs, kMaxRows);
  fixture.upload_pools();
  Limits steps[] = {
      {{100}, {200, 200}},
      {std::vector<int>(32, 4000), {}, {4400}, {1}, staircase(16, 8, 333)},
      {staircase(300, 32, 300), {1000}},
      {staircase(300, 32, 300)},
      {},
      {{10}, {20}, {30}, {40}, {50}, {60}, {70}, {80}, {90}},
  };
  DeviceTensor out(fixture.poisoned_out());
  cudaStream_t stream;
  OPTIMUS_CUDA_CHECK(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  OPTIMUS_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cuda::block_attention_schedule(fixture.device_params(out.data()), stream);
  for (int layer = 0; layer < 2; ++layer) {
    cuda::block_attention(fixture.device_params(out.data()), stream);
  }
  OPTIMUS_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  OPTIMUS_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  for (const Limits& limits : steps) {
    Step step(rng, limits, 64, kPages, kStride);
    fixture.upload_step(step);
    Tensor poison = fixture.poisoned_out();
    copy_to_device(out.data(), static_cast<const char*>(poison.data()), poison.size() * 2, nullptr);
    OPTIMUS_CUDA_CHECK(cudaDeviceSynchronize());
    OPTIMUS_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream));
    fixture.expect_near(out.read(), fixture.expected(step, pool), step);
    if (HasFatalFailure()) break;
  }
  OPTIMUS_CUDA_CHECK(cudaGraphExecDestroy(executable));
  OPTIMUS_CUDA_CHECK(cudaGraphDestroy(graph));
  OPTIMUS_CUDA_CHECK(cudaStreamDestroy(stream));
}

// Rows at the ends of their sequences, and what they write: their keys and values are not there yet.
struct NewRows {
  NewRows(Rng& rng, Fixture& fixture, const Step& step)
      : width((fixture.shape.num_q_heads + 2 * fixture.shape.num_kv_heads) *
              fixture.shape.head_dim),
        qkv(rng, size_t(step.num_rows()) * width),
        k(fixture.k),
        v(fixture.v) {
    for (size_t s = 0; s + 1 < step.cu_seqlens.size(); ++s) {
      const int end = step.cu_seqlens[s + 1];
      for (int row = step.cu_seqlens[s]; row < end; ++row) {
        const int position = step.kv_limits[end - 1] - (end - row);
        const int page = step.page_table[s * fixture.stride + position / fixture.shape.page_size];
        positions.push_back(position);
        slots.push_back(page * fixture.shape.page_size + position % fixture.shape.page_size);
        write(fixture, row, slots.back());
      }
    }
  }
  void write(Fixture& fixture, int row, int slot) {
    const Shape& shape = fixture.shape;
    const int dim = shape.head_dim, page = slot / shape.page_size, entry = slot % shape.page_size;
    for (int at = 0; at < width; ++at) {
      const float value = qkv.bf16.get(size_t(row) * width + at);
      const int head = at / dim - shape.num_q_heads, kv_head = head % shape.num_kv_heads;
      if (head < 0) {
        fixture.q.set(size_t(row) * shape.num_q_heads * dim + at, value);
        continue;
      }
      const size_t to =
          ((size_t(page) * shape.num_kv_heads + kv_head) * shape.page_size + entry) * dim +
          at % dim;
      const bool is_v = head >= shape.num_kv_heads;
      (is_v ? v : k).set(to, value);
      (is_v ? fixture.v : fixture.k).set(to, std::numeric_limits<float>::quiet_NaN());
    }
  }
  int width;
  Values qkv, k, v;  // k, v: the pools once they are written
  std::vector<int32_t> positions, slots;
};

// With positions, keys are read before the kernel is done that writes the rows' own: those are not. A
// kernel of one CTA, far ahead of both for long, leaves SMs and time to be wrong.
void check_waiting(Rng& rng, const Limits& limits, ThreadPool& pool) {
  const Shape shape = {8, 2, 128, 64};
  const int stride = 18, num_pages = pages_of(limits, shape.page_size);
  Step step(rng, limits, shape.page_size, num_pages, stride);
  Fixture fixture(rng, shape, num_pages, stride, static_cast<int>(limits.size()), step.num_rows());
  fixture.poison_pages(step);
  NewRows rows(rng, fixture, step);
  fixture.upload_step(step);
  DeviceBuffer<int32_t> positions = upload(rows.positions), slots = upload(rows.slots);
  constexpr int kLong = 1 << 22;
  DeviceTensor qkv(rows.qkv.bf16), out(fixture.poisoned_out());
  DeviceBuffer<uint16_t> long_x(kLong), long_out(kLong);
  long_x.fill_bytes(0, nullptr);
  cudaStream_t stream;  // kernels of the default stream do not start early
  OPTIMUS_CUDA_CHECK(cudaStreamCreate(&stream));
  for (int round = 0; round < 2; ++round) {  // nor do those that have yet to be loaded
    fixture.upload_pools();
    BlockAttentionParams params = fixture.device_params(out.data());
    params.positions = positions.data();
    OPTIMUS_CUDA_CHECK(cudaDeviceSynchronize());
    cuda::block_attention_schedule(params, stream);
    cuda::rms_norm({long_x.data(), nullptr, nullptr, long_x.data(), long_out.data(), 1, kLong,
                    1e-6f, DType::bfloat16},
                   stream);
    cuda::qk_norm_rope_kv_write(
        {qkv.data(), nullptr, nullptr, nullptr, positions.data(), slots.data(),
         fixture.device_q->data(), fixture.device_k->data(), fixture.device_v->data(),
         step.num_rows(), shape.num_q_heads, shape.num_kv_heads, shape.head_dim, /*rotary_dim=*/0,
         shape.page_size, 1e-6f, DType::bfloat16},
        stream);
    cuda::block_attention(params, stream);
    OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream));
  }
  OPTIMUS_CUDA_CHECK(cudaStreamDestroy(stream));
  std::swap(fixture.k, rows.k);
  std::swap(fixture.v, rows.v);
  fixture.expect_near(out.read(), fixture.expected(step, pool), step);
}

TEST_F(CudaBlockAttentionLaunch, WaitsForTheKeysOfItsStep) {
  Rng rng(312);
  Limits limits = {std::vector<int>(8, 1000), {},  std::vector<int>(5, 70),
                   staircase(40, 32, 333),    {1}, std::vector<int>(64, 64)};
  check_waiting(rng, limits, pool);
  if (HasFatalFailure()) return;
  for (int i = 0; i < 150; ++i) limits.push_back(staircase(8, 8, 64 + 3 * i));  // two heads at once
  check_waiting(rng, limits, pool);
}

}  // namespace
}  // namespace optimus

// qk_norm_rope_kv_write on the GPU against the CPU twin: q, whole pages (what was not written keeps
// its poison), padding rows.
#include "kernels/cuda/gpu_testing.h"

namespace optimus {
namespace {

using namespace testing;

using CudaQkNormRopeKvWrite = GpuTest;

constexpr float kEps = 1e-6f;

struct Shape {
  int rows, num_q_heads, num_kv_heads, head_dim, rotary_dim, page_size;
  bool normed;
};

void run_and_compare(Rng& rng, ThreadPool& pool, const Shape& shape, DType dtype) {
  SCOPED_TRACE(concat("rows ", shape.rows, ", heads ", shape.num_q_heads, "/", shape.num_kv_heads,
                      " x ", shape.head_dim, ", rotary ", shape.rotary_dim));
  const int rows = shape.rows,
            width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  const int num_pages = rows / shape.page_size + 3;
  Tensor qkv = random_tensor(rng, dtype, size_t(rows) * width, 2);
  Tensor q_weight = random_tensor(rng, dtype, shape.head_dim);
  Tensor k_weight = random_tensor(rng, dtype, shape.head_dim);
  std::vector<float> inv_freq;
  for (int j = 0; j < shape.rotary_dim / 2; ++j) {
    inv_freq.push_back(std::pow(1e6f, -2.0f * j / shape.rotary_dim));
  }
  std::vector<int32_t> positions(rows);
  for (auto& position : positions) position = random_int(rng, 0, 32767);
  auto slots = random_permutation(rng, num_pages * shape.page_size);
  slots.resize(rows);
  for (int i = 2; i < rows; i += 3) {
    slots[i] = -1;
    positions[i] = 0;
  }
  Tensor q(dtype, size_t(rows) * shape.num_q_heads * shape.head_dim);
  Tensor k_pages(dtype, size_t(num_pages) * shape.num_kv_heads * shape.page_size * shape.head_dim);
  Tensor v_pages = k_pages;
  DeviceTensor device_qkv(qkv), device_q_weight(q_weight), device_k_weight(k_weight);
  DeviceTensor device_q(q), device_k(k_pages), device_v(v_pages);
  auto device_freq = upload(inv_freq);
  auto device_positions = upload(positions), device_slots = upload(slots);
  cpu::qk_norm_rope_kv_write(
      {qkv.data(), shape.normed ? q_weight.data() : nullptr,
       shape.normed ? k_weight.data() : nullptr, inv_freq.data(), positions.data(), slots.data(),
       q.data(), k_pages.data(), v_pages.data(), rows, shape.num_q_heads, shape.num_kv_heads,
       shape.head_dim, shape.rotary_dim, shape.page_size, kEps, dtype},
      pool);
  cuda::qk_norm_rope_kv_write(
      {device_qkv.data(), shape.normed ? device_q_weight.data() : nullptr,
       shape.normed ? device_k_weight.data() : nullptr, device_freq.data(), device_positions.data(),
       device_slots.data(), device_q.data(), device_k.data(), device_v.data(), rows,
       shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.rotary_dim, shape.page_size,
       kEps, dtype},
      nullptr);
  expect_near_twin(device_q.read(), q);
  expect_near_twin(device_k.read(), k_pages);
  expect_same_as_twin(device_v.read(), v_pages);
}

TEST_F(CudaQkNormRopeKvWrite, MatchesTheCpuTwin) {
  Rng rng(141);
  const Shape shapes[] = {{0, 1, 1, 64, 64, 16, true},      {1, 6, 3, 64, 64, 16, true},
                          {37, 6, 3, 64, 64, 32, true},     {20, 16, 4, 128, 64, 8, true},
                          {33, 32, 8, 128, 128, 64, true},  {5, 3, 3, 96, 96, 4, true},
                          {9, 4, 2, 96, 48, 4, true},       {6, 2, 1, 256, 256, 16, true},
                          {6, 2, 1, 256, 64, 16, false},    {9, 2, 2, 80, 40, 16, true},
                          {5, 3, 3, 96, 0, 4, false},       {7, 4, 2, 20, 10, 1, true},
                          {300, 32, 8, 128, 128, 16, true}, {260, 17, 3, 64, 32, 16, false},
                          {3, 1, 1, 512, 512, 2, true}};
  for_each_dtype([&](DType dtype) {
    for (const auto& shape : shapes) run_and_compare(rng, pool, shape, dtype);
  });
}

TEST_F(CudaQkNormRopeKvWrite, RejectsBadArguments) {
  QkNormRopeKvWriteParams params{};
  params.rows = params.num_q_heads = params.num_kv_heads = params.page_size = 1;
  params.head_dim = 17;
  auto run = [&] { cuda::qk_norm_rope_kv_write(params, nullptr); };
  expect_invalid(run, "head_dim must be even and in 2..512, got 17");
  params.head_dim = 16;
  params.rotary_dim = 18;
  expect_invalid(run, "rotary_dim must be even and in 0..head_dim (16), got 18");
}

}  // namespace
}  // namespace optimus

// block_attention on the GPU against the CPU twin in fp32 over the same bf16 values: ragged, paged,
// split and whole, every tile height; poison everywhere a kernel must not look or must write.
#include <memory>

#include "kernels/cuda/gpu_testing.h"

namespace optimus {
namespace {

using namespace testing;

using CudaBlockAttention = GpuTest;

struct Shape {
  int num_q_heads, num_kv_heads, head_dim, page_size;
};

// The limits of each sequence's rows.
using Limits = std::vector<std::vector<int>>;

// Rows whose limits climb in blocks of `block` up to `last`.
std::vector<int> staircase(int rows, int block, int last) {
  std::vector<int> limits;
  for (int i = 0; i < rows; ++i) {
    limits.push_back(std::max(1, last - (rows - 1 - i) / block * block));
  }
  return limits;
}

// Rows, limits and page tables of one step; pages of a sequence past its last limit are -1.
struct Step {
  Step(Rng& rng, const Limits& limits, int page_size, int num_pages, int stride) {
    std::vector<int32_t> order = random_permutation(rng, num_pages);
    page_table.assign(limits.size() * stride, -1);
    size_t used = 0;
    for (size_t s = 0; s < limits.size(); ++s) {
      cu_seqlens.push_back(cu_seqlens.back() + static_cast<int>(limits[s].size()));
      kv_limits.insert(kv_limits.end(), limits[s].begin(), limits[s].end());
      int last = limits[s].empty() ? 0 : limits[s].back();
      for (int i = 0; i * page_size < last; ++i) page_table[s * stride + i] = order.at(used++);
    }
  }
  int num_rows() const { return cu_seqlens.back(); }
  std::vector<int32_t> cu_seqlens = {0}, kv_limits, page_table;
};

int pages_of(const Limits& limits, int page_size) {
  int pages = 0;
  for (const auto& seq : limits) pages += seq.empty() ? 0 : (seq.back() - 1) / page_size + 1;
  return pages;
}
int longest(const Limits& limits) {
  int last = 1;
  for (const auto& seq : limits) last = std::max(last, seq.empty() ? 1 : seq.back());
  return last;
}

// bf16 values in a bf16 and in an fp32 tensor.
struct Values {
  Values(Rng& rng, size_t count, float scale = 1.0f)
      : bf16(random_tensor(rng, DType::bfloat16, count, scale)), fp32(DType::float32, count) {
    for (size_t i = 0; i < count; ++i) fp32.set(i, bf16.get(i));
  }
  void set(size_t i, float value) {
    bf16.set(i, value);
    fp32.set(i, value);
  }
  Tensor bf16, fp32;
};

// A pool and the device memory of up to `max_seqs` sequences and `max_rows` rows, on which one step
// after another can run: as an engine holds it.
struct Fixture {
  Fixture(Rng& rng, Shape shape, int num_pages, int stride, int max_seqs, int max_rows)
      : shape(shape),
        stride(stride),
        max_seqs(max_seqs),
        max_rows(max_rows),
        q(rng, size_t(max_rows) * shape.num_q_heads * shape.head_dim),
        k(rng, size_t(num_pages) * shape.num_kv_heads * shape.page_size * shape.head_dim),
        v(rng, size_t(num_pages) * shape.num_kv_heads * shape.page_size * shape.head_dim),
        num_pages(num_pages),
        cu_seqlens(max_seqs + 1),
        kv_limits(max_rows),
        page_table(size_t(max_seqs) * stride) {
    device_q = std::make_unique<DeviceTensor>(q.bf16);
    BlockAttentionParams params = device_params(nullptr);
    workspace = DeviceBuffer<char>(cuda::block_attention_workspace_bytes(params));
  }

  // Entries no row may see become NaN, in K and in V.
  void poison_pages(const Step& step) {
    std::vector<int> entries(num_pages, 0);  // valid ones of each page
    for (size_t s = 0; s + 1 < step.cu_seqlens.size(); ++s) {
      if (step.cu_seqlens[s] == step.cu_seqlens[s + 1]) continue;
      int last = step.kv_limits[step.cu_seqlens[s + 1] - 1];
      for (int i = 0; i * shape.page_size < last; ++i) {
        entries[step.page_table[s * stride + i]] =
            std::min(shape.page_size, last - i * shape.page_size);
      }
    }
    size_t row = shape.head_dim, head = row * shape.page_size;
    for (int page = 0; page < num_pages; ++page) {
      for (int h = 0; h < shape.num_kv_heads; ++h) {
        size_t first = (size_t(page) * shape.num_kv_heads + h) * head;
        for (size_t i = first + entries[page] * row; i < first + head; ++i) {
          k.set(i, std::numeric_limits<float>::quiet_NaN());
          v.set(i, std::numeric_limits<float>::quiet_NaN());
        }
      }
    }
  }

  void upload_pools() {
    device_k = std::make_unique<DeviceTensor>(k.bf16);
    device_v = std::make_unique<DeviceTensor>(v.bf16);
  }

  // Puts a step's arrays on the device; sequences up to max_seqs have no rows.
  void upload_step(const Step& step) {
    std::vector<int32_t> cu = step.cu_seqlens;
    cu.resize(max_seqs + 1, step.num_rows());
    std::vector<int32_t> table = step.page_table;
    table.resize(size_t(max_seqs) * stride, -1);
    std::vector<int32_t> limits = step.kv_limits;
    limits.resize(max_rows, -1);
    copy_to_device(cu_seqlens.data(), cu.data(), cu.size(), nullptr);
    copy_to_device(kv_limits.data(), limits.data(), limits.size(), nullptr);
    copy_to_device(page_table.data(), table.data(), table.size(), nullptr);
    OPTIMUS_CUDA_CHECK(cudaDeviceSynchronize());
  }

  BlockAttentionParams device_params(void* out) {
    return {device_q->data(),
            device_k ? device_k->data() : nullptr,
            device_v ? device_v->data() : nullptr,
            cu_seqlens.data(),
            kv_limits.data(),
            page_table.data(),
            out,
            max_seqs,
            shape.num_q_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
            stride,
            kScale,
            DType::bfloat16,
            workspace.data(),
            workspace.size(),
            max_rows};
  }

  Tensor poisoned_out() const {
    return Tensor(DType::bfloat16, size_t(max_rows) * shape.num_q_heads * shape.head_dim);
  }
  // Twice: CTAs that do not wait for each other must come to the same bits.
  Tensor run() {
    DeviceTensor out(poisoned_out()), impatient(poisoned_out());
    cuda::block_attention_schedule(device_params(out.data()), nullptr);
    cuda::block_attention(device_params(out.data()), nullptr);
    BlockAttentionParams params = device_params(impatient.data());
    params.merge_wait_cycles = -1;
    cuda::block_attention(params, nullptr);
    Tensor result = out.read();
    expect_same_bits(impatient.read(), 0, result, 0, result.size());
    return result;
  }

  Tensor expected(const Step& step, ThreadPool& pool) const {
    Tensor out(DType::float32, size_t(max_rows) * shape.num_q_heads * shape.head_dim);
    BlockAttentionParams params = {q.fp32.data(),
                                   k.fp32.data(),
                                   v.fp32.data(),
                                   step.cu_seqlens.data(),
                                   step.kv_limits.data(),
                                   step.page_table.data(),
                                   out.data(),
                                   static_cast<int>(step.cu_seqlens.size()) - 1,
                                   shape.num_q_heads,
                                   shape.num_kv_heads,
                                   shape.head_dim,
                                   shape.page_size,
                                   stride,
                                   kScale,
                                   DType::float32};
    cpu::block_attention(params, pool);
    return out;
  }

  // Each head of each row within 1% in norm; rows past the step's last keep their poison.
  void expect_near(const Tensor& actual, const Tensor& expected, const Step& step) const {
    size_t width = shape.head_dim, heads = size_t(step.num_rows()) * shape.num_q_heads;
    for (size_t head = 0; head < heads; ++head) {
      double error = 0, norm = 0;
      for (size_t i = head * width; i < (head + 1) * width; ++i) {
        error += std::pow(double{actual.get(i)} - expected.get(i), 2);
        norm += std::pow(double{expected.get(i)}, 2);
      }
      ASSERT_LT(std::sqrt(error), 1e-2 * std::sqrt(norm))
          << "row " << head / shape.num_q_heads << ", head " << head % shape.num_q_heads;
    }
    for (size_t i = heads * width; i < actual.size(); ++i) {
      ASSERT_TRUE(std::isnan(actual.get(i))) << "written past the last row, element " << i;
    }
  }

  static constexpr float kScale = 0.125f;
  Shape shape;
  int stride, max_seqs, max_rows;
  Values q, k, v;
  int num_pages;
  DeviceBuffer<int32_t> cu_seqlens, kv_limits, page_table;
  DeviceBuffer<char> workspace;
  std::unique_ptr<DeviceTensor> device_q, device_k, device_v;
};

// Runs one step with some room to spare in every bound, and compares.
void check_step(Rng& rng, Shape shape, const Limits& limits, ThreadPool& pool) {
  SCOPED_TRACE(::testing::Message()
               << shape.num_q_heads << "/" << shape.num_kv_heads << " x " << shape.head_dim
               << ", pages of " << shape.page_size << ", " << limits.size() << " sequences");
  int stride = (longest(limits) - 1) / shape.page_size + 3;
  int num_pages = pages_of(limits, shape.page_size) + 2;
  Step step(rng, limits, shape.page_size, num_pages, stride);
  Fixture fixture(rng, shape, num_pages, stride, static_cast<int>(limits.size()) + 2,
                  step.num_rows() + 3);
  fixture.poison_pages(step);
  fixture.upload_pools();
  fixture.upload_step(step);
  Tensor actual = fixture.run();
  fixture.expect_near(actual, fixture.expected(step, pool), step);
  expect_same_bits(fixture.run(), 0, actual, 0, actual.size());
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinSmall) {
  Rng rng(301);
  Limits limits = {{1},
                   {},
                   staircase(5, 1, 70),
                   staircase(32, 32, 200),
                   staircase(40, 8, 63),
                   {64},
                   {},
                   {65, 65, 128, 129, 130},
                   {}};
  for (Shape shape : {Shape{1, 1, 64, 16}, Shape{6, 2, 128, 32}, Shape{8, 2, 128, 64},
                      Shape{16, 1, 64, 128}, Shape{5, 1, 128, 16}}) {
    check_step(rng, shape, limits, pool);
  }
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinAtEveryTileHeight) {
  Rng rng(302);
  for (int rows : {1, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 65}) {
    for (int head_dim : {64, 128}) {
      Limits limits = {staircase(rows, 32, 777), std::vector<int>(rows, 1300),
                       staircase(rows, 1, 500)};
      check_step(rng, {8, 2, head_dim, 64}, limits, pool);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnLongSequences) {
  Rng rng(303);
  check_step(rng, {4, 1, 128, 64}, {{32768}, {1}, {31999, 32000}, {63}}, pool);
  check_step(rng, {8, 1, 128, 128}, {staircase(8, 8, 20000)}, pool);
  check_step(rng, {4, 1, 64, 16}, {std::vector<int>(32, 9999), {17}}, pool);
}

// Requests of one length: heads in equal parts, or several whole heads per share.
TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnEvenSteps) {
  Rng rng(311);
  for (int num_seqs : {1, 2, 16, 33}) {
    for (int rows : {1, 5, 9, 40}) {
      for (int last : {50, 64 + rows, 700}) {
        Limits limits(num_seqs, staircase(rows, 32, last));
        check_step(rng, {16, 8, 64, 64}, limits, pool);
        if (HasFatalFailure()) return;
      }
    }
  }
  check_step(rng, {8, 2, 128, 64}, Limits(1, std::vector<int>(32, 4100)), pool);
}

// Shares of many tiles: the ring of slots goes round several times, within and across pieces.
TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnLongShares) {
  Rng rng(310);
  for (int head_dim : {64, 128}) {
    for (int rows : {4, 9, 16, 33}) {
      Limits limits(6, std::vector<int>(rows, 4000));
      limits[3] = {};
      limits[4] = staircase(rows, 32, 9000);
      limits[5] = std::vector<int>(rows > 4 ? 2 : 20, 2000);
      check_step(rng, {8, 4, head_dim, 64}, limits, pool);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnPrefillBesideDecode) {
  Rng rng(304);
  check_step(rng, {8, 2, 128, 64},
             {staircase(300, 32, 300), {900}, staircase(160, 32, 480), std::vector<int>(8, 1500)},
             pool);
  check_step(rng, {4, 1, 64, 32}, {staircase(700, 1, 700), std::vector<int>(2, 3000)}, pool);
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnManySequences) {
  Rng rng(305);
  for (int num_seqs : {300, 5000}) {  // beyond one chunk of the schedule, beyond its cached offsets
    Limits limits(num_seqs);
    for (auto& seq : limits) {
      if (random_int(rng, 0, 3) > 0) seq = staircase(1, 1, random_int(rng, 1, 40));
    }
    check_step(rng, {2, 1, 64, 16}, limits, pool);
  }
}

// Limits of `rows` rows of one request: causal, block staircase, chunk window, or anything.
std::vector<int> random_limits(Rng& rng, int rows, int longest) {
  int last = random_int(rng, rows, std::max(rows, longest));
  switch (random_int(rng, 0, 3)) {
    case 0:
      return staircase(rows, 1, last);
    case 1:
      return staircase(rows, 32, last);
    case 2:
      return std::vector<int>(rows, last);
    default: {
      std::vector<int> limits(rows);
      for (auto& limit : limits) limit = random_int(rng, 1, last);
      std::sort(limits.begin(), limits.end());
      return limits;
    }
  }
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnRandomSteps) {
  Rng rng(306);
  for (int trial = 0; trial < 40; ++trial) {
    int group = random_int(rng, 1, 16), num_kv_heads = random_int(rng, 1, 3);
    Shape shape = {group * num_kv_heads, num_kv_heads, random_int(rng, 0, 1) ? 64 : 128,
                   16 << random_int(rng, 0, 3)};
    Limits limits(random_int(rng, 1, 12));
    for (auto& seq : limits) {
      int rows = random_int(rng, 0, 4) == 0 ? 0 : 1 << random_int(rng, 0, 5);
      if (rows > 0) seq = random_limits(rng, rows, random_int(rng, 0, 3) == 0 ? 2500 : 200);
    }
    check_step(rng, shape, limits, pool);
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaBlockAttention, LargeScoresDoNotOverflow) {
  Rng rng(307);
  Limits limits = {staircase(8, 4, 150)};
  Step step(rng, limits, 16, 12, 12);
  Fixture fixture(rng, {2, 1, 64, 16}, 12, 12, 1, 8);
  for (size_t i = 0; i < fixture.q.bf16.size(); ++i) fixture.q.set(i, fixture.q.bf16.get(i) * 1e4f);
  fixture.device_q = std::make_unique<DeviceTensor>(fixture.q.bf16);
  fixture.upload_pools();
  fixture.upload_step(step);
  Tensor out = fixture.run();
  for (size_t i = 0; i < out.size(); ++i) ASSERT_TRUE(std::isfinite(out.get(i)));
}

// One graph, captured with one step's lengths, serves steps with others.
TEST_F(CudaBlockAttention, AGraphServesOtherLengths) {
  Rng rng(308);
  constexpr int kPages = 400, kStride = 70, kMaxSeqs = 9, kMaxRows = 320;
  Fixture fixture(rng, {8, 2, 128, 64}, kPages, kStride, kMaxSeqs, kMaxRows);
  fixture.upload_pools();
  Limits steps[] = {
      {{100}, {200, 200}},
      {std::vector<int>(32, 4000), {}, {4400}, {1}, staircase(16, 8, 333)},
      {staircase(300, 32, 300), {1000}},
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

// Rows at the ends of their sequences, whose keys the kernel before writes: with positions the others
// are read before it is done, those are not. A kernel of one CTA, far ahead of both for long, leaves
// SMs and time to be wrong.
TEST_F(CudaBlockAttention, WaitsForTheKeysOfItsStep) {
  Rng rng(312);
  const Shape shape = {8, 2, 128, 64};
  const Limits limits = {std::vector<int>(8, 1000), {},  std::vector<int>(5, 70),
                         staircase(40, 32, 333),    {1}, std::vector<int>(64, 64)};
  const int stride = 18, num_pages = pages_of(limits, shape.page_size);
  Step step(rng, limits, shape.page_size, num_pages, stride);
  const int rows = step.num_rows(), width = (shape.num_q_heads + 2 * shape.num_kv_heads) * 128;
  Fixture fixture(rng, shape, num_pages, stride, static_cast<int>(limits.size()), rows);
  fixture.poison_pages(step);
  Values qkv(rng, size_t(rows) * width), written_k = fixture.k, written_v = fixture.v;
  std::vector<int32_t> positions, slots;
  for (size_t s = 0; s < limits.size(); ++s) {
    const int count = static_cast<int>(limits[s].size());
    for (int i = 0; i < count; ++i) {
      const int position = limits[s].back() - count + i, row = static_cast<int>(positions.size());
      const int page = step.page_table[s * stride + position / 64];
      positions.push_back(position);
      slots.push_back(page * 64 + position % 64);
      for (int at = 0; at < width; ++at) {
        const float value = qkv.bf16.get(size_t(row) * width + at);
        const int head = at / 128 - shape.num_q_heads, kv_head = head % shape.num_kv_heads;
        if (head < 0) {
          fixture.q.set(size_t(row) * shape.num_q_heads * 128 + at, value);
          continue;
        }
        const size_t to =
            ((size_t(page) * shape.num_kv_heads + kv_head) * 64 + position % 64) * 128 + at % 128;
        const bool is_v = head >= shape.num_kv_heads;
        (is_v ? written_v : written_k).set(to, value);
        (is_v ? fixture.v : fixture.k).set(to, std::numeric_limits<float>::quiet_NaN());
      }
    }
  }
  fixture.upload_pools();
  fixture.upload_step(step);
  std::swap(fixture.k, written_k);  // as the host has it, once it is written
  std::swap(fixture.v, written_v);
  DeviceBuffer<int32_t> device_positions(rows), device_slots(rows);
  copy_to_device(device_positions.data(), positions.data(), rows, nullptr);
  copy_to_device(device_slots.data(), slots.data(), rows, nullptr);
  constexpr int kLong = 1 << 22;
  DeviceTensor device_qkv(qkv.bf16), out(fixture.poisoned_out());
  DeviceBuffer<uint16_t> long_x(kLong), long_out(kLong);
  long_x.fill_bytes(0, nullptr);
  BlockAttentionParams params = fixture.device_params(out.data());
  params.positions = device_positions.data();
  OPTIMUS_CUDA_CHECK(cudaDeviceSynchronize());
  cudaStream_t stream;  // kernels of the default stream do not start early
  OPTIMUS_CUDA_CHECK(cudaStreamCreate(&stream));
  cuda::block_attention_schedule(params, stream);
  cuda::rms_norm({long_x.data(), nullptr, nullptr, long_x.data(), long_out.data(), 1, kLong, 1e-6f,
                  DType::bfloat16},
                 stream);
  cuda::qk_norm_rope_kv_write(
      {device_qkv.data(), nullptr, nullptr, nullptr, device_positions.data(), device_slots.data(),
       fixture.device_q->data(), fixture.device_k->data(), fixture.device_v->data(), rows,
       shape.num_q_heads, shape.num_kv_heads, shape.head_dim, /*rotary_dim=*/0, shape.page_size,
       1e-6f, DType::bfloat16},
      stream);
  cuda::block_attention(params, stream);
  OPTIMUS_CUDA_CHECK(cudaStreamSynchronize(stream));
  OPTIMUS_CUDA_CHECK(cudaStreamDestroy(stream));
  fixture.expect_near(out.read(), fixture.expected(step, pool), step);
}

TEST_F(CudaBlockAttention, RejectsBadArguments) {
  Rng rng(309);
  Fixture fixture(rng, {4, 2, 64, 16}, 4, 4, 1, 8);
  fixture.upload_pools();
  BlockAttentionParams good = fixture.device_params(fixture.device_q->data()), bad = good;
  auto run = [&] { cuda::block_attention(bad, nullptr); };
  bad.dtype = DType::float32;
  expect_invalid(run, "dtype must be bfloat16, got float32");
  bad = good;
  bad.head_dim = 80;
  expect_invalid(run, "head_dim must be 64 or 128, got 80");
  bad = good;
  bad.page_size = 48;
  expect_invalid(run, "page_size must be 16, 32, 64 or 128, got 48");
  bad = good;
  bad.num_q_heads = 34;
  expect_invalid(run, "num_q_heads must be 1 to 16 times num_kv_heads, got 34 and 2");
  bad = good;
  bad.scale = 0;
  expect_invalid(run, "scale must be > 0, got 0");
  bad = good;
  bad.workspace_bytes = 16;
  expect_invalid(run, "workspace_bytes must be >= ");
  bad = good;
  bad.workspace = nullptr;
  expect_invalid(run, "workspace must not be null");
  bad = good;
  bad.k_pages = nullptr;
  expect_invalid(run, "null pointer");
  bad.num_seqs = 0;
  cuda::block_attention(bad, nullptr);  // nothing to do
  cuda::block_attention_schedule(bad, nullptr);
}

}  // namespace
}  // namespace optimus

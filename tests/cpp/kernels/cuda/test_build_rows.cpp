// build_rows on the GPU: every output array, poison included, and the state, equal the CPU twin's.
#include <array>
#include <memory>

#include "kernels/cuda/gpu_decode_state.h"

namespace optimus {
namespace {

using namespace testing;

using CudaBuildRows = GpuTest;
// A test for each case of the long ones: a sanitizer takes minutes for all of them.
class CudaBuildRowsBlocks : public CudaBuildRows, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(CudaBuildRows, CudaBuildRowsBlocks,
                         ::testing::Values(1, 3, 4, 16, 32, 40));

constexpr int32_t kPoison = -77;
constexpr int32_t kMaskTokenId = 999;

// The plan and the outputs of one step, with one guard entry behind each output.
struct Step {
  Step(int max_rows, int max_seqs, int stride)
      : per_row(7, std::vector<int32_t>(max_rows + 1, kPoison)),
        cu_seqlens(max_seqs + 2, kPoison),
        page_table(max_seqs * stride + 1, kPoison),
        counts(3, kPoison),
        max_rows(max_rows) {}

  int num_seqs() const { return static_cast<int>(slots.size()); }

  std::vector<int32_t> slots, chunk_lengths, prefill_lens, prefill_starts, prefill_offsets;
  std::vector<int32_t> prefill_tokens;
  std::vector<uint8_t> refresh;
  std::vector<std::vector<int32_t>> per_row;
  std::vector<int32_t> cu_seqlens, page_table, counts;
  int max_rows, pad_rows_to = 0, pad_seqs_to = 0;
};

struct BatchShape {
  RowMode mode;
  int num_seqs, block_length, page_size;
  bool with_prefill;
};

DecodeStateArrays random_state(Rng& rng, const BatchShape& shape, int num_slots) {
  constexpr int kNumBlocks = 6;
  int stride =
      ceil(double(kNumBlocks * shape.block_length) / shape.page_size) + random_int(rng, 0, 3);
  DecodeStateArrays state(num_slots, shape.block_length, stride);
  state.page_table = random_permutation(rng, num_slots * stride);
  for (int slot = 0; slot < num_slots; ++slot) {
    state.block_start[slot] = random_int(rng, 1, kNumBlocks - 1) * shape.block_length;
    state.ended[slot] = random_int(rng, 0, 5) == 0;
    auto current = random_block(rng, shape.block_length);
    for (int i = 0; i < shape.block_length; ++i) {
      state.status[state.first(slot) + i] = random_int(rng, 0, 3) == 0 ? kFresh : kCached;
      state.status[state.current(slot) + i] = current[i];
    }
    for (int i = 0; i < 2 * shape.block_length; ++i) {
      bool known = is_known(state.status[state.first(slot) + i]);
      state.tokens[state.first(slot) + i] = known ? random_int(rng, 0, 500) : -1;
    }
  }
  return state;
}

Step random_step(Rng& rng, const BatchShape& shape, const DecodeStateArrays& state) {
  const int length = shape.block_length;
  Step step(shape.num_seqs * 4 * length + 40, shape.num_seqs + 20, state.page_table_stride);
  auto order = random_permutation(rng, state.num_slots);
  for (int i = 0; i < shape.num_seqs; ++i) {
    bool prefill = shape.with_prefill && random_int(rng, 0, 2) == 0;
    int len = prefill ? random_int(rng, 1, 3 * length) : 0;
    step.slots.push_back(order[i]);
    step.chunk_lengths.push_back(random_int(rng, 0, length + 1));
    step.refresh.push_back(random_int(rng, 0, 1));
    step.prefill_lens.push_back(len);
    step.prefill_starts.push_back(random_int(rng, 0, 2) * length);
    step.prefill_offsets.push_back(static_cast<int32_t>(step.prefill_tokens.size()));
    for (int t = 0; t < len; ++t) step.prefill_tokens.push_back(random_int(rng, 0, 500));
  }
  return step;
}

BuildRowsParams params_of(const BatchShape& shape, const Step& step, const DecodeState& state,
                          bool causal) {
  BuildRowsParams params{};
  params.state = state;
  params.num_seqs = step.num_seqs();
  params.max_rows = step.max_rows;
  params.page_size = shape.page_size;
  params.mask_token_id = kMaskTokenId;
  params.prefill_causal = causal;
  params.mode = shape.mode;
  params.pad_rows_to = step.pad_rows_to;
  params.pad_seqs_to = step.pad_seqs_to;
  return params;
}

void set_rows(BuildRowsParams& params, std::vector<int32_t*> per_row, int32_t* cu_seqlens,
              int32_t* page_table, int32_t* counts) {
  params.rows = {per_row[0], per_row[1], per_row[2], per_row[3], cu_seqlens,
                 page_table, per_row[4], per_row[5], per_row[6], counts};
}

void set_plan(BuildRowsParams& params, const int32_t* slots, const int32_t* chunk_lengths,
              const uint8_t* refresh, const int32_t* lens, const int32_t* starts,
              const int32_t* offsets, const int32_t* tokens) {
  params.slots = slots;
  params.chunk_lengths = chunk_lengths;
  params.refresh = refresh;
  params.prefill_lens = lens;
  params.prefill_starts = starts;
  params.prefill_offsets = offsets;
  params.prefill_tokens = tokens;
}

void run_and_compare(ThreadPool& pool, const BatchShape& shape, DecodeStateArrays state, Step step,
                     bool causal) {
  GpuDecodeState device_state(state);
  auto slots = upload(step.slots), chunk_lengths = upload(step.chunk_lengths);
  auto lens = upload(step.prefill_lens), starts = upload(step.prefill_starts);
  auto offsets = upload(step.prefill_offsets), tokens = upload(step.prefill_tokens);
  auto refresh = upload(step.refresh);
  auto cu_seqlens = upload(step.cu_seqlens), page_table = upload(step.page_table);
  auto counts = upload(step.counts);
  std::vector<DeviceBuffer<int32_t>> per_row;
  std::vector<int32_t*> device_rows, host_rows;
  for (auto& array : step.per_row) {
    per_row.push_back(upload(array));
    device_rows.push_back(per_row.back().data());
    host_rows.push_back(array.data());
  }
  BuildRowsParams on_device = params_of(shape, step, device_state.view(), causal);
  set_plan(on_device, slots.data(), chunk_lengths.data(), refresh.data(), lens.data(),
           starts.data(), offsets.data(), tokens.data());
  set_rows(on_device, device_rows, cu_seqlens.data(), page_table.data(), counts.data());
  const auto release = [](uint64_t* counts) { release_host_memory(counts, Device::cuda); };
  std::unique_ptr<uint64_t, decltype(release)> host_counts(
      static_cast<uint64_t*>(allocate_host_memory(sizeof(uint64_t), Device::cuda)), release);
  *host_counts = kNoCounts;
  on_device.host_counts = host_counts.get();
  BuildRowsParams on_host = params_of(shape, step, state.view(), causal);
  set_plan(on_host, step.slots.data(), step.chunk_lengths.data(), step.refresh.data(),
           step.prefill_lens.data(), step.prefill_starts.data(), step.prefill_offsets.data(),
           step.prefill_tokens.data());
  set_rows(on_host, host_rows, step.cu_seqlens.data(), step.page_table.data(), step.counts.data());

  cpu::build_rows(on_host, pool);
  cuda::build_rows(on_device, nullptr);
  ASSERT_EQ(download(counts), step.counts);
  ASSERT_EQ(*host_counts, uint64_t(step.counts[1]) << 32 | step.counts[0]);
  ASSERT_EQ(download(cu_seqlens), step.cu_seqlens);
  for (size_t i = 0; i < per_row.size(); ++i) {
    ASSERT_EQ(download(per_row[i]), step.per_row[i]) << "array " << i << " of StepRows";
  }
  ASSERT_EQ(download(page_table), step.page_table);
  device_state.expect_same(state);
}

void check_random(Rng& rng, ThreadPool& pool, const BatchShape& shape, int trials) {
  for (int trial = 0; trial < trials; ++trial) {
    SCOPED_TRACE(concat("sequences ", shape.num_seqs, ", block ", shape.block_length, ", page ",
                        shape.page_size, ", mode ", int(shape.mode), ", trial ", trial));
    DecodeStateArrays state = random_state(rng, shape, shape.num_seqs + random_int(rng, 0, 3));
    Step step = random_step(rng, shape, state);
    if (trial % 2 == 1) {
      step.pad_rows_to = step.max_rows - random_int(rng, 0, 20);
      step.pad_seqs_to = shape.num_seqs + random_int(rng, 0, 20);
    }
    run_and_compare(pool, shape, state, step, random_int(rng, 0, 1) == 1);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST_P(CudaBuildRowsBlocks, SmallMixedBatches) {
  const int length = GetParam();
  Rng rng(161 + length);
  for (RowMode mode : {RowMode::chunk, RowMode::block}) {
    for (int page_size : {1, 8, 64}) {
      for (int num_seqs : {0, 1, 7}) {
        check_random(rng, pool, {mode, num_seqs, length, page_size, true}, 4);
      }
    }
  }
}

class CudaBuildRowsLarge : public CudaBuildRows,
                           public ::testing::WithParamInterface<std::array<int, 4>> {};
INSTANTIATE_TEST_SUITE_P(CudaBuildRows, CudaBuildRowsLarge,
                         ::testing::Values(std::array{100, 32, 64, 1}, std::array{512, 16, 32, 1},
                                           std::array{1024, 8, 16, 0}, std::array{3, 1024, 64, 1}));

TEST_P(CudaBuildRowsLarge, LargeBatches) {
  const auto [num_seqs, length, page_size, with_prefill] = GetParam();
  Rng rng(162 + num_seqs);
  for (RowMode mode : {RowMode::chunk, RowMode::block}) {
    check_random(rng, pool, {mode, num_seqs, length, page_size, with_prefill != 0}, 2);
  }
}

TEST_F(CudaBuildRows, Autoregressive) {
  Rng rng(163);
  for (int num_seqs : {1, 9, 300}) {
    check_random(rng, pool, {RowMode::ar, num_seqs, 1, 16, true}, 4);
  }
}

TEST_F(CudaBuildRows, RowsBehindTheLimitAreLost) {
  Rng rng(164);
  BatchShape shape{RowMode::block, 2, 4, 4, false};
  DecodeStateArrays state = random_state(rng, shape, 2);
  GpuDecodeState device_state(state);
  auto slots = upload(std::vector<int32_t>{0, 1}), zeros = upload(std::vector<int32_t>{0, 0});
  auto refresh = upload(std::vector<uint8_t>{0, 0});
  const int max_rows = 3;
  std::vector<DeviceBuffer<int32_t>> per_row;
  std::vector<int32_t*> pointers;
  for (int i = 0; i < 7; ++i) {
    per_row.push_back(upload(std::vector<int32_t>(max_rows + 1, kPoison)));
    pointers.push_back(per_row.back().data());
  }
  auto cu_seqlens = upload(std::vector<int32_t>(3)), counts = upload(std::vector<int32_t>(2));
  auto page_table = upload(std::vector<int32_t>(2 * state.page_table_stride));
  BuildRowsParams params = params_of(shape, Step(max_rows, 2, 1), device_state.view(), false);
  params.num_seqs = 2;
  set_plan(params, slots.data(), zeros.data(), refresh.data(), zeros.data(), zeros.data(),
           zeros.data(), nullptr);
  set_rows(params, pointers, cu_seqlens.data(), page_table.data(), counts.data());
  cuda::build_rows(params, nullptr);
  EXPECT_GE(download(counts)[0], 8);
  for (auto& array : per_row) EXPECT_EQ(download(array).back(), kPoison);
}

}  // namespace
}  // namespace optimus

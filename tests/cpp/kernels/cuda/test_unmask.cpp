// unmask on the GPU against the CPU twin: candidates up to rounding, tokens, commits and state
// exactly. Draws whose outcome hangs on less than rounding are left out.
#include "kernels/cuda/gpu_decode_state.h"
#include "kernels/noise.h"
#include "kernels/unmask_call.h"

namespace optimus {
namespace {

using namespace testing;

using CudaUnmask = GpuTest;
// A test for each case of the long ones: a sanitizer takes minutes for all of them.
class CudaUnmaskSeeds : public CudaUnmask, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(CudaUnmask, CudaUnmaskSeeds, ::testing::Range(171, 177));
class CudaUnmaskVocabularies : public CudaUnmask, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(CudaUnmask, CudaUnmaskVocabularies,
                         ::testing::Values(5, 700, 9000, 40000));

struct GpuResult {
  std::vector<int32_t> token_ids, num_fresh, num_masked;
  std::vector<float> confidence, logprob, entropy;
  std::vector<uint8_t> committed;
  std::vector<int32_t> slots, offsets;
};

// Runs the call on the GPU, `times` in a row, and compares the state with `expected`'s.
GpuResult run_on_gpu(UnmaskCall call, const UnmaskCall& expected, bool check_state = true,
                     int times = 1) {
  call.poison_outputs();
  GpuDecodeState state(call.state);
  DeviceTensor logits(call.logits);
  auto slots = upload(call.logit_slots), offsets = upload(call.logit_offsets);
  auto token_ids = upload(call.token_ids);
  auto confidence = upload(call.confidence), logprob = upload(call.logprob);
  auto entropy = upload(call.entropy);
  auto committed = upload(call.committed);
  auto out_slots = upload(call.slots), out_offsets = upload(call.offsets);
  auto num_fresh = upload(call.num_fresh), num_masked = upload(call.num_masked);
  DeviceBuffer<char> workspace(
      std::max<size_t>(1, unmask_workspace_bytes(call.num_rows(), call.vocab_size)));
  workspace.fill_bytes(0);
  UnmaskParams params = call.params();
  params.logits = logits.data();
  params.logit_slots = slots.data();
  params.logit_offsets = offsets.data();
  params.state = state.view();
  params.out = {token_ids.data(), confidence.data(), logprob.data(),    entropy.data(),
                committed.data(), out_slots.data(),  out_offsets.data()};
  params.num_fresh = num_fresh.data();
  params.num_masked = num_masked.data();
  params.workspace = workspace.data();
  params.workspace_bytes = workspace.size();
  DeviceBuffer<int32_t> num_rows;
  if (call.num_rows_on_device != nullptr) {
    num_rows = upload(std::vector<int32_t>{*call.num_rows_on_device});
    params.num_logit_rows_device = num_rows.data();
  }
  for (int i = 0; i < times; ++i) cuda::unmask(params, nullptr);
  const std::vector<char> left = download(workspace);
  EXPECT_EQ(std::count(left.begin(), left.end(), 0), int64_t(left.size())) << "for the next call";
  GpuResult result{download(token_ids),  download(num_fresh), download(num_masked),
                   download(confidence), download(logprob),   download(entropy),
                   download(committed),  download(out_slots), download(out_offsets)};
  if (check_state) state.expect_same(expected.state);
  return result;
}

void expect_near(float actual, float expected, float absolute, const char* what, int row) {
  ASSERT_NEAR(actual, expected, 1e-3f * std::abs(expected) + absolute) << what << " of row " << row;
}

void expect_same_result(const GpuResult& actual, const UnmaskCall& expected) {
  ASSERT_EQ(actual.token_ids, expected.token_ids);
  for (size_t i = 0; i < actual.confidence.size(); ++i) {
    int row = static_cast<int>(i);
    ASSERT_LE(actual.confidence[i], 1.0f);
    expect_near(actual.confidence[i], expected.confidence[i], 1e-6f, "confidence", row);
    expect_near(actual.logprob[i], expected.logprob[i], 1e-4f, "logprob", row);
    expect_near(actual.entropy[i], expected.entropy[i], 1e-4f, "entropy", row);
  }
  ASSERT_EQ(actual.committed, expected.committed);
  ASSERT_EQ(actual.slots, expected.slots);
  ASSERT_EQ(actual.offsets, expected.offsets);
  ASSERT_EQ(actual.num_fresh, expected.num_fresh);
  ASSERT_EQ(actual.num_masked, expected.num_masked);
}

// Every strategy on random windows. Thresholds and bounds are random numbers, logits too: a
// comparison that rounding decides is improbable, and is looked for below.
UnmaskCall random_call(Rng& rng, DType dtype, int num_slots, int block_length, int vocab_size) {
  UnmaskCall call(dtype, num_slots, block_length, vocab_size);
  DecodeStateArrays& state = call.state;
  std::uniform_real_distribution<float> unit(0.0f, 1.0f);
  for (int32_t slot : random_permutation(rng, num_slots)) {
    state.strategy[slot] = static_cast<uint8_t>(random_int(rng, 0, 3));
    state.confidence_threshold[slot] = unit(rng);
    state.entropy_bound[slot] = 5 * unit(rng);
    state.denoising_steps[slot] = random_int(rng, 1, block_length);
    state.denoise_step[slot] = random_int(rng, 0, block_length);
    state.block_start[slot] = block_length * random_int(rng, 1, 9);
    state.seed[slot] = rng();
    state.first_output[slot] = state.block_start[slot] + random_int(rng, -9, block_length / 2);
    state.end_position[slot] = state.block_start[slot] + random_int(rng, 1, 4 * block_length);
    for (int k = random_int(rng, 0, kMaxStopTokens); k > 0; --k) {  // of few, so that some are met
      state.stop_token_ids[slot * kMaxStopTokens + k - 1] =
          random_int(rng, 0, 1) ? random_int(rng, 0, vocab_size - 1)
                                : 100 + random_int(rng, 0, block_length - 1);
    }
    state.ended[slot] = random_int(rng, 0, 1);
    std::vector<uint8_t> status = random_block(rng, block_length);
    std::vector<int> masks;
    for (int i = 0; i < block_length; ++i) {
      state.status[state.current(slot) + i] = status[i];
      if (is_known(status[i])) state.tokens[state.current(slot) + i] = 100 + i;
      if (is_masked(status[i])) masks.push_back(i);
    }
    if (num_slots > 1 && random_int(rng, 0, 4) == 0) continue;  // not in this step
    masks.resize(random_int(rng, 1, static_cast<int>(masks.size())));
    for (int i : masks) state.status[state.current(slot) + i] = kPresent;
    call.add_rows(slot, masks);
  }
  call.set_random_logits(rng, 3.0f);
  return call;
}

// Whether a decision of the finished call hangs on less than rounding: two candidates of one slot,
// or one and its threshold or bound, closer than 1e-4 (unless they are equal rows).
bool is_close_call(const UnmaskCall& call) {
  auto close = [](float a, float b) { return std::abs(a - b) < 1e-4f * (std::abs(a) + 0.1f); };
  for (int i = 0; i < call.num_rows(); ++i) {
    const int slot = call.logit_slots[i];
    if (close(call.confidence[i], call.state.confidence_threshold[slot])) return true;
    float sum = 0;  // of any prefix by entropy: checked for the prefix that ends at this row
    for (int j = 0; j < call.num_rows(); ++j) {
      if (call.logit_slots[j] != slot) continue;
      if (call.entropy[j] <= call.entropy[i]) sum += call.entropy[j];
      if (i < j && (close(call.confidence[i], call.confidence[j]) ||
                    close(call.entropy[i], call.entropy[j]))) {
        return true;
      }
    }
    if (close(sum, call.state.entropy_bound[slot])) return true;
  }
  return false;
}

TEST_P(CudaUnmaskSeeds, EveryStrategyMatchesTheCpuTwin) {
  Rng rng(GetParam());
  int compared = 0;
  for (int trial = 0; trial < 50; ++trial) {
    DType dtype = trial % 2 ? DType::float32 : DType::bfloat16;
    UnmaskCall call = random_call(rng, dtype, random_int(rng, 1, 6), random_int(rng, 1, 40),
                                  random_int(rng, 2, 90));
    UnmaskCall expected = call;
    expected.run(pool);
    if (is_close_call(expected)) continue;
    ++compared;
    SCOPED_TRACE(concat("trial ", trial));
    ASSERT_NO_FATAL_FAILURE(expect_same_result(run_on_gpu(call, expected), expected));
  }
  EXPECT_GT(compared, 30);
}

TEST_F(CudaUnmask, EqualRowsCommitInOrder) {
  // All rows alike: only the tie rules decide.
  for (int strategy = 0; strategy < 4; ++strategy) {
    for (int steps : {1, 2, 5, 16}) {
      UnmaskCall call(DType::bfloat16, 1, 16, 7);
      call.state.strategy[0] = static_cast<uint8_t>(strategy);
      call.state.denoising_steps[0] = steps;
      call.state.entropy_bound[0] = 4.1f;
      call.add_rows(0, iota(16));
      std::vector<float> logits(16 * 7, 1.0f);
      call.set_logits(logits);
      UnmaskCall expected = call;
      expected.run(pool);
      ASSERT_NO_FATAL_FAILURE(expect_same_result(run_on_gpu(call, expected), expected));
      EXPECT_EQ(expected.token_ids[0], 0) << "the lowest of equal tokens";
    }
  }
}

// One slot per row, so that strategies decide nothing but the candidate.
UnmaskCall vocabulary_call(Rng& rng, DType dtype, int rows, int vocab_size, int stride,
                           float scale) {
  UnmaskCall call(dtype, rows, 4, vocab_size);
  call.logits_stride = stride;
  for (int slot = 0; slot < rows; ++slot) {
    call.state.seed[slot] = rng();
    call.add_rows(slot, {slot % 4});
  }
  call.set_random_logits(rng, scale);
  return call;
}

TEST_F(CudaUnmask, LargeVocabularies) {
  Rng rng(172);
  for_each_dtype([&](DType dtype) {
    for (auto [vocab_size, stride] : std::vector<std::pair<int, int>>{{1, 0},
                                                                      {1023, 0},
                                                                      {1025, 0},
                                                                      {8191, 0},
                                                                      {8193, 0},
                                                                      {8192, 8200},
                                                                      {20001, 20008},
                                                                      {151936, 0}}) {
      SCOPED_TRACE(concat("vocabulary ", vocab_size, ", stride ", stride));
      UnmaskCall call = vocabulary_call(rng, dtype, 3, vocab_size, stride, 2.0f);
      // Minus infinity bans a token; a large logit late in the row wins; and first among equals.
      if (vocab_size > 100) {
        const int width = stride > 0 ? stride : vocab_size;
        for (int i = 0; i < 50; ++i) {
          call.logits.set(random_int(rng, 0, vocab_size - 1),
                          -std::numeric_limits<float>::infinity());
        }
        for (int v = 1000; v < std::min(vocab_size, 3500); ++v) {  // whole tiles too
          if (v != 1001) call.logits.set(v, -std::numeric_limits<float>::infinity());
        }
        for (int v = 4000; v < std::min(vocab_size, 6500); ++v) call.logits.set(v, -1e10f);
        call.logits.set(size_t(width) + vocab_size - 1, 30.0f);
        for (int at : {vocab_size - 2, 77, 78}) call.logits.set(size_t(2) * width + at, 25.0f);
      }
      UnmaskCall expected = call;
      expected.run(pool);
      ASSERT_NO_FATAL_FAILURE(expect_same_result(run_on_gpu(call, expected), expected));
      if (vocab_size > 100) {
        EXPECT_EQ(expected.token_ids[1], vocab_size - 1);
        EXPECT_EQ(expected.token_ids[2], 77);
      }
    }
  });
}

// Rounding leaves nothing of the largest weight: no confidence, but a token, and an end.
TEST_F(CudaUnmask, LargeLogitsHaveATokenToo) {
  Rng rng(180);
  for_each_dtype([&](DType dtype) {
    for (float largest : {1e10f, -1e10f, 3e38f}) {
      for (float temperature : {0.0f, 1e-4f}) {
        UnmaskCall call = vocabulary_call(rng, dtype, 3, 5000, 0, 1.0f);
        for (size_t i = 0; i < 3 * 5000; ++i) call.logits.set(i, -3.2e38f);
        for (int row = 0; row < 3; ++row) call.logits.set(size_t(row) * 5000 + 2222, largest);
        for (float& each : call.state.temperature) each = temperature;
        const GpuResult result = run_on_gpu(call, call, false);
        for (int row = 0; row < 3; ++row) {
          const int32_t token = result.token_ids[row];
          EXPECT_TRUE(token == 2222 || (temperature > 0 && token >= 0 && token < 5000)) << token;
        }
      }
    }
  });
}

TEST_F(CudaUnmask, TheLowestOfEqualLogitsWins) {
  Rng rng(179);
  for_each_dtype([&](DType dtype) {
    for (int vocab_size : {6000, 40000, 40003}) {
      UnmaskCall call = vocabulary_call(rng, dtype, 50, vocab_size, 0, 1.0f);
      for (int row = 0; row < call.num_rows(); ++row) {
        // Of one chunk, of one tile, of any.
        const int first = random_int(rng, 0, vocab_size - 1);
        for (int distance : {row % 8, random_int(rng, 0, 1000), random_int(rng, 0, vocab_size)}) {
          const int column = std::min(first + distance, vocab_size - 1);
          call.logits.set(size_t(row) * vocab_size + column, row % 3 == 0 ? -0.0f : 12.0f);
        }
        if (row % 3 != 0) continue;  // zeros of either sign are equal
        for (int v = 0; v < vocab_size; ++v) {
          const size_t at = size_t(row) * vocab_size + v;
          if (call.logits.get(at) != 0) call.logits.set(at, -1 - std::abs(call.logits.get(at)));
        }
        call.logits.set(size_t(row) * vocab_size + vocab_size - 1, 0.0f);
      }
      UnmaskCall expected = call;
      expected.run(pool);
      ASSERT_NO_FATAL_FAILURE(expect_same_result(run_on_gpu(call, expected), expected));
    }
  });
}

// Rows whose slots decide nothing by closeness: of 1 to block_length masks each.
UnmaskCall sequential_call(Rng& rng, int num_slots, int block_length, int vocab_size) {
  UnmaskCall call(DType::bfloat16, num_slots, block_length, vocab_size);
  DecodeStateArrays& state = call.state;
  for (int32_t slot : random_permutation(rng, num_slots)) {
    state.strategy[slot] = kSequential;
    state.denoising_steps[slot] = random_int(rng, 1, block_length);
    state.seed[slot] = rng();
    state.temperature[slot] = slot % 3 == 0 ? 0.7f : 0.0f;
    state.top_p[slot] = slot % 6 == 3 ? 0.9f : 1.0f;
    state.top_k[slot] = slot % 9 == 6 ? 20 : 0;
    for (int i = 0; i < block_length; ++i) state.status[state.current(slot) + i] = kPresent;
    call.add_rows(slot, iota(random_int(rng, 1, block_length)));
  }
  call.set_random_logits(rng, 2.0f);
  return call;
}

bool is_clear_sample(const UnmaskCall& call, int row);

// The call after `times` runs on the CPU. Slots with draws that rounding decides become greedy in
// `call`.
UnmaskCall run_clearly(UnmaskCall& call, int times, ThreadPool& pool) {
  for (;;) {
    UnmaskCall expected = call;
    bool clear = true;
    for (int i = 0; i < times; ++i) {
      for (int row = 0; row < call.num_rows(); ++row) {
        float& temperature = call.state.temperature[call.logit_slots[row]];
        if (temperature == 0 || is_clear_sample(expected, row)) continue;
        temperature = 0;
        clear = false;
      }
      expected.run(pool);
    }
    if (clear) return expected;
  }
}

// More rows than warps of a launch, slots that are spread over CTAs, rows that end within a CTA's
// share of the tiles; and again, with what the first call left in the workspace.
TEST_F(CudaUnmask, ManyRowsOfManySlots) {
  Rng rng(177);
  for (auto [num_slots, block_length, vocab_size] :
       {std::tuple(600, 8, 1500), std::tuple(3, 1024, 300), std::tuple(70, 4, 9000)}) {
    for (int times : {1, 2}) {
      SCOPED_TRACE(concat(num_slots, " slots, ", times, " times"));
      UnmaskCall call = sequential_call(rng, num_slots, block_length, vocab_size);
      UnmaskCall expected = run_clearly(call, times, pool);
      ASSERT_NO_FATAL_FAILURE(
          expect_same_result(run_on_gpu(call, expected, true, times), expected));
    }
  }
}

// ---------------------------------------------------------------------------------------- sampling

struct Filter {
  int top_k;
  float top_p;
};

// Whether the CPU's token beats every other one of its set by more than rounding, and the set's
// floor is as clear. The set is recomputed in double precision.
bool is_clear_sample(const UnmaskCall& call, int row) {
  const int slot = call.logit_slots[row], vocab_size = call.vocab_size;
  const float scale = 1.0f / call.state.temperature[slot];
  std::vector<double> x(vocab_size);
  for (int v = 0; v < vocab_size; ++v) x[v] = call.logit(row, v) * scale;
  std::vector<double> sorted = x;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  int keep = call.state.top_k[slot] > 0 ? std::min(call.state.top_k[slot], vocab_size) : vocab_size;
  double total = 0, mass = 0, floor = sorted[keep - 1];
  for (int i = 0; i < keep; ++i) total += std::exp(sorted[i] - sorted[0]);
  const double target = double{call.state.top_p[slot]} * total;
  if (call.state.top_p[slot] < 1.0f) {
    for (int i = 0; i < keep; ++i) {
      mass += std::exp(sorted[i] - sorted[0]);
      if (std::abs(mass - target) < 1e-5 * total) return false;
      if (mass < target) continue;
      floor = sorted[i];
      break;
    }
  }
  const int32_t position = call.state.block_start[slot] + call.logit_offsets[row];
  uint64_t key = noise_key(call.state.seed[slot], position, call.state.denoise_step[slot]);
  double best = -1e300, second = -1e300;
  for (int v = 0; v < vocab_size; ++v) {
    if (x[v] < floor) continue;
    double noisy = x[v] + gumbel_noise(key, v);
    if (noisy > best) std::swap(best, noisy);
    second = std::max(second, noisy);
  }
  return best - second > 1e-4;
}

void check_sampling(Rng& rng, ThreadPool& pool, DType dtype, int vocab_size, float scale,
                    float temperature, const Filter& filter) {
  SCOPED_TRACE(concat("vocabulary ", vocab_size, ", temperature ", temperature, ", top_k ",
                      filter.top_k, ", top_p ", filter.top_p));
  UnmaskCall call = vocabulary_call(rng, dtype, 4, vocab_size, 0, scale);
  for (int slot = 0; slot < 4; ++slot) {
    call.state.temperature[slot] = slot == 3 ? 0.0f : temperature;  // one greedy among them
    call.state.top_k[slot] = filter.top_k;
    call.state.top_p[slot] = filter.top_p;
  }
  UnmaskCall expected = call;
  expected.run(pool);
  for (int row = 0; row < 3; ++row) {
    if (!is_clear_sample(call, row)) return;
  }
  ASSERT_NO_FATAL_FAILURE(expect_same_result(run_on_gpu(call, expected), expected));
}

TEST_P(CudaUnmaskVocabularies, SampledTokensMatchTheCpuTwin) {
  const int vocab_size = GetParam();
  Rng rng(173 + vocab_size);
  const Filter filters[] = {{0, 1.0f},       {1, 1.0f},  {20, 0.95f}, {50, 1.0f},
                            {0, 0.5f},       {0, 0.95f}, {300, 0.9f}, {300, 1.0f},
                            {100000, 0.99f}, {0, 0.05f}, {0, 0.0f}};
  for_each_dtype([&](DType dtype) {
    for (float scale : {0.5f, 4.0f}) {
      for (const Filter& filter : filters) {
        for (float temperature : {0.6f, 1.3f}) {
          check_sampling(rng, pool, dtype, vocab_size, scale, temperature, filter);
          if (HasFatalFailure()) return;
        }
      }
    }
  });
}

TEST_F(CudaUnmask, TiesAtTheFloorAllPass) {
  // 600 equal largest logits: top-k = 5 lets all of them through, and noise chooses among them.
  Rng rng(174);
  UnmaskCall call = vocabulary_call(rng, DType::bfloat16, 4, 3000, 0, 1.0f);
  for (int row = 0; row < 4; ++row) {
    call.state.temperature[row] = 0.7f;
    call.state.top_k[row] = row < 2 ? 5 : 0;
    call.state.top_p[row] = row == 1 || row == 3 ? 0.3f : 1.0f;
    for (int i = 0; i < 600; ++i) call.logits.set(size_t(row) * 3000 + 5 * i, 9.0f);
  }
  UnmaskCall expected = call;
  expected.run(pool);
  ASSERT_NO_FATAL_FAILURE(expect_same_result(run_on_gpu(call, expected), expected));
}

TEST_F(CudaUnmask, PaddingRowsAreNotLookedAt) {
  Rng rng(175);
  for (bool counted : {false, true}) {
    UnmaskCall call = random_call(rng, DType::bfloat16, 5, 8, 64);
    UnmaskCall expected = call;
    expected.run(pool);
    if (is_close_call(expected)) continue;
    const int32_t num_rows = call.num_rows();
    call.add_rows(counted ? call.logit_slots.back() : -1, {0, 0, 0});
    if (counted) call.num_rows_on_device = &num_rows;
    Tensor logits(DType::bfloat16, size_t(num_rows + 3) * 64);
    for (size_t i = 0; i < size_t(num_rows) * 64; ++i) logits.set(i, call.logits.get(i));
    call.logits = logits;
    GpuResult result = run_on_gpu(call, expected);
    EXPECT_EQ(result.num_fresh, expected.num_fresh);
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(result.token_ids[num_rows + i], UnmaskCall::kPoison);
      EXPECT_EQ(result.committed[num_rows + i], UnmaskCall::kPoisonByte);
    }
  }
}

// Most rows of a captured graph may be padding: those behind the real ones, and slots of -1.
TEST_F(CudaUnmask, ManyPaddingRows) {
  Rng rng(178);
  UnmaskCall call = sequential_call(rng, 40, 6, 5000);
  for (float& temperature : call.state.temperature) temperature = 0;
  UnmaskCall expected = call;
  expected.run(pool);
  const int32_t num_rows = call.num_rows(), counted_rows = num_rows + 30;
  call.add_rows(-1, std::vector<int>(30, 0));
  call.add_rows(call.logit_slots[num_rows - 1], std::vector<int>(400, 0));
  call.num_rows_on_device = &counted_rows;
  Tensor logits(DType::bfloat16, size_t(call.num_rows()) * 5000);
  for (size_t i = 0; i < size_t(num_rows) * 5000; ++i) logits.set(i, call.logits.get(i));
  call.logits = logits;
  GpuResult result = run_on_gpu(call, expected);
  EXPECT_EQ(result.num_fresh, expected.num_fresh);
  EXPECT_EQ(result.num_masked, expected.num_masked);
  for (int row = 0; row < num_rows; ++row) {
    ASSERT_EQ(result.token_ids[row], expected.token_ids[row]);
    ASSERT_EQ(result.committed[row], expected.committed[row]);
  }
  for (int row = num_rows; row < call.num_rows(); ++row) {
    ASSERT_EQ(result.token_ids[row], UnmaskCall::kPoison);
    ASSERT_EQ(result.committed[row], UnmaskCall::kPoisonByte);
  }
}

TEST_F(CudaUnmask, RowsDoNotDependOnTheBatch) {
  Rng rng(176);
  UnmaskCall batch = vocabulary_call(rng, DType::bfloat16, 200, 30000, 0, 3.0f);
  batch.state.temperature[5] = 0.8f;
  batch.state.top_p[5] = 0.9f;
  UnmaskCall one(DType::bfloat16, 200, 4, 30000);
  one.state = batch.state;
  one.add_rows(5, {5 % 4});
  one.set_random_logits(rng, 1.0f);
  for (int v = 0; v < 30000; ++v) one.logits.set(v, batch.logit(5, v));
  GpuResult all = run_on_gpu(batch, batch, false), alone = run_on_gpu(one, one, false);
  EXPECT_EQ(all.confidence[5], alone.confidence[0]);
  EXPECT_EQ(all.entropy[5], alone.entropy[0]);
  EXPECT_EQ(all.logprob[5], alone.logprob[0]);
  EXPECT_EQ(all.token_ids[5], alone.token_ids[0]);
}

TEST_F(CudaUnmask, RejectsASmallWorkspace) {
  UnmaskCall call(DType::float32, 1, 4, 3);
  call.add_rows(0, {0});
  call.set_logits({1, 2, 3});
  call.poison_outputs();
  UnmaskParams params = call.params();
  expect_invalid([&] { cuda::unmask(params, nullptr); }, "workspace must hold 36 bytes, got 0");
}

}  // namespace
}  // namespace optimus

// unmask's decisions: every strategy against an obvious rule over random confidences and windows,
// quotas, ties, the strict threshold, and the window that slides when its block has no mask left.
#include <map>

#include "kernels/unmask_call.h"

namespace optimus {
namespace {

using namespace testing;

// Two tokens whose logits differ by `margin`: confidence 1 / (1 + exp(-|margin|)).
UnmaskCall two_token_call(int block_length, const std::vector<int>& offsets,
                          const std::vector<float>& margins) {
  UnmaskCall call(DType::float32, 1, block_length, 2);
  call.add_rows(0, offsets);
  std::vector<float> logits;
  for (float margin : margins) logits.insert(logits.end(), {0.0f, margin});
  call.set_logits(logits);
  return call;
}

std::vector<int> committed_rows(const UnmaskCall& call) {
  std::vector<int> rows;
  for (int i = 0; i < call.num_rows(); ++i) {
    EXPECT_LE(call.committed[i], 1);
    if (call.committed[i]) rows.push_back(i);
  }
  return rows;
}

// ------------------------------------------------------------------------------------- reference

// Rows [begin, end) by ascending (value, row); the rows ascend with the positions.
std::vector<int> rank_rows(int begin, int end, const std::vector<double>& value) {
  std::set<std::pair<double, int>> ranked;
  for (int i = begin; i < end; ++i) ranked.insert({value[i], i});
  std::vector<int> rows;
  for (auto [v, i] : ranked) rows.push_back(i);
  return rows;
}

// The commits of one slot's rows, from the candidates' reported confidence and entropy.
std::set<int> expected_commits(const UnmaskCall& before, const UnmaskCall& after, int begin,
                               int end) {
  const DecodeStateArrays& state = before.state;
  const int slot = before.logit_slots[begin], steps = state.denoising_steps[slot];
  int quota = state.block_length / steps;
  if (state.denoise_step[slot] < state.block_length % steps) ++quota;
  quota = std::min(std::max(quota, 1), end - begin);

  std::vector<double> doubt(end), entropy(end);
  std::set<int> above, commits;
  for (int i = begin; i < end; ++i) {
    doubt[i] = -double{after.confidence[i]};
    entropy[i] = after.entropy[i];
    if (after.confidence[i] > state.confidence_threshold[slot]) above.insert(i);
  }
  std::vector<int> best = rank_rows(begin, end, doubt);
  switch (state.strategy[slot]) {
    case kLowConfidenceDynamic:
      if (static_cast<int>(above.size()) >= quota) return above;
      [[fallthrough]];
    case kLowConfidenceStatic:
      return {best.begin(), best.begin() + quota};
    case kSequential:
      for (int i = begin; i < begin + quota; ++i) commits.insert(i);
      return commits;
    default:
      break;
  }
  double sum = 0;
  for (int i : rank_rows(begin, end, entropy)) {
    sum += entropy[i];
    if (!commits.empty() && sum > state.entropy_bound[slot]) break;
    commits.insert(i);
  }
  return commits;
}

// The state after committing `commits` (rows) of a slot.
void expect_window(const UnmaskCall& before, const UnmaskCall& after, int slot,
                   const std::set<int>& commits) {
  const int length = before.state.block_length;
  const int first = before.state.first(slot);
  std::vector<int32_t> tokens(before.state.tokens.begin() + first,
                              before.state.tokens.begin() + first + 2 * length);
  std::vector<uint8_t> status(before.state.status.begin() + first,
                              before.state.status.begin() + first + 2 * length);
  for (int row : commits) {
    tokens[length + before.logit_offsets[row]] = after.token_ids[row];
    status[length + before.logit_offsets[row]] = kFresh;
  }
  int start = before.state.block_start[slot], step = before.state.denoise_step[slot] + 1;
  if (std::none_of(status.begin() + length, status.end(), is_masked)) {
    tokens.erase(tokens.begin(), tokens.begin() + length);
    status.erase(status.begin(), status.begin() + length);
    tokens.resize(2 * length, -1);
    status.resize(2 * length, kAbsent);
    start += length;
    step = 0;
  }
  EXPECT_EQ(after.state.block_start[slot], start);
  EXPECT_EQ(after.state.denoise_step[slot], step);
  EXPECT_EQ(after.num_fresh[slot], std::count(status.begin(), status.end(), kFresh));
  EXPECT_EQ(after.num_masked[slot],
            std::count_if(status.begin() + length, status.end(), is_masked));
  for (int i = 0; i < 2 * length; ++i) {
    ASSERT_EQ(int{after.state.status[first + i]}, int{status[i]}) << "window entry " << i;
    ASSERT_EQ(after.state.tokens[first + i], tokens[i]) << "window entry " << i;
  }
}

// A step for some of the slots, in any order: the first few masks of a random window each.
UnmaskCall random_call(Rng& rng, int num_slots, int block_length) {
  UnmaskCall call(DType::float32, num_slots, block_length, random_int(rng, 2, 5));
  DecodeStateArrays& state = call.state;
  for (int32_t slot : random_permutation(rng, num_slots)) {
    state.strategy[slot] = static_cast<uint8_t>(random_int(rng, 0, 3));
    state.confidence_threshold[slot] = 0.1f * random_int(rng, 0, 10);
    state.entropy_bound[slot] = 0.2f * random_int(rng, 0, 10);
    state.denoising_steps[slot] = random_int(rng, 1, block_length);
    state.denoise_step[slot] = random_int(rng, 0, block_length);
    state.block_start[slot] = block_length * random_int(rng, 1, 9);
    std::vector<uint8_t> status = random_block(rng, block_length);
    std::vector<int> masks;
    for (int i = 0; i < block_length; ++i) {
      state.status[state.current(slot) + i] = status[i];
      if (is_known(status[i])) state.tokens[state.current(slot) + i] = 100 + i;
      if (is_masked(status[i])) masks.push_back(i);
    }
    if (num_slots > 1 && random_int(rng, 0, 3) == 0) continue;  // not in this step
    masks.resize(random_int(rng, 1, static_cast<int>(masks.size())));
    for (int i : masks) state.status[state.current(slot) + i] = kPresent;
    call.add_rows(slot, masks);
  }
  // Few distinct values: ties are common.
  std::vector<float> logits(static_cast<size_t>(call.num_rows()) * call.vocab_size);
  for (float& value : logits) value = random_int(rng, 0, 4);
  call.set_logits(logits);
  return call;
}

TEST(Unmask, EveryStrategyFollowsItsRule) {
  Rng rng(1);
  for (int trial = 0; trial < 1500; ++trial) {
    UnmaskCall before = random_call(rng, random_int(rng, 1, 5), random_int(rng, 1, 12));
    UnmaskCall after = before;
    after.run();
    std::set<int> slots_seen;
    for (int begin = 0, end = 0; begin < before.num_rows(); begin = end) {
      int slot = before.logit_slots[begin];
      while (end < before.num_rows() && before.logit_slots[end] == slot) ++end;
      std::set<int> expected = expected_commits(before, after, begin, end);
      for (int i = begin; i < end; ++i) {
        ASSERT_EQ(int{after.committed[i]}, expected.count(i)) << "trial " << trial << ", row " << i;
      }
      ASSERT_NO_FATAL_FAILURE(expect_window(before, after, slot, expected)) << "trial " << trial;
      slots_seen.insert(slot);
    }
    for (int slot = 0; slot < before.state.num_slots; ++slot) {
      if (slots_seen.count(slot)) continue;
      EXPECT_EQ(after.num_fresh[slot], UnmaskCall::kPoison) << "a slot that is not in the step";
      EXPECT_EQ(after.num_masked[slot], UnmaskCall::kPoison);
      EXPECT_EQ(after.state.block_start[slot], before.state.block_start[slot]);
      EXPECT_EQ(after.state.denoise_step[slot], before.state.denoise_step[slot]);
      for (int i = 0; i < 2 * before.state.block_length; ++i) {
        int at = before.state.first(slot) + i;
        ASSERT_EQ(after.state.status[at], before.state.status[at]);
        ASSERT_EQ(after.state.tokens[at], before.state.tokens[at]);
      }
    }
  }
}

TEST(Unmask, ThresholdIsStrict) {
  // Equal logits: the confidence is exactly one half.
  for (float threshold : {0.5f, std::nextafter(0.5f, 0.0f)}) {
    UnmaskCall call = two_token_call(4, {0, 1, 2}, {0, 0, 0});
    call.state.confidence_threshold[0] = threshold;
    call.run();
    EXPECT_EQ(call.confidence[0], 0.5f);
    std::vector<int> expected = threshold < 0.5f ? std::vector{0, 1, 2} : std::vector{0};
    EXPECT_EQ(committed_rows(call), expected) << "threshold " << threshold;
  }
}

TEST(Unmask, CertainCandidateDoesNotPassThresholdOne) {
  UnmaskCall call = two_token_call(4, {0, 1, 2, 3}, {1, 500, 2, 500});
  call.state.confidence_threshold[0] = 1.0f;
  call.run();
  EXPECT_EQ(call.confidence[1], 1.0f);
  EXPECT_EQ(committed_rows(call), (std::vector{1})) << "only the best, the lower of the two";
}

TEST(Unmask, DynamicFallsBackToTheBest) {
  UnmaskCall call = two_token_call(8, {0, 2, 3, 7}, {0.1f, 0.3f, 0.3f, 0.2f});
  call.state.denoising_steps[0] = 3;  // quotas 3, 3, 2
  call.run();
  EXPECT_EQ(committed_rows(call), (std::vector{1, 2, 3}));
  EXPECT_EQ(call.state.tokens[call.state.current(0) + 7], 1);
}

TEST(Unmask, DynamicWithFewerAboveThanTheQuotaTakesTheBest) {
  UnmaskCall call = two_token_call(4, {0, 1, 2, 3}, {0.2f, 0.1f, 9.0f, 0.3f});
  call.state.denoising_steps[0] = 2;
  call.run();
  EXPECT_EQ(committed_rows(call), (std::vector{2, 3}));
}

TEST(Unmask, EntropyBound) {
  // Entropies about 0, ln 2, 0.33, 0.33 nats.
  std::vector<float> margins = {30.0f, 0.0f, 2.2f, 2.2f};
  for (auto [bound, expected] : std::vector<std::pair<float, std::vector<int>>>{
           {0.0f, {0}}, {0.4f, {0, 2}}, {0.7f, {0, 2, 3}}, {9.0f, {0, 1, 2, 3}}}) {
    UnmaskCall call = two_token_call(8, {0, 1, 2, 3}, margins);
    call.state.strategy[0] = kEntropyBounded;
    call.state.entropy_bound[0] = bound;
    call.run();
    EXPECT_EQ(committed_rows(call), expected) << "bound " << bound;
  }
}

TEST(Unmask, QuotasOfABlockAddUpToItsLength) {
  for (int length : {1, 5, 8, 32}) {
    for (int steps = 1; steps <= length; ++steps) {
      for (UnmaskingStrategy strategy : {kLowConfidenceStatic, kSequential}) {
        UnmaskCall call(DType::float32, 1, length, 2);
        call.state.strategy[0] = strategy;
        call.state.denoising_steps[0] = steps;
        int start = call.state.block_start[0], num_steps = 0;
        while (call.state.block_start[0] == start) {
          call.logit_slots.clear();
          call.logit_offsets.clear();
          for (int i = 0; i < length; ++i) {
            if (is_masked(call.state.status[call.state.current(0) + i])) call.add_rows(0, {i});
          }
          call.set_logits(std::vector<float>(2 * call.num_rows(), 0.0f));
          call.run();
          size_t quota = length / steps + (num_steps < length % steps ? 1 : 0);
          ASSERT_EQ(committed_rows(call).size(), quota) << "step " << num_steps;
          ++num_steps;
        }
        EXPECT_EQ(num_steps, steps) << "block length " << length;
      }
    }
  }
}

TEST(Unmask, FinishedBlockBecomesThePreviousOne) {
  UnmaskCall call = two_token_call(4, {1, 3}, {5.0f, -5.0f});
  int start = call.state.block_start[0];
  call.state.tokens = {7, 7, 7, 7, 40, -1, 42, -1};
  call.state.status = {kCached, kCached, kCached, kCached, kCached, kPresent, kFresh, kPresent};
  call.state.denoise_step[0] = 3;
  call.run();
  EXPECT_EQ(call.state.tokens, (std::vector<int32_t>{40, 1, 42, 0, -1, -1, -1, -1}));
  EXPECT_EQ(call.state.status, (std::vector<uint8_t>{kCached, kFresh, kFresh, kFresh, kAbsent,
                                                     kAbsent, kAbsent, kAbsent}));
  EXPECT_EQ(call.state.block_start[0], start + 4);
  EXPECT_EQ(call.state.denoise_step[0], 0);
  EXPECT_EQ(call.num_fresh[0], 3);
  EXPECT_EQ(call.num_masked[0], 4);
}

// A request is done when a stop token, or its last one, is known and nothing before is masked.
TEST(Unmask, NotesWhichRequestsHaveEnded) {
  constexpr int kVocabSize = 6;
  Rng rng(11);
  int num_ended = 0, num_trials = 3000;
  for (int trial = 0; trial < num_trials; ++trial) {
    const int length = random_int(rng, 1, 6);
    UnmaskCall call(DType::float32, 1, length, kVocabSize);
    DecodeStateArrays& state = call.state;
    const int start = state.block_start[0], current = state.current(0);
    const std::vector<uint8_t> status = random_block(rng, length);
    std::map<int, int> known;  // position -> token
    for (int i = 0; i < length; ++i) {
      state.status[current + i] = status[i];
      if (is_masked(status[i])) call.add_rows(0, {i});
      if (is_known(status[i])) {
        state.tokens[current + i] = known[start + i] = random_int(rng, 0, kVocabSize - 1);
      }
    }
    state.first_output[0] = start + random_int(rng, -2, length - 1);
    state.end_position[0] = state.first_output[0] + random_int(rng, 1, 2 * length);
    state.ended[0] = random_int(rng, 0, 1);
    std::set<int> stops;
    while (random_int(rng, 0, 2) > 0 && static_cast<int>(stops.size()) < 3) {
      stops.insert(random_int(rng, 0, kVocabSize - 1));
    }
    std::copy(stops.begin(), stops.end(), state.stop_token_ids.begin() + random_int(rng, 0, 4));
    state.confidence_threshold[0] = 0.3f;
    call.set_random_logits(rng, 2.0f);
    call.run();

    for (int i : committed_rows(call)) known[start + call.logit_offsets[i]] = call.token_ids[i];
    bool ended = false;
    for (int position = start; known.count(position); ++position) {
      if (position < state.first_output[0]) continue;
      ended |= stops.count(known[position]) > 0 || position + 1 >= state.end_position[0];
    }
    ASSERT_EQ(call.state.ended[0], ended) << "trial " << trial;
    num_ended += ended;
  }
  EXPECT_GT(num_ended, num_trials / 10);
  EXPECT_LT(num_ended, num_trials * 9 / 10);
}

TEST(Unmask, PaddingRowsAreNotLookedAt) {
  for (bool counted : {false, true}) {
    UnmaskCall call = two_token_call(4, {1, 3}, {5.0f, -5.0f});
    UnmaskCall expected = call;
    expected.run();
    const int32_t num_rows = 2;
    if (counted) {
      call.num_rows_on_device = &num_rows;
      call.add_rows(0, {0, 2});  // of an earlier step
    } else {
      call.add_rows(-1, {0, 0});
    }
    std::vector<float> logits(8, std::numeric_limits<float>::quiet_NaN());
    for (int i = 0; i < 4; ++i) logits[i] = expected.logits.get(i);
    call.set_logits(logits);
    call.run();
    EXPECT_EQ(call.state.tokens, expected.state.tokens);
    EXPECT_EQ(call.state.status, expected.state.status);
    EXPECT_EQ(call.num_fresh, expected.num_fresh);
    for (int i = 2; i < 4; ++i) {
      EXPECT_EQ(call.token_ids[i], UnmaskCall::kPoison);
      EXPECT_EQ(call.committed[i], UnmaskCall::kPoisonByte);
    }
  }
}

TEST(Unmask, NoRowsChangeNothing) {
  UnmaskCall call(DType::float32, 2, 4, 3);
  DecodeStateArrays before = call.state;
  call.run();
  EXPECT_EQ(call.state.status, before.status);
  EXPECT_EQ(call.state.block_start, before.block_start);
  EXPECT_EQ(call.num_fresh, (std::vector<int32_t>(2, UnmaskCall::kPoison)));
}

}  // namespace
}  // namespace optimus

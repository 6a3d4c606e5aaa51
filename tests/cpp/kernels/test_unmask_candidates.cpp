// unmask's candidates: token, confidence, logprob and entropy against a softmax in double; the
// sampled token against a plain re-implementation of the noise of kernels/noise.h, against the
// top-k/top-p sets, and against the probabilities it must have.
#include <map>
#include <tuple>

#include "kernels/noise.h"
#include "kernels/unmask_call.h"

namespace optimus {
namespace {

using namespace testing;

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Softmax {
  Softmax(const UnmaskCall& call, int row, double temperature) {
    double max = -kInf, sum = 0;
    for (int v = 0; v < call.vocab_size; ++v) {
      max = std::max(max, call.logit(row, v) / temperature);
    }
    for (int v = 0; v < call.vocab_size; ++v) {
      p.push_back(std::exp(call.logit(row, v) / temperature - max));
      sum += p.back();
    }
    for (double& value : p) {
      value /= sum;
      if (value > 0) entropy -= value * std::log(value);
    }
  }
  std::vector<double> p;
  double entropy = 0;
};

int first_argmax(const UnmaskCall& call, int row) {
  int best = 0;
  for (int v = 1; v < call.vocab_size; ++v) {
    if (call.logit(row, v) > call.logit(row, best)) best = v;
  }
  return best;
}

void expect_values(const UnmaskCall& call, int row) {
  float temperature = call.state.temperature[call.logit_slots[row]];
  Softmax plain(call, row, 1.0), scaled(call, row, temperature > 0 ? temperature : 1.0);
  int token = call.token_ids[row];
  ASSERT_GE(token, 0);
  ASSERT_LT(token, call.vocab_size);
  EXPECT_NEAR(call.confidence[row], scaled.p[token], 1e-5);
  EXPECT_NEAR(call.logprob[row], std::log(plain.p[token]), 1e-4);
  EXPECT_NEAR(call.entropy[row], scaled.entropy, 1e-4);
}

// Every instruction set of this machine (isa <= best) in both dtypes.
class UnmaskCandidates : public ::testing::TestWithParam<std::tuple<int, DType>> {
 protected:
  void SetUp() override {
    int isa = std::get<0>(GetParam());
    if (isa > static_cast<int>(cpu::best_isa())) GTEST_SKIP() << "not on this machine";
    cpu::set_active_isa(static_cast<cpu::Isa>(isa));
  }
  void TearDown() override { cpu::set_active_isa(cpu::best_isa()); }
  DType dtype() const { return std::get<1>(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Isas, UnmaskCandidates,
                         ::testing::Combine(::testing::Values(0, 1, 2),
                                            ::testing::Values(DType::float32, DType::bfloat16)),
                         [](const auto& info) {
                           return std::string(dtype_name(std::get<1>(info.param))) + "Isa" +
                                  std::to_string(std::get<0>(info.param));
                         });

TEST_P(UnmaskCandidates, GreedyMatchesSoftmax) {
  Rng rng(1);
  for (int vocab : {1, 2, 7, 64, 2048}) {
    for (float scale : {0.1f, 1.0f, 20.0f}) {
      UnmaskCall call(dtype(), 2, 8, vocab);
      call.add_rows(0, iota(8));
      call.add_rows(1, iota(3));
      call.set_random_logits(rng, scale);
      call.run();
      for (int row = 0; row < call.num_rows(); ++row) {
        EXPECT_EQ(call.token_ids[row], first_argmax(call, row));
        expect_values(call, row);
      }
    }
  }
}

TEST_P(UnmaskCandidates, SampledMatchesScaledSoftmax) {
  Rng rng(2);
  for (float temperature : {0.3f, 1.0f, 2.5f}) {
    UnmaskCall call(dtype(), 1, 32, 100);
    call.add_rows(0, iota(32));
    call.set_random_logits(rng, 3.0f);
    call.state.temperature[0] = temperature;
    call.state.top_k[0] = 5;  // the reported values stay those of the unfiltered softmax
    call.state.top_p[0] = 0.8f;
    call.run();
    for (int row = 0; row < call.num_rows(); ++row) expect_values(call, row);
  }
}

TEST_P(UnmaskCandidates, MinusInfinityHasNoProbability) {
  Rng rng(3);
  UnmaskCall call(dtype(), 1, 4, 50);
  call.add_rows(0, iota(3));
  std::vector<float> logits(150, -kInf);
  logits[17] = 2.0f;                                         // row 0: one token possible
  logits[50 + 3] = logits[50 + 40] = -1.0f;                  // row 1: two, equal
  for (int v = 0; v < 49; ++v) logits[100 + v] = 0.01f * v;  // row 2: all but the last
  call.set_logits(logits);
  for (float temperature : {0.0f, 0.7f}) {
    call.state.temperature[0] = temperature;
    call.state.seed[0] = 5;
    call.state.block_start[0] = 4;
    call.run();
    EXPECT_EQ(call.token_ids[0], 17);
    EXPECT_EQ(call.confidence[0], 1.0f);
    EXPECT_EQ(call.entropy[0], 0.0f);
    EXPECT_EQ(call.logprob[0], 0.0f);
    EXPECT_TRUE(call.token_ids[1] == 3 || call.token_ids[1] == 40);
    EXPECT_EQ(call.confidence[1], 0.5f);
    EXPECT_NEAR(call.entropy[1], std::log(2.0), 1e-6);
    EXPECT_NE(call.token_ids[2], 49);
    for (int row = 0; row < 3; ++row) expect_values(call, row);
  }
}

// Padding behind the vocabulary is never looked at, however large.
TEST_P(UnmaskCandidates, PaddedLogitsDoNotCount) {
  Rng rng(11);
  const int vocab = 50, stride = 67, rows = 8;
  for (float temperature : {0.0f, 0.8f, 5.0f}) {
    UnmaskCall plain(dtype(), 1, rows, vocab), padded(dtype(), 1, rows, vocab);
    padded.logits_stride = stride;
    for (UnmaskCall* call : {&plain, &padded}) {
      call->add_rows(0, iota(rows));
      call->state.temperature[0] = temperature;
      call->state.top_k[0] = temperature > 1 ? 20 : 0;
      call->state.seed[0] = 8;
    }
    plain.set_random_logits(rng, 2.0f);
    std::vector<float> values(rows * stride, 100.0f);
    for (int row = 0; row < rows; ++row) {
      for (int v = 0; v < vocab; ++v) values[row * stride + v] = plain.logit(row, v);
    }
    padded.set_logits(values);
    plain.run();
    padded.run();
    EXPECT_EQ(plain.token_ids, padded.token_ids);
    EXPECT_EQ(plain.confidence, padded.confidence);
    EXPECT_EQ(plain.logprob, padded.logprob);
    EXPECT_EQ(plain.entropy, padded.entropy);
    EXPECT_EQ(plain.committed, padded.committed);
    for (int row = 0; row < rows; ++row) expect_values(padded, row);
  }
}

// A large logit divided by a small temperature has few digits behind the point.
TEST_P(UnmaskCandidates, ConfidenceIsAtMostOne) {
  Rng rng(9);
  for (float temperature : {0.0f, 1.0f, 0.3f, 0.07f, 0.01f, 0.001f}) {
    UnmaskCall call(dtype(), 1, 32, 16);
    call.add_rows(0, iota(32));
    call.set_random_logits(rng, 1.0f);
    for (int row = 0; row < 32; ++row) call.logits.set(row * 16 + row % 16, 30.1f + row);
    call.state.temperature[0] = temperature;
    call.state.confidence_threshold[0] = 1.0f;  // nothing is above: one commit
    call.run();
    for (int row = 0; row < 32; ++row) {
      EXPECT_EQ(call.confidence[row], 1.0f) << "temperature " << temperature << ", row " << row;
      EXPECT_EQ(int{call.committed[row]}, row == 0 ? 1 : 0) << "temperature " << temperature;
    }
  }
}

TEST_P(UnmaskCandidates, TiesGoToTheLowerToken) {
  UnmaskCall call(dtype(), 1, 1, 6);
  call.add_rows(0, {0});
  call.set_logits({1, 3, 2, 3, 3, 0});
  call.run();
  EXPECT_EQ(call.token_ids[0], 1);
}

TEST_P(UnmaskCandidates, RowsDoNotDependOnBatchOrThreads) {
  Rng rng(4);
  UnmaskCall batch(dtype(), 4, 16, 333);
  for (int slot : {2, 0, 3}) {
    batch.add_rows(slot, iota(random_int(rng, 1, 16)));
    batch.state.temperature[slot] = slot * 0.5f;
    batch.state.top_k[slot] = 20;
    batch.state.seed[slot] = 100 + slot;
  }
  batch.set_random_logits(rng, 2.0f);
  UnmaskCall original = batch;
  ThreadPool pool(3);
  batch.run(pool);
  for (int row = 0; row < batch.num_rows(); ++row) {
    UnmaskCall alone(dtype(), 4, 16, 333);
    alone.state = original.state;
    alone.add_rows(batch.logit_slots[row], {batch.logit_offsets[row]});
    std::vector<float> logits;
    for (int v = 0; v < 333; ++v) logits.push_back(original.logit(row, v));
    alone.set_logits(logits);
    alone.run();
    EXPECT_EQ(alone.token_ids[0], batch.token_ids[row]);
    EXPECT_EQ(alone.confidence[0], batch.confidence[row]);
    EXPECT_EQ(alone.logprob[0], batch.logprob[row]);
    EXPECT_EQ(alone.entropy[0], batch.entropy[row]);
  }
}

TEST(Unmask, EmptyVocabularyThrows) {
  UnmaskCall call(DType::float32, 1, 1, 0);
  call.add_rows(0, {0});
  expect_invalid([&] { call.run(); }, "[unmask] vocab_size must be positive, got 0");
}

// ---------------------------------------------------------------------------------------- sampling

// As written in the header comment of kernels/noise.h.
uint64_t mix(uint64_t z) {
  z += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}
float noise(uint64_t seed, int position, int step, int token) {
  uint64_t key = mix(mix(mix(seed) ^ uint64_t(position)) ^ uint64_t(step));
  float u =
      static_cast<float>((static_cast<double>(mix(key ^ uint64_t(token)) >> 41) + 0.5) / (1 << 23));
  return -std::log(-std::log(u));
}

TEST(Noise, IsFiniteAndAFunctionOfEveryArgument) {
  Rng rng(5);
  std::set<float> seen;
  for (int i = 0; i < 1000; ++i) {
    float value = noise(7, i % 10, i / 10 % 10, i / 100);
    EXPECT_TRUE(std::isfinite(value));
    EXPECT_EQ(value, gumbel_noise(noise_key(7, i % 10, i / 10 % 10), i / 100));
    seen.insert(value);
  }
  EXPECT_GT(seen.size(), 990u);
}

// The set that top-k and then top-p (of the mass of the top-k set) let through; no ties expected.
std::set<int> allowed_tokens(const UnmaskCall& call, int row) {
  const DecodeStateArrays& state = call.state;
  int slot = call.logit_slots[row];
  std::vector<std::pair<double, int>> ranked;
  for (int v = 0; v < call.vocab_size; ++v) {
    ranked.push_back({-call.logit(row, v) / double{state.temperature[slot]}, v});
  }
  std::sort(ranked.begin(), ranked.end());
  int top_k = state.top_k[slot];
  if (top_k > 0 && top_k < call.vocab_size) ranked.resize(top_k);
  double total = 0, mass = 0;
  for (auto [negative, v] : ranked) total += std::exp(-negative);
  std::set<int> allowed;
  for (auto [negative, v] : ranked) {
    allowed.insert(v);
    mass += std::exp(-negative);
    if (state.top_p[slot] < 1 && mass >= state.top_p[slot] * total) break;
  }
  return allowed;
}

using Filters = std::vector<std::pair<int, float>>;  // top_k, top_p

void set_sampling(DecodeStateArrays& state, float temperature, int top_k, float top_p,
                  uint64_t seed) {
  state.temperature[0] = temperature;
  state.top_k[0] = top_k;
  state.top_p[0] = top_p;
  state.seed[0] = seed;
}

TEST(Sampling, IsGumbelMaxOverTheAllowedSet) {
  Rng rng(6);
  for (int trial = 0; trial < 200; ++trial) {
    UnmaskCall call(DType::float32, 1, 8, random_int(rng, 2, 200));
    call.add_rows(0, iota(8));
    call.set_random_logits(rng, 2.0f);
    set_sampling(call.state, 0.25f * random_int(rng, 1, 8), random_int(rng, 0, 30),
                 random_int(rng, 0, 2) ? 0.05f * random_int(rng, 1, 19) : 1.0f,
                 uint64_t{rng()} << 32 | rng());
    int step = random_int(rng, 0, 7), start = 8 * random_int(rng, 0, 1000);
    call.state.denoise_step[0] = step;
    call.state.block_start[0] = start;
    UnmaskCall before = call;
    call.run();
    float scale = 1.0f / before.state.temperature[0];
    for (int row = 0; row < 8; ++row) {
      int best = -1;
      float best_value = -kInf;
      for (int v : allowed_tokens(before, row)) {
        float value =
            call.logit(row, v) * scale + noise(before.state.seed[0], start + row, step, v);
        if (value > best_value) best = v;
        best_value = std::max(best_value, value);
      }
      ASSERT_EQ(call.token_ids[row], best) << "trial " << trial << ", row " << row;
    }
  }
}

// How often each token is drawn at `num_draws` seeds (or positions, or steps: by `vary`).
std::map<int, int> draw(UnmaskCall& call, int num_draws, char vary) {
  std::map<int, int> counts;
  for (int i = 0; i < num_draws; ++i) {
    call.state.seed[0] = vary == 's' ? i : 42;
    call.state.block_start[0] = vary == 'p' ? i : 4;
    call.state.denoise_step[0] = vary == 'd' ? i : 0;
    call.run();
    ++counts[call.token_ids[0]];
  }
  return counts;
}

TEST(Sampling, FrequenciesMatchProbabilities) {
  for (char vary : {'s', 'p', 'd'}) {
    for (auto [top_k, top_p] : Filters{{0, 1.0f}, {4, 1.0f}, {0, 0.7f}, {5, 0.9f}}) {
      UnmaskCall call(DType::float32, 1, 1, 8);
      call.add_rows(0, {0});
      call.set_logits({0.3f, -1.0f, 1.2f, 0.0f, 0.9f, -0.4f, 0.5f, 1.0f});
      set_sampling(call.state, 1.5f, top_k, top_p, 0);
      std::set<int> allowed = allowed_tokens(call, 0);
      Softmax softmax(call, 0, 1.5);
      double mass = 0, chi_square = 0;
      for (int v : allowed) mass += softmax.p[v];
      constexpr int kDraws = 4000;
      std::map<int, int> counts = draw(call, kDraws, vary);
      for (auto [v, count] : counts) EXPECT_TRUE(allowed.count(v)) << "token " << v;
      for (int v : allowed) {
        double expected = kDraws * softmax.p[v] / mass;
        chi_square += (counts[v] - expected) * (counts[v] - expected) / expected;
      }
      // At most 7 degrees of freedom: a chance of 1e-6 for a correct sampler.
      EXPECT_LT(chi_square, 41.0) << "varying " << vary << ", top_k " << top_k << ", top_p "
                                  << top_p;
    }
  }
}

TEST(Sampling, TokensTiedAtTheBorderAllPass) {
  UnmaskCall call(DType::float32, 1, 1, 5);
  call.add_rows(0, {0});
  call.set_logits({1, 2, 1, 1, 0});
  set_sampling(call.state, 1.0f, 2, 1.0f, 0);
  std::map<int, int> counts = draw(call, 300, 's');
  EXPECT_EQ(counts.size(), 4u);
  EXPECT_EQ(counts.count(4), 0u);
}

TEST(Sampling, TopKOfOneAndTinyTopPAreGreedy) {
  Rng rng(8);
  for (auto [top_k, top_p] : Filters{{1, 1.0f}, {0, 1e-6f}}) {
    UnmaskCall call(DType::float32, 1, 32, 100);
    call.add_rows(0, iota(32));
    call.set_random_logits(rng, 1.0f);
    set_sampling(call.state, 3.0f, top_k, top_p, 9);
    call.run();
    for (int row = 0; row < 32; ++row) EXPECT_EQ(call.token_ids[row], first_argmax(call, row));
  }
}

}  // namespace
}  // namespace optimus

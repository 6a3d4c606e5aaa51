// The engine end to end on a tiny random model: every mode runs to completion, ar and block
// decoding equal their obvious loops, block equals chunk with c = B recomputed, and a request's
// tokens depend on nothing but the request: not on its batch, pages, budget, threads, cached
// prefixes or preemption.
#include "engine/tiny_engine.h"

namespace optimus {
namespace {

using namespace testing;

EngineConfig recomputed_block() {
  EngineConfig config = tiny_engine_config(DecodeMode::chunk);
  config.chunk_length = kBlock;
  config.recompute_block = true;
  return config;
}

// Every mode whose tokens do not depend on load.
std::vector<EngineConfig> steady_configs() {
  return {tiny_engine_config(DecodeMode::ar), tiny_engine_config(DecodeMode::block),
          tiny_engine_config(DecodeMode::chunk, KvPolicy::refresh),
          tiny_engine_config(DecodeMode::chunk, KvPolicy::freeze)};
}

std::string config_name(const EngineConfig& config) {
  return "mode " + std::to_string(static_cast<int>(config.decode_mode)) + ", kv policy " +
         std::to_string(static_cast<int>(config.kv_policy));
}

void expect_complete(const std::vector<Job>& jobs, const std::vector<Outcome>& outcomes) {
  ASSERT_EQ(outcomes.size(), jobs.size());
  for (size_t i = 0; i < jobs.size(); ++i) {
    const Outcome& outcome = outcomes[i];
    EXPECT_EQ(outcome.finish_reason, FinishReason::length);
    EXPECT_EQ(outcome.output.size(), static_cast<size_t>(jobs[i].params.max_tokens));
    int steps = 0;
    for (auto [masks, count] : outcome.metrics.chunk_histogram) {
      EXPECT_GE(masks, 1);
      steps += count;
    }
    EXPECT_EQ(steps, outcome.metrics.nfe);
    EXPECT_GE(outcome.metrics.decode_rows, outcome.metrics.nfe);
    for (const OutputToken& token : outcome.output) {
      EXPECT_LE(token.logprob, 0.0f);
      EXPECT_GT(token.confidence, 0.0f);
      EXPECT_GE(token.step, 1);
    }
  }
}

TEST(Engine, EveryModeAndPolicyRunsToCompletion) {
  std::vector<Job> jobs = tiny_jobs(1, 8);
  for (DecodeMode mode :
       {DecodeMode::ar, DecodeMode::block, DecodeMode::chunk, DecodeMode::schedule,
        DecodeMode::elastic, DecodeMode::elastic_per_request}) {
    for (KvPolicy policy : {KvPolicy::freeze, KvPolicy::refresh, KvPolicy::auto_}) {
      EngineConfig config = tiny_engine_config(mode, policy);
      SCOPED_TRACE(config_name(config));
      expect_complete(jobs, run_jobs(config, jobs));
      config.enable_prefix_cache = false;
      config.page_size = 4;
      config.num_pages = 128;
      expect_complete(jobs, run_jobs(config, jobs, {0, 3, 3, 9, 9, 9, 20, 40}));
    }
  }
}

TEST(Engine, Bfloat16RunsToCompletion) {
  std::vector<Job> jobs = tiny_jobs(2, 4);
  EngineConfig config = tiny_engine_config(DecodeMode::chunk);
  expect_complete(jobs, run_jobs(config, jobs, {}, DType::bfloat16));
}

TEST(Engine, BlockEqualsChunkWithTheWholeBlockRecomputed) {
  std::vector<Job> jobs = tiny_jobs(3, 12);
  std::vector<Outcome> block = run_jobs(tiny_engine_config(DecodeMode::block), jobs);
  expect_same_outcomes(run_jobs(recomputed_block(), jobs), block);
  for (size_t i = 0; i < jobs.size(); ++i) EXPECT_GT(block[i].metrics.nfe, 0);
}

// ---------------------------------------------------------------------- against the obvious loops

// Logits [rows, vocab] of a whole sequence, from nothing.
std::vector<float> full_forward(Engine& engine, const std::vector<int32_t>& tokens,
                                int block_length) {
  std::vector<int32_t> positions, limits, pages;
  for (int i = 0; i < static_cast<int>(tokens.size()); ++i) {
    positions.push_back(i);
    limits.push_back((i / block_length + 1) * block_length);
    if (i % engine.config().page_size == 0) pages.push_back(i / engine.config().page_size);
  }
  return engine.forward(tokens, positions, limits, pages);
}

std::pair<int, double> best_token(const std::vector<float>& logits, int row, int vocab) {
  auto first = logits.begin() + row * vocab;
  auto best = std::max_element(first, first + vocab);
  double sum = 0;
  for (auto it = first; it != first + vocab; ++it) sum += std::exp(double{*it} - *best);
  return {static_cast<int>(best - first), 1 / sum};
}

TEST(Engine, AutoregressiveIsGreedyDecoding) {
  Rng rng(4);
  Engine engine(tiny_model(), tiny_engine_config(DecodeMode::ar));
  for (int trial = 0; trial < 4; ++trial) {
    Job job{random_prompt(rng, random_int(rng, 1, 20)), SamplingParams()};
    job.params.max_tokens = 20;
    std::vector<int32_t> tokens = job.prompt;
    for (int i = 0; i < 20; ++i) {
      std::vector<float> logits = full_forward(engine, tokens, 1);
      tokens.push_back(best_token(logits, static_cast<int>(tokens.size()) - 1, 61).first);
    }
    tokens.erase(tokens.begin(), tokens.begin() + job.prompt.size());
    EXPECT_EQ(run_jobs(engine, {job})[0].token_ids(), tokens);
  }
}

// The published loop: forward everything up to the end of the block, commit what is above the
// threshold, or the best mask.
std::vector<int32_t> block_decode(Engine& engine, std::vector<int32_t> tokens, int max_tokens,
                                  double threshold) {
  const size_t prompt_len = tokens.size(), end = prompt_len + max_tokens;
  for (size_t start = prompt_len / kBlock * kBlock; start < end; start += kBlock) {
    std::set<int> masks;
    for (size_t p = std::max(start, prompt_len); p < start + kBlock; ++p) {
      masks.insert(static_cast<int>(p));
    }
    tokens.resize(start + kBlock, 60);
    while (!masks.empty()) {
      std::vector<float> logits = full_forward(engine, tokens, kBlock);
      std::map<int, std::pair<int, double>> candidates;
      int best = *masks.begin();
      for (int p : masks) {
        candidates[p] = best_token(logits, p, 61);
        if (candidates[p].second > candidates[best].second) best = p;
      }
      for (auto [p, candidate] : candidates) {
        if (p != best && candidate.second <= threshold) continue;
        tokens[p] = candidate.first;
        masks.erase(p);
      }
    }
  }
  return {tokens.begin() + prompt_len, tokens.begin() + end};
}

TEST(Engine, BlockIsThePublishedLoop) {
  Rng rng(5);
  Engine engine(tiny_model(), tiny_engine_config(DecodeMode::block));
  for (int trial = 0; trial < 5; ++trial) {
    Job job{random_prompt(rng, trial == 0 ? kBlock : random_int(rng, 1, 20)), SamplingParams()};
    job.params.max_tokens = 30;
    job.params.confidence_threshold = 0.2f * trial;
    EXPECT_EQ(run_jobs(engine, {job})[0].token_ids(),
              block_decode(engine, job.prompt, 30, job.params.confidence_threshold));
  }
}

// --------------------------------------------------------------- what tokens must not depend on

// Each job in an engine of its own.
std::vector<Outcome> run_alone(const EngineConfig& config, const std::vector<Job>& jobs) {
  std::vector<Outcome> outcomes;
  for (const Job& job : jobs) outcomes.push_back(run_jobs(config, {job})[0]);
  return outcomes;
}

TEST(Engine, TokensDoNotDependOnTheBatch) {
  std::vector<Job> jobs = tiny_jobs(6, 9);
  for (EngineConfig config : steady_configs()) {
    SCOPED_TRACE(config_name(config));
    std::vector<Outcome> alone = run_alone(config, jobs);
    expect_same_outcomes(run_jobs(config, jobs), alone);
    config.max_num_seqs = 9;
    config.max_num_batched_rows = 4 * kBlock;  // rows are short: requests take turns
    expect_same_outcomes(run_jobs(config, jobs, {0, 1, 2, 5, 9, 10, 11, 30, 31}), alone);
  }
}

TEST(Engine, TokensDoNotDependOnPagesOrThreads) {
  std::vector<Job> jobs = tiny_jobs(7, 6);
  for (EngineConfig config : steady_configs()) {
    SCOPED_TRACE(config_name(config));
    std::vector<Outcome> expected = run_jobs(config, jobs);
    config.shuffle_pages = true;
    config.num_threads = 3;
    for (int page_size : {1, 4, 32}) {
      config.page_size = page_size;
      config.num_pages = 1024 / page_size;
      expect_same_outcomes(run_jobs(config, jobs), expected);
    }
  }
}

TEST(Engine, TokensDoNotDependOnCachedPrefixes) {
  std::vector<Job> jobs = tiny_jobs(8, 6);
  Rng rng(9);
  std::vector<int32_t> shared = random_prompt(rng, 2 * kBlock);
  for (Job& job : jobs) job.prompt.insert(job.prompt.begin(), shared.begin(), shared.end());
  for (EngineConfig config : steady_configs()) {
    SCOPED_TRACE(config_name(config));
    config.enable_prefix_cache = false;
    std::vector<Outcome> expected = run_jobs(config, jobs);
    config.enable_prefix_cache = true;
    config.max_num_seqs = 1;
    std::vector<Outcome> cached = run_jobs(config, jobs);
    expect_same_outcomes(cached, expected);
    EXPECT_GE(cached[5].metrics.cached_prompt_tokens, 2 * kBlock);
    // A conversation: prompt and output of an earlier request come back as a prompt.
    Engine engine(tiny_model(), config), fresh(tiny_model(), config);
    Job first = jobs[4];
    first.params.max_tokens = 32;
    Job second = first;
    for (int32_t id : run_jobs(fresh, {first})[0].token_ids()) second.prompt.push_back(id);
    second.params.max_tokens = 12;
    engine.add_request(first.prompt, first.params);
    while (engine.has_unfinished()) engine.step();
    expect_same_outcomes(run_jobs(engine, {second}), run_jobs(fresh, {second}));
  }
}

TEST(Engine, TokensDoNotDependOnPreemption) {
  std::vector<Job> jobs = tiny_jobs(10, 8);
  for (Job& job : jobs) job.params.max_tokens = 40;
  for (EngineConfig config : steady_configs()) {
    if (config.kv_policy == KvPolicy::freeze) continue;  // stale KV is lost with the pages
    for (bool cache : {false, true}) {
      for (int page_size : {4, kBlock}) {
        SCOPED_TRACE(config_name(config) + (cache ? ", cached" : ""));
        config.enable_prefix_cache = cache;
        config.page_size = page_size;
        config.num_pages = 1024;
        std::vector<Outcome> expected = run_jobs(config, jobs);
        config.num_pages = 88 / page_size;
        config.max_model_len = 80;
        std::vector<Outcome> actual = run_jobs(config, jobs);
        expect_same_outcomes(actual, expected, /*steps=*/false);
        int preemptions = 0;
        for (const Outcome& outcome : actual) preemptions += outcome.metrics.num_preemptions;
        EXPECT_GT(preemptions, 0);
        config.max_model_len = 96;
      }
    }
  }
}

TEST(Engine, EveryModeSurvivesPreemption) {
  std::vector<Job> jobs = tiny_jobs(11, 8);
  for (Job& job : jobs) job.params.max_tokens = 40;
  for (DecodeMode mode : {DecodeMode::chunk, DecodeMode::schedule, DecodeMode::elastic,
                          DecodeMode::elastic_per_request}) {
    for (KvPolicy policy : {KvPolicy::freeze, KvPolicy::refresh, KvPolicy::auto_}) {
      EngineConfig config = tiny_engine_config(mode, policy);
      SCOPED_TRACE(config_name(config));
      config.num_pages = 10;
      config.max_model_len = 80;
      expect_complete(jobs, run_jobs(config, jobs));
    }
  }
}

}  // namespace
}  // namespace optimus

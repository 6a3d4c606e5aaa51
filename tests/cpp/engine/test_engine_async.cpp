// async_scheduling: a step is planned before anybody has seen what the one before commits. That must
// change no token, compute no row more, and give everything back, whatever ends when.
#include "engine/tiny_engine.h"

namespace optimus {
namespace {

using namespace testing;

std::vector<EngineConfig> steady_configs() {
  std::vector<EngineConfig> configs = {tiny_engine_config(DecodeMode::ar),
                                       tiny_engine_config(DecodeMode::block)};
  for (int chunk_length : {1, 3, kBlock}) {
    for (KvPolicy policy : {KvPolicy::freeze, KvPolicy::refresh, KvPolicy::auto_}) {
      configs.push_back(tiny_engine_config(DecodeMode::chunk, policy));
      configs.back().chunk_length = chunk_length;
    }
  }
  return configs;
}

std::string name(const EngineConfig& config) {
  return concat("mode ", int(config.decode_mode), ", kv policy ", int(config.kv_policy), ", chunk ",
                config.chunk_length, ", pages ", config.num_pages, ", rows ",
                config.max_num_batched_rows);
}

// Some end at a stop token: of a vocabulary of 61 a request of 40 tokens meets one of three often.
std::vector<Job> jobs_with_stops(unsigned seed, int count, int num_stops = 3) {
  std::vector<Job> jobs = tiny_jobs(seed, count);
  Rng rng(seed);
  for (size_t i = 0; i < jobs.size(); i += 2) {
    for (int k = 0; k < num_stops; ++k) {
      jobs[i].params.stop_token_ids.push_back(random_int(rng, 0, 60));
    }
  }
  return jobs;
}

// What all steps together did.
struct Totals {
  int64_t rows = 0, logit_rows = 0, commits = 0;
  int steps = 0, ahead = 0;
};

struct RunResult {
  std::vector<Outcome> outcomes;
  Totals totals;
};

RunResult run(EngineConfig config, bool async, const std::vector<Job>& jobs,
              const std::vector<int>& arrivals = {}) {
  config.async_scheduling = async;
  Engine engine(tiny_model(), config);
  RunResult run;
  run.outcomes = run_jobs(engine, jobs, arrivals);
  for (const StepRecord& record : engine.core().log().records()) {
    run.totals.rows += record.rows;
    run.totals.logit_rows += record.logit_rows;
    run.totals.commits += record.commits;
    run.totals.steps += 1;
    run.totals.ahead += record.is_ahead;
  }
  return run;
}

TEST(EngineAsync, ChangesNoTokenAndAddsNoRow) {
  const std::vector<Job> jobs = jobs_with_stops(3, 24);
  std::vector<int> arrivals;
  for (size_t i = 0; i < jobs.size(); ++i) arrivals.push_back(static_cast<int>(i) * 2);
  for (const EngineConfig& config : steady_configs()) {
    for (const auto& when : {std::vector<int>(), arrivals}) {
      SCOPED_TRACE(name(config));
      const RunResult expected = run(config, false, jobs, when),
                      actual = run(config, true, jobs, when);
      ASSERT_NO_FATAL_FAILURE(expect_same_outcomes(actual.outcomes, expected.outcomes));
      EXPECT_EQ(expected.totals.ahead, 0);
      EXPECT_GT(actual.totals.ahead, actual.totals.steps / 2);
      EXPECT_EQ(actual.totals.commits, expected.totals.commits);
      if (when.empty() && config.kv_policy != KvPolicy::auto_) {
        EXPECT_EQ(actual.totals.logit_rows, expected.totals.logit_rows);
      }
    }
  }
}

// Without room for what a step might come to, it waits for the one before; then requests lose their
// pages as they always do.
TEST(EngineAsync, WaitsWherePagesOrRowsAreShort) {
  const std::vector<Job> jobs = jobs_with_stops(5, 16);
  for (EngineConfig config : steady_configs()) {
    config.num_pages = 14;
    config.enable_prefix_cache = false;
    for (int rows : {4 * kBlock, 6 * kBlock}) {
      config.max_num_batched_rows = rows;
      SCOPED_TRACE(name(config));
      const RunResult actual = run(config, true, jobs);
      if (HasFatalFailure()) return;
      ASSERT_EQ(actual.outcomes.size(), jobs.size());
      int preemptions = 0;
      for (const Outcome& outcome : actual.outcomes) {
        preemptions += outcome.metrics.num_preemptions;
      }
      EXPECT_GT(preemptions, 0);
      EXPECT_LT(actual.totals.ahead, actual.totals.steps);
      // Where a preemption repeats what it lost, tokens stay.
      if (config.kv_policy == KvPolicy::refresh) {
        const RunResult expected = run(config, false, jobs);
        ASSERT_NO_FATAL_FAILURE(expect_same_outcomes(actual.outcomes, expected.outcomes, false));
      }
    }
  }
}

TEST(EngineAsync, MoreStopTokensThanTheDeviceKnowsEndTheOutput) {
  const std::vector<Job> jobs = jobs_with_stops(7, 12, kMaxStopTokens + 5);
  for (const EngineConfig& config : steady_configs()) {
    SCOPED_TRACE(name(config));
    expect_same_outcomes(run(config, true, jobs).outcomes, run(config, false, jobs).outcomes);
  }
}

TEST(EngineAsync, ElasticModesRunToCompletion) {
  const std::vector<Job> jobs = jobs_with_stops(9, 24);
  for (KvPolicy policy : {KvPolicy::freeze, KvPolicy::refresh, KvPolicy::auto_}) {
    for (DecodeMode mode : {DecodeMode::elastic, DecodeMode::schedule}) {
      EngineConfig config = tiny_engine_config(mode, policy);
      config.async_scheduling = true;
      config.max_num_batched_rows = 128;
      Engine engine(tiny_model(), config);
      LatencyProfile profile;
      profile.decode = {{1, 1.0}, {16, 1.1}, {32, 4.0}, {64, 9.0}};
      engine.set_profile(profile);
      EXPECT_EQ(run_jobs(engine, jobs).size(), jobs.size());
    }
  }
}

// Aborts, stops and releases between any two steps, while the steps in flight hold their rows: the
// others do not notice.
TEST(EngineAsync, WhatEndsInFlightIsNobodysBusiness) {
  const std::vector<Job> jobs = tiny_jobs(11, 12);
  for (EngineConfig config : steady_configs()) {
    if (config.kv_policy == KvPolicy::auto_) continue;
    SCOPED_TRACE(name(config));
    const std::vector<Outcome> expected = run(config, false, jobs).outcomes;
    config.async_scheduling = true;
    Rng rng(13);
    for (int trial = 0; trial < 10; ++trial) {
      Engine engine(tiny_model(), config);
      std::map<uint64_t, size_t> kept;
      std::vector<uint64_t> others;
      for (size_t i = 0; i < jobs.size(); ++i) {
        const uint64_t id = engine.add_request(jobs[i].prompt, jobs[i].params);
        if (random_int(rng, 0, 1)) {
          kept[id] = i;
        } else {
          others.push_back(id);
        }
      }
      for (int step = 0; engine.has_unfinished(); ++step) {
        ASSERT_LT(step, 5000);
        engine.step();
        if (others.empty() || random_int(rng, 0, 2) > 0) continue;
        const size_t at = random_int(rng, 0, static_cast<int>(others.size()) - 1);
        const Request& request = engine.request(others[at]);
        if (random_int(rng, 0, 1)) {
          engine.abort(request.id);
        } else {
          engine.stop_request(request.id, random_int(rng, 0, request.num_known));
        }
        engine.release(others[at]);
        others.erase(others.begin() + at);
      }
      for (auto [id, i] : kept) {
        const Request& request = engine.request(id);
        ASSERT_NO_FATAL_FAILURE(expect_same_outcomes(
            {{request.output, request.finish_reason, request.metrics}}, {expected[i]}));
      }
      expect_all_pages_free(engine);
    }
  }
}

// The step that was planned before the last request's end was known leaves no trace.
TEST(EngineAsync, IsIdleAfterTheLastRequest) {
  for (EngineConfig config : steady_configs()) {
    config.async_scheduling = true;
    Engine engine(tiny_model(), config);
    for (const Job& job : tiny_jobs(15, 4)) {
      const uint64_t id = engine.add_request(job.prompt, job.params);
      int steps = 0;
      for (; engine.has_unfinished(); ++steps) EXPECT_GT(engine.step().record.rows, 0);
      EXPECT_EQ(engine.step().record.rows, 0);
      EXPECT_EQ(engine.forward({1}, {0}, {1}, {3}).size(), 61u);
      EXPECT_GE(steps, engine.request(id).metrics.nfe);
    }
  }
}

TEST(EngineAsync, DoesNotGoWithElasticPerRequest) {
  EngineConfig config = tiny_engine_config(DecodeMode::elastic_per_request);
  config.async_scheduling = true;
  expect_invalid([&] { Engine engine(tiny_model(), config); },
                 "async_scheduling does not go with elastic_per_request");
}

}  // namespace
}  // namespace optimus

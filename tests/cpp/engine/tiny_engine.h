// Runs the tiny model under an engine and checks, on the way, what holds for every run: updates add
// up to the output, known tokens stay, steps respect the row budget, and all pages come back.
#pragma once

#include <map>

#include "engine/engine.h"
#include "tiny_model.h"

namespace optimus::testing {

constexpr int kBlock = 8;

inline EngineConfig tiny_engine_config(DecodeMode mode, KvPolicy policy = KvPolicy::refresh) {
  EngineConfig config;
  config.decode_mode = mode;
  config.kv_policy = policy;
  config.block_length = kBlock;
  config.chunk_length = 3;
  config.chunk_schedule = {{1, kBlock}, {3, 4}, {8, 2}};
  config.max_num_seqs = 4;
  config.max_num_batched_rows = 64;
  config.max_model_len = 96;
  config.page_size = kBlock;
  config.num_pages = 64;
  config.num_threads = 1;
  return config;
}

struct Job {
  std::vector<int32_t> prompt;
  SamplingParams params;
};

// A few requests of all sorts: aligned and unaligned prompts, greedy and sampled, every strategy.
inline std::vector<Job> tiny_jobs(unsigned seed, int count) {
  Rng rng(seed);
  std::vector<Job> jobs;
  for (int i = 0; i < count; ++i) {
    Job job{
        random_prompt(rng, i % 3 == 0 ? kBlock * random_int(rng, 1, 3) : random_int(rng, 1, 30)),
        SamplingParams()};
    job.params.max_tokens = random_int(rng, 1, 40);
    job.params.confidence_threshold = 0.1f * random_int(rng, 2, 9);
    job.params.unmasking_strategy = static_cast<UnmaskingStrategy>(i % 4);
    job.params.denoising_steps = random_int(rng, 0, kBlock);
    job.params.temperature = i % 2 ? 0.8f : 0.0f;
    job.params.top_p = i % 4 == 3 ? 0.9f : 1.0f;
    job.params.seed = seed * 1000 + i;
    jobs.push_back(job);
  }
  return jobs;
}

struct Outcome {
  std::vector<OutputToken> output;
  FinishReason finish_reason;
  RequestMetrics metrics;

  std::vector<int32_t> token_ids() const {
    std::vector<int32_t> ids;
    for (const OutputToken& token : output) ids.push_back(token.token_id);
    return ids;
  }
};

// What a reader of the updates has seen of one request.
struct Stream {
  std::map<int, OutputToken> commits;
  int num_known = 0;
};

inline void expect_step_is_sound(const Engine& engine, const StepOutput& step,
                                 std::map<uint64_t, Stream>& streams) {
  const StepRecord& record = step.record;
  EXPECT_GT(record.rows, 0);
  EXPECT_LE(record.rows, engine.config().max_num_batched_rows);
  EXPECT_LE(record.num_seqs, engine.config().max_num_seqs);
  EXPECT_LE(record.logit_rows + record.prefill_rows, record.rows);
  for (const RequestUpdate& update : step.updates) {
    Stream& stream = streams[update.id];
    EXPECT_GE(update.num_known, stream.num_known) << "a token that was final is gone";
    stream.num_known = update.num_known;
    for (const Commit& commit : update.commits) {
      stream.commits[commit.output_idx] = commit.token;
      EXPECT_EQ(commit.token.step, engine.request(update.id).metrics.nfe);
    }
  }
}

inline void expect_stream_is_output(const Stream& stream, const Request& request) {
  ASSERT_EQ(stream.num_known, request.num_known);
  ASSERT_EQ(request.output.size(), static_cast<size_t>(request.num_known));
  for (int i = 0; i < request.num_known; ++i) {
    ASSERT_TRUE(stream.commits.count(i)) << "output " << i << " was never in an update";
    EXPECT_EQ(stream.commits.at(i).token_id, request.output[i].token_id);
    EXPECT_EQ(stream.commits.at(i).step, request.output[i].step);
  }
}

inline void expect_all_pages_free(Engine& engine) {
  PagePool& pool = engine.scheduler().pool();
  EXPECT_EQ(pool.num_free() + engine.scheduler().prefix_cache().num_cached(), pool.num_pages());
  engine.scheduler().prefix_cache().clear();
  EXPECT_EQ(pool.num_free(), pool.num_pages());
  EXPECT_EQ(engine.scheduler().num_running() + engine.scheduler().num_waiting(), 0);
}

// Runs the jobs to completion; job i arrives at step arrivals[i] (default: all at once).
inline std::vector<Outcome> run_jobs(Engine& engine, const std::vector<Job>& jobs,
                                     const std::vector<int>& arrivals = {}) {
  std::vector<uint64_t> ids(jobs.size(), 0);
  std::map<uint64_t, Stream> streams;
  size_t num_arrived = 0;
  for (int step = 0; num_arrived < jobs.size() || engine.has_unfinished(); ++step) {
    for (size_t i = 0; i < jobs.size(); ++i) {
      if (ids[i] != 0 || (!arrivals.empty() && arrivals[i] > step)) continue;
      ids[i] = engine.add_request(jobs[i].prompt, jobs[i].params);
      ++num_arrived;
    }
    if (!engine.has_unfinished()) continue;
    expect_step_is_sound(engine, engine.step(), streams);
    if (step > 20000 || ::testing::Test::HasFailure()) {
      ADD_FAILURE() << "stopped after step " << step;
      return {};
    }
  }
  std::vector<Outcome> outcomes;
  for (uint64_t id : ids) {
    const Request& request = engine.request(id);
    EXPECT_EQ(request.status, RequestStatus::finished);
    expect_stream_is_output(streams[id], request);
    outcomes.push_back({request.output, request.finish_reason, request.metrics});
  }
  for (uint64_t id : ids) engine.release(id);
  expect_all_pages_free(engine);
  return outcomes;
}

inline std::vector<Outcome> run_jobs(const EngineConfig& config, const std::vector<Job>& jobs,
                                     const std::vector<int>& arrivals = {},
                                     DType dtype = DType::float32) {
  Engine engine(tiny_model(dtype), config);
  return run_jobs(engine, jobs, arrivals);
}

// Bit for bit; `steps`: also the request's own forward at which each token was committed.
inline void expect_same_outcomes(const std::vector<Outcome>& actual,
                                 const std::vector<Outcome>& expected, bool steps = true) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    SCOPED_TRACE("job " + std::to_string(i));
    ASSERT_EQ(actual[i].token_ids(), expected[i].token_ids());
    EXPECT_EQ(actual[i].finish_reason, expected[i].finish_reason);
    for (size_t k = 0; k < actual[i].output.size(); ++k) {
      const OutputToken &a = actual[i].output[k], &b = expected[i].output[k];
      ASSERT_EQ(a.logprob, b.logprob) << "output " << k;
      ASSERT_EQ(a.confidence, b.confidence) << "output " << k;
      ASSERT_TRUE(!steps || a.step == b.step) << "output " << k;
    }
  }
}

}  // namespace optimus::testing

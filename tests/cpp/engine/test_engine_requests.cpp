// Requests from outside: abort, stop and release in every state, stop tokens, bad arguments that
// throw and change nothing, and the profile. Pages must come back in all of them.
#include "engine/tiny_engine.h"

namespace optimus {
namespace {

using namespace testing;

const std::vector<DecodeMode> kModes = {DecodeMode::ar, DecodeMode::block, DecodeMode::chunk,
                                        DecodeMode::elastic, DecodeMode::elastic_per_request};

Job simple_job(int prompt_len, int max_tokens, unsigned seed = 1) {
  Rng rng(seed);
  Job job{random_prompt(rng, prompt_len), SamplingParams()};
  job.params.max_tokens = max_tokens;
  job.params.confidence_threshold = 0.6f;
  return job;
}

uint64_t add(Engine& engine, const Job& job) { return engine.add_request(job.prompt, job.params); }

void finish_all(Engine& engine) {
  for (int i = 0; i < 5000 && engine.has_unfinished(); ++i) engine.step();
  EXPECT_FALSE(engine.has_unfinished());
}

// Two requests under a pool and row budget so small that, over time, the second one waits, is
// prefilled in slices, decodes, is preempted and finishes.
EngineConfig crowded_config(DecodeMode mode) {
  EngineConfig config = tiny_engine_config(mode);
  config.max_num_seqs = 2;
  config.num_pages = 10;
  config.max_model_len = 80;
  config.max_num_batched_rows = mode == DecodeMode::ar ? 8 : 4 * kBlock;
  return config;
}

TEST(EngineRequests, AbortAtEveryStep) {
  const Job first = simple_job(30, 40, 1), second = simple_job(29, 40, 2);
  for (DecodeMode mode : kModes) {
    std::set<std::pair<RequestStatus, bool>> seen;  // and whether it was preempted before
    bool was_finished = false;
    for (int abort_step = 0; !was_finished && abort_step < 400; ++abort_step) {
      Engine engine(tiny_model(), crowded_config(mode));
      uint64_t kept = add(engine, first), aborted = add(engine, second);
      for (int i = 0; i < abort_step; ++i) engine.step();
      const Request& request = engine.request(aborted);
      seen.insert({request.status, request.metrics.num_preemptions > 0});
      was_finished = request.status == RequestStatus::finished;
      int num_known = request.num_known;
      engine.abort(aborted);
      EXPECT_EQ(request.status, RequestStatus::finished);
      EXPECT_EQ(request.finish_reason, was_finished ? FinishReason::length : FinishReason::abort);
      EXPECT_EQ(request.num_known, num_known) << "what was known stays readable";
      EXPECT_EQ(request.output.size(), static_cast<size_t>(num_known));
      finish_all(engine);
      EXPECT_EQ(engine.request(kept).output.size(), 40u);
      expect_all_pages_free(engine);
    }
    EXPECT_TRUE(was_finished);
    EXPECT_TRUE(seen.count({RequestStatus::waiting, false}));
    EXPECT_TRUE(seen.count({RequestStatus::prefilling, false}));
    EXPECT_TRUE(seen.count({RequestStatus::decoding, false}));
    EXPECT_TRUE(seen.count({RequestStatus::waiting, true})) << "mode " << static_cast<int>(mode);
  }
}

TEST(EngineRequests, OthersDoNotNoticeAnAbort) {
  const Job kept = simple_job(13, 30, 3), aborted = simple_job(20, 30, 4);
  EngineConfig config = tiny_engine_config(DecodeMode::chunk);
  std::vector<Outcome> expected = run_jobs(config, {kept});
  for (int abort_step : {0, 1, 2, 5, 9}) {
    Engine engine(tiny_model(), config);
    uint64_t other = add(engine, aborted), id = add(engine, kept);
    for (int i = 0; i < abort_step; ++i) engine.step();
    engine.abort(other);
    finish_all(engine);
    const Request& request = engine.request(id);
    expect_same_outcomes({{request.output, request.finish_reason, request.metrics}}, expected);
  }
}

TEST(EngineRequests, StopRequestCutsTheOutput) {
  for (DecodeMode mode : kModes) {
    Engine engine(tiny_model(), tiny_engine_config(mode));
    Job job = simple_job(11, 40);
    uint64_t running = add(engine, job), finished = add(engine, simple_job(11, 5, 2));
    while (engine.request(running).num_known < 10) engine.step();
    expect_invalid([&] { engine.stop_request(running, 1000); }, "got 1000");
    expect_invalid([&] { engine.stop_request(running, -1); }, "num_tokens must be in [0, ");
    EXPECT_NE(engine.request(running).status, RequestStatus::finished);
    engine.stop_request(running, 7);
    EXPECT_EQ(engine.request(running).output.size(), 7u);
    EXPECT_EQ(engine.request(running).finish_reason, FinishReason::stop);
    finish_all(engine);
    engine.stop_request(finished, 0);  // a stop string found after the last step
    EXPECT_EQ(engine.request(finished).output.size(), 0u);
    EXPECT_EQ(engine.request(finished).finish_reason, FinishReason::stop);
    expect_all_pages_free(engine);
  }
}

TEST(EngineRequests, StopTokensEndTheOutput) {
  for (DecodeMode mode : kModes) {
    EngineConfig config = tiny_engine_config(mode);
    Job job = simple_job(14, 40);
    std::vector<int32_t> ids = run_jobs(config, {job})[0].token_ids();
    int32_t stop = ids[23];
    auto end = std::find(ids.begin(), ids.end(), stop) + 1;  // stop token included
    std::vector<int32_t> expected(ids.begin(), end);

    Job stopped = job;
    stopped.params.stop_token_ids = {-5, stop};
    Outcome by_param = run_jobs(config, {stopped})[0];
    EXPECT_EQ(by_param.token_ids(), expected);
    EXPECT_EQ(by_param.finish_reason, FinishReason::stop);

    config.eos_token_ids = {stop};
    EXPECT_EQ(run_jobs(config, {job})[0].token_ids(), expected);
    job.params.ignore_eos = true;
    Outcome ignored = run_jobs(config, {job})[0];
    EXPECT_EQ(ignored.token_ids(), ids);
    EXPECT_EQ(ignored.finish_reason, FinishReason::length);
  }
}

TEST(EngineRequests, MaxTokensIsBoundedByTheContext) {
  EngineConfig config = tiny_engine_config(DecodeMode::block);
  config.max_model_len = 43;  // not whole blocks
  for (int max_tokens : {-1, 1000}) {
    EXPECT_EQ(run_jobs(config, {simple_job(30, max_tokens)})[0].output.size(), 13u);
  }
}

TEST(EngineRequests, BadArgumentsThrowAndChangeNothing) {
  EngineConfig config = tiny_engine_config(DecodeMode::chunk);
  config.num_pages = 8;
  Engine engine(tiny_model(), config);
  auto rejects = [&](const std::string& text, auto change) {
    Job job = simple_job(9, 8);
    change(job);
    expect_invalid([&] { add(engine, job); }, text);
    EXPECT_FALSE(engine.has_unfinished()) << text;
    EXPECT_EQ(engine.scheduler().num_waiting(), 0) << text;
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  rejects("the prompt is empty", [](Job& j) { j.prompt.clear(); });
  rejects("got 61", [](Job& j) { j.prompt[3] = 61; });
  rejects("got -1", [](Job& j) { j.prompt[0] = -1; });
  rejects("a prompt of 96 tokens leaves no room in max_model_len 96",
          [](Job& j) { j.prompt.resize(96); });
  rejects("needs 9 pages of 8 tokens, the kv cache has 8",
          [](Job& j) { j.params.max_tokens = 56; });
  rejects("temperature must be 0 (greedy) or in [0.0001, 1000000], got 1e-05",
          [](Job& j) { j.params.temperature = 1e-5f; });
  rejects("temperature must be 0 (greedy) or in [0.0001, 1000000], got -1",
          [](Job& j) { j.params.temperature = -1; });
  rejects("temperature must be 0 (greedy) or in [0.0001, 1000000], got 2e+06",
          [](Job& j) { j.params.temperature = 2e6f; });
  rejects("temperature must be 0 (greedy) or in [0.0001, 1000000], got nan",
          [&](Job& j) { j.params.temperature = nan; });
  rejects("top_k must be >= 0, got -2", [](Job& j) { j.params.top_k = -2; });
  rejects("top_p must be in (0, 1], got 0", [](Job& j) { j.params.top_p = 0; });
  rejects("top_p must be in (0, 1], got nan", [&](Job& j) { j.params.top_p = nan; });
  rejects("confidence_threshold must be in [0, 1], got 1.5",
          [](Job& j) { j.params.confidence_threshold = 1.5; });
  rejects("entropy_bound must be >= 0, got -0.5", [](Job& j) { j.params.entropy_bound = -0.5; });
  rejects("denoising_steps must be >= 0, got -3", [](Job& j) { j.params.denoising_steps = -3; });
  rejects("max_tokens must be at least 1, got 0", [](Job& j) { j.params.max_tokens = 0; });
  EXPECT_EQ(add(engine, simple_job(9, 8)), 1u) << "rejected requests take no id";
  finish_all(engine);
  expect_all_pages_free(engine);
}

TEST(EngineRequests, UnknownAndUnfinishedIdsThrow) {
  Engine engine(tiny_model(), tiny_engine_config(DecodeMode::ar));
  expect_invalid([&] { engine.abort(9); }, "[abort] unknown request 9");
  expect_invalid([&] { engine.request(9); }, "[request] unknown request 9");
  expect_invalid([&] { engine.stop_request(9, 0); }, "[stop_request] unknown request 9");
  uint64_t id = add(engine, simple_job(5, 5));
  expect_invalid([&] { engine.release(id); }, "[release] request 1 is not finished");
  finish_all(engine);
  engine.release(id);
  expect_invalid([&] { engine.release(id); }, "[release] unknown request 1");
}

TEST(EngineRequests, ConstructionChecksModelAndConfig) {
  auto unloaded = std::make_shared<Model>(tiny_config());
  expect_invalid([&] { Engine engine(unloaded, tiny_engine_config(DecodeMode::ar)); },
                 "weights are not loaded");
  ModelConfig maskless = tiny_config();
  maskless.mask_token_id = -1;
  auto model = std::make_shared<Model>(maskless);
  load_tiny_tensors(*model);
  model->finish_loading();
  expect_invalid([&] { Engine engine(model, tiny_engine_config(DecodeMode::chunk)); },
                 "only decode_mode ar works without a mask_token_id");
  Engine engine(model, tiny_engine_config(DecodeMode::ar));
  EngineConfig config = tiny_engine_config(DecodeMode::chunk);
  config.page_size = 6;
  expect_invalid([&] { Engine bad(tiny_model(), config); }, "got 6");
}

TEST(EngineRequests, IdleStepDoesNothing) {
  Engine engine(tiny_model(), tiny_engine_config(DecodeMode::chunk));
  StepOutput output = engine.step();
  EXPECT_TRUE(output.updates.empty());
  EXPECT_EQ(output.record.rows, 0);
}

TEST(EngineRequests, ProfileMeasuresAscendingRowsAndKeepsTokens) {
  for (DecodeMode mode : kModes) {
    EngineConfig config = tiny_engine_config(mode);
    config.chunk_arms = {kBlock};  // elastic: one arm, so that timing does not change tokens
    Job job = simple_job(20, 30);
    std::vector<Outcome> expected = run_jobs(config, {job});
    Engine engine(tiny_model(), config);
    add(engine, job);
    expect_invalid([&] { engine.profile(1); }, "[profile] 1 requests are unfinished");
    finish_all(engine);  // leaves cached pages behind
    expect_invalid([&] { engine.profile(0); }, "repeats must be at least 1, got 0");
    const LatencyProfile profile = engine.profile(2);
    EXPECT_EQ(engine.core().latency().profile().decode.size(), profile.decode.size());
    EXPECT_FALSE(profile.is_padded);
    EXPECT_EQ(profile.prefill.size(), profile.decode.size());
    EXPECT_FALSE(profile.kv.empty());
    for (size_t i = 0; i < profile.kv.size(); ++i) {
      EXPECT_GE(profile.kv[i].extra_ms, i == 0 ? 0 : profile.kv[i - 1].extra_ms);
    }
    const std::vector<LatencyProfile::Point>& points = profile.decode;
    EXPECT_EQ(points.front().rows, 1);
    EXPECT_EQ(points.back().rows, config.max_num_batched_rows);
    for (size_t i = 0; i < points.size(); ++i) {
      EXPECT_GT(points[i].ms, 0);
      EXPECT_TRUE(i == 0 || points[i - 1].rows < points[i].rows);
    }
    expect_same_outcomes(run_jobs(engine, {job}), expected);
  }
}

TEST(EngineRequests, ElasticWithAProfileRunsToCompletion) {
  for (DecodeMode mode : {DecodeMode::elastic, DecodeMode::elastic_per_request}) {
    Engine engine(tiny_model(), tiny_engine_config(mode, KvPolicy::auto_));
    LatencyProfile profile;
    profile.decode = {{1, 1.0}, {16, 1.1}, {32, 4.0}, {64, 9.0}};
    engine.set_profile(profile);
    for (const Outcome& outcome : run_jobs(engine, tiny_jobs(5, 10))) {
      EXPECT_EQ(outcome.finish_reason, FinishReason::length);
    }
  }
}

TEST(EngineRequests, ForwardChecksItsArguments) {
  Engine engine(tiny_model(), tiny_engine_config(DecodeMode::ar));
  auto rejects = [&](const std::string& text, std::vector<int32_t> tokens,
                     std::vector<int32_t> positions, std::vector<int32_t> limits,
                     std::vector<int32_t> pages) {
    expect_invalid([&] { engine.forward(tokens, positions, limits, pages); }, text);
  };
  rejects("rows must be between 1 and max_num_batched_rows 64, got 0", {}, {}, {}, {0});
  rejects("must have one length, got 1, 2, 1", {1}, {0, 1}, {1}, {0});
  rejects("page ids must be below 64, got 64", {1}, {0}, {1}, {64});
  rejects("token ids must be below vocab_size 61, got 61", {61}, {0}, {1}, {0});
  rejects("got position 8 and kv_limit 9", {1}, {8}, {9}, {0});
  rejects("got position 0 and kv_limit 0", {1}, {0}, {0}, {0});
  rejects("at most 12 pages, got 13", {1}, {0}, {1}, std::vector<int32_t>(13, 0));
  rejects("kv_limits must not decrease, got 2 and then 1", {1, 1}, {0, 1}, {2, 1}, {0});
  rejects("no position may lie before the first row's, 1, got 0", {1, 1}, {1, 0}, {2, 2}, {0});
  rejects("page ids must differ, got 2 twice", {1}, {0}, {1}, {2, 1, 2});
  EXPECT_EQ(engine.forward({1}, {0}, {1}, {3}).size(), 61u);
}

// Requests that start alike compute a page each before they can know that it is cached. The later
// pages hang on the cached one: keeping both, the last request would not fit the pool alone.
TEST(EngineRequests, FillAPoolThatHasCachedTheirBeginning) {
  EngineConfig config = tiny_engine_config(DecodeMode::ar);
  config.page_size = 2;
  config.num_pages = 3;
  config.max_num_seqs = 1;
  config.max_num_batched_rows = 4;
  config.max_model_len = 6;
  std::vector<Job> jobs;
  for (int max_tokens : {2, 1, 1, 1, 1, 5}) jobs.push_back(simple_job(1, max_tokens));
  const std::vector<Outcome> outcomes = run_jobs(config, jobs);
  ASSERT_EQ(outcomes.size(), jobs.size());
  EXPECT_EQ(outcomes.back().output.size(), 5u);
}

}  // namespace
}  // namespace optimus

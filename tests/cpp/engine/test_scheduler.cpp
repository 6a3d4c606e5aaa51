// Scheduler: what holds of every plan under random loads in every mode (row budget, slots, pages),
// the order of service, the prompts' share of the rows, turns under a short budget, and preemption.
#include "engine/scheduled_requests.h"

namespace optimus {
namespace {

using namespace testing;

constexpr int kBlock = 8;

EngineConfig base_config(DecodeMode mode = DecodeMode::chunk, KvPolicy policy = KvPolicy::refresh) {
  EngineConfig config;
  config.decode_mode = mode;
  config.kv_policy = policy;
  config.block_length = kBlock;
  config.chunk_length = 3;
  config.chunk_schedule = {{1, kBlock}, {3, 4}, {8, 2}};
  config.max_num_seqs = 6;
  config.max_num_batched_rows = 64;
  config.max_model_len = 128;
  config.page_size = kBlock;
  config.num_pages = 64;
  config.enable_prefix_cache = false;
  return config;
}

LatencyProfile small_profile(bool is_padded) {
  LatencyProfile profile;
  profile.decode = {{1, 1.0}, {20, 1.1}, {64, 4.0}};
  profile.is_padded = is_padded;
  return profile;
}

std::vector<uint64_t> ids_of(const StepPlan& plan) {
  std::vector<uint64_t> ids;
  for (const SeqPlan& seq : plan.seqs) ids.push_back(seq.request->id);
  return ids;
}

// Every prompt a multiple of the block, so that it needs its pages and no more.
void add_many(ScheduledRequests& run, int count, int prompt_len, int max_tokens) {
  for (int i = 0; i < count; ++i) run.add(prompt_len, max_tokens);
}

// Steps until all requests decode.
void prefill_all(ScheduledRequests& run) {
  auto decodes = [](const auto& request) { return request->status == RequestStatus::decoding; };
  for (int i = 0; i < 100; ++i) {
    if (std::all_of(run.requests.begin(), run.requests.end(), decodes)) return;
    run.step();
  }
  FAIL() << "some request never decodes";
}

TEST(Scheduler, RandomLoadsKeepEveryRuleAndFinish) {
  Rng rng(1);
  int preemptions = 0;
  for (int trial = 0; trial < 240; ++trial) {
    EngineConfig config =
        base_config(static_cast<DecodeMode>(trial % 6), static_cast<KvPolicy>(trial / 6 % 3));
    config.page_size = 1 << random_int(rng, 1, 5);
    config.max_num_seqs = random_int(rng, 1, 8);
    config.max_num_batched_rows = 4 * config.grid() + random_int(rng, 0, 40);
    config.enable_prefix_cache = random_int(rng, 0, 1) == 1;
    config.shuffle_pages = random_int(rng, 0, 1) == 1;
    config.recompute_block = random_int(rng, 0, 3) == 0;
    config.num_pages = (96 + random_int(rng, 0, 200)) / config.page_size + 1;
    ScheduledRequests run(config, trial);
    if (random_int(rng, 0, 1)) run.latency.set_profile(small_profile(random_int(rng, 0, 1)));
    int num_requests = random_int(rng, 1, 12);
    for (int i = 0; i < num_requests; ++i) {
      run.add(random_int(rng, 1, 40), random_int(rng, 1, 48));
      for (int s = random_int(rng, 0, 4); s > 0; --s) run.step();
    }
    run.run_all();
    for (const auto& request : run.requests) {
      EXPECT_EQ(request->num_known, request->params.max_tokens);
    }
    run.expect_all_pages_free();
    preemptions += run.num_preemptions();
    ASSERT_FALSE(HasFailure()) << "trial " << trial;
  }
  EXPECT_GT(preemptions, 50);
}

TEST(Scheduler, AdmitsInOrderOfArrival) {
  EngineConfig config = base_config();
  config.max_num_seqs = 2;
  ScheduledRequests run(config);
  add_many(run, 5, 16, 16);
  std::vector<uint64_t> order;
  while (run.scheduler.num_running() + run.scheduler.num_waiting() > 0) {
    for (uint64_t id : ids_of(run.step())) {
      if (std::find(order.begin(), order.end(), id) == order.end()) order.push_back(id);
    }
  }
  EXPECT_EQ(order, (std::vector<uint64_t>{1, 2, 3, 4, 5}));
}

TEST(Scheduler, SmallRequestDoesNotOvertakeALargeOne) {
  EngineConfig config = base_config();
  config.num_pages = 12;
  ScheduledRequests run(config);
  Request* first = run.add(40, 32);
  run.step();
  Request* large = run.add(80, 8);
  Request* small = run.add(8, 8);
  while (first->status != RequestStatus::finished) {
    EXPECT_EQ(large->status, RequestStatus::waiting);
    EXPECT_EQ(small->status, RequestStatus::waiting);
    run.step();
  }
  run.run_all();
}

TEST(Scheduler, PromptsKeepAQuarterOfTheRows) {
  for (DecodeMode mode : {DecodeMode::ar, DecodeMode::block, DecodeMode::chunk}) {
    EngineConfig config = base_config(mode);
    config.max_num_seqs = 40;
    config.max_num_batched_rows = mode == DecodeMode::ar ? 32 : 64;
    config.num_pages = 1000;
    config.max_model_len = 512;
    ScheduledRequests run(config);
    add_many(run, 39, 16, 60);
    prefill_all(run);
    Request* late = run.add(300, 8);
    while (run.step(), late->status == RequestStatus::prefilling) {
      int left = late->prefill_target - late->num_computed;
      StepPlan plan = run.step();
      EXPECT_GE(plan.prefill_rows, std::min(left, config.max_num_batched_rows / 4));
      EXPECT_GT(plan.num_rows, plan.prefill_rows) << "decoding goes on";
      ASSERT_FALSE(HasFailure());
    }
    EXPECT_EQ(late->status, RequestStatus::decoding);
  }
}

TEST(Scheduler, RequestsTakeTurnsWhenRowsAreShort) {
  for (DecodeMode mode : {DecodeMode::block, DecodeMode::chunk}) {
    EngineConfig config = base_config(mode);
    config.max_num_seqs = 11;
    config.max_num_batched_rows = 4 * kBlock;
    config.num_pages = 1000;
    config.max_model_len = 512;
    ScheduledRequests run(config);
    add_many(run, 11, 8, 500);  // nobody finishes
    prefill_all(run);
    std::vector<int> last_served(12, 0);
    for (int step = 1; step <= 40; ++step) {
      for (uint64_t id : ids_of(run.step())) last_served[id] = step;
      // A refreshed block and a current one at the most: two requests a step at the least, so who
      // was just served waits for at most five steps.
      for (int id = 1; id <= 11; ++id) {
        ASSERT_LE(step - last_served[id], 5) << "request " << id << " in step " << step;
      }
    }
  }
}

TEST(Scheduler, PreemptsTheYoungestAndLosesNothing) {
  for (KvPolicy policy : {KvPolicy::refresh, KvPolicy::freeze}) {
    EngineConfig config = base_config(DecodeMode::chunk, policy);
    config.num_pages = 14;
    ScheduledRequests run(config);
    add_many(run, 3, 24, 64);
    std::vector<int> known(3, 0);
    int num_seen = 0;
    while (num_seen < 4 && run.scheduler.num_running() + run.scheduler.num_waiting() > 0) {
      std::vector<Request*> running;
      for (auto& request : run.requests) {
        if (request->slot >= 0) running.push_back(request.get());
      }
      int before = run.num_preemptions();
      run.step();
      int preempted = run.num_preemptions() - before;
      for (int i = 0; i < preempted; ++i) {
        Request* youngest = running.back();  // the pool lets nobody overtake: ids are in order
        running.pop_back();
        EXPECT_EQ(youngest->status, RequestStatus::waiting);
        EXPECT_EQ(youngest->slot, -1);
        EXPECT_TRUE(youngest->pages.empty());
        EXPECT_EQ(youngest->num_computed, 0);
        EXPECT_EQ(youngest->replays_block, policy == KvPolicy::refresh);
        EXPECT_GE(static_cast<int>(youngest->output.size()), youngest->num_known);
        ++num_seen;
      }
      for (size_t i = 0; i < 3; ++i) {
        EXPECT_GE(run.requests[i]->num_known, known[i]);
        known[i] = run.requests[i]->num_known;
      }
    }
    EXPECT_GE(num_seen, 2);
    EXPECT_EQ(run.requests[0]->metrics.num_preemptions, 0) << "the oldest always progresses";
    run.run_all();
    for (auto& request : run.requests) EXPECT_EQ(request->num_known, 64);
    run.expect_all_pages_free();
  }
}

TEST(Scheduler, PreemptionWithoutReplayDropsTokensBehindAMask) {
  EngineConfig config = base_config(DecodeMode::chunk, KvPolicy::freeze);
  config.num_pages = 8;
  ScheduledRequests run(config);
  Request *first = run.add(24, 30), *second = run.add(16, 30);
  prefill_all(run);
  second->output.resize(7);
  second->num_known = 2;
  for (int i : {0, 1, 5}) second->output[i] = {i, 0.0f, 1.0f, 1};
  first->block_start += 3 * kBlock;  // needs three pages more
  run.scheduler.plan(run.now_s, run.latency, run.commits);
  ASSERT_EQ(second->metrics.num_preemptions, 1);
  EXPECT_EQ(second->output[1].token_id, 1);
  EXPECT_EQ(second->output[5].step, 0) << "a token behind a mask";
}

TEST(Scheduler, CachedPrefixIsSharedAndEvictedBeforeAnybodyIsPreempted) {
  EngineConfig config = base_config();
  config.enable_prefix_cache = true;
  config.num_pages = 16;
  ScheduledRequests run(config);
  Request* first = run.add(40, 8);
  run.run_all();
  EXPECT_GE(run.scheduler.prefix_cache().num_cached(), 5);
  Request* same = run.add(0, 8);
  same->prompt = first->prompt;
  same->block_start = 40;
  run.step();
  EXPECT_EQ(same->metrics.cached_prompt_tokens, 40);
  run.run_all();
  Request* other = run.add(8, 110);
  run.run_all();
  EXPECT_EQ(other->metrics.num_preemptions, 0);
  run.expect_all_pages_free();
}

TEST(Scheduler, RemoveInEveryState) {
  for (int num_steps = 0; num_steps < 12; ++num_steps) {
    EngineConfig config = base_config();
    config.num_pages = 10;
    config.max_num_batched_rows = 4 * kBlock;
    ScheduledRequests run(config);
    add_many(run, 4, 35, 20);
    for (int i = 0; i < num_steps; ++i) run.step();
    for (auto& request : run.requests) {
      run.scheduler.remove(request.get());
      run.scheduler.remove(request.get());  // nothing left to do
    }
    EXPECT_EQ(run.scheduler.num_running() + run.scheduler.num_waiting(), 0);
    run.expect_all_pages_free();
  }
}

TEST(Scheduler, PagesCoverWholeBlocks) {
  EngineConfig config = base_config();
  config.page_size = 4;
  Scheduler scheduler(config);
  EXPECT_EQ(scheduler.pages_for(1), 2);
  EXPECT_EQ(scheduler.pages_for(8), 2);
  EXPECT_EQ(scheduler.pages_for(9), 4);
  config.decode_mode = DecodeMode::ar;
  Scheduler ar(config);
  EXPECT_EQ(ar.pages_for(1), 1);
  EXPECT_EQ(ar.pages_for(9), 3);
}

TEST(Scheduler, DecodeRowsCountsFreshRefreshedAndMasks) {
  Request request;
  request.num_fresh = 2;
  request.num_masked = 5;
  Scheduler chunk(base_config());
  EXPECT_EQ(chunk.decode_rows(request, 3, false), 5);
  EXPECT_EQ(chunk.decode_rows(request, 8, false), 7);
  request.previous_block_pending = true;
  request.num_masked = kBlock;
  EXPECT_EQ(chunk.decode_rows(request, 3, false), 5);
  EXPECT_EQ(chunk.decode_rows(request, 3, true), kBlock + 3);
  request.num_fresh = kBlock;
  EXPECT_EQ(Scheduler(base_config(DecodeMode::block)).decode_rows(request, 8, true), 2 * kBlock);
  EXPECT_EQ(Scheduler(base_config(DecodeMode::ar)).decode_rows(request, 1, false), 1);
}

TEST(EngineConfig, BadValuesThrowWithValues) {
  auto rejects = [](const std::string& text, auto change) {
    EngineConfig config = base_config();
    change(config);
    expect_invalid([&] { validate(config); }, text);
  };
  validate(base_config());
  rejects("block_length must be at least 1, got 0", [](auto& c) { c.block_length = 0; });
  rejects("max_num_seqs must be at least 1, got -1", [](auto& c) { c.max_num_seqs = -1; });
  rejects("page_size must be at least 1, got 0", [](auto& c) { c.page_size = 0; });
  rejects("num_pages must be at least 1, got 0", [](auto& c) { c.num_pages = 0; });
  rejects("max_model_len must be at least 8, got 7", [](auto& c) { c.max_model_len = 7; });
  rejects("num_threads must be at least 0, got -2", [](auto& c) { c.num_threads = -2; });
  rejects("max_num_batched_rows must be at least 32, got 31",
          [](auto& c) { c.max_num_batched_rows = 31; });
  rejects("page_size must be a multiple of block_length 8 or divide it, got 12",
          [](auto& c) { c.page_size = 12; });
  rejects("chunk_length must be between 1 and block_length 8, got 9",
          [](auto& c) { c.chunk_length = 9; });
  rejects("target_tpot_ms must not be negative, got -1", [](auto& c) { c.target_tpot_ms = -1; });
  rejects("target_ttft_ms must not be negative, got nan",
          [](auto& c) { c.target_ttft_ms = std::nan(""); });
  rejects("step_log_size must be at least 0, got -1", [](auto& c) { c.step_log_size = -1; });
  rejects("chunk_arms must be between 1 and block_length 8, got 0",
          [](auto& c) { c.chunk_arms = {2, 0}; });
  EngineConfig ar = base_config(DecodeMode::ar);
  ar.page_size = 5;  // the grid is 1: any page size
  ar.chunk_length = 99;
  ar.max_num_batched_rows = 4;
  validate(ar);
}

}  // namespace
}  // namespace optimus

// EngineCore driven by hand: clocks that jump back or are no number, the step log, and what the
// core tells its models.
#include <map>

#include "engine/simulated_runs.h"
#include "kernels/cpu/kernels.h"

namespace optimus {
namespace {

using namespace testing;

constexpr int kB = 8;

// Runs steps of a core with candidates of confidence 0.95, some of them less, as the simulator does.
class CoreDriver {
 public:
  explicit CoreDriver(EngineConfig config)
      : core(config, 100),
        buffers_(core.config(), core.scheduler().pages_for(config.max_model_len)),
        threads_(1) {}

  StepOutput step(double plan_s, double forward_ms, double end_s) {
    return core.update(run(plan_s), forward_ms, end_s);
  }

  StepResult run(double plan_s) {
    EXPECT_TRUE(start(plan_s));
    return commit();
  }

  // Makes the rows of the next step; false: there is none yet.
  bool start(double plan_s) {
    const StepPlan& plan = core.plan(plan_s);
    if (plan.seqs.empty()) return false;
    buffers_.write_plan(plan);
    cpu::open_windows(buffers_.open_windows_params(), threads_);
    cpu::build_rows(buffers_.build_rows_params(/*mask_token_id=*/0), threads_);
    note_clean(plan);
    return true;
  }

  StepResult commit() {
    for (int i = 0; i < buffers_.num_logit_rows(); ++i) {
      buffers_.candidates().token_ids[i] = 1;
      buffers_.candidates().confidence[i] =
          doubt > 0 && random_int(rng_, 0, doubt) == 0 ? 0.3f : 0.95f;
      buffers_.candidates().logprob[i] = buffers_.candidates().entropy[i] = 0.05f;
    }
    cpu::commit_candidates(
        buffers_.unmask_params(nullptr, ModelConfig{}, buffers_.num_logit_rows()));
    return buffers_.result(buffers_.num_rows(), buffers_.num_logit_rows());
  }

  EngineCore core;
  // By request: leading positions that were fed as whole blocks of known tokens, one after the other.
  std::map<uint64_t, int> clean;
  int doubt = 0;  // > 0: about one candidate in that many is none

 private:
  void note_clean(const StepPlan& plan) {
    const int32_t* ends = buffers_.rows().cu_seqlens_q + 1;
    for (size_t s = 0; s < plan.seqs.size(); ++s) {
      const SeqPlan& seq = plan.seqs[s];
      int& known = clean[seq.request->id];
      if (seq.prefill_len > 0) known = seq.prefill_start + seq.prefill_len;
      const int block_start = buffers_.state().block_start[seq.slot];
      int num_before = 0;
      for (int row = ends[s] - seq_rows(s); row < ends[s]; ++row) {
        num_before += buffers_.rows().positions[row] < block_start;
      }
      const bool is_whole = seq.prefill_len == 0 && num_before == core.config().grid();
      if (is_whole && known == block_start - core.config().grid()) known = block_start;
    }
  }
  int seq_rows(size_t s) const {
    return buffers_.rows().cu_seqlens_q[s + 1] - buffers_.rows().cu_seqlens_q[s];
  }

  DecodeBuffers buffers_;
  ThreadPool threads_;
  Rng rng_{17};
};

EngineConfig core_config(DecodeMode mode = DecodeMode::elastic) {
  EngineConfig config;
  config.decode_mode = mode;
  config.block_length = config.page_size = kB;
  config.max_num_seqs = 4;
  config.max_num_batched_rows = 64;
  config.max_model_len = 512;
  return config;
}

LatencyProfile flat_profile() {
  LatencyProfile profile;
  profile.decode = {{1, 2.0}, {64, 2.0}};
  return profile;
}

TEST(EngineCore, AClockThatJumpsBackTurnsNothingNegative) {
  for (bool with_profile : {false, true}) {
    CoreDriver driver(core_config());
    if (with_profile) driver.core.latency().set_profile(flat_profile());
    const uint64_t id =
        driver.core.add_request(std::vector<int32_t>(20, 1), simulated_params(60), 100.0);
    double last_start = 0;
    const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
    const double clocks[] = {99.0, 101.0, -5.0, nan, inf, -inf, 101.5, 0.0, 102.0, 3.0};
    for (int i = 0; driver.core.has_unfinished(); ++i) {
      ASSERT_LT(i, 100);
      const StepRecord record = driver
                                    .step(clocks[i % 10],
                                          i % 3 == 0   ? -1.0
                                          : i % 3 == 1 ? nan
                                                       : 2.0,
                                          clocks[(i * 7 + 3) % 10])
                                    .record;
      EXPECT_GE(record.start_s, last_start);
      EXPECT_GE(record.step_ms, 0);
      EXPECT_TRUE(std::isfinite(record.start_s) && std::isfinite(record.step_ms));
      EXPECT_TRUE(std::isfinite(record.predicted_ms) && record.predicted_ms >= 0);
      EXPECT_TRUE(record.chunk_length >= 0 && record.chunk_length <= kB);
      last_start = record.start_s;
    }
    const RequestMetrics& metrics = driver.core.request(id).metrics;
    EXPECT_EQ(metrics.arrival_s, 100.0);
    EXPECT_GE(metrics.first_token_s, metrics.arrival_s);
    EXPECT_GE(metrics.finish_s, metrics.first_token_s);
    EXPECT_EQ(driver.core.request(id).output.size(), 60u);
  }
}

TEST(EngineCore, HostTimeIsLearnedBetweenStepsThatFollowEachOther) {
  CoreDriver driver(core_config());
  driver.core.latency().set_profile(flat_profile());
  driver.core.add_request(std::vector<int32_t>(20, 1), simulated_params(200), 0.0);
  double now_s = 0;
  for (int i = 0; i < 12; ++i, now_s += 0.005) driver.step(now_s + 0.001, 2.0, now_s + 0.005);
  EXPECT_NEAR(driver.core.latency().overhead_ms(), 3.0, 1e-6) << "5 ms a step, 2 of them forward";
  EXPECT_NEAR(driver.core.latency().predict({8, 0, 0}), 5.0, 0.01);
  // An idle engine is not a slow one.
  while (driver.core.has_unfinished()) {
    driver.step(now_s + 0.001, 2.0, now_s + 0.005);
    now_s += 0.005;
  }
  for (int i = 0; i < 10; ++i) {
    now_s += 1000;
    driver.core.add_request(std::vector<int32_t>(8, 1), simulated_params(1), now_s);
    while (driver.core.has_unfinished()) {
      driver.step(now_s + 0.001, 2.0, now_s + 0.005);
      now_s += 0.005;
    }
  }
  EXPECT_NEAR(driver.core.latency().overhead_ms(), 3.0, 1e-3);
}

TEST(EngineCore, StepLogIsARingInOrder) {
  for (int capacity : {0, 1, 5, 1000}) {
    EngineConfig config = core_config(DecodeMode::chunk);
    config.step_log_size = capacity;
    CoreDriver driver(config);
    driver.core.add_request(std::vector<int32_t>(20, 1), simulated_params(100), 0.0);
    std::vector<StepRecord> all;
    for (int i = 0; driver.core.has_unfinished(); ++i) {
      all.push_back(driver.step(i, 2.0, i + 0.5).record);
      const std::vector<StepRecord> kept = driver.core.log().records();
      ASSERT_EQ(kept.size(), std::min(all.size(), size_t(capacity)));
      for (size_t k = 0; k < kept.size(); ++k) {
        const StepRecord& expected = all[all.size() - kept.size() + k];
        ASSERT_EQ(kept[k].step, expected.step);
        ASSERT_EQ(kept[k].commits, expected.commits);
      }
    }
    EXPECT_EQ(all.front().step, 1u);
    EXPECT_EQ(all.back().step, all.size());
    driver.core.log().clear();
    EXPECT_TRUE(driver.core.log().records().empty());
  }
}

// The next step is planned between the halves of an update: where no model chooses, what both see
// must not depend on that.
TEST(EngineCore, PlanningAheadOfTheReportChangesNothing) {
  for (DecodeMode mode : {DecodeMode::ar, DecodeMode::block, DecodeMode::chunk}) {
    CoreDriver whole(core_config(mode)), halves(core_config(mode));
    for (CoreDriver* driver : {&whole, &halves}) {
      driver->core.latency().set_profile(flat_profile());
      for (int i = 0; i < 9; ++i) {
        driver->core.add_request(std::vector<int32_t>(10 + i, 1), simulated_params(20 + 3 * i), 0);
      }
    }
    StepResult result = halves.run(0);
    for (double now_s = 0; whole.core.has_unfinished(); now_s += 0.01) {
      const StepOutput expected = whole.step(now_s, 2.0, now_s + 0.01);
      halves.core.apply(result, 2.0, now_s + 0.01);
      if (halves.core.has_unfinished()) result = halves.run(now_s + 0.01);
      const StepOutput got = halves.core.report();
      ASSERT_EQ(got.updates.size(), expected.updates.size());
      for (size_t i = 0; i < got.updates.size(); ++i) {
        const RequestUpdate &a = got.updates[i], &b = expected.updates[i];
        EXPECT_EQ(a.id, b.id);
        EXPECT_EQ(a.num_known, b.num_known);
        EXPECT_EQ(a.finish_reason, b.finish_reason);
        ASSERT_EQ(a.commits.size(), b.commits.size());
        for (size_t k = 0; k < a.commits.size(); ++k) {
          EXPECT_EQ(a.commits[k].output_idx, b.commits[k].output_idx);
          EXPECT_EQ(a.commits[k].token.step, b.commits[k].token.step);
        }
        EXPECT_EQ(halves.core.request(a.id).metrics.chunk_histogram,
                  whole.core.request(b.id).metrics.chunk_histogram);
      }
      EXPECT_EQ(got.record.step, expected.record.step);
      EXPECT_EQ(got.record.rows, expected.record.rows);
      EXPECT_EQ(got.record.chunk_lengths, expected.record.chunk_lengths);
      EXPECT_EQ(got.record.expected_commits, expected.record.expected_commits);
      EXPECT_EQ(got.record.num_waiting, expected.record.num_waiting);
    }
    for (int i = 0; i < CommitModel::kReliabilityBins; ++i) {
      EXPECT_EQ(halves.core.commits().reliability()[i].predicted,
                whole.core.commits().reliability()[i].predicted);
    }
  }
}

// Where a model chooses, a plan made ahead of the report knows one step less. Nothing is lost for it:
// every mask of every step is learned from, once.
TEST(EngineCore, PlanningAheadOfTheReportLosesNoObservation) {
  for (DecodeMode mode : {DecodeMode::elastic, DecodeMode::elastic_per_request}) {
    CoreDriver driver(core_config(mode));
    driver.core.latency().set_profile(flat_profile());
    int tokens = 0, expected_tokens = 0;
    for (int i = 0; i < 9; ++i) {
      driver.core.add_request(std::vector<int32_t>(10 + i, 1), simulated_params(20 + 3 * i), 0);
      expected_tokens += 20 + 3 * i;
    }
    int64_t masks = 0;
    StepResult result = driver.run(0);
    for (double now_s = 0; driver.core.has_unfinished(); now_s += 0.01) {
      driver.core.apply(result, 2.0, now_s + 0.01);
      if (driver.core.has_unfinished()) result = driver.run(now_s + 0.01);
      const StepOutput output = driver.core.report();
      masks += output.record.logit_rows;
      for (const RequestUpdate& update : output.updates) tokens += update.commits.size();
    }
    EXPECT_EQ(tokens, expected_tokens);
    double observed = 0;
    for (const auto& bin : driver.core.commits().reliability()) observed += bin.count;
    EXPECT_EQ(observed, masks);
  }
}

// What refreshing has made clean, the prefix cache may keep, and nothing else. Blocks whose arm asks
// for it are refreshed, whether the end of the block was known when that was planned or not.
TEST(EngineCore, PlanningAheadRefreshesWhatIsDueAndKnowsWhatIsClean) {
  for (bool is_due : {false, true}) {  // for the first request
    for (bool ahead : {false, true}) {
      SCOPED_TRACE(concat("due ", is_due, ", ahead ", ahead));
      EngineConfig config = core_config();
      config.kv_policy = KvPolicy::auto_;
      config.chunk_arms = {3};
      // At the lower threshold only refreshed blocks are good enough.
      config.measured_arms = {{0.5f, 3, false, 0.5, -0.1},
                              {0.5f, 3, true, 0.9, 0.1},
                              {0.9f, 3, false, 0.9, 0.1},
                              {0.9f, 3, true, 0.9, 0.1}};
      CoreDriver driver(config);
      driver.doubt = 3;
      // Rows are free up to 28, so that refreshing is so now and then.
      LatencyProfile profile;
      profile.decode = {{1, 2.0}, {28, 2.0}, {64, 20.0}};
      driver.core.latency().set_profile(profile);
      std::vector<uint64_t> ids;
      for (int i = 0; i < 6; ++i) {
        const float threshold = i == 0 && is_due ? 0.5f : 0.9f;
        ids.push_back(driver.core.add_request(std::vector<int32_t>(9 + 3 * i, 1 + i),
                                              simulated_params(60 + 7 * i, threshold), 0));
      }
      int num_refreshed = 0, num_ahead = 0;
      ASSERT_TRUE(driver.start(0));
      for (double now_s = 0; driver.core.has_unfinished(); now_s += 0.01) {
        KeptResult result;
        result.keep(driver.commit(), config.max_num_seqs);
        std::map<uint64_t, int> clean = driver.clean;  // of this step
        const bool started = ahead && driver.start(now_s);
        driver.core.apply(result.view(), 2.0, now_s + 0.01);
        const StepOutput output = driver.core.report();
        num_refreshed += output.record.refresh_rows > 0;
        num_ahead += output.record.is_ahead;
        for (uint64_t id : ids) {
          const Request& request = driver.core.request(id);
          if (request.status != RequestStatus::decoding || request.metrics.nfe == 0) continue;
          ASSERT_EQ(request.num_clean, clean[id]) << "request " << id;
          // Whole blocks behind the one that is due next.
          if (is_due && id == ids[0]) {
            ASSERT_GE(request.num_clean, request.block_start - kB);
          }
        }
        if (driver.core.is_void()) driver.core.drop_plan();
        if (!started && driver.core.has_unfinished()) {
          ASSERT_TRUE(driver.start(now_s + 0.01));
        }
      }
      EXPECT_GT(num_refreshed, 0);
      EXPECT_EQ(num_ahead > 0, ahead);
    }
  }
}

// After a failure nothing in flight counts, and everybody gets all tokens all the same.
TEST(EngineCore, ForgottenPlansAreMadeAgain) {
  for (DecodeMode mode : {DecodeMode::ar, DecodeMode::block, DecodeMode::chunk}) {
    EngineConfig config = core_config(mode);
    Rng rng(5);
    CoreDriver driver(config);
    driver.doubt = 3;
    std::map<uint64_t, int> lengths;
    for (int i = 0; i < 9; ++i) {
      lengths[driver.core.add_request(std::vector<int32_t>(10 + i, 1), simulated_params(20 + 3 * i),
                                      0)] = 20 + 3 * i;
    }
    int num_forgotten = 0;
    bool started = false;
    for (double now_s = 0; driver.core.has_unfinished(); now_s += 0.01) {
      if (!started) {
        ASSERT_TRUE(driver.start(now_s));
      }
      KeptResult result;
      result.keep(driver.commit(), config.max_num_seqs);
      started = driver.start(now_s);
      if (random_int(rng, 0, 5) == 0) {
        driver.core.forget_plans();
        started = false;
        ++num_forgotten;
        continue;
      }
      driver.core.apply(result.view(), 2.0, now_s + 0.01);
      driver.core.report();
      if (driver.core.is_void()) {
        driver.core.drop_plan();
        started = false;
      }
    }
    EXPECT_GT(num_forgotten, 3);
    for (auto [id, length] : lengths) EXPECT_EQ(driver.core.request(id).num_known, length);
    PagePool& pool = driver.core.scheduler().pool();
    driver.core.scheduler().prefix_cache().clear();
    EXPECT_EQ(pool.num_free(), pool.num_pages());
  }
}

TEST(EngineCore, RecordsAddUp) {
  CoreDriver driver(core_config(DecodeMode::elastic_per_request));
  driver.core.latency().set_profile(flat_profile());
  for (int i = 0; i < 3; ++i) {
    driver.core.add_request(std::vector<int32_t>(10 + i, 1), simulated_params(50), 0.0);
  }
  int commits = 0;
  for (int i = 0; driver.core.has_unfinished(); ++i) {
    const StepOutput output = driver.step(i, 2.0, i + 0.5);
    const StepRecord& record = output.record;
    int in_updates = 0, lengths = 0;
    for (const RequestUpdate& update : output.updates) {
      in_updates += static_cast<int>(update.commits.size());
    }
    for (uint16_t length : record.chunk_lengths) lengths += length;
    EXPECT_EQ(record.commits, in_updates);
    EXPECT_EQ(record.logit_rows, lengths);
    EXPECT_EQ(record.num_decoding, static_cast<int>(record.chunk_lengths.size()));
    EXPECT_EQ(record.arms.empty(), record.num_decoding == 0);
    EXPECT_GT(record.predicted_ms, 0);
    commits += record.commits;
  }
  EXPECT_EQ(commits, 150);
  CommitModel::Reliability sum;
  for (const auto& bin : driver.core.commits().reliability()) sum.count += bin.count;
  EXPECT_GE(sum.count, 150) << "every evaluated mask was learned from";
}

}  // namespace
}  // namespace optimus

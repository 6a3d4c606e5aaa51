// Both elastic modes under everything that can go wrong: curves that are not monotone, change in
// mid-run or are wrong from the start, masks that never commit, one huge context, targets nobody can
// meet, no profile, no pages, slow steps. Every request finishes, no step is empty or too large.
#include "engine/simulated_runs.h"

namespace optimus {
namespace {

using namespace testing;

constexpr int kB = 32;

struct Load {
  int prompt_len = 40, max_tokens = 100;
  double arrival_s = 0;
  float threshold = 0.9f;
};

std::vector<Load> mixed_load(unsigned seed, int count = 48) {
  Rng rng(seed);
  std::vector<Load> loads(count);
  double arrival_s = 0;
  for (Load& load : loads) {
    if (random_int(rng, 0, 3) == 0) arrival_s += 0.02 * random_int(rng, 0, 10);  // bursts
    load = {random_int(rng, 1, 200), random_int(rng, 1, 150), arrival_s,
            random_int(rng, 0, 1) ? 0.9f : 0.7f};
  }
  return loads;
}

struct Result {
  std::vector<SimulatedRequest> finished;
  std::vector<StepRecord> records;
  double seconds = 0;
};

Result run(SimulatorConfig config, const std::vector<Load>& loads, unsigned seed = 1) {
  Rng rng(seed);
  std::vector<CommitTrace> traces;
  for (double ease : {0.3, 1.0, 2.0, 4.0}) traces.push_back(random_trace(rng, 40, 120, kB, ease));
  Simulator simulator(config, traces);
  std::vector<int> wanted;
  for (const Load& load : loads) {
    simulator.add_request(load.arrival_s, load.prompt_len, static_cast<int>(wanted.size() % 4),
                          simulated_params(load.max_tokens, load.threshold));
    wanted.push_back(load.max_tokens);
  }
  Result result;
  result.finished = run_to_the_end(simulator, wanted);
  result.records = simulator.core().log().records();
  result.seconds = simulator.now_s();
  return result;
}

// Runs `body(config)` for both elastic modes and every KV policy.
template <class Body>
void for_each_elastic(const Body& body) {
  for (DecodeMode mode : {DecodeMode::elastic, DecodeMode::elastic_per_request}) {
    for (KvPolicy policy : {KvPolicy::freeze, KvPolicy::refresh, KvPolicy::auto_}) {
      SCOPED_TRACE("mode " + std::to_string(static_cast<int>(mode)) + ", kv policy " +
                   std::to_string(static_cast<int>(policy)));
      body(simulator_config(mode, policy));
      if (::testing::Test::HasFailure()) return;
    }
  }
}

TEST(SimulatorAdversarial, CurvesThatAreNotMonotone) {
  for_each_elastic([](SimulatorConfig config) {
    for (unsigned seed = 1; seed <= 4; ++seed) {
      SCOPED_TRACE("seed " + std::to_string(seed));
      Rng rng(seed);
      config.latency = {};
      for (int rows = 0; rows < 4096;) {
        rows += random_int(rng, 1, 400);
        config.latency.decode.push_back({rows, 0.1 * random_int(rng, 1, 300)});
      }
      config.latency.is_padded = seed % 2 == 0;
      run(config, mixed_load(seed), seed);
    }
  });
}

TEST(SimulatorAdversarial, TheDeviceSlowsDownInMidRun) {
  for_each_elastic([](SimulatorConfig config) {
    config.jitter = 0.03;
    config.slowdowns = {{0.3, 3.0}, {0.8, 1.0 / 3}};
    const Result result = run(config, mixed_load(2, 64));
    // Predictions follow: 12 steps after each change they are right again.
    int since_change = 0, num_checked = 0;
    double last_start = 0;
    for (const StepRecord& record : result.records) {
      for (double change : {0.3, 0.8}) {
        if (last_start < change && record.start_s >= change) since_change = 0;
      }
      last_start = record.start_s;
      if (++since_change <= 12) continue;
      ++num_checked;
      // Single steps differ by jitter and by what their prompts cost.
      EXPECT_NEAR(std::log(record.predicted_ms / record.forward_ms), 0, 0.25)
          << "at " << record.start_s << " s";
    }
    EXPECT_GT(num_checked, 50);
  });
}

TEST(SimulatorAdversarial, TheProfileIsWrong) {
  // Flat is what is steep, and the other way round.
  for_each_elastic([](SimulatorConfig config) {
    config.profile.decode = {{1, 40.0}, {128, 20.0}, {512, 5.0}, {4096, 1.0}};
    run(config, mixed_load(3));
    config.profile.decode = {{1, 1e-6}};
    run(config, mixed_load(3));
    config.profile.decode = {{4096, 1e6}};
    config.profile.is_padded = true;
    run(config, mixed_load(3));
  });
}

TEST(SimulatorAdversarial, NoMaskIsEverSureEnough) {
  for_each_elastic([](SimulatorConfig config) {
    std::vector<Load> loads = mixed_load(4);
    for (Load& load : loads) load.threshold = 1.0f;
    const Result result = run(config, loads);
    for (size_t i = 0; i < loads.size(); ++i) {
      // One mask a forward; masks behind the end of the answer may come first.
      EXPECT_GE(result.finished[i].metrics.nfe, loads[i].max_tokens);
      EXPECT_LE(result.finished[i].metrics.nfe, loads[i].max_tokens + kB);
    }
    // Evaluating more than the least is of no use, and the policy learns it.
    double rows = 0, count = 0;
    for (size_t i = result.records.size() / 2; i < result.records.size(); ++i) {
      for (uint16_t length : result.records[i].chunk_lengths) rows += length;
      count += static_cast<double>(result.records[i].chunk_lengths.size());
      if (result.records[i].num_decoding < 24) continue;
      EXPECT_LE(result.records[i].chunk_length, 8) << "at " << result.records[i].start_s;
    }
    EXPECT_GT(count, 0);
  });
}

TEST(SimulatorAdversarial, OneContextIsAHundredTimesLonger) {
  for_each_elastic([](SimulatorConfig config) {
    std::vector<Load> loads = mixed_load(5);
    loads[7].prompt_len = 7000;
    for (double extra_ms : {0.0, 200.0}) {
      config.latency.kv = {{7000, extra_ms}};
      for (double target : {0.0, 4.0}) {
        config.engine.target_tpot_ms = config.engine.target_ttft_ms = target;
        config.engine.max_num_batched_rows = target > 0 ? 512 : 4096;
        run(config, loads);
      }
    }
  });
}

TEST(SimulatorAdversarial, TargetsThatNobodyCanMeet) {
  for_each_elastic([](SimulatorConfig config) {
    config.engine.target_tpot_ms = 1e-4;
    config.engine.target_ttft_ms = 1e-4;
    const Result result = run(config, mixed_load(6));
    int num_decoding = 0;
    for (const StepRecord& record : result.records) {
      if (record.num_decoding == 0) continue;
      ++num_decoding;
      EXPECT_FALSE(record.meets_target);
      EXPECT_THAT(record.reason, ::testing::HasSubstr("cannot be met"));
    }
    EXPECT_GT(num_decoding, 20);
    // Best effort is not giving up.
    config.engine.target_tpot_ms = config.engine.target_ttft_ms = 0;
    EXPECT_LT(result.seconds, 2 * run(config, mixed_load(6)).seconds);
  });
}

TEST(SimulatorAdversarial, WithoutAProfileTheTrainedBlock) {
  for_each_elastic([](SimulatorConfig config) {
    config.without_profile = true;
    config.engine.target_tpot_ms = 5;
    const Result result = run(config, mixed_load(7));
    for (const StepRecord& record : result.records) {
      EXPECT_EQ(record.predicted_ms, 0);
      if (record.num_decoding == 0) continue;
      EXPECT_EQ(record.chunk_length, kB);
      EXPECT_THAT(record.reason, ::testing::HasSubstr("no latency profile"));
    }
  });
}

TEST(SimulatorAdversarial, TooFewPagesAndRows) {
  int preemptions = 0;
  for_each_elastic([&](SimulatorConfig config) {
    config.engine.max_model_len = 384;
    config.engine.num_pages = 24;
    config.engine.max_num_batched_rows = 4 * kB;
    for (int page_size : {8, 32}) {
      config.engine.page_size = page_size;
      config.engine.num_pages = 24 * 32 / page_size;
      for (const SimulatedRequest& request : run(config, mixed_load(8)).finished) {
        preemptions += request.metrics.num_preemptions;
      }
    }
  });
  EXPECT_GT(preemptions, 20);
}

TEST(SimulatorAdversarial, SlowStepsNowAndThen) {
  for_each_elastic([](SimulatorConfig config) {
    const auto decode_rows = [](const Result& result) {
      double rows = 0;
      for (const SimulatedRequest& request : result.finished) {
        rows += static_cast<double>(request.metrics.decode_rows);
      }
      return rows;
    };
    std::vector<Load> loads(32);
    double calm_rows = 0, rough_rows = 0;  // of several runs: a single one may take another turn
    for (unsigned seed = 1; seed <= 8; ++seed) {
      config.outlier_share = 0;
      const Result calm = run(config, loads, seed);
      config.outlier_share = 0.05;
      config.outlier_factor = 100;
      const Result rough = run(config, loads, seed);
      EXPECT_GT(rough.seconds, 2 * calm.seconds);
      calm_rows += decode_rows(calm);
      rough_rows += decode_rows(rough);
    }
    // What was chosen did not change much.
    EXPECT_NEAR(rough_rows, calm_rows, 0.05 * calm_rows);
  });
}

TEST(SimulatorAdversarial, EverythingAtOnce) {
  for_each_elastic([](SimulatorConfig config) {
    for (unsigned seed = 1; seed <= 6; ++seed) {
      SCOPED_TRACE("seed " + std::to_string(seed));
      Rng rng(seed);
      config.latency = {};
      for (int rows = 0; rows < 512;) {
        rows += random_int(rng, 1, 100);
        config.latency.decode.push_back({rows, 0.1 * random_int(rng, 1, 300)});
      }
      config.latency.is_padded = seed % 2 == 0;
      config.latency.kv = {{500, 0.1 * random_int(rng, 0, 10)}};
      config.latency.prefill = {{100, 3.0}, {200, 1.0}};
      config.jitter = 0.3;
      config.outlier_share = 0.05;
      config.outlier_factor = 1000;
      config.slowdowns = {{0.2, 5.0}, {0.5, 0.01}};
      config.host_ms = 0.1 * random_int(rng, 0, 20);
      config.seed = seed;
      config.engine.target_tpot_ms = 0.5 * random_int(rng, 0, 10);
      config.engine.target_ttft_ms = 20.0 * random_int(rng, 0, 5);
      config.engine.max_model_len = 400;
      config.engine.num_pages = random_int(rng, 16, 60);
      config.engine.max_num_seqs = random_int(rng, 2, 40);
      config.engine.max_num_batched_rows = random_int(rng, 4 * kB, 600);
      config.engine.chunk_arms = seed % 3 == 0 ? std::vector<int>{1, 5, 32} : std::vector<int>{};
      config.engine.measured_arms = {{0.9f, 4, false, 0.9, 0.01},
                                     {0.9f, 32, false, 0.7, -0.1},
                                     {0.9f, 8, true, 0.92, 0.02},
                                     {0.7f, 8, true, 0.5, -0.2}};
      std::vector<Load> loads = mixed_load(seed);
      loads[3].threshold = 1.0f;
      run(config, loads, seed);
    }
  });
}

}  // namespace
}  // namespace optimus

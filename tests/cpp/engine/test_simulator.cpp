// Simulator and CommitTrace: decoding follows the trace exactly, the clock is the sum of the curve,
// runs repeat themselves, and no mode is faster than the oracle. Adversarial runs are in
// test_simulator_adversarial.cpp.
#include "engine/simulated_runs.h"

namespace optimus {
namespace {

using namespace testing;

constexpr int kB = 32;

TEST(CommitTrace, ConfidenceOfRowsAndBehindThem) {
  // Positions 2..9 of a grid of 8: six in the first block, two in the second.
  const CommitTrace trace = TraceBuilder::make(
      2, 8, 8, [](int j, int idx) { return 0.1f * static_cast<float>(j) + 0.01f * idx; });
  trace.validate();
  EXPECT_EQ(trace.num_tokens(), 8);
  for (int j = 0; j < 8; ++j) {
    const int block_end = j < 6 ? 6 : 14;
    for (int idx = j; idx < block_end; ++idx) {
      EXPECT_FLOAT_EQ(trace.confidence(j, idx), 0.1f * j + 0.01f * idx) << j << ", " << idx;
    }
  }
  EXPECT_FLOAT_EQ(trace.confidence(8, 8), trace.confidence(0, 0)) << "the answer starts anew";
  EXPECT_FLOAT_EQ(trace.confidence(8 + 3, 8 + 5), trace.confidence(3, 5));
  // Row 5 has one entry; another alignment asks for more: the longest row has them.
  EXPECT_FLOAT_EQ(trace.confidence(5, 5 + 3), trace.confidence(6, 6 + 3));
  EXPECT_FLOAT_EQ(trace.confidence(5, 5 + 30), trace.confidence(6, 13)) << "its last";
}

TEST(CommitTrace, BadTracesThrow) {
  const CommitTrace good = trace_of_runs(0, 8, {3, 5});
  good.validate();
  const auto rejects = [&](const std::string& text, auto change) {
    CommitTrace trace = good;
    change(trace);
    expect_invalid([&] { trace.validate(); }, text);
    expect_invalid([&] { Simulator(simulator_config(DecodeMode::block), {trace}); }, text);
  };
  rejects("at least one row", [](auto& t) { t.row_begin = {0}; });
  rejects("at least one row", [](auto& t) { t.row_begin.clear(); });
  rejects("row_begin must run from 0 to", [](auto& t) { t.row_begin.back() += 1; });
  rejects("row_begin must run from 0 to", [](auto& t) { t.row_begin.front() = 1; });
  rejects("row 1 is empty", [](auto& t) { t.row_begin[2] = t.row_begin[1]; });
  rejects("between 0 and 1, got 1.5", [](auto& t) { t.confidences[3] = 1.5f; });
  rejects("between 0 and 1, got nan", [](auto& t) { t.confidences[3] = std::nanf(""); });
}

TEST(Simulator, BlockDecodingTakesOneForwardPerRun) {
  for (unsigned seed = 1; seed <= 30; ++seed) {
    Rng rng(seed);
    const int prompt_len = random_int(rng, 1, 100);
    std::vector<int> runs;
    int position = prompt_len;
    for (int i = random_int(rng, 1, 40); i > 0; --i) {
      const int room = kB - position % kB;  // a run ends with its block
      runs.push_back(std::min(room, random_int(rng, 1, 12)));
      position += runs.back();
    }
    const CommitTrace trace = trace_of_runs(prompt_len, kB, runs);
    Simulator simulator(simulator_config(DecodeMode::block), {trace});
    simulator.add_request(0, prompt_len, 0, simulated_params(trace.num_tokens()));
    const auto finished = run_to_the_end(simulator, {trace.num_tokens()});
    ASSERT_EQ(finished[0].metrics.nfe, static_cast<int>(runs.size())) << "seed " << seed;

    for (int c : {1, 2, 3, 8, 32}) {
      SimulatorConfig config = simulator_config(DecodeMode::chunk);
      config.engine.chunk_length = c;
      Simulator chunks(config, {trace});
      chunks.add_request(0, prompt_len, 0, simulated_params(trace.num_tokens()));
      int expected = 0;
      for (int run : runs) expected += (run + c - 1) / c;
      const int nfe = run_to_the_end(chunks, {trace.num_tokens()})[0].metrics.nfe;
      ASSERT_EQ(nfe, expected) << "seed " << seed << ", chunk " << c;
      ASSERT_GE(nfe, static_cast<int>(runs.size()));
    }
  }
}

TEST(Simulator, FollowsTheTraceByHand) {
  for (unsigned seed = 1; seed <= 40; ++seed) {
    Rng rng(seed);
    const int prompt_len = random_int(rng, 1, 100), num_tokens = random_int(rng, 1, 150);
    const CommitTrace trace =
        random_trace(rng, prompt_len, num_tokens, kB, 0.3 * random_int(rng, 0, 10));
    const float threshold = seed % 2 ? 0.9f : 0.5f;
    // Shorter than the trace, as long, longer; aligned with the trace or not.
    const int max_tokens = seed % 3 == 0 ? num_tokens : random_int(rng, 1, 300);
    const int at = seed % 5 == 0 ? random_int(rng, 1, 100) : prompt_len;
    for (int c : {1, 2, 5, 16, 32}) {
      SimulatorConfig config = simulator_config(DecodeMode::chunk);
      config.engine.chunk_length = c;
      config.engine.recompute_block = c == kB && seed % 2 == 0;
      Simulator simulator(config, {trace});
      simulator.add_request(0, at, 0, simulated_params(max_tokens, threshold));
      const auto finished = run_to_the_end(simulator, {max_tokens});
      ASSERT_EQ(finished[0].metrics.nfe, forwards_by_hand(trace, at, max_tokens, c, kB, threshold))
          << "seed " << seed << ", chunk " << c;
    }
  }
}

TEST(Simulator, AutoregressiveTakesOneForwardPerToken) {
  Rng rng(1);
  const CommitTrace trace = random_trace(rng, 7, 50, kB, 1.0);
  Simulator simulator(simulator_config(DecodeMode::ar), {trace});
  simulator.add_request(0, 7, 0, simulated_params(50));
  EXPECT_EQ(run_to_the_end(simulator, {50})[0].metrics.nfe, 50);
}

// ------------------------------------------------------------------------------------- the clock

// A batch of requests of all lengths, all at once or over time.
std::vector<int> add_requests(Simulator& simulator, unsigned seed, int count, double every_s,
                              int num_traces) {
  Rng rng(seed);
  std::vector<int> wanted;
  for (int i = 0; i < count; ++i) {
    wanted.push_back(random_int(rng, 1, 200));
    simulator.add_request(i * every_s, random_int(rng, 1, 300), i % num_traces,
                          simulated_params(wanted.back()));
  }
  return wanted;
}

std::vector<CommitTrace> mixed_traces(unsigned seed) {
  Rng rng(seed);
  std::vector<CommitTrace> traces;
  for (double ease : {0.5, 1.0, 1.5, 3.0}) traces.push_back(random_trace(rng, 40, 120, kB, ease));
  return traces;
}

TEST(Simulator, ClockIsTheSumOfTheCurve) {
  for (DecodeMode mode : {DecodeMode::ar, DecodeMode::block, DecodeMode::chunk, DecodeMode::elastic,
                          DecodeMode::elastic_per_request}) {
    SimulatorConfig config = simulator_config(mode);
    config.latency = simulated_latency(/*is_padded=*/mode != DecodeMode::block);
    config.latency.prefill = {{1, 2.0}, {4096, 40.0}};
    config.host_ms = 0.25;
    config.slowdowns = {{0.1, 2.0}, {0.3, 0.5}};
    Simulator simulator(config, mixed_traces(1));
    const std::vector<int> wanted = add_requests(simulator, 2, 12, 0, 4);
    run_to_the_end(simulator, wanted);
    double now_s = 0;
    int64_t commits = 0;
    for (const StepRecord& record : simulator.core().log().records()) {
      ASSERT_NEAR(record.start_s, now_s, 1e-9);
      double factor = now_s >= 0.1 ? 2.0 : 1.0;
      if (now_s >= 0.3) factor *= 0.5;
      const double ms =
          factor * config.latency.ms({record.rows, record.prefill_rows, record.kv_tokens});
      ASSERT_NEAR(record.forward_ms, ms, 1e-9);
      ASSERT_NEAR(record.step_ms, ms + 0.25, 1e-6);
      now_s += (ms + 0.25) * 1e-3;
      commits += record.commits;
    }
    EXPECT_NEAR(simulator.now_s(), now_s, 1e-9);
    EXPECT_EQ(commits, std::accumulate(wanted.begin(), wanted.end(), 0));
  }
}

TEST(Simulator, IdleTimeIsSkipped) {
  const CommitTrace trace = trace_of_runs(32, kB, {4, 4, 4, 4});
  const auto run = [&](std::vector<double> arrivals) {
    Simulator simulator(simulator_config(DecodeMode::block), {trace});
    for (double arrival : arrivals) simulator.add_request(arrival, 32, 0, simulated_params(16));
    auto finished = run_to_the_end(simulator, std::vector<int>(arrivals.size(), 16));
    EXPECT_FALSE(simulator.step()) << "nothing is left";
    return finished;
  };
  const double alone_s = run({0})[0].metrics.finish_s;
  const auto apart = run({0, 100, 5000});
  for (int i = 0; i < 3; ++i) {
    const RequestMetrics& metrics = apart[i].metrics;
    EXPECT_EQ(metrics.arrival_s, i == 0 ? 0 : i == 1 ? 100 : 5000);
    EXPECT_NEAR(metrics.finish_s - metrics.arrival_s, alone_s, 1e-9);
    EXPECT_EQ(metrics.nfe, 4);
  }
}

TEST(Simulator, ARequestArrivesInTheMiddleOfAStep) {
  const CommitTrace trace = trace_of_runs(32, kB, std::vector<int>(16, 2));
  Simulator simulator(simulator_config(DecodeMode::block), {trace});
  simulator.add_request(0, 32, 0, simulated_params(32));
  simulator.add_request(0.010, 32, 0, simulated_params(32));
  const auto finished = run_to_the_end(simulator, {32, 32});
  EXPECT_EQ(finished[1].metrics.arrival_s, 0.010) << "not the start of the step that admits it";
  EXPECT_GT(finished[1].metrics.first_token_s, 0.010);
  EXPECT_LT(finished[1].metrics.first_token_s, 0.025);
}

TEST(Simulator, RunsRepeatThemselvesBySeed) {
  const auto run = [](uint64_t seed) {
    SimulatorConfig config = simulator_config(DecodeMode::elastic_per_request, KvPolicy::auto_);
    config.jitter = 0.05;
    config.outlier_share = 0.02;
    config.seed = seed;
    Simulator simulator(config, mixed_traces(3));
    const std::vector<int> wanted = add_requests(simulator, 4, 40, 0.01, 4);
    std::vector<double> times;
    for (const SimulatedRequest& request : run_to_the_end(simulator, wanted)) {
      times.push_back(request.metrics.first_token_s);
      times.push_back(request.metrics.finish_s);
      times.push_back(request.metrics.nfe);
      times.push_back(static_cast<double>(request.metrics.decode_rows));
    }
    return times;
  };
  EXPECT_EQ(run(1), run(1));
  EXPECT_NE(run(1), run(2));
}

TEST(Simulator, RunStopsAtItsLimits) {
  Simulator simulator(simulator_config(DecodeMode::chunk), mixed_traces(5));
  const std::vector<int> wanted = add_requests(simulator, 6, 10, 0.05, 4);
  EXPECT_EQ(simulator.run(1e9, 7), 7);
  const double now_s = simulator.now_s();
  EXPECT_EQ(simulator.run(now_s, 100), 0) << "the time has come already";
  simulator.run(0.2, 100000);
  EXPECT_GE(simulator.now_s(), 0.2);
  EXPECT_LT(simulator.now_s(), 0.3);
  EXPECT_TRUE(simulator.core().has_unfinished());
  run_to_the_end(simulator, wanted);
}

TEST(Simulator, BadRequestsThrow) {
  Simulator simulator(simulator_config(DecodeMode::chunk), mixed_traces(7));
  simulator.add_request(1.0, 5, 0, simulated_params(4));
  const auto rejects = [&](const std::string& text, double arrival_s, int prompt_len, int trace) {
    expect_invalid(
        [&] { simulator.add_request(arrival_s, prompt_len, trace, simulated_params(4)); }, text);
  };
  rejects("arrivals must not descend, got 0.5 after 1", 0.5, 5, 0);
  rejects("arrivals must not descend, got nan", std::nan(""), 5, 0);
  rejects("trace must be in [0, 4), got 4", 1.0, 5, 4);
  rejects("trace must be in [0, 4), got -1", 1.0, 5, -1);
  rejects("prompt_len must be at least 1, got 0", 1.0, 0, 0);
  SimulatorConfig config = simulator_config(DecodeMode::chunk);
  expect_invalid([&] { Simulator(config, {}); }, "needs at least one trace");
  config.latency = {};
  expect_invalid([&] { Simulator(config, mixed_traces(1)); }, "needs a latency curve");
  run_to_the_end(simulator, {4});
}

// ------------------------------------------------------------------------------ how fast modes are

// A closed loop: `concurrency` requests at a time, eight rounds of them.
struct Seconds {
  double taken, oracle;
};
Seconds run_loop(SimulatorConfig config, int concurrency) {
  config.engine.max_num_seqs = concurrency;
  Simulator simulator(config, mixed_traces(8));
  std::vector<int> wanted;
  for (int i = 0; i < 8 * concurrency; ++i) {
    wanted.push_back(90 + i * 7 % 60);
    simulator.add_request(0, 40, i % 4, simulated_params(wanted.back()));
  }
  run_to_the_end(simulator, wanted);
  return {simulator.now_s(), simulator.oracle_s()};
}
double seconds(const SimulatorConfig& config, int concurrency) {
  return run_loop(config, concurrency).taken;
}

SimulatorConfig with_chunk(int chunk_length, KvPolicy policy = KvPolicy::freeze) {
  SimulatorConfig config = simulator_config(DecodeMode::chunk, policy);
  config.engine.chunk_length = chunk_length;
  return config;
}

const std::vector<int> kConcurrencies = {1, 4, 16, 64};

TEST(Simulator, NoModeIsFasterThanTheOracle) {
  for (int concurrency : kConcurrencies) {
    const double best_s = run_loop(with_chunk(kB), concurrency).oracle;
    for (int c : {1, 2, 4, 8, 16, 32}) {
      const Seconds chunk = run_loop(with_chunk(c), concurrency);
      EXPECT_GE(chunk.taken, best_s) << "chunk " << c << " at " << concurrency;
      EXPECT_GE(chunk.taken, chunk.oracle) << "chunk " << c << " at " << concurrency;
    }
    // What is forced when nothing is certain depends on the path: each mode has an oracle of its own.
    for (DecodeMode mode : {DecodeMode::block, DecodeMode::schedule, DecodeMode::elastic,
                            DecodeMode::elastic_per_request}) {
      const Seconds run = run_loop(simulator_config(mode), concurrency);
      EXPECT_GE(run.taken, run.oracle)
          << "mode " << static_cast<int>(mode) << " at " << concurrency;
      EXPECT_GT(run.oracle, 0.3 * run.taken) << "mode " << static_cast<int>(mode);
    }
    if (concurrency >= 16) {
      EXPECT_LT(best_s, 0.9 * seconds(with_chunk(kB), concurrency)) << "it pays for fewer rows";
    }
  }
}

// At threshold 1 a step commits one mask however many it looks at: rows by marginal gain must find
// that out, though every step commits something.
TEST(Simulator, RowsByMarginalGainLookAtOneMaskWhereNothingIsEverAccepted) {
  SimulatorConfig config = simulator_config(DecodeMode::elastic_per_request);
  config.engine.chunk_arms = {1, 2, 4, 8, 16, 32};
  config.engine.max_num_seqs = 8;
  config.latency = {};
  config.latency.decode = {{1, 1.0}, {1024, 20.0}};  // every row costs
  Simulator simulator(config, mixed_traces(3));
  std::vector<int> wanted;
  for (int i = 0; i < 64; ++i) {
    wanted.push_back(100);
    simulator.add_request(0, 40, i % 4, simulated_params(100, 1.0f));
  }
  double masks = 0, steps = 0;
  for (const SimulatedRequest& request : run_to_the_end(simulator, wanted)) {
    for (const auto& [length, count] : request.metrics.chunk_histogram) {
      masks += double(length) * count;
      steps += count;
    }
  }
  EXPECT_NEAR(steps, 6400, 200);
  EXPECT_LT(masks / steps, 1.5);
}

// A guard against regressions on made-up traces, seconds of work; how close the policies
// come is measured on recorded traces and long runs.
TEST(Simulator, ElasticKeepsUpWithTheBestFixedLength) {
  for (int concurrency : kConcurrencies) {
    double best_s = 1e300;
    for (int c : {2, 4, 8, 16, 32}) best_s = std::min(best_s, seconds(with_chunk(c), concurrency));
    EXPECT_LE(seconds(simulator_config(DecodeMode::elastic), concurrency), 1.06 * best_s)
        << "elastic at " << concurrency;
    EXPECT_LE(seconds(simulator_config(DecodeMode::elastic_per_request), concurrency),
              1.04 * best_s)
        << "elastic_per_request at " << concurrency;
    EXPECT_LE(seconds(simulator_config(DecodeMode::elastic), concurrency),
              1.035 * seconds(simulator_config(DecodeMode::block), concurrency))
        << "never below block decoding";
  }
}

}  // namespace
}  // namespace optimus

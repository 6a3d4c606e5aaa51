// Traces made up for the simulator, requests that decode them, and the loop they must follow.
#pragma once

#include <functional>
#include <set>

#include "engine/simulator.h"
#include "testing.h"

namespace optimus::testing {

// Confidences of a made-up answer; row j starts at position j of the answer and ends with its block.
class TraceBuilder {
 public:
  // confidence(j, idx): of position idx while j is the first mask.
  static CommitTrace make(int prompt_len, int num_tokens, int block_length,
                          const std::function<float(int, int)>& confidence) {
    CommitTrace trace;
    trace.prompt_len = prompt_len;
    trace.row_begin = {0};
    for (int j = 0; j < num_tokens; ++j) {
      const int block_end = ((prompt_len + j) / block_length + 1) * block_length - prompt_len;
      for (int idx = j; idx < block_end; ++idx) trace.confidences.push_back(confidence(j, idx));
      trace.row_begin.push_back(static_cast<int32_t>(trace.confidences.size()));
    }
    return trace;
  }
};

// Runs of easy masks: everything up to the end of the run of the first mask is certain, what is
// behind it is not. Block decoding takes one forward per run (a run ends with its block).
inline CommitTrace trace_of_runs(int prompt_len, int block_length, const std::vector<int>& runs) {
  std::vector<int> run_of;
  for (size_t i = 0; i < runs.size(); ++i)
    run_of.insert(run_of.end(), runs[i], static_cast<int>(i));
  const int num_tokens = static_cast<int>(run_of.size());
  return TraceBuilder::make(prompt_len, num_tokens, block_length, [&](int j, int idx) {
    return idx < num_tokens && run_of[idx] == run_of[j] ? 0.99f : 0.1f + 0.001f * (idx - j);
  });
}

// Each position has a reach: how far behind the first mask it is certain already, 0 = not even as
// the first mask itself. Reaches are distributed as commits by offset are on the demo model, longer
// with more ease (1 = the demo model).
inline CommitTrace random_trace(Rng& rng, int prompt_len, int num_tokens, int block_length,
                                double ease) {
  constexpr double kReaches[] = {0.97, 0.97, 0.8, 0.6, 0.55, 0.3, 0.26, 0.22, 0.19};
  std::uniform_real_distribution<> uniform;
  std::vector<int> reach(num_tokens + block_length);
  for (int& r : reach) {
    const double u = std::pow(uniform(rng), ease);
    while (r < 9 && u < kReaches[r]) ++r;
    if (r == 9) r += static_cast<int>(40 * uniform(rng));
  }
  return TraceBuilder::make(prompt_len, num_tokens, block_length, [&](int j, int idx) {
    const double noise = uniform(rng);
    return static_cast<float>(idx - j < reach[idx] ? 0.991 + 0.008 * noise : 0.85 * noise);
  });
}

// Flat to 128 rows, then linear; 5 us for 1000 keys.
inline LatencyProfile simulated_latency(bool is_padded = false) {
  LatencyProfile latency;
  for (int rows : {1, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096}) {
    latency.decode.push_back({rows, 4.0 + 0.02 * std::max(0, rows - 128)});
  }
  latency.kv = {{1000, 0.005}};
  latency.is_padded = is_padded;
  return latency;
}

inline SimulatorConfig simulator_config(DecodeMode mode, KvPolicy policy = KvPolicy::freeze) {
  SimulatorConfig config;
  config.engine.decode_mode = mode;
  config.engine.kv_policy = policy;
  config.engine.block_length = 32;
  config.engine.chunk_length = 4;
  config.engine.chunk_schedule = {{2, 32}, {8, 8}, {32, 4}};
  config.engine.max_num_seqs = 64;
  config.engine.max_num_batched_rows = 4096;
  config.engine.max_model_len = 8192;
  config.engine.page_size = 32;
  config.engine.num_pages = 8192;
  config.engine.step_log_size = 100000;
  config.latency = simulated_latency();
  return config;
}

inline SamplingParams simulated_params(int max_tokens, float threshold = 0.9f) {
  SamplingParams params;
  params.max_tokens = max_tokens;
  params.confidence_threshold = threshold;
  return params;
}

// Forwards that decode `max_tokens` of the trace by hand: the first `chunk_length` masks of the block
// are looked at, those above the threshold commit, or the best one.
inline int forwards_by_hand(const CommitTrace& trace, int prompt_len, int max_tokens,
                            int chunk_length, int block_length, float threshold) {
  int forwards = 0;
  const int first = prompt_len / block_length * block_length - prompt_len;
  for (int start = first; start < max_tokens; start += block_length) {
    std::set<int> masks;
    for (int idx = std::max(start, 0); idx < start + block_length; ++idx) masks.insert(idx);
    while (!masks.empty() && *masks.begin() < max_tokens) {
      ++forwards;
      const int first_mask = *masks.begin();
      std::vector<int> looked_at;
      for (int idx : masks) {
        if (static_cast<int>(looked_at.size()) < chunk_length) looked_at.push_back(idx);
      }
      int best = looked_at[0];
      for (int idx : looked_at) {
        if (trace.confidence(first_mask, idx) > trace.confidence(first_mask, best)) best = idx;
      }
      for (int idx : looked_at) {
        if (idx == best || trace.confidence(first_mask, idx) > threshold) masks.erase(idx);
      }
    }
  }
  return forwards;
}

// Runs to the end and checks what holds of every run: nothing is lost, no step is empty or too
// large, nobody waits without end. `wanted`: max_tokens by request, in order of their ids.
inline std::vector<SimulatedRequest> run_to_the_end(Simulator& simulator,
                                                    const std::vector<int>& wanted) {
  constexpr int64_t kMostSteps = 200000;
  EXPECT_LT(simulator.run(1e9, kMostSteps), kMostSteps) << "it does not end";
  EXPECT_FALSE(simulator.core().has_unfinished());
  std::vector<SimulatedRequest> finished = simulator.take_finished();
  EXPECT_EQ(finished.size(), wanted.size()) << "requests were lost";
  std::sort(finished.begin(), finished.end(),
            [](const auto& a, const auto& b) { return a.id < b.id; });
  for (const SimulatedRequest& request : finished) {
    EXPECT_EQ(request.num_tokens, wanted[request.id - 1]) << "request " << request.id;
    EXPECT_GE(request.metrics.first_token_s, request.metrics.arrival_s);
    EXPECT_GE(request.metrics.finish_s, request.metrics.first_token_s);
    EXPECT_LE(request.metrics.finish_s, simulator.now_s());
  }
  const EngineConfig& engine = simulator.core().config();
  for (const StepRecord& record : simulator.core().log().records()) {
    EXPECT_GT(record.rows, 0);
    EXPECT_LE(record.rows, engine.max_num_batched_rows);
    for (uint16_t length : record.chunk_lengths) {
      EXPECT_GE(length, 1);
      EXPECT_LE(length, engine.block_length);
    }
    if (::testing::Test::HasFailure()) break;
  }
  PagePool& pool = simulator.core().scheduler().pool();
  EXPECT_EQ(pool.num_free() + simulator.core().scheduler().prefix_cache().num_cached(),
            pool.num_pages());
  return finished;
}

}  // namespace optimus::testing

// What the scheduler decides for one step, and what came of it.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/chunk_policy.h"
#include "engine/request.h"

namespace optimus {

enum class DecodeMode : uint8_t { ar, block, chunk, schedule, elastic, elastic_per_request };

struct EngineConfig {
  DecodeMode decode_mode = DecodeMode::elastic;
  KvPolicy kv_policy = KvPolicy::refresh;
  int block_length = 32;
  int chunk_length = 4;                             // chunk mode
  bool recompute_block = false;                     // chunk mode: feed the whole block every step
  std::vector<std::pair<int, int>> chunk_schedule;  // schedule mode: (most requests, chunk length)
  std::vector<int> chunk_arms;             // elastic modes; empty = powers of two, 2..block_length
  std::vector<MeasuredArm> measured_arms;  // elastic modes: calibration; empty = nothing known
  std::optional<double> quality_floor;     // elastic modes: accuracy; none = block decode's
  double target_tpot_ms = 0;               // per request and output token; 0 = none
  double target_ttft_ms = 0;               // arrival to first token; 0 = none
  int max_num_seqs = 16;
  int max_num_batched_rows = 512;
  int max_model_len = 2048;
  int page_size = 32;
  int num_pages = 1024;  // CUDA: 0 = as many as gpu_memory_utilization leaves room for
  double gpu_memory_utilization = 0.9;  // share of the GPU's memory that is in use at most
  bool cuda_graphs = true;              // false: CUDA kernels are launched one by one
  bool enable_prefix_cache = true;
  int num_threads = 0;       // 0 = all cores
  int step_log_size = 4096;  // steps remembered
  std::vector<int32_t> eos_token_ids;
  bool shuffle_pages = false;  // hand pages out in random order (tests)
  // Plan the next step before the results of the one in progress are known, so that the device never
  // waits for the host. Not with elastic_per_request, which goes by the last step's confidences.
  bool async_scheduling = false;

  // Pages a request of this many tokens needs at its longest.
  int pages_for(int num_tokens) const {
    const int end = (num_tokens + grid() - 1) / grid() * grid();
    return (end + page_size - 1) / page_size;
  }
  // The decode grid: the trained block, or single tokens in ar mode.
  int grid() const { return decode_mode == DecodeMode::ar ? 1 : block_length; }
  RowMode row_mode() const {
    if (decode_mode == DecodeMode::ar) return RowMode::ar;
    bool whole =
        decode_mode == DecodeMode::block || (decode_mode == DecodeMode::chunk && recompute_block);
    return whole ? RowMode::block : RowMode::chunk;
  }
  // Chunk lengths follow measured time, and so may a request's tokens.
  bool is_elastic() const {
    return decode_mode == DecodeMode::elastic || decode_mode == DecodeMode::elastic_per_request;
  }
};

// Throws std::invalid_argument naming the field and its value.
void validate(const EngineConfig& config);

// One request's part of a step: a prompt slice, or decode rows.
struct SeqPlan {
  Request* request = nullptr;  // null: it has ended since
  int slot = -1;
  int prefill_start = 0, prefill_len = 0;  // > 0: prompt (or recomputed) positions
  int chunk_length = 0;                    // masks to evaluate
  bool refresh = false;                    // feed the whole previous block, if it is not cached yet
  bool needs_refresh = false;              // its block must be refreshed when it is done
};

struct StepPlan {
  std::vector<SeqPlan> seqs;
  // Made while a step is in progress whose results decide how many rows this one has: its counts are
  // estimates, as if requests stood where that step found them.
  bool is_ahead = false;
  int num_rows = 0;
  int most_rows = 0;  // at most; without is_ahead exactly num_rows
  int prefill_rows = 0;
  int refresh_rows = 0;
  int num_decoding = 0;
  int64_t kv_tokens = 0;
  double predicted_ms = 0;        // 0 = no profile
  ChunkDecision decision;         // of the decode rows
  double planned_s = 0;           // engine clock
  std::vector<ArmEstimate> arms;  // what an elastic policy compared

  StepLoad load() const { return {num_rows, prefill_rows, kv_tokens}; }
  void clear() {
    seqs.clear();
    arms.clear();
    is_ahead = false;
    num_rows = most_rows = prefill_rows = refresh_rows = num_decoding = 0;
    kv_tokens = 0;
    predicted_ms = 0;
    decision = {};
  }
};

// What the host did for a step; launching includes the step itself where there is no device. And what
// lay on the device between the step before and this one, from forward to forward: copies, making
// rows, and waiting for the host; of that, until the rows were made. 0 = nothing came before.
struct HostTimes {
  double plan_ms = 0, launch_ms = 0, wait_ms = 0, apply_ms = 0, idle_ms = 0, rows_ms = 0;
};

// What one step did, and why.
struct StepRecord {
  uint64_t step = 0;   // from 1
  double start_s = 0;  // engine clock
  int rows = 0, prefill_rows = 0, refresh_rows = 0, logit_rows = 0;
  int num_seqs = 0, num_decoding = 0, num_waiting = 0;
  int64_t kv_tokens = 0;
  int chunk_length = 0;  // the policy's choice (per request: the longest), 0 without decode rows
  bool refresh = false;  // finished blocks are refreshed
  std::vector<uint16_t> chunk_lengths;  // masks each decoding request evaluated
  int commits = 0;
  double expected_commits = 0, predicted_ms = 0;  // 0 = not estimated
  double forward_ms = 0, step_ms = 0;
  HostTimes host;  // all 0 without an engine
  bool meets_target = true;
  bool is_ahead = false;  // planned before the results of the step before were known
  std::string reason;
  std::vector<ArmEstimate> arms;  // what an elastic policy compared
};

struct StepOutput {
  std::vector<RequestUpdate> updates;
  StepRecord record;
};

}  // namespace optimus

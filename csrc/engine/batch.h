// What the scheduler decides for one step, and what came of it.
#pragma once

#include <string>
#include <vector>

#include "engine/request.h"

namespace optimus {

enum class DecodeMode : uint8_t { ar, block, chunk, elastic };
enum class KvPolicy : uint8_t { freeze, refresh, auto_ };

struct EngineConfig {
  DecodeMode decode_mode = DecodeMode::elastic;
  KvPolicy kv_policy = KvPolicy::refresh;
  int block_length = 32;
  int chunk_length = 4;          // chunk mode
  bool recompute_block = false;  // chunk mode: feed the whole block every step
  std::vector<int> chunk_arms;   // elastic mode; empty = powers of two, 2..block_length
  int max_num_seqs = 16;
  int max_num_batched_rows = 512;
  int max_model_len = 2048;
  int page_size = 32;
  int num_pages = 1024;
  bool enable_prefix_cache = true;
  int num_threads = 0;  // 0 = all cores
  std::vector<int32_t> eos_token_ids;
  bool shuffle_pages = false;  // hand pages out in random order (tests)

  // The decode grid: the trained block, or single tokens in ar mode.
  int grid() const { return decode_mode == DecodeMode::ar ? 1 : block_length; }
  RowMode row_mode() const {
    if (decode_mode == DecodeMode::ar) return RowMode::ar;
    bool whole =
        decode_mode == DecodeMode::block || (decode_mode == DecodeMode::chunk && recompute_block);
    return whole ? RowMode::block : RowMode::chunk;
  }
};

// Throws std::invalid_argument naming the field and its value.
void validate(const EngineConfig& config);

// One request's part of a step: a prompt slice, or decode rows.
struct SeqPlan {
  Request* request = nullptr;
  int prefill_len = 0;   // > 0: prompt (or recomputed) positions from request->num_computed
  int chunk_length = 0;  // masks to evaluate
  bool refresh = false;  // feed the whole previous block
};

struct StepPlan {
  std::vector<SeqPlan> seqs;
  int num_rows = 0;  // upper bound
  int prefill_rows = 0;
  int refresh_rows = 0;
  int chunk_length = 0;  // the policy's choice, 0 without decode rows
  double predicted_ms = 0;
  std::string reason;
};

struct StepRecord {
  uint64_t step = 0;
  int rows = 0, prefill_rows = 0, logit_rows = 0, num_seqs = 0;
  int chunk_length = 0, refresh_rows = 0, commits = 0;
  double predicted_ms = 0, forward_ms = 0, step_ms = 0;
  std::string reason;
};

struct StepOutput {
  std::vector<RequestUpdate> updates;
  StepRecord record;
};

}  // namespace optimus

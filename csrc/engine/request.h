// A generation request as the host sees it: what was asked, what is known, where it stands.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "engine/commit_model.h"
#include "kernels/ops.h"

namespace optimus {

struct SamplingParams {
  float temperature = 0.0f;  // 0 = greedy
  int top_k = 0;             // 0 = off
  float top_p = 1.0f;        // 1 = off
  uint64_t seed = 0;
  int max_tokens = -1;  // -1 = up to the context length
  bool ignore_eos = false;
  std::vector<int32_t> stop_token_ids;
  UnmaskingStrategy unmasking_strategy = kLowConfidenceDynamic;
  float confidence_threshold = 0.9f;
  float entropy_bound = 0.3f;
  int denoising_steps = 0;  // 0 = block_length
};
// Throws std::invalid_argument for what no model could decode with.
void validate(const SamplingParams&);

enum class RequestStatus : uint8_t { waiting, prefilling, decoding, finished };
enum class FinishReason : uint8_t { none, stop, length, abort };

// One generated token. `step` counts the request's own forward evaluations, from 1.
struct OutputToken {
  int32_t token_id = -1;
  float logprob = 0.0f;
  float confidence = 0.0f;
  int32_t step = 0;  // 0 = still masked
};

struct RequestMetrics {
  int nfe = 0;               // forward evaluations that held decode rows of this request
  int64_t decode_rows = 0;   // decode rows computed
  int64_t prefill_rows = 0;  // prompt rows computed (recomputation included)
  int cached_prompt_tokens = 0;
  int num_preemptions = 0;
  std::map<int, int> chunk_histogram;                     // mask rows evaluated in a step -> steps
  double arrival_s = 0, first_token_s = 0, finish_s = 0;  // steady clock, seconds
};

struct Request {
  uint64_t id = 0;
  std::vector<int32_t> prompt;
  SamplingParams params;
  RequestStatus status = RequestStatus::waiting;
  FinishReason finish_reason = FinishReason::none;

  // By output index (position - prompt length); grows block by block, masks included.
  std::vector<OutputToken> output;
  int num_known = 0;  // leading output tokens without a mask before them

  int slot = -1;
  std::vector<int32_t> pages;
  int num_computed = 0;  // leading positions whose KV is in the pages, once planned steps are done
  int num_clean = 0;     // of those, KV computed from real tokens in a clean context (cacheable)
  int prefill_target = 0;  // num_computed at which decoding starts
  int num_registered_pages = 0;
  // Decode window, as the last step left it.
  int block_start = 0;
  int num_fresh = 0;
  int num_masked = 0;
  // What the policy knows of it.
  int commit_context = 0;               // CommitModel::context of its unmasking rule
  MaskHistory history;                  // of the current block's masks
  int num_learned_commits = 0;          // told to the commit model
  int last_chunk_length = 0;            // of its last step
  bool block_needs_refresh = false;     // the current block was decoded by an arm that asks for it
  bool previous_needs_refresh = false;  // so was the previous one
  bool previous_block_pending = false;  // the block before block_start still has fresh positions
  bool window_open = false;             // the slot's device state belongs to this request
  bool replays_block = false;           // preempted: outputs of the current block are decoded again
  uint64_t last_scheduled_step = 0;
  // Steps with decode rows of it that are planned and not applied yet; what the last of them evaluates,
  // and whether it asks for its block to be refreshed.
  struct InFlight {
    int num_steps = 0;
    int chunk_length = 0;
    bool needs_refresh = false;
  } in_flight;
  RequestMetrics metrics;

  int prompt_len() const { return static_cast<int>(prompt.size()); }
  int max_len() const { return prompt_len() + params.max_tokens; }
  // Token at a position whose token is known.
  int32_t token_at(int position) const {
    return position < prompt_len() ? prompt[position] : output[position - prompt_len()].token_id;
  }
};

// What changed for one request in one step. Commits below num_known are final. With freeze or auto
// KV and in elastic mode a preemption takes back those above it: their index is committed again.
struct Commit {
  int32_t output_idx;
  OutputToken token;
};
struct RequestUpdate {
  uint64_t id = 0;
  std::vector<Commit> commits;
  int num_known = 0;  // leading output tokens that are final and contiguous
  FinishReason finish_reason = FinishReason::none;  // none = still running
};

}  // namespace optimus

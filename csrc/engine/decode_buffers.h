// Everything a step reads and writes besides weights, KV and activations: the decode state of every
// slot, the plan as build_rows takes it, the rows, and the candidates. Allocated once.
#pragma once

#include "core/buffer.h"
#include "engine/batch.h"
#include "models/config.h"

namespace optimus {

// Views into the buffers of a finished step, valid until the next one.
struct StepResult {
  const int32_t* logit_slots;    // [num_logit_rows]
  const int32_t* logit_offsets;  // [num_logit_rows] position - block_start, before the step
  Candidates candidates;         // [num_logit_rows]
  const int32_t* block_start;    // [num_slots] after the step
  const int32_t* num_fresh;      // [num_slots] after the step
  const int32_t* num_masked;     // [num_slots] after the step
  int num_rows, num_logit_rows;
};

class DecodeBuffers {
 public:
  DecodeBuffers(const EngineConfig& config, int max_pages_per_seq);

  // Opens the windows of requests that start decoding and writes the plan down.
  BuildRowsParams write_plan(const StepPlan& plan, int mask_token_id);
  // unmask of the rows that build_rows made.
  UnmaskParams unmask_params(const void* logits, const ModelConfig& model);
  StepResult result() const;

  const DecodeState& state() const { return state_; }
  const StepRows& rows() const { return rows_; }
  const Candidates& candidates() const { return candidates_; }
  int num_rows() const { return counts_[0]; }
  int num_logit_rows() const { return counts_[1]; }
  size_t bytes() const;

 private:
  void open_window(const Request& request);

  EngineConfig config_;
  // Decode state [num_slots, ...]; see DecodeState.
  Buffer<int32_t> block_start_, window_tokens_, denoise_step_, page_table_, top_k_,
      denoising_steps_;
  Buffer<uint8_t> window_status_, unmasking_strategy_;
  Buffer<float> temperature_, top_p_, confidence_threshold_, entropy_bound_;
  Buffer<uint64_t> seed_;
  DecodeState state_{};

  // The plan as build_rows reads it [max_num_seqs], [max_rows].
  Buffer<int32_t> slots_, chunk_lengths_, prefill_lens_, prefill_starts_, prefill_offsets_,
      prefill_tokens_;
  Buffer<uint8_t> refresh_;

  // Rows and results of a step [max_rows].
  Buffer<int32_t> token_ids_, positions_, kv_limits_, kv_slots_, cu_seqlens_q_, seq_page_table_,
      logit_rows_, logit_slots_, logit_offsets_, counts_;
  Buffer<int32_t> candidate_ids_, num_fresh_, num_masked_;
  Buffer<float> candidate_confidence_, candidate_logprob_, candidate_entropy_;
  Buffer<uint8_t> candidate_committed_;
  StepRows rows_{};
  Candidates candidates_{};
};

}  // namespace optimus

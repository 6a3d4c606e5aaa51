// Runs a planned step: owns the KV memory, the decode state, and every buffer of a step, all
// allocated once. The only part of the engine that calls kernels.
#pragma once

#include <vector>

#include "engine/batch.h"
#include "models/model.h"

namespace optimus {

// Views into the runner's buffers, valid until the next step.
struct StepResult {
  const int32_t* logit_slots;    // [num_logit_rows]
  const int32_t* logit_offsets;  // [num_logit_rows] position - block_start, before the step
  Candidates candidates;         // [num_logit_rows]
  const int32_t* block_start;    // [num_slots] after the step
  const int32_t* num_fresh;      // [num_slots] after the step
  const int32_t* num_masked;     // [num_slots] after the step
  int num_rows, num_logit_rows;
};

class Runner {
 public:
  Runner(const Model& model, const EngineConfig& config, int max_pages_per_seq);

  StepResult run(const StepPlan& plan);

  // Rows of one sequence over the given pages; returns fp32 logits [rows, vocab_size].
  std::vector<float> forward(const std::vector<int32_t>& token_ids,
                             const std::vector<int32_t>& positions,
                             const std::vector<int32_t>& kv_limits,
                             const std::vector<int32_t>& page_ids);
  // Milliseconds of one forward of `num_rows` rows, in sequences of `seq_rows`, that write all over
  // the given pages and read their first `context` positions.
  double time_forward(int num_rows, int seq_rows, int context,
                      const std::vector<int32_t>& page_ids);

  size_t kv_cache_bytes() const { return kv_cache_.bytes(); }
  size_t activation_bytes() const { return activations_.bytes(); }
  size_t state_bytes() const;

 private:
  void open_window(const Request& request);
  void write_plan(const StepPlan& plan);
  void forward_rows(int num_rows, int num_seqs, int num_logit_rows);

  const Model& model_;
  EngineConfig config_;
  ThreadPool threads_;
  Execution execution_;
  KvCache kv_cache_;
  Activations activations_;

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

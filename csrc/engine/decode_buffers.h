// Everything a step reads and writes besides weights, KV and activations: the decode state of every
// slot, the plan as build_rows takes it, the rows, and the candidates. Allocated once, where the
// kernels run; what the host has written goes there in one copy, what it reads comes back in one.
#pragma once

#include <utility>
#include <vector>

#include "core/buffer.h"
#include "core/mirrored.h"
#include "engine/batch.h"
#include "models/config.h"

namespace optimus {

// What came of a finished step, on the host: views into buffers that the next step writes.
struct StepResult {
  const int32_t* logit_slots;    // [num_logit_rows]
  const int32_t* logit_offsets;  // [num_logit_rows] position - block_start, before the step
  Candidates candidates;         // [num_logit_rows]
  const int32_t* block_start;    // [num_slots] after the step
  const int32_t* num_fresh;      // [num_slots] after the step
  const int32_t* num_masked;     // [num_slots] after the step
  int num_rows, num_logit_rows;
};

// A StepResult that stays.
class KeptResult {
 public:
  void keep(const StepResult& result, int num_slots);
  StepResult view();

 private:
  std::vector<int32_t> logit_slots_, logit_offsets_, token_ids_, block_start_, num_fresh_,
      num_masked_;
  std::vector<float> confidence_, logprob_;
  std::vector<uint8_t> committed_;
  int num_rows_ = 0;
};

// Rows written down by the host, for steps that no plan made.
struct HostRows {
  std::vector<int32_t> token_ids, positions, kv_limits, kv_slots, logit_rows;  // [rows]
  std::vector<int32_t> logit_slots, logit_offsets;  // rows that unmask looks at, at most [rows]
  std::vector<int32_t> cu_seqlens_q;                // [num_seqs + 1]
  std::vector<int32_t> page_table;                  // [num_seqs, page_table_stride]
};

class DecodeBuffers {
 public:
  DecodeBuffers(const EngineConfig& config, int max_pages_per_seq, Device device = Device::cpu);

  // Writes the plan down on the host, with the windows of requests that start decoding.
  void write_plan(const StepPlan& plan);
  void upload(Stream& stream) { plan_.upload(stream, plan_end_); }
  void upload_all(Stream& stream) { plan_.upload(stream, plan_.host_end()); }
  // Of the uploaded plan: windows first, then the rows. Padded to that many rows and sequences.
  OpenWindowsParams open_windows_params() const;
  BuildRowsParams build_rows_params(int mask_token_id, int pad_rows_to = 0,
                                    int pad_seqs_to = 0) const;
  // unmask of the rows that build_rows made, without a workspace; `num_logit_rows` with padding.
  UnmaskParams unmask_params(const void* logits, const ModelConfig& model, int num_logit_rows);
  // How many rows, and logits rows, build_rows has made of the last plan, while it may still be at it.
  // The plan is on the device then and may be written anew.
  std::pair<int, int> wait_for_counts(Stream& stream) const;
  void download(Stream& stream, int num_logit_rows) {
    stream.copy({results_.downloaded(), row_results_.downloaded(num_logit_rows)});
  }
  // Of the downloaded step. Candidates have no entropy.
  StepResult result(int num_rows, int num_logit_rows) const;

  void write_rows(const HostRows& rows);

  // Device memory, but for the counts.
  const DecodeState& state() const { return state_; }
  const StepRows& rows() const { return rows_; }
  const Candidates& candidates() const { return candidates_; }
  // Of the plan: logits rows at most; if it is not ahead, exactly.
  int most_logit_rows() const { return most_logit_rows_; }
  int num_openings() const { return num_openings_; }
  // Downloaded, before the next step's rows are made; without a device at once.
  int num_rows() const { return counts_.host[0]; }
  int num_logit_rows() const { return counts_.host[1]; }
  size_t bytes() const;

 private:
  void open_window(const Request& request);
  void write_sampling(const Request& request);
  int most_masks(const Request& request, int chunk_length) const;

  EngineConfig config_;
  int num_seqs_ = 0, num_openings_ = 0, most_logit_rows_ = 0;

  // Host to device. The plan as build_rows reads it [max_num_seqs], [max_rows]; windows to open
  // [max_num_seqs]; and those fields of the state that the host alone writes [num_slots]. At the end,
  // and left behind when there are none: the tokens of windows to open, then those of prompts.
  MirroredArrays plan_;
  const void* plan_end_ = nullptr;  // in host memory
  Mirrored<int32_t> slots_, chunk_lengths_, prefill_lens_, prefill_starts_, prefill_offsets_,
      prefill_tokens_;
  Mirrored<uint8_t> refresh_;
  Mirrored<int32_t> open_slots_, open_block_starts_, open_num_fresh_, open_tokens_;
  Mirrored<int32_t> page_table_, top_k_, denoising_steps_;
  Mirrored<float> temperature_, top_p_, confidence_threshold_, entropy_bound_;
  Mirrored<uint8_t> unmasking_strategy_;
  Mirrored<uint64_t> seed_;
  Mirrored<int32_t> first_output_, end_position_, stop_token_ids_;

  // Device to host [2], [num_slots], [max_rows].
  MirroredArrays results_;
  MirroredRows row_results_;
  MirroredArrays early_;
  Mirrored<uint64_t> early_counts_;  // [1] host memory that build_rows writes, see BuildRowsParams
  Mirrored<int32_t> counts_, block_start_, num_fresh_, num_masked_, candidate_slots_,
      candidate_offsets_, candidate_ids_;
  Mirrored<float> candidate_confidence_, candidate_logprob_;
  Mirrored<uint8_t> candidate_committed_;

  // Device only.
  Buffer<int32_t> window_tokens_, denoise_step_;
  Buffer<uint8_t> window_status_, ended_;
  Buffer<int32_t> token_ids_, positions_, kv_limits_, kv_slots_, cu_seqlens_q_, seq_page_table_,
      logit_rows_, logit_slots_, logit_offsets_;
  Buffer<float> candidate_entropy_;

  DecodeState state_{};
  StepRows rows_{};
  Candidates candidates_{};
};

}  // namespace optimus

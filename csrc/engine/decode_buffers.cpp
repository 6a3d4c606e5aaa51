#include "engine/decode_buffers.h"

#include <algorithm>

namespace optimus {

DecodeBuffers::DecodeBuffers(const EngineConfig& config, int max_pages_per_seq) : config_(config) {
  const size_t slots = config.max_num_seqs, rows = config.max_num_batched_rows;
  const size_t window = 2 * size_t(config.grid()), stride = max_pages_per_seq;
  auto allocate = [](size_t count, auto&... buffers) {
    ((buffers = std::decay_t<decltype(buffers)>(count, 0)), ...);
  };
  allocate(slots, block_start_, denoise_step_, top_k_, denoising_steps_, unmasking_strategy_,
           temperature_, top_p_, confidence_threshold_, entropy_bound_, seed_, slots_,
           chunk_lengths_, prefill_lens_, prefill_starts_, prefill_offsets_, refresh_, num_fresh_,
           num_masked_);
  allocate(slots * window, window_tokens_, window_status_);
  allocate(slots * stride, page_table_, seq_page_table_);
  allocate(rows, prefill_tokens_, token_ids_, positions_, kv_limits_, kv_slots_, logit_rows_,
           logit_slots_, logit_offsets_, candidate_ids_, candidate_confidence_, candidate_logprob_,
           candidate_entropy_, candidate_committed_);
  // time_forward runs every row as its own sequence at the worst.
  cu_seqlens_q_ = Buffer<int32_t>(std::max(slots, rows) + 1, 0);
  counts_ = Buffer<int32_t>(2, 0);

  state_ = {block_start_.data(),   window_tokens_.data(),   window_status_.data(),
            denoise_step_.data(),  page_table_.data(),      temperature_.data(),
            top_k_.data(),         top_p_.data(),           confidence_threshold_.data(),
            entropy_bound_.data(), denoising_steps_.data(), unmasking_strategy_.data(),
            seed_.data(),          config.max_num_seqs,     config.grid(),
            max_pages_per_seq};
  rows_ = {token_ids_.data(),     positions_.data(),      kv_limits_.data(),  kv_slots_.data(),
           cu_seqlens_q_.data(),  seq_page_table_.data(), logit_rows_.data(), logit_slots_.data(),
           logit_offsets_.data(), counts_.data()};
  candidates_ = {candidate_ids_.data(), candidate_confidence_.data(), candidate_logprob_.data(),
                 candidate_entropy_.data(), candidate_committed_.data()};
}

// Writes a request's decode window and sampling parameters into its slot.
void DecodeBuffers::open_window(const Request& request) {
  const int grid = config_.grid(), slot = request.slot;
  int32_t* tokens = window_tokens_.data() + size_t(slot) * 2 * grid;
  uint8_t* status = window_status_.data() + size_t(slot) * 2 * grid;
  std::fill(tokens, tokens + 2 * grid, -1);
  std::fill(status, status + grid, uint8_t(kCached));
  std::fill(status + grid, status + 2 * grid, uint8_t(kAbsent));
  int first = config_.decode_mode == DecodeMode::ar ? 0 : grid;  // ar feeds the token before
  for (int i = 0; i < request.num_fresh; ++i) {
    tokens[first + i] = request.token_at(request.block_start - grid + first + i);
    status[first + i] = kFresh;
  }
  const SamplingParams& params = request.params;
  block_start_[slot] = request.block_start;
  denoise_step_[slot] = 0;
  temperature_[slot] = params.temperature;
  top_k_[slot] = params.top_k;
  top_p_[slot] = params.top_p;
  confidence_threshold_[slot] = params.confidence_threshold;
  entropy_bound_[slot] = params.entropy_bound;
  denoising_steps_[slot] =
      params.denoising_steps > 0 ? std::min(params.denoising_steps, grid) : grid;
  unmasking_strategy_[slot] = params.unmasking_strategy;
  seed_[slot] = params.seed;
}

BuildRowsParams DecodeBuffers::write_plan(const StepPlan& plan, int mask_token_id) {
  int num_prefill_tokens = 0;
  for (size_t s = 0; s < plan.seqs.size(); ++s) {
    const SeqPlan& seq = plan.seqs[s];
    Request& request = *seq.request;
    if (seq.prefill_len == 0 && !request.window_open) {
      open_window(request);
      request.window_open = true;
    }
    slots_[s] = request.slot;
    chunk_lengths_[s] = seq.chunk_length;
    refresh_[s] = seq.refresh;
    prefill_lens_[s] = seq.prefill_len;
    prefill_starts_[s] = request.num_computed;
    prefill_offsets_[s] = num_prefill_tokens;
    for (int i = 0; i < seq.prefill_len; ++i) {
      prefill_tokens_[num_prefill_tokens++] = request.token_at(request.num_computed + i);
    }
    std::copy(request.pages.begin(), request.pages.end(),
              page_table_.data() + size_t(request.slot) * state_.page_table_stride);
  }
  return {state_,
          slots_.data(),
          chunk_lengths_.data(),
          refresh_.data(),
          prefill_lens_.data(),
          prefill_starts_.data(),
          prefill_offsets_.data(),
          prefill_tokens_.data(),
          rows_,
          static_cast<int>(plan.seqs.size()),
          config_.max_num_batched_rows,
          config_.page_size,
          mask_token_id,
          config_.decode_mode == DecodeMode::ar,
          config_.row_mode()};
}

UnmaskParams DecodeBuffers::unmask_params(const void* logits, const ModelConfig& model) {
  return {logits,
          rows_.logit_slots,
          rows_.logit_offsets,
          state_,
          candidates_,
          num_fresh_.data(),
          num_masked_.data(),
          num_logit_rows(),
          model.true_vocab_size > 0 ? model.true_vocab_size : model.vocab_size,
          config_.row_mode(),
          model.dtype,
          model.vocab_size};
}

StepResult DecodeBuffers::result() const {
  return {rows_.logit_slots, rows_.logit_offsets, candidates_, state_.block_start,
          num_fresh_.data(), num_masked_.data(),  num_rows(),  num_logit_rows()};
}

size_t DecodeBuffers::bytes() const {
  return (page_table_.size() + seq_page_table_.size() + window_tokens_.size()) * sizeof(int32_t) +
         window_status_.size() + block_start_.size() * 64 + token_ids_.size() * 64;
}

}  // namespace optimus

#include "engine/runner.h"

#include <algorithm>
#include <chrono>

#include "core/check.h"

namespace optimus {

Runner::Runner(const Model& model, const EngineConfig& config, int max_pages_per_seq)
    : model_(model),
      config_(config),
      threads_(config.num_threads),
      execution_{Device::cpu, &threads_, nullptr},
      kv_cache_(model.config(), config.num_pages, config.page_size),
      activations_(model.config(), config.max_num_batched_rows) {
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

size_t Runner::state_bytes() const {
  return (page_table_.size() + seq_page_table_.size() + window_tokens_.size()) * sizeof(int32_t) +
         window_status_.size() + block_start_.size() * 64 + token_ids_.size() * 64;
}

// Writes a request's decode window and sampling parameters into its slot.
void Runner::open_window(const Request& request) {
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

void Runner::write_plan(const StepPlan& plan) {
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
}

void Runner::forward_rows(int num_rows, int num_seqs, int num_logit_rows) {
  ForwardBatch batch{rows_.token_ids,    rows_.positions,  rows_.kv_limits,         rows_.kv_slots,
                     rows_.cu_seqlens_q, rows_.page_table, rows_.logit_rows,        num_rows,
                     num_seqs,           num_logit_rows,   state_.page_table_stride};
  model_.forward(batch, kv_cache_, activations_, execution_);
}

StepResult Runner::run(const StepPlan& plan) {
  write_plan(plan);
  const ModelConfig& model = model_.config();
  const int num_seqs = static_cast<int>(plan.seqs.size());
  build_rows({state_, slots_.data(), chunk_lengths_.data(), refresh_.data(), prefill_lens_.data(),
              prefill_starts_.data(), prefill_offsets_.data(), prefill_tokens_.data(), rows_,
              num_seqs, config_.max_num_batched_rows, config_.page_size, model.mask_token_id,
              config_.decode_mode == DecodeMode::ar, config_.row_mode()},
             execution_);
  int num_rows = counts_[0], num_logit_rows = counts_[1];
  forward_rows(num_rows, num_seqs, num_logit_rows);
  unmask({activations_.logits.data(), rows_.logit_slots, rows_.logit_offsets, state_, candidates_,
          num_fresh_.data(), num_masked_.data(), num_logit_rows,
          model.true_vocab_size > 0 ? model.true_vocab_size : model.vocab_size, config_.row_mode(),
          model.dtype, model.vocab_size},
         execution_);
  return {rows_.logit_slots, rows_.logit_offsets, candidates_, state_.block_start,
          num_fresh_.data(), num_masked_.data(),  num_rows,    num_logit_rows};
}

std::vector<float> Runner::forward(const std::vector<int32_t>& token_ids,
                                   const std::vector<int32_t>& positions,
                                   const std::vector<int32_t>& kv_limits,
                                   const std::vector<int32_t>& page_ids) {
  const int rows = static_cast<int>(token_ids.size()), page_size = config_.page_size;
  const int capacity = static_cast<int>(page_ids.size()) * page_size;
  OPTIMUS_CHECK(rows > 0 && rows <= config_.max_num_batched_rows,
                "[forward] rows must be between 1 and max_num_batched_rows ",
                config_.max_num_batched_rows, ", got ", rows);
  OPTIMUS_CHECK(positions.size() == token_ids.size() && kv_limits.size() == token_ids.size(),
                "[forward] token_ids, positions and kv_limits must have one length, got ", rows,
                ", ", positions.size(), ", ", kv_limits.size());
  OPTIMUS_CHECK(static_cast<int>(page_ids.size()) <= state_.page_table_stride, "[forward] at most ",
                state_.page_table_stride, " pages, got ", page_ids.size());
  for (int32_t page : page_ids) {
    OPTIMUS_CHECK(page >= 0 && page < config_.num_pages, "[forward] page ids must be below ",
                  config_.num_pages, ", got ", page);
  }
  for (int i = 0; i < rows; ++i) {
    OPTIMUS_CHECK(token_ids[i] >= 0 && token_ids[i] < model_.config().vocab_size,
                  "[forward] token ids must be below vocab_size ", model_.config().vocab_size,
                  ", got ", token_ids[i]);
    OPTIMUS_CHECK(positions[i] >= 0 && positions[i] < capacity && kv_limits[i] >= 1 &&
                      kv_limits[i] <= capacity,
                  "[forward] positions and kv_limits must lie in ", page_ids.size(), " pages of ",
                  page_size, ", got position ", positions[i], " and kv_limit ", kv_limits[i]);
    token_ids_[i] = token_ids[i];
    positions_[i] = positions[i];
    kv_limits_[i] = kv_limits[i];
    kv_slots_[i] = page_ids[positions[i] / page_size] * page_size + positions[i] % page_size;
    logit_rows_[i] = i;
  }
  cu_seqlens_q_[0] = 0;
  cu_seqlens_q_[1] = rows;
  std::copy(page_ids.begin(), page_ids.end(), seq_page_table_.data());
  forward_rows(rows, 1, rows);

  std::vector<float> logits(size_t(rows) * model_.config().vocab_size);
  dispatch_dtype(model_.config().dtype, [&](auto element) {
    const auto* source = reinterpret_cast<const decltype(element)*>(activations_.logits.data());
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = to_float(source[i]);
  });
  return logits;
}

double Runner::time_forward(int num_rows, int seq_rows, int context,
                            const std::vector<int32_t>& page_ids) {
  const int page_size = config_.page_size;
  const int capacity = static_cast<int>(page_ids.size()) * page_size;
  int num_seqs = 0;
  for (int i = 0; i < num_rows; ++i) {
    token_ids_[i] = (i * 7919) % model_.config().vocab_size;
    positions_[i] = i % capacity;
    kv_limits_[i] = context;
    kv_slots_[i] = page_ids[(i % capacity) / page_size] * page_size + i % page_size;
    logit_rows_[i] = i;
    if (i % seq_rows == 0 && num_seqs < config_.max_num_seqs) cu_seqlens_q_[num_seqs++] = i;
  }
  cu_seqlens_q_[num_seqs] = num_rows;
  for (int s = 0; s < num_seqs; ++s) {
    std::copy(page_ids.begin(), page_ids.end(),
              seq_page_table_.data() + size_t(s) * state_.page_table_stride);
  }
  auto start = std::chrono::steady_clock::now();
  forward_rows(num_rows, num_seqs, num_rows);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace optimus

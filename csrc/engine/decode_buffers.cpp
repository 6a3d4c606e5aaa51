#include "engine/decode_buffers.h"

#include <algorithm>
#include <atomic>

#include "core/check.h"

namespace optimus {

void KeptResult::keep(const StepResult& result, int num_slots) {
  const auto keep = [](auto& to, const auto* from, int count) { to.assign(from, from + count); };
  const int rows = result.num_logit_rows;
  keep(logit_slots_, result.logit_slots, rows);
  keep(logit_offsets_, result.logit_offsets, rows);
  keep(token_ids_, result.candidates.token_ids, rows);
  keep(confidence_, result.candidates.confidence, rows);
  keep(logprob_, result.candidates.logprob, rows);
  keep(committed_, result.candidates.committed, rows);
  keep(block_start_, result.block_start, num_slots);
  keep(num_fresh_, result.num_fresh, num_slots);
  keep(num_masked_, result.num_masked, num_slots);
  num_rows_ = result.num_rows;
}

StepResult KeptResult::view() {
  const Candidates candidates = {token_ids_.data(), confidence_.data(), logprob_.data(), nullptr,
                                 committed_.data()};
  return {logit_slots_.data(), logit_offsets_.data(),
          candidates,          block_start_.data(),
          num_fresh_.data(),   num_masked_.data(),
          num_rows_,           static_cast<int>(logit_slots_.size())};
}

DecodeBuffers::DecodeBuffers(const EngineConfig& config, int max_pages_per_seq, Device device)
    : config_(config),
      plan_(device),
      results_(device),
      row_results_(device, config.max_num_batched_rows),
      early_(device) {
  const size_t slots = config.max_num_seqs, rows = config.max_num_batched_rows;
  const size_t grid = config.grid(), stride = max_pages_per_seq;
  const auto mirror = [](MirroredArrays& arrays, size_t count, auto&... mirrored) {
    (arrays.add(count, mirrored), ...);
  };
  mirror(plan_, slots, slots_, chunk_lengths_, prefill_lens_, prefill_starts_, prefill_offsets_,
         refresh_, open_slots_, open_block_starts_, open_num_fresh_, top_k_, denoising_steps_,
         temperature_, top_p_, confidence_threshold_, entropy_bound_, unmasking_strategy_, seed_,
         first_output_, end_position_);
  mirror(plan_, slots * kMaxStopTokens, stop_token_ids_);
  mirror(plan_, slots * stride, page_table_);
  mirror(plan_, slots * grid, open_tokens_);
  mirror(plan_, rows, prefill_tokens_);
  plan_.allocate();
  std::fill_n(denoising_steps_.host, slots, 1);  // slots that nobody had are timed too
  mirror(results_, 2, counts_);
  mirror(early_, 1, early_counts_);
  early_.allocate();
  mirror(results_, slots, block_start_, num_fresh_, num_masked_);
  results_.allocate();
  const auto mirror_rows = [this](auto&... mirrored) { (row_results_.add(mirrored), ...); };
  mirror_rows(candidate_slots_, candidate_offsets_, candidate_ids_, candidate_confidence_,
              candidate_logprob_, candidate_committed_);
  row_results_.allocate();

  const auto allocate = [device](size_t count, auto&... buffers) {
    ((buffers = std::decay_t<decltype(buffers)>(count, device)), ...);
  };
  allocate(slots, denoise_step_, ended_);
  allocate(slots * 2 * grid, window_tokens_, window_status_);
  allocate(slots * stride, seq_page_table_);
  allocate(rows, token_ids_, positions_, kv_limits_, kv_slots_, logit_rows_, logit_slots_,
           logit_offsets_, candidate_entropy_);
  allocate(slots + 1, cu_seqlens_q_);

  state_ = {block_start_.device,    window_tokens_.data(),   window_status_.data(),
            denoise_step_.data(),   page_table_.device,      temperature_.device,
            top_k_.device,          top_p_.device,           confidence_threshold_.device,
            entropy_bound_.device,  denoising_steps_.device, unmasking_strategy_.device,
            seed_.device,           first_output_.device,    end_position_.device,
            stop_token_ids_.device, ended_.data(),           config.max_num_seqs,
            config.grid(),          max_pages_per_seq};
  rows_ = {token_ids_.data(),     positions_.data(),      kv_limits_.data(),  kv_slots_.data(),
           cu_seqlens_q_.data(),  seq_page_table_.data(), logit_rows_.data(), logit_slots_.data(),
           logit_offsets_.data(), counts_.device};
  candidates_ = {candidate_ids_.device,     candidate_confidence_.device, candidate_logprob_.device,
                 candidate_entropy_.data(), candidate_committed_.device,  candidate_slots_.device,
                 candidate_offsets_.device};
}

// A request's sampling parameters and where it ends, into its slot.
void DecodeBuffers::write_sampling(const Request& request) {
  const int grid = config_.grid(), slot = request.slot;
  const SamplingParams& params = request.params;
  temperature_.host[slot] = params.temperature;
  top_k_.host[slot] = params.top_k;
  top_p_.host[slot] = params.top_p;
  confidence_threshold_.host[slot] = params.confidence_threshold;
  entropy_bound_.host[slot] = params.entropy_bound;
  denoising_steps_.host[slot] =
      params.denoising_steps > 0 ? std::min(params.denoising_steps, grid) : grid;
  unmasking_strategy_.host[slot] = params.unmasking_strategy;
  seed_.host[slot] = params.seed;
  first_output_.host[slot] = request.prompt_len();
  end_position_.host[slot] = request.max_len();
  // Of more stop tokens than fit, the rest is found when the host looks.
  int32_t* stops = stop_token_ids_.host + size_t(slot) * kMaxStopTokens;
  int32_t* const end = stops + kMaxStopTokens;
  const auto add = [&](const std::vector<int32_t>& ids) {
    for (auto id = ids.begin(); id != ids.end() && stops != end; ++id) *stops++ = *id;
  };
  if (!params.ignore_eos) add(config_.eos_token_ids);
  add(params.stop_token_ids);
  std::fill(stops, end, -1);
}

void DecodeBuffers::open_window(const Request& request) {
  const int grid = config_.grid(), at = num_openings_++;
  // ar feeds the token before block_start.
  const int first = request.block_start - (config_.decode_mode == DecodeMode::ar ? grid : 0);
  open_slots_.host[at] = request.slot;
  open_block_starts_.host[at] = request.block_start;
  open_num_fresh_.host[at] = request.num_fresh;
  for (int i = 0; i < request.num_fresh; ++i) {
    open_tokens_.host[size_t(at) * grid + i] = request.token_at(first + i);
  }
  write_sampling(request);
}

// A step in flight may begin a new block, with nothing but masks.
int DecodeBuffers::most_masks(const Request& request, int chunk_length) const {
  const bool is_known = request.in_flight.num_steps <= 1;  // this step itself
  const int masks = is_known ? request.num_masked : config_.grid();
  return config_.row_mode() == RowMode::chunk ? std::min(chunk_length, masks) : masks;
}

void DecodeBuffers::write_plan(const StepPlan& plan) {
  int num_prefill_tokens = 0;
  num_openings_ = most_logit_rows_ = 0;
  *early_counts_.host = kNoCounts;
  num_seqs_ = static_cast<int>(plan.seqs.size());
  for (int s = 0; s < num_seqs_; ++s) {
    const SeqPlan& seq = plan.seqs[s];
    Request& request = *seq.request;
    if (seq.prefill_len == 0) {
      if (!request.window_open) open_window(request);
      request.window_open = true;
      most_logit_rows_ += most_masks(request, seq.chunk_length);
    }
    slots_.host[s] = request.slot;
    chunk_lengths_.host[s] = seq.chunk_length;
    refresh_.host[s] = seq.refresh;
    prefill_lens_.host[s] = seq.prefill_len;
    prefill_starts_.host[s] = seq.prefill_start;
    prefill_offsets_.host[s] = num_prefill_tokens;
    for (int i = 0; i < seq.prefill_len; ++i) {
      prefill_tokens_.host[num_prefill_tokens++] = request.token_at(seq.prefill_start + i);
    }
    std::copy(request.pages.begin(), request.pages.end(),
              page_table_.host + size_t(request.slot) * state_.page_table_stride);
  }
  plan_end_ = num_prefill_tokens > 0 ? prefill_tokens_.host + num_prefill_tokens
              : num_openings_ > 0
                  ? open_tokens_.host + size_t(num_openings_) * config_.grid()
                  : page_table_.host + size_t(config_.max_num_seqs) * state_.page_table_stride;
}

OpenWindowsParams DecodeBuffers::open_windows_params() const {
  return {state_,
          open_slots_.device,
          open_block_starts_.device,
          open_num_fresh_.device,
          open_tokens_.device,
          num_openings_,
          config_.row_mode()};
}

BuildRowsParams DecodeBuffers::build_rows_params(int mask_token_id, int pad_rows_to,
                                                 int pad_seqs_to) const {
  return {state_,
          slots_.device,
          chunk_lengths_.device,
          refresh_.device,
          prefill_lens_.device,
          prefill_starts_.device,
          prefill_offsets_.device,
          prefill_tokens_.device,
          rows_,
          num_seqs_,
          config_.max_num_batched_rows,
          config_.page_size,
          mask_token_id,
          config_.decode_mode == DecodeMode::ar,
          config_.row_mode(),
          pad_rows_to,
          pad_seqs_to,
          results_.device() != Device::cpu ? early_counts_.host : nullptr};
}

UnmaskParams DecodeBuffers::unmask_params(const void* logits, const ModelConfig& model,
                                          int num_logit_rows) {
  return {logits,
          rows_.logit_slots,
          rows_.logit_offsets,
          state_,
          candidates_,
          num_fresh_.device,
          num_masked_.device,
          num_logit_rows,
          model.true_vocab_size > 0 ? model.true_vocab_size : model.vocab_size,
          config_.row_mode(),
          model.dtype,
          model.vocab_size,
          counts_.device + 1};
}

std::pair<int, int> DecodeBuffers::wait_for_counts(Stream& stream) const {
  if (results_.device() == Device::cpu) return {num_rows(), num_logit_rows()};
  constexpr uint32_t kSpins = 1 << 14;  // between two looks for errors
  const volatile uint64_t* counts = early_counts_.host;
  uint64_t both = *counts;
  for (uint32_t spin = 1; both == kNoCounts; both = *counts, ++spin) {
    OPTIMUS_INVARIANT(spin % kSpins != 0 || !stream.is_done() || *counts != kNoCounts,
                      "a step without counts");
  }
  std::atomic_thread_fence(std::memory_order_acquire);
  return {static_cast<int>(both & UINT32_MAX), static_cast<int>(both >> 32)};
}

StepResult DecodeBuffers::result(int num_rows, int num_logit_rows) const {
  const Candidates candidates = {candidate_ids_.host, candidate_confidence_.host,
                                 candidate_logprob_.host, nullptr, candidate_committed_.host};
  // On the CPU the rows are still there, also where a simulation stands for unmask.
  const bool is_cpu = results_.device() == Device::cpu;
  return {is_cpu ? rows_.logit_slots : candidate_slots_.host,
          is_cpu ? rows_.logit_offsets : candidate_offsets_.host,
          candidates,
          block_start_.host,
          num_fresh_.host,
          num_masked_.host,
          num_rows,
          num_logit_rows};
}

void DecodeBuffers::write_rows(const HostRows& rows) {
  const auto write = [](Buffer<int32_t>& buffer, const std::vector<int32_t>& values) {
    buffer.copy_in(0, values.data(), values.size());
  };
  write(token_ids_, rows.token_ids);
  write(positions_, rows.positions);
  write(kv_limits_, rows.kv_limits);
  write(kv_slots_, rows.kv_slots);
  write(logit_rows_, rows.logit_rows);
  write(cu_seqlens_q_, rows.cu_seqlens_q);
  write(seq_page_table_, rows.page_table);
  const auto write_results = [this](int32_t* to, const std::vector<int32_t>& from) {
    copy_memory(to, from.data(), from.size() * sizeof(int32_t), results_.device());
  };
  write_results(rows_.logit_slots, rows.logit_slots);
  write_results(rows_.logit_offsets, rows.logit_offsets);
  write_results(rows_.counts, {static_cast<int32_t>(rows.token_ids.size()),
                               static_cast<int32_t>(rows.logit_slots.size())});
}

size_t DecodeBuffers::bytes() const {
  size_t total = plan_.bytes() + early_.bytes() + results_.bytes() + row_results_.bytes() +
                 window_status_.bytes() + ended_.bytes() + candidate_entropy_.bytes();
  for (const Buffer<int32_t>* buffer :
       {&window_tokens_, &denoise_step_, &token_ids_, &positions_, &kv_limits_, &kv_slots_,
        &cu_seqlens_q_, &seq_page_table_, &logit_rows_, &logit_slots_, &logit_offsets_}) {
    total += buffer->bytes();
  }
  return total;
}

}  // namespace optimus

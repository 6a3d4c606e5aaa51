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
      activations_(model.config(), config.max_num_batched_rows),
      buffers_(config, max_pages_per_seq) {}

void Runner::forward_rows(int num_rows, int num_seqs, int num_logit_rows) {
  const StepRows& rows = buffers_.rows();
  ForwardBatch batch{rows.token_ids,
                     rows.positions,
                     rows.kv_limits,
                     rows.kv_slots,
                     rows.cu_seqlens_q,
                     rows.page_table,
                     rows.logit_rows,
                     num_rows,
                     num_seqs,
                     num_logit_rows,
                     buffers_.state().page_table_stride};
  model_.forward(batch, kv_cache_, activations_, execution_);
}

StepResult Runner::run(const StepPlan& plan) {
  const ModelConfig& model = model_.config();
  build_rows(buffers_.write_plan(plan, model.mask_token_id), execution_);
  forward_rows(buffers_.num_rows(), static_cast<int>(plan.seqs.size()), buffers_.num_logit_rows());
  unmask(buffers_.unmask_params(activations_.logits.data(), model), execution_);
  return buffers_.result();
}

std::vector<float> Runner::forward(const std::vector<int32_t>& token_ids,
                                   const std::vector<int32_t>& positions,
                                   const std::vector<int32_t>& kv_limits,
                                   const std::vector<int32_t>& page_ids) {
  const int rows = static_cast<int>(token_ids.size()), page_size = config_.page_size;
  const StepRows& step = buffers_.rows();
  const int capacity = static_cast<int>(page_ids.size()) * page_size;
  OPTIMUS_CHECK(rows > 0 && rows <= config_.max_num_batched_rows,
                "[forward] rows must be between 1 and max_num_batched_rows ",
                config_.max_num_batched_rows, ", got ", rows);
  OPTIMUS_CHECK(positions.size() == token_ids.size() && kv_limits.size() == token_ids.size(),
                "[forward] token_ids, positions and kv_limits must have one length, got ", rows,
                ", ", positions.size(), ", ", kv_limits.size());
  OPTIMUS_CHECK(static_cast<int>(page_ids.size()) <= buffers_.state().page_table_stride,
                "[forward] at most ", buffers_.state().page_table_stride, " pages, got ",
                page_ids.size());
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
    step.token_ids[i] = token_ids[i];
    step.positions[i] = positions[i];
    step.kv_limits[i] = kv_limits[i];
    step.kv_slots[i] = page_ids[positions[i] / page_size] * page_size + positions[i] % page_size;
    step.logit_rows[i] = i;
  }
  step.cu_seqlens_q[0] = 0;
  step.cu_seqlens_q[1] = rows;
  std::copy(page_ids.begin(), page_ids.end(), step.page_table);
  forward_rows(rows, 1, rows);

  std::vector<float> logits(size_t(rows) * model_.config().vocab_size);
  dispatch_dtype(model_.config().dtype, [&](auto element) {
    const auto* source = reinterpret_cast<const decltype(element)*>(activations_.logits.data());
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = to_float(source[i]);
  });
  return logits;
}

double Runner::time_forward(int num_rows, int num_seqs, int context, bool with_logits,
                            const std::vector<int32_t>& page_ids) {
  const int page_size = config_.page_size;
  const int capacity = static_cast<int>(page_ids.size()) * page_size;
  const StepRows& step = buffers_.rows();
  for (int i = 0; i < num_rows; ++i) {
    step.token_ids[i] = (i * 7919) % model_.config().vocab_size;
    step.positions[i] = i % capacity;
    step.kv_limits[i] = context;
    step.kv_slots[i] = page_ids[(i % capacity) / page_size] * page_size + i % page_size;
    step.logit_rows[i] = i;
  }
  for (int s = 0; s < num_seqs; ++s) {
    step.cu_seqlens_q[s] = static_cast<int32_t>(int64_t(num_rows) * s / num_seqs);
    std::copy(page_ids.begin(), page_ids.end(),
              step.page_table + size_t(s) * buffers_.state().page_table_stride);
  }
  step.cu_seqlens_q[num_seqs] = num_rows;
  auto start = std::chrono::steady_clock::now();
  forward_rows(num_rows, num_seqs, with_logits ? num_rows : 0);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

}  // namespace optimus

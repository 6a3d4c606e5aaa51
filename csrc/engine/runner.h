// Runs a planned step: owns the KV memory and every buffer of a step, all allocated once. The only part of the engine that calls kernels.
#pragma once

#include <vector>

#include "engine/decode_buffers.h"
#include "models/model.h"

namespace optimus {

class Runner {
 public:
  Runner(const Model& model, const EngineConfig& config, int max_pages_per_seq);

  StepResult run(const StepPlan& plan);

  // Rows of one sequence over the given pages; returns fp32 logits [rows, vocab_size].
  std::vector<float> forward(const std::vector<int32_t>& token_ids,
                             const std::vector<int32_t>& positions,
                             const std::vector<int32_t>& kv_limits,
                             const std::vector<int32_t>& page_ids);
  // Milliseconds of one forward of `num_rows` rows in `num_seqs` sequences (as even as it goes) that
  // write all over the given pages and read their first `context` positions. `with_logits`: every
  // row is a mask row; none otherwise.
  double time_forward(int num_rows, int num_seqs, int context, bool with_logits,
                      const std::vector<int32_t>& page_ids);

  size_t kv_cache_bytes() const { return kv_cache_.bytes(); }
  size_t activation_bytes() const { return activations_.bytes(); }
  size_t state_bytes() const { return buffers_.bytes(); }

 private:
  void forward_rows(int num_rows, int num_seqs, int num_logit_rows);

  const Model& model_;
  EngineConfig config_;
  ThreadPool threads_;
  Execution execution_;
  KvCache kv_cache_;
  Activations activations_;
  DecodeBuffers buffers_;
};

}  // namespace optimus

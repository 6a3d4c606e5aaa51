// Dense Qwen3/SDAR decoder: weights, and one straight-line forward over a ragged batch of rows.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "models/config.h"
#include "models/linear.h"

namespace optimus {

// KV memory of all layers: layer l's K pages start at k(l), [num_pages, num_kv_heads, page_size, head_dim].
class KvCache {
 public:
  KvCache(const ModelConfig& config, int num_pages, int page_size, Device device = Device::cpu);
  static size_t page_bytes(const ModelConfig& config, int page_size);  // over all layers
  void* k(int layer) { return data_.data() + (2 * size_t(layer)) * layer_bytes_; }
  void* v(int layer) { return data_.data() + (2 * size_t(layer) + 1) * layer_bytes_; }
  size_t bytes() const { return data_.size(); }
  const int num_pages, page_size;

 private:
  size_t layer_bytes_;
  Buffer<char> data_;
};

// Every intermediate of a forward, allocated once for `max_rows` rows of `max_seqs` sequences.
struct Activations {
  Activations(const ModelConfig& config, int max_rows, int max_seqs = 1,
              Device device = Device::cpu);
  size_t bytes() const;

  Buffer<char> residual;   // [max_rows, hidden]
  Buffer<char> normed;     // [max_rows, hidden]
  Buffer<char> qkv;        // [max_rows, (q_heads + 2 * kv_heads) * head_dim]
  Buffer<char> q;          // [max_rows, q_heads, head_dim]
  Buffer<char> attended;   // [max_rows, q_heads, head_dim]
  Buffer<char> hidden;     // [max_rows, hidden] output of o_proj and down_proj
  Buffer<char> gate_up;    // [max_rows, 2 * intermediate]
  Buffer<char> activated;  // [max_rows, intermediate]
  Buffer<char> logits;     // [max_rows, vocab_size]
  // Scratch of the CUDA kernels; empty on the CPU.
  Buffer<char> attention_workspace, gemm_workspace;
};

// Rows of a step as the model needs them; the arrays are those of StepRows.
struct ForwardBatch {
  const int32_t* token_ids;     // [num_rows]
  const int32_t* positions;     // [num_rows] in a sequence nowhere before its first row's
  const int32_t* kv_limits;     // [num_rows]
  const int32_t* kv_slots;      // [num_rows]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  const int32_t* page_table;    // [num_seqs, page_table_stride]
  const int32_t* logit_rows;    // [num_logit_rows]
  int num_rows, num_seqs, num_logit_rows, page_table_stride;
};

class Model {
 public:
  explicit Model(const ModelConfig& config, Device device = Device::cpu);

  const ModelConfig& config() const { return config_; }
  // Where the weights lie, and forward runs.
  Device device() const { return device_; }
  // Hugging Face tensor names and shapes this model needs.
  const std::map<std::string, std::vector<int64_t>>& expected_tensors() const { return expected_; }
  // Copies one tensor in; `data` is row-major [shape] of `dtype`, converted to the model's.
  void load_tensor(const std::string& name, const std::vector<int64_t>& shape, DType dtype,
                   const void* data);
  // Throws naming every tensor that is missing.
  void finish_loading();
  bool is_loaded() const { return loaded_; }

  // Writes logits [num_logit_rows, vocab_size] to activations.logits and K/V to the cache.
  void forward(const ForwardBatch& batch, KvCache& kv_cache, Activations& activations,
               const Execution& execution) const;
  // The matrix products of a forward alone, on whatever is in `activations`: what a step's time is
  // held against.
  void run_gemms(int rows, Activations& activations, const Execution& execution) const;
  // Before serving: chooses how the matrix products of `rows` rows are computed. Overwrites
  // activations.
  void plan(int rows, Activations& activations, const Execution& execution) const;

  int64_t num_parameters() const;
  size_t weight_bytes() const;

 private:
  struct Layer {
    Linear qkv, o, gate_up, down;
    Buffer<char> input_norm, post_attention_norm, q_norm, k_norm;
  };
  // Where a named tensor goes: rows of a Linear, or a whole buffer.
  struct Destination {
    Linear* linear = nullptr;
    int row_begin = 0;
    Buffer<char>* buffer = nullptr;
  };

  void expect(const std::string& name, std::vector<int64_t> shape, Destination destination);
  BlockAttentionParams attention_params(int layer_idx, const ForwardBatch& batch, KvCache& kv_cache,
                                        Activations& activations) const;
  void norm(const void* x, void* residual, const Buffer<char>& weight, int rows, Activations&,
            const Execution&) const;
  bool run_gate_up(const Layer&, int rows, Activations&, const Execution&) const;
  void mlp(const Layer&, int rows, Activations&, const Execution&) const;
  void attention(const Layer& layer, int layer_idx, const ForwardBatch& batch, KvCache& kv_cache,
                 Activations& activations, const Execution& execution) const;

  ModelConfig config_;
  Device device_;
  Buffer<char> embedding_;   // [vocab_size, hidden]; empty when tied: rows come from lm_head_
  Buffer<char> final_norm_;  // [hidden]
  Linear lm_head_;
  Buffer<float> inv_freq_;  // [head_dim / 2]
  std::vector<Layer> layers_;
  std::map<std::string, std::vector<int64_t>> expected_;
  std::map<std::string, Destination> destinations_;
  std::map<std::string, bool> seen_;
  bool loaded_ = false;
};

}  // namespace optimus

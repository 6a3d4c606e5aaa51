// Shape of a dense Qwen3-style decoder (Qwen3, SDAR). Filled from config.json by the caller.
#pragma once

#include "core/dtype.h"

namespace optimus {

struct ModelConfig {
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 1e6;
  bool tie_word_embeddings = false;
  int mask_token_id = -1;  // -1: the model has none and decodes only in ar mode
  DType dtype = DType::float32;
  // Tokens that exist: rows of the embedding and the head behind them are padding, and their logits
  // are never looked at. 0 = vocab_size.
  int true_vocab_size = 0;
};

// Throws std::invalid_argument naming the field and its value.
void validate(const ModelConfig& config);

}  // namespace optimus

// A Qwen3-style model of a few thousand random parameters, loaded tensor by tensor.
#pragma once

#include <map>
#include <memory>
#include <utility>

#include "models/model.h"
#include "testing.h"

namespace optimus::testing {

inline ModelConfig tiny_config(DType dtype = DType::float32) {
  ModelConfig config;
  config.vocab_size = 61;
  config.hidden_size = 32;
  config.intermediate_size = 40;
  config.num_layers = 2;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.max_position_embeddings = 512;
  config.rope_theta = 1e4;
  config.mask_token_id = 60;
  config.dtype = dtype;
  return config;
}

inline size_t num_elements(const std::vector<int64_t>& shape) {
  size_t count = 1;
  for (int64_t n : shape) count *= n;
  return count;
}

// The same values for the same name and seed, whatever the dtype. Norm weights lie around 1; the
// head is large, so that confidences spread over (0, 1).
inline std::vector<float> tiny_tensor(const std::string& name, const std::vector<int64_t>& shape,
                                      unsigned seed = 1) {
  Rng rng(seed);
  for (char c : name) rng.seed(rng() ^ static_cast<unsigned char>(c));
  bool is_norm = shape.size() == 1, is_head = name == "lm_head.weight";
  std::normal_distribution<float> normal(is_norm ? 1.0f : 0.0f, is_norm   ? 0.1f
                                                                : is_head ? 0.8f
                                                                          : 0.3f);
  std::vector<float> values(num_elements(shape));
  for (float& value : values) value = normal(rng);
  return values;
}

inline void load_tiny_tensors(Model& model, unsigned seed = 1) {
  for (const auto& [name, shape] : model.expected_tensors()) {
    model.load_tensor(name, shape, DType::float32, tiny_tensor(name, shape, seed).data());
  }
}

inline std::shared_ptr<const Model> tiny_model(DType dtype = DType::float32, unsigned seed = 1) {
  static std::map<std::pair<DType, unsigned>, std::shared_ptr<const Model>> loaded;
  std::shared_ptr<const Model>& entry = loaded[{dtype, seed}];
  if (entry == nullptr) {
    auto model = std::make_shared<Model>(tiny_config(dtype));
    load_tiny_tensors(*model, seed);
    model->finish_loading();
    entry = model;
  }
  return entry;
}

inline std::vector<int32_t> random_prompt(Rng& rng, int length) {
  std::vector<int32_t> prompt(length);
  for (int32_t& token : prompt) token = random_int(rng, 0, 60);  // the mask's id included
  return prompt;
}

}  // namespace optimus::testing

// The tiny model in shapes that the CUDA kernels take, on either device with the same weights.
#pragma once

#include "tiny_model.h"

namespace optimus::testing {

inline ModelConfig gpu_config(DType dtype, bool tied) {
  ModelConfig config = tiny_config(dtype);
  config.vocab_size = 200;
  config.true_vocab_size = 187;
  config.hidden_size = 128;
  config.intermediate_size = 192;
  config.num_layers = 3;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.mask_token_id = 60;
  config.tie_word_embeddings = tied;
  return config;
}

inline std::shared_ptr<const Model> gpu_sized_model(Device device, DType dtype = DType::bfloat16,
                                                    bool tied = false) {
  auto model = std::make_shared<Model>(gpu_config(dtype, tied), device);
  for (const auto& [name, shape] : model->expected_tensors()) {
    std::vector<float> values = tiny_tensor(name, shape);
    // Deep in hidden size, as trained matrices are: the residual stream stays of order one.
    if (shape.size() == 2) {
      for (float& value : values) value *= 0.5f;
    }
    model->load_tensor(name, shape, DType::float32, values.data());
  }
  model->finish_loading();
  return model;
}

}  // namespace optimus::testing

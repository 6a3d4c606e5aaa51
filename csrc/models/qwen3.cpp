// Qwen3 (and SDAR, the same backbone): pre-norm attention with per-head QK-norm and half-split
// rotary embedding, SwiGLU, no biases. Source: Hugging Face transformers, modeling_qwen3 (layout of
// names and shapes only).
#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"
#include "models/model.h"

namespace optimus {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

int64_t num_elements(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t n : shape) count *= n;
  return count;
}

Buffer<char> convert(const void* data, int64_t count, DType from, DType to) {
  Buffer<char> converted(count * dtype_size(to));
  dispatch_dtype(from, [&](auto source) {
    dispatch_dtype(to, [&](auto target) {
      const auto* in = static_cast<const decltype(source)*>(data);
      auto* out = reinterpret_cast<decltype(target)*>(converted.data());
      for (int64_t i = 0; i < count; ++i) out[i] = from_float<decltype(target)>(to_float(in[i]));
    });
  });
  return converted;
}

// What the CUDA kernels take.
void validate_for_cuda(const ModelConfig& c) {
  const std::string problem = cuda_problem();
  OPTIMUS_CHECK(problem.empty(), "[model] ", problem);
  OPTIMUS_CHECK(c.dtype == DType::bfloat16, "[model] on CUDA dtype must be bfloat16, got ",
                dtype_name(c.dtype));
  OPTIMUS_CHECK(c.head_dim == 64 || c.head_dim == 128,
                "[model] on CUDA head_dim must be 64 or 128, got ", c.head_dim);
  OPTIMUS_CHECK(c.num_q_heads / c.num_kv_heads <= 16,
                "[model] on CUDA at most 16 query heads may share a key/value head, got ",
                c.num_q_heads, " and ", c.num_kv_heads);
  constexpr int kColumns = 8;  // 16 bytes of a row
  for (const auto& [name, size] :
       {std::pair("vocab_size", c.vocab_size), std::pair("hidden_size", c.hidden_size),
        std::pair("intermediate_size", c.intermediate_size)}) {
    OPTIMUS_CHECK(size % kColumns == 0, "[model] on CUDA ", name, " must be a multiple of ",
                  kColumns, ", got ", size);
  }
}

}  // namespace

void validate(const ModelConfig& c) {
  auto positive = [](const char* name, int value) {
    OPTIMUS_CHECK(value > 0, "[model_config] ", name, " must be positive, got ", value);
  };
  positive("vocab_size", c.vocab_size);
  positive("hidden_size", c.hidden_size);
  positive("intermediate_size", c.intermediate_size);
  positive("num_layers", c.num_layers);
  positive("num_q_heads", c.num_q_heads);
  positive("num_kv_heads", c.num_kv_heads);
  positive("head_dim", c.head_dim);
  positive("max_position_embeddings", c.max_position_embeddings);
  OPTIMUS_CHECK(c.num_q_heads % c.num_kv_heads == 0, "[model_config] num_q_heads ", c.num_q_heads,
                " must be a multiple of num_kv_heads ", c.num_kv_heads);
  OPTIMUS_CHECK(c.head_dim % 2 == 0, "[model_config] head_dim must be even, got ", c.head_dim);
  OPTIMUS_CHECK(c.mask_token_id >= -1 && c.mask_token_id < c.vocab_size,
                "[model_config] mask_token_id must be below vocab_size ", c.vocab_size, ", got ",
                c.mask_token_id);
  OPTIMUS_CHECK(c.true_vocab_size >= 0 && c.true_vocab_size <= c.vocab_size,
                "[model_config] true_vocab_size must be at most vocab_size ", c.vocab_size,
                ", got ", c.true_vocab_size);
}

KvCache::KvCache(const ModelConfig& c, int num_pages_, int page_size_, Device device)
    : num_pages(num_pages_),
      page_size(page_size_),
      layer_bytes_(num_pages_ * page_bytes(c, page_size_) / (2 * size_t(c.num_layers))),
      data_(2 * size_t(c.num_layers) * layer_bytes_, device) {}

size_t KvCache::page_bytes(const ModelConfig& c, int page_size) {
  return 2 * size_t(c.num_layers) * c.num_kv_heads * page_size * c.head_dim * dtype_size(c.dtype);
}

Activations::Activations(const ModelConfig& c, int max_rows, int max_seqs, Device device) {
  const size_t row = size_t(max_rows) * dtype_size(c.dtype);
  const auto allocate = [&](Buffer<char>& buffer, size_t bytes) {
    buffer = Buffer<char>(bytes, device);
  };
  allocate(residual, row * c.hidden_size);
  allocate(normed, row * c.hidden_size);
  allocate(qkv, row * (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim);
  allocate(q, row * c.num_q_heads * c.head_dim);
  allocate(attended, row * c.num_q_heads * c.head_dim);
  allocate(hidden, row * c.hidden_size);
  allocate(gate_up, row * 2 * c.intermediate_size);
  allocate(activated, row * c.intermediate_size);
  allocate(logits, row * c.vocab_size);
  if (device == Device::cpu) return;
  BlockAttentionParams attention{};
  attention.num_seqs = max_seqs;
  attention.max_rows = max_rows;
  attention.num_q_heads = c.num_q_heads;
  attention.num_kv_heads = c.num_kv_heads;
  attention.head_dim = c.head_dim;
  attention.dtype = c.dtype;
  allocate(attention_workspace,
           block_attention_workspace_bytes(attention, {device, nullptr, nullptr}));
  allocate(gemm_workspace, kGemmWorkspaceBytes);
}

size_t Activations::bytes() const {
  size_t total = 0;
  for (const Buffer<char>* buffer : {&residual, &normed, &qkv, &q, &attended, &hidden, &gate_up,
                                     &activated, &logits, &attention_workspace, &gemm_workspace}) {
    total += buffer->size();
  }
  return total;
}

Model::Model(const ModelConfig& config, Device device) : config_(config), device_(device) {
  validate(config_);
  if (device == Device::cuda) validate_for_cuda(config_);
  const ModelConfig& c = config_;
  const int q_size = c.num_q_heads * c.head_dim, kv_size = c.num_kv_heads * c.head_dim;
  auto vector_buffer = [&](int64_t n) { return Buffer<char>(n * dtype_size(c.dtype), device); };

  final_norm_ = vector_buffer(c.hidden_size);
  lm_head_ = Linear(c.vocab_size, c.hidden_size, c.dtype, device);
  const std::vector<int64_t> table_shape = {c.vocab_size, c.hidden_size};
  if (c.tie_word_embeddings) {
    expect("model.embed_tokens.weight", table_shape, {&lm_head_, 0, nullptr});
  } else {
    embedding_ = vector_buffer(int64_t(c.vocab_size) * c.hidden_size);
    expect("model.embed_tokens.weight", table_shape, {nullptr, 0, &embedding_});
    expect("lm_head.weight", table_shape, {&lm_head_, 0, nullptr});
  }
  expect("model.norm.weight", {c.hidden_size}, {nullptr, 0, &final_norm_});
  layers_.resize(c.num_layers);
  for (int i = 0; i < c.num_layers; ++i) {
    Layer& layer = layers_[i];
    layer.qkv = Linear(q_size + 2 * kv_size, c.hidden_size, c.dtype, device);
    layer.o = Linear(c.hidden_size, q_size, c.dtype, device);
    layer.gate_up = Linear::gate_up(c.intermediate_size, c.hidden_size, c.dtype, device);
    layer.down = Linear(c.hidden_size, c.intermediate_size, c.dtype, device);
    layer.input_norm = vector_buffer(c.hidden_size);
    layer.post_attention_norm = vector_buffer(c.hidden_size);
    layer.q_norm = vector_buffer(c.head_dim);
    layer.k_norm = vector_buffer(c.head_dim);
    std::string prefix = "model.layers." + std::to_string(i) + ".";
    auto linear = [&](const char* name, int n, int k, Linear* to, int row_begin) {
      expect(prefix + name + ".weight", {n, k}, {to, row_begin, nullptr});
    };
    auto norm = [&](const char* name, int n, Buffer<char>* to) {
      expect(prefix + name + ".weight", {n}, {nullptr, 0, to});
    };
    linear("self_attn.q_proj", q_size, c.hidden_size, &layer.qkv, 0);
    linear("self_attn.k_proj", kv_size, c.hidden_size, &layer.qkv, q_size);
    linear("self_attn.v_proj", kv_size, c.hidden_size, &layer.qkv, q_size + kv_size);
    linear("self_attn.o_proj", c.hidden_size, q_size, &layer.o, 0);
    linear("mlp.gate_proj", c.intermediate_size, c.hidden_size, &layer.gate_up, 0);
    linear("mlp.up_proj", c.intermediate_size, c.hidden_size, &layer.gate_up, c.intermediate_size);
    linear("mlp.down_proj", c.hidden_size, c.intermediate_size, &layer.down, 0);
    norm("input_layernorm", c.hidden_size, &layer.input_norm);
    norm("post_attention_layernorm", c.hidden_size, &layer.post_attention_norm);
    norm("self_attn.q_norm", c.head_dim, &layer.q_norm);
    norm("self_attn.k_norm", c.head_dim, &layer.k_norm);
  }
  std::vector<float> inv_freq(c.head_dim / 2);
  for (int j = 0; j < c.head_dim / 2; ++j) {
    // Exponent, power and reciprocal are each rounded to fp32, as when the models were trained:
    // rounded once, a frequency is a few units in the last place off, times the position.
    const float exponent = static_cast<float>(2 * j) / static_cast<float>(c.head_dim);
    inv_freq[j] = 1.0f / static_cast<float>(std::pow(c.rope_theta, double{exponent}));
  }
  inv_freq_ = Buffer<float>(inv_freq.size(), device);
  inv_freq_.copy_in(0, inv_freq.data(), inv_freq.size());
}

void Model::expect(const std::string& name, std::vector<int64_t> shape, Destination destination) {
  expected_[name] = std::move(shape);
  destinations_[name] = destination;
}

void Model::load_tensor(const std::string& name, const std::vector<int64_t>& shape, DType dtype,
                        const void* data) {
  OPTIMUS_CHECK(!loaded_, "[load_tensor] ", name, ": the model is loaded already");
  auto it = expected_.find(name);
  OPTIMUS_CHECK(it != expected_.end(), "[load_tensor] unexpected tensor ", name);
  OPTIMUS_CHECK(it->second == shape, "[load_tensor] ", name, " must have shape ",
                shape_text(it->second), ", got ", shape_text(shape));
  Buffer<char> converted;
  if (dtype != config_.dtype) {
    converted = convert(data, num_elements(shape), dtype, config_.dtype);
    data = converted.data();
  }
  const Destination& to = destinations_[name];
  if (to.linear != nullptr) {
    to.linear->load_rows(to.row_begin, static_cast<int>(shape[0]), data);
  } else {
    to.buffer->copy_in(0, static_cast<const char*>(data), to.buffer->size());
  }
  seen_[name] = true;
}

void Model::finish_loading() {
  OPTIMUS_CHECK(!loaded_, "[finish_loading] the model is loaded already");
  std::string missing;
  for (const auto& [name, shape] : expected_) {
    if (!seen_.count(name))
      missing += (missing.empty() ? "" : ", ") + name + " " + shape_text(shape);
  }
  OPTIMUS_CHECK(missing.empty(), "[finish_loading] missing tensors: ", missing);
  lm_head_.finish_loading();
  for (Layer& layer : layers_) {
    for (Linear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      linear->finish_loading();
    }
  }
  loaded_ = true;
}

int64_t Model::num_parameters() const {
  int64_t total = 0;
  for (const auto& [name, shape] : expected_) total += num_elements(shape);
  return total;
}

size_t Model::weight_bytes() const {
  size_t total = embedding_.size() + final_norm_.size() + lm_head_.bytes();
  for (const Layer& layer : layers_) {
    total += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
    total += layer.input_norm.size() + layer.post_attention_norm.size() + layer.q_norm.size() +
             layer.k_norm.size();
  }
  return total;
}

BlockAttentionParams Model::attention_params(int layer_idx, const ForwardBatch& b, KvCache& kv,
                                             Activations& a) const {
  const ModelConfig& c = config_;
  BlockAttentionParams params{};
  params.q = a.q.data();
  params.k_pages = kv.k(layer_idx);
  params.v_pages = kv.v(layer_idx);
  params.cu_seqlens_q = b.cu_seqlens_q;
  params.kv_limits = b.kv_limits;
  params.page_table = b.page_table;
  params.out = a.attended.data();
  params.num_seqs = b.num_seqs;
  params.num_q_heads = c.num_q_heads;
  params.num_kv_heads = c.num_kv_heads;
  params.head_dim = c.head_dim;
  params.page_size = kv.page_size;
  params.page_table_stride = b.page_table_stride;
  params.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  params.dtype = c.dtype;
  params.workspace = a.attention_workspace.data();
  params.workspace_bytes = a.attention_workspace.size();
  params.max_rows = b.num_rows;
  params.positions = b.positions;
  return params;
}

// normed -> hidden, through the pages.
void Model::attention(const Layer& layer, int layer_idx, const ForwardBatch& b, KvCache& kv,
                      Activations& a, const Execution& e) const {
  const ModelConfig& c = config_;
  layer.qkv.run(a.normed.data(), a.qkv.data(), b.num_rows, a.gemm_workspace, e);
  qk_norm_rope_kv_write({a.qkv.data(), layer.q_norm.data(), layer.k_norm.data(), inv_freq_.data(),
                         b.positions, b.kv_slots, a.q.data(), kv.k(layer_idx), kv.v(layer_idx),
                         b.num_rows, c.num_q_heads, c.num_kv_heads, c.head_dim,
                         /*rotary_dim=*/c.head_dim, kv.page_size, c.rms_norm_eps, c.dtype},
                        e);
  block_attention(attention_params(layer_idx, b, kv, a), e);
  layer.o.run(a.attended.data(), a.hidden.data(), b.num_rows, a.gemm_workspace, e);
}

// normed -> activated, or without the activation -> gate_up; returns whether with it.
bool Model::run_gate_up(const Layer& layer, int rows, Activations& a, const Execution& e) const {
  const bool silu =
      layer.gate_up.gives_silu(a.normed.data(), a.activated.data(), rows, a.gemm_workspace, e);
  void* out = silu ? a.activated.data() : a.gate_up.data();
  layer.gate_up.run(a.normed.data(), out, rows, a.gemm_workspace, e, silu);
  return silu;
}

// normed -> hidden.
void Model::mlp(const Layer& layer, int rows, Activations& a, const Execution& e) const {
  if (!run_gate_up(layer, rows, a, e)) {
    silu_mul({a.gate_up.data(), a.activated.data(), rows, config_.intermediate_size, config_.dtype,
              layer.gate_up.is_in_turn()},
             e);
  }
  layer.down.run(a.activated.data(), a.hidden.data(), rows, a.gemm_workspace, e);
}

// x, added to the residual if there is one -> normed.
void Model::norm(const void* x, void* residual, const Buffer<char>& weight, int rows,
                 Activations& a, const Execution& e) const {
  rms_norm({x, residual, nullptr, weight.data(), a.normed.data(), rows, config_.hidden_size,
            config_.rms_norm_eps, config_.dtype},
           e);
}

void Model::forward(const ForwardBatch& b, KvCache& kv, Activations& a, const Execution& e) const {
  const ModelConfig& c = config_;
  const bool tied = c.tie_word_embeddings;
  block_attention_schedule(attention_params(0, b, kv, a), e);
  embedding({tied ? lm_head_.weight() : embedding_.data(), b.token_ids, a.residual.data(),
             b.num_rows, c.hidden_size, c.dtype, tied && lm_head_.is_packed()},
            e);
  norm(a.residual.data(), nullptr, layers_[0].input_norm, b.num_rows, a, e);
  for (int i = 0; i < c.num_layers; ++i) {
    const Layer& layer = layers_[i];
    attention(layer, i, b, kv, a, e);
    norm(a.hidden.data(), a.residual.data(), layer.post_attention_norm, b.num_rows, a, e);
    mlp(layer, b.num_rows, a, e);
    if (i + 1 == c.num_layers) break;
    norm(a.hidden.data(), a.residual.data(), layers_[i + 1].input_norm, b.num_rows, a, e);
  }
  if (b.num_logit_rows == 0) return;
  // Normed first and gathered then: rms_norm gathers distinct rows only, and padding repeats row 0.
  norm(a.hidden.data(), a.residual.data(), final_norm_, b.num_rows, a, e);
  embedding(
      {a.normed.data(), b.logit_rows, a.hidden.data(), b.num_logit_rows, c.hidden_size, c.dtype},
      e);
  lm_head_.run(a.hidden.data(), a.logits.data(), b.num_logit_rows, a.gemm_workspace, e);
}

void Model::run_gemms(int rows, Activations& a, const Execution& e) const {
  for (const Layer& layer : layers_) {
    layer.qkv.run(a.normed.data(), a.qkv.data(), rows, a.gemm_workspace, e);
    layer.o.run(a.attended.data(), a.hidden.data(), rows, a.gemm_workspace, e);
    run_gate_up(layer, rows, a, e);
    layer.down.run(a.activated.data(), a.hidden.data(), rows, a.gemm_workspace, e);
  }
  lm_head_.run(a.hidden.data(), a.logits.data(), rows, a.gemm_workspace, e);
}

void Model::plan(int rows, Activations& a, const Execution& e) const {
  // Layers whose weights no cache holds, if there are as many.
  constexpr size_t kMoreThanCaches = size_t(128) << 20;
  const Layer& first = layers_[0];
  const size_t layer_bytes =
      first.qkv.bytes() + first.o.bytes() + first.gate_up.bytes() + first.down.bytes();
  const auto least_layers =
      static_cast<int>(std::max<size_t>(3, kMoreThanCaches / layer_bytes + 1));
  const int num_layers = std::min(config_.num_layers, least_layers);
  const auto add_and_norm = [&](const Buffer<char>& weight) {
    norm(a.hidden.data(), a.residual.data(), weight, rows, a, e);
  };
  const auto chain = [&] {
    for (int i = 0; i < num_layers; ++i) {
      const Layer& layer = layers_[i];
      add_and_norm(layer.input_norm);
      layer.qkv.run(a.normed.data(), a.qkv.data(), rows, a.gemm_workspace, e);
      add_and_norm(layer.post_attention_norm);  // for attention, which depends on the step
      layer.o.run(a.attended.data(), a.hidden.data(), rows, a.gemm_workspace, e);
      add_and_norm(layer.post_attention_norm);
      mlp(layer, rows, a, e);
    }
  };
  const auto params = [&](const Linear& linear, const Buffer<char>& x, Buffer<char>& out) {
    return linear.params(x.data(), out.data(), rows, a.gemm_workspace);
  };
  GemmParams gate_up = params(first.gate_up, a.normed, a.gate_up);
  gate_up.silu = first.gate_up.is_in_turn();
  plan_gemms({gate_up, params(first.down, a.activated, a.hidden),
              params(first.qkv, a.normed, a.qkv), params(first.o, a.attended, a.hidden)},
             chain, e);
  plan_gemms(
      {params(lm_head_, a.hidden, a.logits)},
      [&] {
        add_and_norm(final_norm_);
        lm_head_.run(a.hidden.data(), a.logits.data(), rows, a.gemm_workspace, e);
      },
      e);
}

}  // namespace optimus

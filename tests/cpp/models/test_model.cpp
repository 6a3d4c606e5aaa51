// Model: loading (names, shapes, dtypes, what is missing) and the forward's independence of pages,
// batch and dtype. Values against an independent implementation are tested from Python.
#include "tiny_model.h"

namespace optimus {
namespace {

using namespace testing;

constexpr int kPageSize = 4;

// Logits of one causal or block-wise sequence whose position p lies on page_table[p / kPageSize].
Tensor run_forward(const Model& model, const std::vector<int32_t>& tokens, int block_length,
                   const std::vector<int32_t>& page_table, int num_pages, int slice = 1 << 20) {
  const int rows = static_cast<int>(tokens.size()), vocab = model.config().vocab_size;
  KvCache kv_cache(model.config(), num_pages, kPageSize);
  Activations activations(model.config(), rows);
  ThreadPool pool(2);
  Execution execution{Device::cpu, &pool, nullptr};
  Tensor logits(model.config().dtype, static_cast<size_t>(rows) * vocab);
  for (int begin = 0; begin < rows; begin += slice) {
    int count = std::min(slice, rows - begin);
    std::vector<int32_t> positions, limits, slots, logit_rows;
    for (int i = 0; i < count; ++i) {
      int p = begin + i;
      positions.push_back(p);
      limits.push_back(std::min(rows, (p / block_length + 1) * block_length));
      slots.push_back(page_table[p / kPageSize] * kPageSize + p % kPageSize);
      logit_rows.push_back(i);
    }
    int32_t cu[2] = {0, count};
    model.forward({tokens.data() + begin, positions.data(), limits.data(), slots.data(), cu,
                   page_table.data(), logit_rows.data(), count, 1, count,
                   static_cast<int>(page_table.size())},
                  kv_cache, activations, execution);
    size_t row_bytes = vocab * dtype_size(model.config().dtype);
    std::memcpy(static_cast<char*>(logits.data()) + begin * row_bytes, activations.logits.data(),
                count * row_bytes);
  }
  return logits;
}

TEST(Model, ReportsWhatItNeeds) {
  Model model(tiny_config());
  EXPECT_EQ(model.expected_tensors().size(), 3u + 2 * 11);
  EXPECT_EQ(model.expected_tensors().at("model.layers.1.self_attn.k_proj.weight"),
            (std::vector<int64_t>{16, 32}));
  int64_t parameters = 0;
  for (const auto& [name, shape] : model.expected_tensors()) parameters += num_elements(shape);
  EXPECT_EQ(model.num_parameters(), parameters);
  EXPECT_FALSE(model.is_loaded());
  ModelConfig tied = tiny_config();
  tied.tie_word_embeddings = true;
  EXPECT_EQ(Model(tied).expected_tensors().count("lm_head.weight"), 0u);
}

TEST(Model, BadTensorsThrow) {
  Model model(tiny_config());
  std::vector<float> values(10000);
  auto load = [&](const char* name, std::vector<int64_t> shape) {
    model.load_tensor(name, shape, DType::float32, values.data());
  };
  expect_invalid([&] { load("model.layers.2.mlp.up_proj.weight", {40, 32}); },
                 "[load_tensor] unexpected tensor model.layers.2.mlp.up_proj.weight");
  expect_invalid([&] { load("model.norm.weight", {33}); },
                 "[load_tensor] model.norm.weight must have shape [32], got [33]");
  expect_invalid([&] { load("model.layers.0.mlp.up_proj.weight", {32, 40}); },
                 "must have shape [40, 32], got [32, 40]");
  expect_invalid([&] { load("model.norm.weight", {}); }, "got []");
}

TEST(Model, MissingTensorsAreNamedWithTheirShapes) {
  Model model(tiny_config());
  for (const auto& [name, shape] : model.expected_tensors()) {
    if (name == "lm_head.weight" || name == "model.layers.1.self_attn.q_norm.weight") continue;
    model.load_tensor(name, shape, DType::float32, tiny_tensor(name, shape).data());
  }
  expect_invalid([&] { model.finish_loading(); },
                 "[finish_loading] missing tensors: lm_head.weight [61, 32], "
                 "model.layers.1.self_attn.q_norm.weight [8]");
  EXPECT_FALSE(model.is_loaded());
  for (const char* name : {"lm_head.weight", "model.layers.1.self_attn.q_norm.weight"}) {
    const std::vector<int64_t>& shape = model.expected_tensors().at(name);
    model.load_tensor(name, shape, DType::float32, tiny_tensor(name, shape).data());
  }
  model.finish_loading();
  EXPECT_TRUE(model.is_loaded());
}

TEST(Model, LoadingTwiceThrows) {
  Model model(tiny_config());
  load_tiny_tensors(model);
  model.finish_loading();
  expect_invalid([&] { load_tiny_tensors(model); }, "the model is loaded already");
  expect_invalid([&] { model.finish_loading(); }, "[finish_loading] the model is loaded already");
}

TEST(Model, BadConfigsThrowWithValues) {
  auto rejects = [](const std::string& text, auto change) {
    ModelConfig config = tiny_config();
    change(config);
    expect_invalid([&] { Model model(config); }, text);
  };
  rejects("vocab_size must be positive, got 0", [](ModelConfig& c) { c.vocab_size = 0; });
  rejects("num_layers must be positive, got -1", [](ModelConfig& c) { c.num_layers = -1; });
  rejects("num_q_heads 4 must be a multiple of num_kv_heads 3",
          [](ModelConfig& c) { c.num_kv_heads = 3; });
  rejects("head_dim must be even, got 7", [](ModelConfig& c) { c.head_dim = 7; });
  rejects("mask_token_id must be below vocab_size 61, got 61",
          [](ModelConfig& c) { c.mask_token_id = 61; });
  rejects("got -2", [](ModelConfig& c) { c.mask_token_id = -2; });
  rejects("true_vocab_size must be at most vocab_size 61, got 62",
          [](ModelConfig& c) { c.true_vocab_size = 62; });
}

TEST(Model, ForwardDoesNotDependOnPages) {
  Rng rng(1);
  std::vector<int32_t> tokens = random_prompt(rng, 23);
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    auto model = tiny_model(dtype);
    Tensor in_order = run_forward(*model, tokens, 8, {0, 1, 2, 3, 4, 5}, 6);
    for (int trial = 0; trial < 5; ++trial) {
      std::vector<int32_t> pages = random_permutation(rng, 12);
      pages.resize(6);
      Tensor shuffled = run_forward(*model, tokens, 8, pages, 12);
      expect_same_bits(in_order, 0, shuffled, 0, in_order.size());
    }
  }
}

TEST(Model, ForwardInSlicesIsTheSame) {
  Rng rng(2);
  std::vector<int32_t> tokens = random_prompt(rng, 24);
  auto model = tiny_model();
  for (auto [block_length, slice] : std::vector<std::pair<int, int>>{{1, 1}, {1, 7}, {8, 8}}) {
    Tensor whole = run_forward(*model, tokens, block_length, {5, 4, 3, 2, 1, 0}, 6);
    Tensor sliced = run_forward(*model, tokens, block_length, {0, 1, 2, 3, 4, 5}, 6, slice);
    expect_same_bits(whole, 0, sliced, 0, whole.size());
  }
}

TEST(Model, ForwardSeesItsLimitsAndNoMore) {
  Rng rng(3);
  std::vector<int32_t> tokens = random_prompt(rng, 16), changed = tokens;
  changed[11] = (changed[11] + 1) % 60;
  auto model = tiny_model();
  const size_t vocab = model->config().vocab_size;
  for (int block_length : {1, 4}) {
    Tensor before = run_forward(*model, tokens, block_length, {0, 1, 2, 3}, 4);
    Tensor after = run_forward(*model, changed, block_length, {0, 1, 2, 3}, 4);
    size_t first_seeing = 11 / block_length * block_length;
    expect_same_bits(before, 0, after, 0, first_seeing * vocab);
    for (size_t row = first_seeing; row < 16; ++row) {
      EXPECT_FALSE(before.same_bits(row * vocab, after, row * vocab)) << "row " << row;
    }
  }
}

TEST(Model, Bfloat16IsClose) {
  Rng rng(4);
  std::vector<int32_t> tokens = random_prompt(rng, 16);
  Tensor exact = run_forward(*tiny_model(DType::float32), tokens, 8, {0, 1, 2, 3}, 4);
  Tensor rounded = run_forward(*tiny_model(DType::bfloat16), tokens, 8, {0, 1, 2, 3}, 4);
  double error = 0, squares = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(double{exact.get(i)} - rounded.get(i), 2);
    squares += std::pow(double{exact.get(i)}, 2);
  }
  EXPECT_GT(squares, 0);
  EXPECT_LT(std::sqrt(error / squares), 0.05);
}

TEST(Model, TiedHeadIsTheEmbedding) {
  Rng rng(5);
  std::vector<int32_t> tokens = random_prompt(rng, 8);
  ModelConfig config = tiny_config();
  config.tie_word_embeddings = true;
  Model tied(config), untied(tiny_config());
  load_tiny_tensors(tied);
  tied.finish_loading();
  load_tiny_tensors(untied);
  const auto& shape = untied.expected_tensors().at("lm_head.weight");
  untied.load_tensor("lm_head.weight", shape, DType::float32,
                     tiny_tensor("model.embed_tokens.weight", shape).data());
  untied.finish_loading();
  Tensor a = run_forward(tied, tokens, 8, {0, 1}, 2);
  Tensor b = run_forward(untied, tokens, 8, {0, 1}, 2);
  expect_same_bits(a, 0, b, 0, a.size());
  // One copy of the table serves both.
  EXPECT_EQ(untied.weight_bytes() - tied.weight_bytes(),
            size_t(config.vocab_size) * config.hidden_size * sizeof(float));
}

TEST(Model, TensorsConvertToTheModelsDtype) {
  Rng rng(6);
  Model from_bf16(tiny_config()), from_fp32(tiny_config());
  for (const auto& [name, shape] : from_bf16.expected_tensors()) {
    std::vector<float> values = tiny_tensor(name, shape);
    std::vector<bfloat16> half;
    for (float& value : values) {
      half.push_back(to_bfloat16(value));
      value = to_float(half.back());
    }
    from_bf16.load_tensor(name, shape, DType::bfloat16, half.data());
    from_fp32.load_tensor(name, shape, DType::float32, values.data());
  }
  from_bf16.finish_loading();
  from_fp32.finish_loading();
  std::vector<int32_t> tokens = random_prompt(rng, 4);
  Tensor a = run_forward(from_bf16, tokens, 4, {0}, 1),
         b = run_forward(from_fp32, tokens, 4, {0}, 1);
  expect_same_bits(a, 0, b, 0, a.size());
}

}  // namespace
}  // namespace optimus

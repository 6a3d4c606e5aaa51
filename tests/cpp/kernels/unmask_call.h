// One call of unmask with all its arrays, for the tests of its candidates, sampling and strategies.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/decode_state.h"

namespace optimus::testing {

struct UnmaskCall {
  UnmaskCall(DType dtype, int num_slots, int block_length, int vocab_size)
      : state(num_slots, block_length),
        logits(dtype, 0),
        num_fresh(num_slots, kPoison),
        num_masked(num_slots, kPoison),
        vocab_size(vocab_size) {}

  // Appends the rows of one slot's masks at `offsets`; their logits are set with set_logits.
  void add_rows(int slot, const std::vector<int>& offsets) {
    for (int offset : offsets) {
      logit_slots.push_back(slot);
      logit_offsets.push_back(offset);
    }
  }
  int num_rows() const { return static_cast<int>(logit_slots.size()); }

  // Elements from one row of logits to the next.
  size_t stride() const { return logits_stride > 0 ? logits_stride : vocab_size; }

  // `values`: [rows, stride()].
  void set_logits(const std::vector<float>& values) {
    ASSERT_EQ(values.size(), num_rows() * stride());
    logits = Tensor(logits.dtype(), values.size());
    for (size_t i = 0; i < values.size(); ++i) logits.set(i, values[i]);
  }
  void set_random_logits(Rng& rng, float scale) {
    logits = random_tensor(rng, logits.dtype(), num_rows() * stride(), scale);
  }
  float logit(int row, int token) const { return logits.get(row * stride() + token); }

  void poison_outputs() {
    const size_t rows = num_rows() + 1;  // one guard entry behind each
    token_ids.assign(rows, kPoison);
    confidence.assign(rows, kPoison);
    logprob.assign(rows, kPoison);
    entropy.assign(rows, kPoison);
    committed.assign(rows, kPoisonByte);
    slots.assign(rows, kPoison);
    offsets.assign(rows, kPoison);
  }
  UnmaskParams params() {
    return {logits.data(),
            logit_slots.data(),
            logit_offsets.data(),
            state.view(),
            Candidates{token_ids.data(), confidence.data(), logprob.data(), entropy.data(),
                       committed.data(), slots.data(), offsets.data()},
            num_fresh.data(),
            num_masked.data(),
            num_rows(),
            vocab_size,
            RowMode::chunk,
            logits.dtype(),
            logits_stride,
            num_rows_on_device};
  }
  void run(ThreadPool& pool) {
    poison_outputs();
    cpu::unmask(params(), pool);
    EXPECT_TRUE(logits.guards_intact());
    EXPECT_EQ(token_ids.back(), kPoison);
    EXPECT_EQ(confidence.back(), kPoison);
    EXPECT_EQ(logprob.back(), kPoison);
    EXPECT_EQ(entropy.back(), kPoison);
    EXPECT_EQ(committed.back(), kPoisonByte);
    const int real_rows = num_rows_on_device != nullptr ? *num_rows_on_device : num_rows();
    for (int i = 0; i <= num_rows(); ++i) {
      const bool is_real = i < real_rows && logit_slots[i] >= 0;
      ASSERT_EQ(slots[i], is_real ? logit_slots[i] : kPoison) << "row " << i;
      ASSERT_EQ(offsets[i], is_real ? logit_offsets[i] : kPoison) << "row " << i;
    }
  }
  void run() {
    static ThreadPool pool(1);
    run(pool);
  }

  static constexpr int kPoison = -77;
  static constexpr uint8_t kPoisonByte = 0xa5;
  DecodeStateArrays state;
  Tensor logits;
  std::vector<int32_t> logit_slots, logit_offsets;
  std::vector<int32_t> token_ids, slots, offsets;
  std::vector<float> confidence, logprob, entropy;
  std::vector<uint8_t> committed;
  std::vector<int32_t> num_fresh, num_masked;
  int vocab_size, logits_stride = 0;
  const int32_t* num_rows_on_device = nullptr;
};

inline std::vector<int> iota(int count) {
  std::vector<int> values(count);
  std::iota(values.begin(), values.end(), 0);
  return values;
}

}  // namespace optimus::testing

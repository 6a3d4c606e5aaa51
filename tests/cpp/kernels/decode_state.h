// Owns the arrays behind a DecodeState, for tests of the kernels that read and write it.
#pragma once

#include <set>
#include <vector>

#include "kernels/ops.h"
#include "testing.h"

namespace optimus::testing {

struct DecodeStateArrays {
  DecodeStateArrays(int num_slots, int block_length, int page_table_stride = 1)
      : num_slots(num_slots),
        block_length(block_length),
        page_table_stride(page_table_stride),
        block_start(num_slots, block_length),
        tokens(num_slots * 2 * block_length, -1),
        status(num_slots * 2 * block_length, kAbsent),
        denoise_step(num_slots),
        page_table(num_slots * page_table_stride),
        temperature(num_slots),
        top_k(num_slots),
        top_p(num_slots, 1.0f),
        confidence_threshold(num_slots, 0.9f),
        entropy_bound(num_slots, 0.3f),
        denoising_steps(num_slots, block_length),
        strategy(num_slots, kLowConfidenceDynamic),
        seed(num_slots),
        first_output(num_slots),
        end_position(num_slots, 1 << 30),
        stop_token_ids(num_slots * kMaxStopTokens, -1),
        ended(num_slots) {
    for (int slot = 0; slot < num_slots; ++slot) {
      for (int i = 0; i < block_length; ++i) status[first(slot) + i] = kCached;
    }
  }

  DecodeState view() {
    return {block_start.data(),    tokens.data(),          status.data(),
            denoise_step.data(),   page_table.data(),      temperature.data(),
            top_k.data(),          top_p.data(),           confidence_threshold.data(),
            entropy_bound.data(),  denoising_steps.data(), strategy.data(),
            seed.data(),           first_output.data(),    end_position.data(),
            stop_token_ids.data(), ended.data(),           num_slots,
            block_length,          page_table_stride};
  }

  // Where a slot's window starts in `tokens` and `status`.
  int first(int slot) const { return slot * 2 * block_length; }
  // Where its current block starts.
  int current(int slot) const { return first(slot) + block_length; }

  int num_slots, block_length, page_table_stride;
  std::vector<int32_t> block_start, tokens;
  std::vector<uint8_t> status;
  std::vector<int32_t> denoise_step, page_table;
  std::vector<float> temperature;
  std::vector<int32_t> top_k;
  std::vector<float> top_p, confidence_threshold, entropy_bound;
  std::vector<int32_t> denoising_steps;
  std::vector<uint8_t> strategy;
  std::vector<uint64_t> seed;
  std::vector<int32_t> first_output, end_position, stop_token_ids;
  std::vector<uint8_t> ended;
};

inline bool is_known(uint8_t status) { return status == kFresh || status == kCached; }
inline bool is_masked(uint8_t status) { return status == kAbsent || status == kPresent; }

// No absent mask precedes a known position.
inline bool is_valid_block(const std::vector<uint8_t>& status) {
  for (size_t i = 0; i < status.size(); ++i) {
    for (size_t j = i + 1; j < status.size(); ++j) {
      if (status[i] == kAbsent && is_known(status[j])) return false;
    }
  }
  return true;
}

// A current block with at least one mask, any valid mixture of statuses.
inline std::vector<uint8_t> random_block(Rng& rng, int block_length) {
  std::vector<uint8_t> status(block_length, kAbsent);
  int num_entered = random_int(rng, 0, block_length);
  for (int i = 0; i < num_entered; ++i) {
    status[i] = static_cast<uint8_t>(random_int(rng, kPresent, kCached));
  }
  if (std::all_of(status.begin(), status.end(), is_known)) {
    status[random_int(rng, 0, block_length - 1)] = kPresent;
  }
  return status;
}

}  // namespace optimus::testing

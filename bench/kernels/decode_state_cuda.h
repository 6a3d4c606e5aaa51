// A decode state on the device, for the benchmarks of the kernels that work on it: every slot with the
// same rules, in the middle of a request, all of its current block masked.
#pragma once

#include "cuda_timing.h"
#include "kernels/ops.h"

namespace optimus::bench {

class DeviceDecodeState {
 public:
  struct SamplingRules {
    float temperature;
    int top_k;
    float top_p;
  };

  DeviceDecodeState(int num_slots, int block_length, SamplingRules sampling, cudaStream_t stream)
      : block_start_(filled(num_slots, 10 * block_length, stream)),
        tokens_(filled(num_slots * 2 * block_length, 1, stream)),
        denoise_step_(filled(num_slots, 0, stream)),
        page_table_(filled(num_slots * kPages, 3, stream)),
        top_k_(filled(num_slots, sampling.top_k, stream)),
        steps_(filled(num_slots, block_length, stream)),
        first_output_(filled(num_slots, 0, stream)),
        end_position_(filled(num_slots, 1 << 30, stream)),
        stop_token_ids_(filled(num_slots * kMaxStopTokens, -1, stream)),
        status_(filled(num_slots * 2 * block_length, uint8_t{kPresent}, stream)),
        strategy_(filled(num_slots, uint8_t{kLowConfidenceDynamic}, stream)),
        ended_(filled(num_slots, uint8_t{0}, stream)),
        temperature_(filled(num_slots, sampling.temperature, stream)),
        top_p_(filled(num_slots, sampling.top_p, stream)),
        threshold_(filled(num_slots, 0.9f, stream)),
        bound_(filled(num_slots, 0.3f, stream)),
        seed_(filled(num_slots, uint64_t{7}, stream)),
        num_slots_(num_slots),
        block_length_(block_length) {}

  DecodeState view() {
    return {block_start_.data(), tokens_.data(),       status_.data(),       denoise_step_.data(),
            page_table_.data(),  temperature_.data(),  top_k_.data(),        top_p_.data(),
            threshold_.data(),   bound_.data(),        steps_.data(),        strategy_.data(),
            seed_.data(),        first_output_.data(), end_position_.data(), stop_token_ids_.data(),
            ended_.data(),       num_slots_,           block_length_,        kPages};
  }

 private:
  static constexpr int kPages = 64;  // of a slot

  DeviceBuffer<int32_t> block_start_, tokens_, denoise_step_, page_table_, top_k_, steps_;
  DeviceBuffer<int32_t> first_output_, end_position_, stop_token_ids_;
  DeviceBuffer<uint8_t> status_, strategy_, ended_;
  DeviceBuffer<float> temperature_, top_p_, threshold_, bound_;
  DeviceBuffer<uint64_t> seed_;
  int num_slots_, block_length_;
};

}  // namespace optimus::bench

// A DecodeState on the GPU, copied from and back to the arrays of a test.
#pragma once

#include "kernels/cuda/gpu_testing.h"
#include "kernels/decode_state.h"

namespace optimus::testing {

class GpuDecodeState {
 public:
  explicit GpuDecodeState(const DecodeStateArrays& host)
      : host_(host),
        block_start_(upload(host.block_start)),
        tokens_(upload(host.tokens)),
        status_(upload(host.status)),
        denoise_step_(upload(host.denoise_step)),
        page_table_(upload(host.page_table)),
        temperature_(upload(host.temperature)),
        top_k_(upload(host.top_k)),
        top_p_(upload(host.top_p)),
        confidence_threshold_(upload(host.confidence_threshold)),
        entropy_bound_(upload(host.entropy_bound)),
        denoising_steps_(upload(host.denoising_steps)),
        strategy_(upload(host.strategy)),
        seed_(upload(host.seed)),
        first_output_(upload(host.first_output)),
        end_position_(upload(host.end_position)),
        stop_token_ids_(upload(host.stop_token_ids)),
        ended_(upload(host.ended)) {}

  DecodeState view() {
    return {block_start_.data(),    tokens_.data(),          status_.data(),
            denoise_step_.data(),   page_table_.data(),      temperature_.data(),
            top_k_.data(),          top_p_.data(),           confidence_threshold_.data(),
            entropy_bound_.data(),  denoising_steps_.data(), strategy_.data(),
            seed_.data(),           first_output_.data(),    end_position_.data(),
            stop_token_ids_.data(), ended_.data(),           host_.num_slots,
            host_.block_length,     host_.page_table_stride};
  }

  void expect_same(const DecodeStateArrays& expected) {
    EXPECT_EQ(download(block_start_), expected.block_start);
    EXPECT_EQ(download(tokens_), expected.tokens);
    EXPECT_EQ(download(status_), expected.status);
    EXPECT_EQ(download(denoise_step_), expected.denoise_step);
    EXPECT_EQ(download(page_table_), expected.page_table);
    EXPECT_EQ(download(ended_), expected.ended);
  }

 private:
  DecodeStateArrays host_;
  DeviceBuffer<int32_t> block_start_, tokens_;
  DeviceBuffer<uint8_t> status_;
  DeviceBuffer<int32_t> denoise_step_, page_table_;
  DeviceBuffer<float> temperature_;
  DeviceBuffer<int32_t> top_k_;
  DeviceBuffer<float> top_p_, confidence_threshold_, entropy_bound_;
  DeviceBuffer<int32_t> denoising_steps_;
  DeviceBuffer<uint8_t> strategy_;
  DeviceBuffer<uint64_t> seed_;
  DeviceBuffer<int32_t> first_output_, end_position_, stop_token_ids_;
  DeviceBuffer<uint8_t> ended_;
};

}  // namespace optimus::testing

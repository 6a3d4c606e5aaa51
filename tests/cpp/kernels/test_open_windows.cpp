// open_windows: known tokens are fresh, the rest masked and absent, other slots untouched.
#include "kernels/cpu/kernels.h"
#include "kernels/decode_state.h"

namespace optimus {
namespace {

using namespace testing;

TEST(OpenWindows, KnownTokensAreFreshAndTheRestIsMasked) {
  ThreadPool pool(1);
  DecodeStateArrays arrays(3, 4);
  std::fill(arrays.tokens.begin(), arrays.tokens.end(), 9);
  std::fill(arrays.status.begin(), arrays.status.end(), uint8_t(kPresent));
  arrays.denoise_step = {5, 5, 5};
  arrays.ended = {1, 1, 1};
  const DecodeStateArrays before = arrays;
  const std::vector<int32_t> slots = {2, 0}, starts = {8, 12}, num_fresh = {3, 0},
                             tokens = {41, 42, 43, -7, -7, -7, -7, -7};
  cpu::open_windows({arrays.view(), slots.data(), starts.data(), num_fresh.data(), tokens.data(), 2,
                     RowMode::chunk},
                    pool);
  const auto window = [](const auto& values, int slot) {
    return std::vector<int>(values.begin() + slot * 8, values.begin() + (slot + 1) * 8);
  };
  EXPECT_EQ(window(arrays.tokens, 2), (std::vector<int>{-1, -1, -1, -1, 41, 42, 43, -1}));
  EXPECT_EQ(window(arrays.status, 2), (std::vector<int>{kCached, kCached, kCached, kCached, kFresh,
                                                        kFresh, kFresh, kAbsent}));
  EXPECT_EQ(window(arrays.tokens, 0), std::vector<int>(8, -1));
  EXPECT_EQ(window(arrays.status, 0), (std::vector<int>{kCached, kCached, kCached, kCached, kAbsent,
                                                        kAbsent, kAbsent, kAbsent}));
  EXPECT_EQ(window(arrays.tokens, 1), window(before.tokens, 1));
  EXPECT_EQ(window(arrays.status, 1), window(before.status, 1));
  EXPECT_EQ(arrays.block_start, (std::vector<int32_t>{12, before.block_start[1], 8}));
  EXPECT_EQ(arrays.denoise_step, (std::vector<int32_t>{0, 5, 0}));
  EXPECT_EQ(arrays.ended, (std::vector<uint8_t>{0, 1, 0}));
}

TEST(OpenWindows, ArFeedsTheTokenBefore) {
  ThreadPool pool(1);
  DecodeStateArrays arrays(1, 1);
  const int32_t slot = 0, start = 17, num_fresh = 1, token = 5;
  cpu::open_windows({arrays.view(), &slot, &start, &num_fresh, &token, 1, RowMode::ar}, pool);
  EXPECT_EQ(arrays.tokens, (std::vector<int32_t>{5, -1}));
  EXPECT_EQ(arrays.status, (std::vector<uint8_t>{kFresh, kAbsent}));
  EXPECT_EQ(arrays.block_start[0], 17);
}

TEST(OpenWindows, BadPlansThrow) {
  ThreadPool pool(1);
  DecodeStateArrays arrays(2, 4);
  const int32_t slot = 2, start = 0, num_fresh = 0, tokens[4] = {};
  EXPECT_THROW(cpu::open_windows(
                   {arrays.view(), &slot, &start, &num_fresh, tokens, 1, RowMode::chunk}, pool),
               std::invalid_argument);
  const int32_t good_slot = 1, too_many = 5;
  EXPECT_THROW(cpu::open_windows(
                   {arrays.view(), &good_slot, &start, &too_many, tokens, 1, RowMode::chunk}, pool),
               std::invalid_argument);
}

}  // namespace
}  // namespace optimus

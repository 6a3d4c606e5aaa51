// Starts decode windows. See OpenWindowsParams.
#include <algorithm>

#include "core/check.h"
#include "kernels/cpu/kernels.h"

namespace optimus::cpu {

void open_windows(const OpenWindowsParams& p, ThreadPool&) {
  const int length = p.state.block_length;
  for (int i = 0; i < p.num_openings; ++i) {
    const int slot = p.slots[i], num_fresh = p.num_fresh[i];
    OPTIMUS_CHECK(slot >= 0 && slot < p.state.num_slots, "[open_windows] slots must be in 0..",
                  p.state.num_slots - 1, ", got ", slot);
    OPTIMUS_CHECK(num_fresh >= 0 && num_fresh <= length, "[open_windows] num_fresh must be in 0..",
                  length, " (block_length), got ", num_fresh);
    int32_t* tokens = p.state.window_tokens + int64_t(slot) * 2 * length;
    uint8_t* status = p.state.window_status + int64_t(slot) * 2 * length;
    std::fill(tokens, tokens + 2 * length, -1);
    std::fill(status, status + length, uint8_t(kCached));
    std::fill(status + length, status + 2 * length, uint8_t(kAbsent));
    const int first = p.mode == RowMode::ar ? 0 : length;
    std::copy_n(p.tokens + int64_t(i) * length, num_fresh, tokens + first);
    std::fill_n(status + first, num_fresh, uint8_t(kFresh));
    p.state.block_start[slot] = p.block_starts[i];
    p.state.denoise_step[slot] = 0;
    p.state.ended[slot] = 0;
  }
}

}  // namespace optimus::cpu

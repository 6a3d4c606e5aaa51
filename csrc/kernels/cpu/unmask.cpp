// From logits to commits: one candidate per row, then the unmasking strategy of each request.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/check.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd.h"
#include "kernels/noise.h"

namespace optimus::cpu {
namespace {

// Moves the `count` largest to the front, in descending order.
void sort_head(std::vector<float>& values, int count) {
  auto head = values.begin() + count;
  if (head != values.end()) std::nth_element(values.begin(), head, values.end(), std::greater<>());
  std::sort(values.begin(), head, std::greater<>());
}

// Smallest scaled logit that top-k and top-p let through. Ties at the border all pass.
// top-p keeps the smallest set, by descending probability, whose mass (of the top-k set) reaches p.
template <class T>
float sampling_floor(const T* logits, int vocab_size, float scale, int top_k, float top_p,
                     const SoftmaxSums& sums, std::vector<float>& scratch) {
  const float kAll = -std::numeric_limits<float>::infinity();
  bool use_top_k = top_k > 0 && top_k < vocab_size;
  if (!use_top_k && top_p >= 1.0f) return kAll;
  scratch.resize(vocab_size);
  for (int v = 0; v < vocab_size; ++v) scratch[v] = to_float(logits[v]) * scale;
  const int keep = use_top_k ? top_k : vocab_size;
  auto weight = [&](int i) { return std::exp(double(scratch[i]) - sums.max); };
  double total = sums.sum;
  if (use_top_k) {
    sort_head(scratch, keep);
    if (top_p >= 1.0f) return scratch[keep - 1];
    total = 0;
    for (int i = 0; i < keep; ++i) total += weight(i);
  }
  // Mostly a few tokens hold the mass: sort no more of the vocabulary than that takes.
  for (int sorted = std::min(keep, 64);; sorted = std::min(keep, sorted * 8)) {
    if (!use_top_k) sort_head(scratch, sorted);
    double mass = 0;
    for (int i = 0; i < sorted; ++i) {
      mass += weight(i);
      if (mass >= double(top_p) * total) return scratch[i];
    }
    if (sorted == keep) return scratch[keep - 1];
  }
}

template <class T>
int sample_token(const T* logits, int vocab_size, float scale, float floor, uint64_t key) {
  float best = -std::numeric_limits<float>::infinity();
  int token = 0;
  for (int v = 0; v < vocab_size; ++v) {
    float x = to_float(logits[v]) * scale;
    if (x < floor) continue;
    float noisy = x + gumbel_noise(key, v);
    if (noisy > best) {
      best = noisy;
      token = v;
    }
  }
  return token;
}

template <class T>
void find_candidate(const UnmaskParams& p, int i, std::vector<float>& scratch) {
  const DecodeState& state = p.state;
  const int stride = p.logits_stride > 0 ? p.logits_stride : p.vocab_size;
  const T* logits = static_cast<const T*>(p.logits) + int64_t(i) * stride;
  int slot = p.logit_slots[i];
  const SimdKernels<T>& simd = simd_kernels<T>();
  SoftmaxSums plain = simd.softmax_sums(logits, p.vocab_size, 1.0f);
  SoftmaxSums scaled = plain;
  int token = plain.argmax;
  float scale = 1.0f;
  if (state.temperature[slot] > 0.0f) {
    scale = 1.0f / state.temperature[slot];
    scaled = simd.softmax_sums(logits, p.vocab_size, scale);
    float floor = sampling_floor(logits, p.vocab_size, scale, state.top_k[slot], state.top_p[slot],
                                 scaled, scratch);
    int32_t position = state.block_start[slot] + p.logit_offsets[i];
    token = sample_token(logits, p.vocab_size, scale, floor,
                         noise_key(state.seed[slot], position, state.denoise_step[slot]));
  }
  float logit = to_float(logits[token]);
  if (p.out.slots != nullptr) p.out.slots[i] = slot;
  if (p.out.offsets != nullptr) p.out.offsets[i] = p.logit_offsets[i];
  p.out.token_ids[i] = token;
  p.out.logprob[i] = static_cast<float>(logit - plain.max - std::log(plain.sum));
  // The fp32 product, as softmax_sums saw it: a confidence never exceeds 1.
  float scaled_logit = logit * scale;
  p.out.confidence[i] = static_cast<float>(std::exp(scaled_logit - scaled.max) / scaled.sum);
  p.out.entropy[i] = static_cast<float>(std::log(scaled.sum) - scaled.weighted_sum / scaled.sum);
}

// Rows [begin, end) of one slot, best first: highest confidence, or lowest entropy.
void order_rows(const UnmaskParams& p, int begin, int end, bool by_entropy,
                std::vector<int>& order) {
  order.resize(end - begin);
  for (int i = begin; i < end; ++i) order[i - begin] = i;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return by_entropy ? p.out.entropy[a] < p.out.entropy[b]
                      : p.out.confidence[a] > p.out.confidence[b];
  });
}

void apply_strategy(const UnmaskParams& p, int begin, int end, std::vector<int>& order) {
  const DecodeState& state = p.state;
  int slot = p.logit_slots[begin];
  int steps = state.denoising_steps[slot];
  int quota =
      state.block_length / steps + (state.denoise_step[slot] < state.block_length % steps ? 1 : 0);
  quota = std::min(std::max(quota, 1), end - begin);
  for (int i = begin; i < end; ++i) p.out.committed[i] = 0;

  switch (static_cast<UnmaskingStrategy>(state.unmasking_strategy[slot])) {
    case kSequential:
      for (int i = begin; i < begin + quota; ++i) p.out.committed[i] = 1;
      return;
    case kEntropyBounded: {
      order_rows(p, begin, end, /*by_entropy=*/true, order);
      float total = 0;
      for (size_t k = 0; k < order.size(); ++k) {
        total += p.out.entropy[order[k]];
        if (k > 0 && total > state.entropy_bound[slot]) return;
        p.out.committed[order[k]] = 1;
      }
      return;
    }
    case kLowConfidenceDynamic: {
      int above = 0;
      for (int i = begin; i < end; ++i) {
        p.out.committed[i] = p.out.confidence[i] > state.confidence_threshold[slot];
        above += p.out.committed[i];
      }
      if (above >= quota) return;
      break;
    }
    case kLowConfidenceStatic:
      break;
  }
  order_rows(p, begin, end, /*by_entropy=*/false, order);
  for (int i = begin; i < end; ++i) p.out.committed[i] = 0;
  for (int k = 0; k < quota; ++k) p.out.committed[order[k]] = 1;
}

// Whether the slot's tokens up to its first mask are all that it may have, or hold a stop token.
bool has_ended(const DecodeState& state, int slot, const int32_t* tokens, const uint8_t* status) {
  const int32_t* stops = state.stop_token_ids + int64_t(slot) * kMaxStopTokens;
  for (int i = 0; i < state.block_length; ++i) {
    const int32_t position = state.block_start[slot] + i;
    if (status[i] == kAbsent || status[i] == kPresent) return false;
    if (position < state.first_output[slot]) continue;
    if (position + 1 >= state.end_position[slot]) return true;
    if (std::find(stops, stops + kMaxStopTokens, tokens[i]) != stops + kMaxStopTokens) return true;
  }
  return false;
}

// Writes the commits into the window; a block without masks becomes the previous block.
void update_window(const UnmaskParams& p, int begin, int end) {
  const DecodeState& state = p.state;
  const int block_length = state.block_length;
  int slot = p.logit_slots[begin];
  int32_t* tokens = state.window_tokens + int64_t(slot) * 2 * block_length;
  uint8_t* status = state.window_status + int64_t(slot) * 2 * block_length;
  for (int i = begin; i < end; ++i) {
    if (!p.out.committed[i]) continue;
    tokens[block_length + p.logit_offsets[i]] = p.out.token_ids[i];
    status[block_length + p.logit_offsets[i]] = kFresh;
  }
  state.ended[slot] = has_ended(state, slot, tokens + block_length, status + block_length);
  state.denoise_step[slot] += 1;
  auto count = [&](int first, int last, auto&& predicate) {
    return static_cast<int>(std::count_if(status + first, status + last, predicate));
  };
  auto is_masked = [](uint8_t s) { return s == kAbsent || s == kPresent; };
  if (count(block_length, 2 * block_length, is_masked) == 0) {
    std::copy(tokens + block_length, tokens + 2 * block_length, tokens);
    std::copy(status + block_length, status + 2 * block_length, status);
    std::fill(tokens + block_length, tokens + 2 * block_length, -1);
    std::fill(status + block_length, status + 2 * block_length, uint8_t(kAbsent));
    state.block_start[slot] += block_length;
    state.denoise_step[slot] = 0;
  }
  p.num_fresh[slot] = count(0, 2 * block_length, [](uint8_t s) { return s == kFresh; });
  p.num_masked[slot] = count(block_length, 2 * block_length, is_masked);
}

int count_rows(const UnmaskParams& p) {
  int num_rows = p.num_logit_rows;
  if (p.num_logit_rows_device != nullptr) num_rows = std::min(num_rows, *p.num_logit_rows_device);
  while (num_rows > 0 && p.logit_slots[num_rows - 1] < 0) --num_rows;  // padding
  return num_rows;
}

}  // namespace

void unmask(const UnmaskParams& p, ThreadPool& threads) {
  OPTIMUS_CHECK(p.vocab_size > 0, "[unmask] vocab_size must be positive, got ", p.vocab_size);
  OPTIMUS_CHECK(p.logits_stride == 0 || p.logits_stride >= p.vocab_size,
                "[unmask] logits_stride must be 0 or at least vocab_size ", p.vocab_size, ", got ",
                p.logits_stride);
  const int num_rows = count_rows(p);
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    threads.parallel_for(num_rows, 4, [&](int64_t begin, int64_t end) {
      static thread_local std::vector<float> scratch;
      for (int64_t i = begin; i < end; ++i) find_candidate<T>(p, static_cast<int>(i), scratch);
    });
  });
  commit_candidates(p);
}

void commit_candidates(const UnmaskParams& p) {
  const int num_rows = count_rows(p);
  static thread_local std::vector<int> order;
  for (int begin = 0; begin < num_rows;) {
    int end = begin + 1;
    while (end < num_rows && p.logit_slots[end] == p.logit_slots[begin]) ++end;
    apply_strategy(p, begin, end, order);
    update_window(p, begin, end);
    begin = end;
  }
}

}  // namespace optimus::cpu

#include "engine/request.h"

#include "core/check.h"

namespace optimus {

void validate(const SamplingParams& p) {
  // Below the range, logits / temperature overflows fp32 and the order of tokens is lost; above, what
  // is no logit at all would be as likely as the best one.
  constexpr float kLowest = 1e-4f, kHighest = 1e6f;
  const bool is_greedy = p.temperature == 0;
  OPTIMUS_CHECK(is_greedy || (p.temperature >= kLowest && p.temperature <= kHighest),
                "[sampling_params] temperature must be 0 (greedy) or in [0.0001, 1000000], got ",
                p.temperature);
  OPTIMUS_CHECK(p.top_k >= 0, "[sampling_params] top_k must be >= 0, got ", p.top_k);
  OPTIMUS_CHECK(p.top_p > 0 && p.top_p <= 1, "[sampling_params] top_p must be in (0, 1], got ",
                p.top_p);
  OPTIMUS_CHECK(p.confidence_threshold >= 0 && p.confidence_threshold <= 1,
                "[sampling_params] confidence_threshold must be in [0, 1], got ",
                p.confidence_threshold);
  OPTIMUS_CHECK(p.entropy_bound >= 0, "[sampling_params] entropy_bound must be >= 0, got ",
                p.entropy_bound);
  OPTIMUS_CHECK(p.denoising_steps >= 0, "[sampling_params] denoising_steps must be >= 0, got ",
                p.denoising_steps);
  OPTIMUS_CHECK(p.max_tokens == -1 || p.max_tokens >= 1,
                "[sampling_params] max_tokens must be at least 1, got ", p.max_tokens);
}

}  // namespace optimus

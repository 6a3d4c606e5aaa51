#include "engine/simulator.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"
#include "kernels/cpu/kernels.h"

namespace optimus {
namespace {

constexpr int kVocabSize = 1 << 30;  // prompts count up, so that no two share a prefix
constexpr int kMaskTokenId = 0;

EngineConfig resolve(EngineConfig config) {
  OPTIMUS_CHECK(config.decode_mode != DecodeMode::ar || config.block_length >= 1,
                "[simulator] block_length must be at least 1");
  if (config.row_mode() != RowMode::chunk) config.kv_policy = KvPolicy::refresh;
  config.eos_token_ids.clear();
  return config;
}

}  // namespace

Simulator::Simulator(const SimulatorConfig& config, std::vector<CommitTrace> traces)
    : config_(config),
      traces_(std::move(traces)),
      core_(resolve(config.engine), kVocabSize),
      buffers_(core_.config(), core_.scheduler().pages_for(core_.config().max_model_len)),
      threads_(1),
      random_(config.seed) {
  OPTIMUS_CHECK(!traces_.empty(), "[simulator] needs at least one trace");
  for (const CommitTrace& trace : traces_) trace.validate();
  config_.latency.validate();
  OPTIMUS_CHECK(!config_.latency.decode.empty(), "[simulator] needs a latency curve");
  const auto check = [](const char* name, double value, double most) {
    OPTIMUS_CHECK(value >= 0 && value <= most, "[simulator] ", name, " must be between 0 and ",
                  most, ", got ", value);
  };
  check("host_ms", config_.host_ms, 1e6);
  check("jitter", config_.jitter, 2);
  check("outlier_share", config_.outlier_share, 1);
  check("outlier_factor", config_.outlier_factor, 1e6);
  if (!config_.without_profile) {
    core_.latency().set_profile(config_.profile.decode.empty() ? config_.latency : config_.profile);
  }
}

uint64_t Simulator::add_request(double arrival_s, int prompt_len, int trace,
                                SamplingParams params) {
  OPTIMUS_CHECK(std::isfinite(arrival_s) && arrival_s >= last_arrival_s_,
                "[simulator] arrivals must not descend, got ", arrival_s, " after ",
                last_arrival_s_);
  OPTIMUS_CHECK(trace >= 0 && trace < static_cast<int>(traces_.size()),
                "[simulator] trace must be in [0, ", traces_.size(), "), got ", trace);
  OPTIMUS_CHECK(prompt_len >= 1, "[simulator] prompt_len must be at least 1, got ", prompt_len);
  last_arrival_s_ = arrival_s;
  // The core numbers requests in the order in which they are added, and so do we.
  const uint64_t id = ++num_added_;
  std::vector<int32_t> prompt(prompt_len, static_cast<int32_t>(id % (kVocabSize - 1)) + 1);
  trace_of_[id] = trace;
  arrivals_.push_back({arrival_s, id, std::move(prompt), std::move(params)});
  return id;
}

void Simulator::admit_arrivals() {
  while (!arrivals_.empty() && arrivals_.front().arrival_s <= now_s_) {
    Arrival arrival = std::move(arrivals_.front());
    arrivals_.pop_front();
    const uint64_t id =
        core_.add_request(std::move(arrival.prompt), arrival.params, arrival.arrival_s);
    OPTIMUS_INVARIANT(id == arrival.id, "request ", arrival.id, " became ", id);
  }
}

// Candidates of the step's mask rows, as the model would have found them.
void Simulator::fill_confidences(const StepPlan& plan) {
  const StepRows& rows = buffers_.rows();
  const Candidates& out = buffers_.candidates();
  const int num_logit_rows = buffers_.num_logit_rows();
  int row = 0;
  for (const SeqPlan& seq : plan.seqs) {
    if (seq.prefill_len > 0) continue;
    const Request& request = *seq.request;
    const CommitTrace& trace = traces_[trace_of_.at(request.id)];
    int first_mask = -1;
    for (; row < num_logit_rows && rows.logit_slots[row] == request.slot; ++row) {
      const int position = request.block_start + rows.logit_offsets[row];
      const int idx = std::max(position - request.prompt_len(), 0);
      if (first_mask < 0) first_mask = idx;
      out.token_ids[row] = 1;
      out.confidence[row] = trace.confidence(first_mask, idx);
      out.logprob[row] = std::log(std::max(out.confidence[row], 1e-9f));
      out.entropy[row] = -out.logprob[row];
    }
  }
}

// Rows without which the same tokens could not have been committed: prompts, new tokens fed once more,
// and masks that did commit; nothing behind a request's last token.
int Simulator::count_needed(const StepPlan& plan) const {
  const StepRows& rows = buffers_.rows();
  int needed = 0, logit_row = 0;
  for (size_t s = 0; s < plan.seqs.size(); ++s) {
    const int end = plan.seqs[s].request->max_len();
    for (int row = rows.cu_seqlens_q[s]; row < rows.cu_seqlens_q[s + 1]; ++row) {
      const bool is_mask =
          logit_row < buffers_.num_logit_rows() && rows.logit_rows[logit_row] == row;
      const bool commits = is_mask && buffers_.candidates().committed[logit_row];
      logit_row += is_mask;
      needed += rows.positions[row] < end && (commits || !is_mask);
    }
  }
  return needed;
}

double Simulator::step_ms(const StepLoad& load) {
  double ms = config_.latency.ms(load);
  for (const auto& [from_s, factor] : config_.slowdowns) {
    if (now_s_ >= from_s) ms *= factor;
  }
  if (config_.jitter > 0) ms *= std::exp(std::normal_distribution<>(0, config_.jitter)(random_));
  if (std::uniform_real_distribution<>()(random_) < config_.outlier_share) {
    ms *= config_.outlier_factor;
  }
  return ms;
}

bool Simulator::step() {
  admit_arrivals();
  if (!core_.has_unfinished()) {
    if (arrivals_.empty()) return false;
    now_s_ = arrivals_.front().arrival_s;
    admit_arrivals();
  }
  const StepPlan& plan = core_.plan(now_s_);
  OPTIMUS_INVARIANT(!plan.seqs.empty(), "an empty plan with requests left");
  buffers_.write_plan(plan);
  cpu::open_windows(buffers_.open_windows_params(), threads_);
  cpu::build_rows(buffers_.build_rows_params(kMaskTokenId), threads_);
  fill_confidences(plan);
  cpu::commit_candidates(buffers_.unmask_params(nullptr, ModelConfig{}, buffers_.num_logit_rows()));
  const StepResult result = buffers_.result(buffers_.num_rows(), buffers_.num_logit_rows());
  StepLoad load = plan.load();
  load.rows = result.num_rows;
  const double ms = step_ms(load);
  now_s_ += (ms + config_.host_ms) * 1e-3;
  StepLoad needed = load;
  needed.rows = std::max(1, count_needed(plan));
  needed_rows_ += needed.rows;
  const double share = config_.latency.ms(needed) / config_.latency.ms(load);
  spared_s_ += std::max(0.0, 1 - share) * ms * 1e-3;  // more rows may take less time
  const StepOutput output = core_.update(result, ms, now_s_);
  for (const RequestUpdate& update : output.updates) {
    if (update.finish_reason == FinishReason::none) continue;
    const Request& request = core_.request(update.id);
    finished_.push_back({request.id, request.prompt_len(), static_cast<int>(request.output.size()),
                         request.metrics});
    core_.release(update.id);
    trace_of_.erase(update.id);
  }
  return true;
}

std::vector<SimulatedRequest> Simulator::take_finished() { return std::exchange(finished_, {}); }

int64_t Simulator::run(double until_s, int64_t max_steps) {
  int64_t steps = 0;
  while (steps < max_steps && now_s_ < until_s && step()) ++steps;
  return steps;
}

}  // namespace optimus

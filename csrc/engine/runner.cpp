#include "engine/runner.h"

#include <algorithm>
#include <chrono>
#include <tuple>
#include <utility>

#include "core/check.h"

namespace optimus {
namespace {

constexpr int kMostPaddedRows = 1024;  // beyond, launches hide behind the kernels

double now_ms() {
  return std::chrono::duration<double, std::milli>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Dense where steps are short and rows cost little, and as fine as GEMM tiles where they cost.
std::vector<int> choose_padded_rows(int max_rows) {
  const int most = std::min(max_rows, kMostPaddedRows);
  std::vector<int> sizes;
  for (int rows = 1; rows < most; rows += rows < 8     ? rows
                                          : rows < 32  ? 8
                                          : rows < 256 ? 16
                                          : rows < 512 ? 64
                                                       : 128) {
    sizes.push_back(rows);
  }
  sizes.push_back(most);
  return sizes;
}

// What kernels take on CUDA.
void validate_for_cuda(const EngineConfig& config) {
  constexpr int kMostSeqs = 1024;
  const int page_size = config.page_size;
  OPTIMUS_CHECK(page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128,
                "[engine] on CUDA page_size must be 16, 32, 64 or 128, got ", page_size);
  OPTIMUS_CHECK(config.max_num_seqs <= kMostSeqs, "[engine] on CUDA max_num_seqs must be at most ",
                kMostSeqs, ", got ", config.max_num_seqs);
  OPTIMUS_CHECK(config.gpu_memory_utilization > 0 && config.gpu_memory_utilization <= 1,
                "[engine] gpu_memory_utilization must be in (0, 1], got ",
                config.gpu_memory_utilization);
}

// Everything else is allocated.
int choose_num_pages(const EngineConfig& config, const Model& model) {
  if (config.num_pages > 0) return config.num_pages;
  OPTIMUS_CHECK(model.device() == Device::cuda, "[engine] num_pages must be at least 1, got 0");
  const DeviceMemoryInfo memory = cuda_memory();
  const size_t page_bytes = KvCache::page_bytes(model.config(), config.page_size);
  const double kept_free = (1 - config.gpu_memory_utilization) * static_cast<double>(memory.total);
  const double room = static_cast<double>(memory.free) - kept_free;
  const int needed = config.pages_for(config.max_model_len);
  const double num_pages = std::min(room / static_cast<double>(page_bytes), double(1 << 24));
  OPTIMUS_CHECK(num_pages >= needed, "[engine] the GPU has ", memory.free, " of ", memory.total,
                " bytes free; with gpu_memory_utilization ", config.gpu_memory_utilization,
                " that is not enough for the ", needed, " pages of ", page_bytes,
                " bytes that one request of max_model_len ", config.max_model_len, " needs");
  return static_cast<int>(num_pages);
}

}  // namespace

Runner::Runner(const Model& model, const EngineConfig& config)
    : model_(model),
      config_(config),
      threads_(model.device() == Device::cpu ? config.num_threads : 1),
      stream_(model.device()),
      copies_(model.device()),
      plan_copied_(model.device()),
      results_copied_(model.device()),
      marks_{Marks(model.device()), Marks(model.device()), Marks(model.device())},
      execution_{model.device(), &threads_, stream_.handle()},
      activations_(model.config(), config.max_num_batched_rows, config.max_num_seqs,
                   model.device()),
      buffers_(config, config.pages_for(config.max_model_len), model.device()),
      unmask_workspace_(
          model.device() == Device::cpu
              ? 0
              : unmask_workspace_bytes(config.max_num_batched_rows, model.config().vocab_size),
          model.device()),
      kv_cache_(model.config(), choose_num_pages(config, model), config.page_size, model.device()) {
  config_.num_pages = kv_cache_.num_pages;
  if (device() == Device::cpu) return;
  validate_for_cuda(config);
  padded_rows_ = choose_padded_rows(config.max_num_batched_rows);
  buffers_.upload_all(stream_);
  capture_graphs();
}

Runner::~Runner() {
  try {
    copies_.synchronize();
    stream_.synchronize();
  } catch (const std::exception&) {  // whoever waited for the step has had the error
  }
}

void Runner::capture_graphs() {
  for (int rows : padded_rows_) model_.plan(rows, activations_, execution_);
  if (!config_.cuda_graphs) return;
  for (int rows : padded_rows_) {
    const Shape shape = shape_of(rows, 1, rows);
    // Once without: kernels are loaded when they are first launched, which cannot be captured.
    forward_rows(shape);
    stream_.synchronize();
    const size_t free_before = cuda_memory().free;
    const double start_ms = now_ms();
    graphs_.emplace_back(stream_, [&] { forward_rows(shape); });
    const double capture_ms = now_ms() - start_ms;
    const size_t free_after = cuda_memory().free;
    captured_.push_back({rows, capture_ms, free_before - std::min(free_before, free_after)});
  }
  // The first launch uploads a graph.
  for (Graph& graph : graphs_) graph.launch(stream_);
  stream_.synchronize();
}

size_t Runner::graph_bytes() const {
  size_t total = 0;
  for (const CapturedGraph& graph : captured_) total += graph.bytes;
  return total;
}

Runner::Shape Runner::shape_of(int rows, int seqs, int logit_rows) const {
  const auto padded =
      std::lower_bound(padded_rows_.begin(), padded_rows_.end(), std::max(rows, seqs));
  if (padded == padded_rows_.end() || logit_rows == 0) return {rows, seqs, logit_rows, -1};
  return {*padded, std::min(*padded, config_.max_num_seqs), *padded,
          static_cast<int>(padded - padded_rows_.begin())};
}

// With logits rows: to the commits.
void Runner::forward_rows(const Shape& shape) {
  const StepRows& rows = buffers_.rows();
  ForwardBatch batch{rows.token_ids,
                     rows.positions,
                     rows.kv_limits,
                     rows.kv_slots,
                     rows.cu_seqlens_q,
                     rows.page_table,
                     rows.logit_rows,
                     shape.rows,
                     shape.seqs,
                     shape.logit_rows,
                     buffers_.state().page_table_stride};
  model_.forward(batch, kv_cache_, activations_, execution_);
  if (shape.logit_rows == 0) return;
  UnmaskParams params =
      buffers_.unmask_params(activations_.logits.data(), model_.config(), shape.logit_rows);
  params.workspace = unmask_workspace_.data();
  params.workspace_bytes = unmask_workspace_.size();
  unmask(params, execution_);
}

void Runner::launch(const Shape& shape) {
  if (shape.graph >= 0 && !graphs_.empty()) {
    graphs_[shape.graph].launch(stream_);
  } else {
    forward_rows(shape);
  }
}

// Ahead of the end of a step that reads the same memory, the host's part of the decode state. But for
// the page tables, which build_rows alone reads, only windows that open change it: without them the
// same values are written again.
void Runner::upload(const StepPlan& plan) {
  if (!plan.is_ahead || buffers_.num_openings() > 0) return buffers_.upload(stream_);
  copies_.wait(marks_of(turn_).rows_made);
  buffers_.upload(copies_);
  plan_copied_.record(copies_);
  stream_.wait(plan_copied_);
}

void Runner::start(const StepPlan& plan) {
  OPTIMUS_INVARIANT(plan.is_ahead ? step_ && !ahead_ : !step_, "a step started out of turn");
  if (step_) buffers_.wait_for_counts(stream_);  // its plan is on the device
  buffers_.write_plan(plan);
  const Step step{static_cast<int>(plan.seqs.size()), plan.most_rows, buffers_.most_logit_rows()};
  upload(plan);
  if (buffers_.num_openings() > 0) open_windows(buffers_.open_windows_params(), execution_);
  // As many as any graph of this many rows or fewer reads.
  const int most_padded = padded_rows_.empty() || step.logit_rows == 0 ? 0 : padded_rows_.back();
  const Shape shape = shape_of(std::min(step.rows, most_padded), step.seqs, step.logit_rows);
  const bool padded = shape.graph >= 0;
  build_rows(buffers_.build_rows_params(model_.config().mask_token_id, padded ? shape.rows : 0,
                                        padded ? shape.seqs : 0),
             execution_);
  marks_of(plan.is_ahead ? turn_ + 1 : turn_).rows_made.record(stream_);
  if (plan.is_ahead) {
    ahead_ = step;
    fetch(*step_);
    stream_.wait(results_copied_);  // the step ahead writes its own there
  } else {
    step_ = step;
    run(step);
    if (!config_.async_scheduling) fetch(step);  // nothing comes in between
  }
}

// The step whose turn it is. On the CPU it is done then, and the next one's rows would overwrite it.
void Runner::run(const Step& step) {
  StreamTimer& timer = marks_of(turn_).forward;
  timer.start(stream_);
  if (step.rows > 0) launch(shape_of(step.rows, step.seqs, step.logit_rows));
  timer.stop(stream_);
  if (device() == Device::cpu) {
    kept_[turn_ % 2].keep(buffers_.result(step.rows, step.logit_rows), config_.max_num_seqs);
  }
}

// Beside the next step's rows, if those may already be on their way.
void Runner::fetch(const Step& step) {
  Stream& stream = config_.async_scheduling ? copies_ : stream_;
  if (config_.async_scheduling) copies_.wait(marks_of(turn_).forward.stopped());
  buffers_.download(stream, step.logit_rows);
  results_copied_.record(stream);
}

StepResult Runner::finish() {
  OPTIMUS_INVARIANT(step_.has_value(), "no step to finish");
  const Step done = *step_;
  KeptResult& kept = kept_[turn_ % 2];
  if (ahead_) {
    std::tie(ahead_->rows, ahead_->logit_rows) = buffers_.wait_for_counts(stream_);
  } else {
    if (config_.async_scheduling) fetch(done);
    results_copied_.synchronize();
    OPTIMUS_INVARIANT(
        buffers_.num_rows() == done.rows && buffers_.num_logit_rows() == done.logit_rows,
        "a step of ", buffers_.num_rows(), " rows, ", buffers_.num_logit_rows(),
        " of them with logits, was planned with ", done.rows, " and ", done.logit_rows);
  }
  step_ = std::exchange(ahead_, std::nullopt);
  ++turn_;
  if (step_) run(*step_);
  if (device() == Device::cpu) return kept.view();
  results_copied_.synchronize();
  return buffers_.result(done.rows, done.logit_rows);
}

void Runner::forget_steps() noexcept {
  try {
    copies_.synchronize();
    stream_.synchronize();
  } catch (const std::exception&) {  // what is thrown already says it
  }
  step_.reset();
  ahead_.reset();
}

}  // namespace optimus

// Rows that no plan made: the forward pass as a function, and what steps of any size cost.
#include <algorithm>
#include <optional>

#include "core/check.h"
#include "engine/runner.h"

namespace optimus {
namespace {

// Of one sequence.
void check_pages(std::vector<int32_t> page_ids, int num_pages) {
  for (int32_t page : page_ids) {
    OPTIMUS_CHECK(page >= 0 && page < num_pages, "[forward] page ids must be below ", num_pages,
                  ", got ", page);
  }
  std::sort(page_ids.begin(), page_ids.end());
  const auto twice = std::adjacent_find(page_ids.begin(), page_ids.end());
  OPTIMUS_CHECK(twice == page_ids.end(), "[forward] page ids must differ, got ", *twice, " twice");
}

}  // namespace

void Runner::check_rows(const std::vector<int32_t>& token_ids,
                        const std::vector<int32_t>& positions,
                        const std::vector<int32_t>& kv_limits, int num_pages) const {
  const int rows = static_cast<int>(token_ids.size()), vocab_size = model_.config().vocab_size;
  const int page_size = config_.page_size, capacity = num_pages * page_size;
  OPTIMUS_CHECK(rows > 0 && rows <= config_.max_num_batched_rows,
                "[forward] rows must be between 1 and max_num_batched_rows ",
                config_.max_num_batched_rows, ", got ", rows);
  for (int i = 0; i < rows; ++i) {
    OPTIMUS_CHECK(token_ids[i] >= 0 && token_ids[i] < vocab_size,
                  "[forward] token ids must be below vocab_size ", vocab_size, ", got ",
                  token_ids[i]);
    OPTIMUS_CHECK(positions[i] >= 0 && positions[i] < capacity && kv_limits[i] >= 1 &&
                      kv_limits[i] <= capacity,
                  "[forward] positions and kv_limits must lie in ", num_pages, " pages of ",
                  page_size, ", got position ", positions[i], " and kv_limit ", kv_limits[i]);
    OPTIMUS_CHECK(positions[i] >= positions[0],
                  "[forward] no position may lie before the first row's, ", positions[0], ", got ",
                  positions[i]);
    OPTIMUS_CHECK(i == 0 || kv_limits[i] >= kv_limits[i - 1],
                  "[forward] kv_limits must not decrease, got ", kv_limits[i - 1], " and then ",
                  kv_limits[i]);
  }
}

std::vector<float> Runner::forward(const std::vector<int32_t>& token_ids,
                                   const std::vector<int32_t>& positions,
                                   const std::vector<int32_t>& kv_limits,
                                   const std::vector<int32_t>& page_ids) {
  const int rows = static_cast<int>(token_ids.size()), page_size = config_.page_size;
  OPTIMUS_CHECK(positions.size() == token_ids.size() && kv_limits.size() == token_ids.size(),
                "[forward] token_ids, positions and kv_limits must have one length, got ", rows,
                ", ", positions.size(), ", ", kv_limits.size());
  OPTIMUS_CHECK(static_cast<int>(page_ids.size()) <= buffers_.state().page_table_stride,
                "[forward] at most ", buffers_.state().page_table_stride, " pages, got ",
                page_ids.size());
  check_pages(page_ids, config_.num_pages);
  check_rows(token_ids, positions, kv_limits, static_cast<int>(page_ids.size()));
  HostRows step;
  for (int i = 0; i < rows; ++i) {
    step.kv_slots.push_back(page_ids[positions[i] / page_size] * page_size +
                            positions[i] % page_size);
    step.logit_rows.push_back(i);
  }
  step.token_ids = token_ids;
  step.positions = positions;
  step.kv_limits = kv_limits;
  step.cu_seqlens_q = {0, rows};
  step.page_table = page_ids;
  buffers_.write_rows(step);
  forward_rows({rows, 1, rows, -1});
  stream_.synchronize();

  const size_t count = size_t(rows) * model_.config().vocab_size;
  std::vector<float> logits(count);
  dispatch_dtype(model_.config().dtype, [&](auto element) {
    std::vector<decltype(element)> raw(count);
    copy_memory(raw.data(), activations_.logits.data(), count * sizeof(element), device());
    for (size_t i = 0; i < count; ++i) logits[i] = to_float(raw[i]);
  });
  return logits;
}

double Runner::time_forward(int num_rows, const std::vector<int>& contexts, bool with_logits,
                            const std::vector<int32_t>& page_ids) {
  const int page_size = config_.page_size, stride = buffers_.state().page_table_stride;
  const int num_seqs = static_cast<int>(contexts.size());
  const int most_rows = (num_rows + num_seqs - 1) / num_seqs;  // of a sequence
  const Shape shape = shape_of(num_rows, num_seqs, with_logits ? num_rows : 0);
  HostRows step;
  const auto add_row = [&step](int token, int position, int kv_limit, int kv_slot, int logit_row) {
    step.token_ids.push_back(token);
    step.positions.push_back(position);
    step.kv_limits.push_back(kv_limit);
    step.kv_slots.push_back(kv_slot);
    step.logit_rows.push_back(logit_row);
  };
  size_t first_page = 0;  // of the sequence
  for (int s = 0; s < num_seqs; ++s) {
    const int context = contexts[s];
    const int num_pages = std::min<int>(
        {(std::max(context, most_rows) + page_size - 1) / page_size, stride, int(page_ids.size())});
    const auto page_of = [&](int i) { return page_ids[(first_page + i) % page_ids.size()]; };
    const int begin = static_cast<int>(int64_t(num_rows) * s / num_seqs);
    const int end = static_cast<int>(int64_t(num_rows) * (s + 1) / num_seqs);
    step.cu_seqlens_q.push_back(begin);
    for (int i = begin; i < end; ++i) {
      const int position =
          (std::max(0, context - (end - begin)) + i - begin) % (num_pages * page_size);
      add_row((i * 7919) % model_.config().vocab_size, position, context,
              page_of(position / page_size) * page_size + position % page_size, i);
    }
    for (int i = 0; i < stride; ++i) step.page_table.push_back(i < num_pages ? page_of(i) : 0);
    first_page += num_pages;
  }
  for (int i = num_rows; i < shape.rows; ++i) add_row(0, 0, 1, -1, 0);
  for (int s = num_seqs; s <= shape.seqs; ++s) step.cu_seqlens_q.push_back(num_rows);
  if (with_logits) {
    // The rows of a slot as unmask expects them: no more than its block.
    const int of_slot = std::min(most_rows, config_.grid());
    const int count =
        static_cast<int>(std::min<int64_t>(num_rows, int64_t(of_slot) * config_.max_num_seqs));
    for (int i = 0; i < count; ++i) {
      step.logit_slots.push_back(i / of_slot);
      step.logit_offsets.push_back(i % of_slot);
    }
  }
  buffers_.write_rows(step);
  StreamTimer timer(device());
  timer.start(stream_);
  launch(shape);
  timer.stop(stream_);
  stream_.synchronize();
  return timer.ms();
}

double Runner::time_gemms(int rows, int repeats) {
  const auto run = [&] { model_.run_gemms(rows, activations_, execution_); };
  run();
  stream_.synchronize();
  std::optional<Graph> graph;
  if (device() == Device::cuda) graph.emplace(stream_, run);
  std::vector<double> times;
  StreamTimer timer(device());
  for (int i = 0; i < repeats; ++i) {
    timer.start(stream_);
    graph ? graph->launch(stream_) : run();
    timer.stop(stream_);
    stream_.synchronize();
    times.push_back(timer.ms());
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[repeats / 2];
}

}  // namespace optimus

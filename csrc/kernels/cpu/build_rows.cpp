// Expands the plan of a step into rows. See BuildRowsParams for the rules.
#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "kernels/cpu/kernels.h"

namespace optimus::cpu {
namespace {

// Appends rows and keeps the counters; one instance per call.
struct RowWriter {
  const BuildRowsParams& p;
  int rows = 0;
  int logit_rows = 0;

  int add_row(int slot, int32_t token, int32_t position, int32_t kv_limit) {
    OPTIMUS_CHECK(rows < p.max_rows, "[build_rows] the plan needs more than max_rows ", p.max_rows,
                  " rows");
    const int32_t* pages = p.state.page_table + int64_t(slot) * p.state.page_table_stride;
    p.rows.token_ids[rows] = token;
    p.rows.positions[rows] = position;
    p.rows.kv_limits[rows] = kv_limit;
    p.rows.kv_slots[rows] = pages[position / p.page_size] * p.page_size + position % p.page_size;
    return rows++;
  }

  void add_logit_row(int row, int slot, int32_t offset) {
    p.rows.logit_rows[logit_rows] = row;
    p.rows.logit_slots[logit_rows] = slot;
    p.rows.logit_offsets[logit_rows] = offset;
    ++logit_rows;
  }
};

void build_prefill(RowWriter& writer, int seq, int slot) {
  const BuildRowsParams& p = writer.p;
  const int block_length = p.state.block_length;
  const int32_t* tokens = p.prefill_tokens + p.prefill_offsets[seq];
  for (int i = 0; i < p.prefill_lens[seq]; ++i) {
    int32_t position = p.prefill_starts[seq] + i;
    int32_t kv_limit =
        p.prefill_causal ? position + 1 : (position / block_length + 1) * block_length;
    writer.add_row(slot, tokens[i], position, kv_limit);
  }
}

// The row of the last known token predicts the next position.
void build_ar(RowWriter& writer, int slot, int32_t* tokens, uint8_t* status) {
  int32_t start = writer.p.state.block_start[slot];
  int row = writer.add_row(slot, tokens[0], start - 1, start);
  status[0] = kCached;
  writer.add_logit_row(row, slot, 0);
}

bool any_fresh(const uint8_t* status, int count) {
  return std::any_of(status, status + count, [](uint8_t s) { return s == kFresh; });
}

// The previous block: positions whose KV still comes from a MASK input, or, refreshed, all of them.
void build_previous_block(RowWriter& writer, int seq, int slot, const int32_t* tokens,
                          uint8_t* status) {
  const BuildRowsParams& p = writer.p;
  const int block_length = p.state.block_length;
  if (!any_fresh(status, block_length)) return;
  int32_t start = p.state.block_start[slot];
  for (int i = 0; i < block_length; ++i) {
    if (status[i] != kFresh && !p.refresh[seq]) continue;
    writer.add_row(slot, tokens[i], start - block_length + i, start);
    status[i] = kCached;
  }
}

// Marks which positions of the current block become rows; returns the number of present positions.
// Masks enter in order, so absent positions always lie behind every present or known one.
int select_positions(const BuildRowsParams& p, int chunk_length, const uint8_t* status,
                     bool* is_row) {
  const int block_length = p.state.block_length;
  int masks_left = chunk_length;
  int num_present = 0;
  for (int i = 0; i < block_length; ++i) {
    bool masked = status[i] == kAbsent || status[i] == kPresent;
    is_row[i] = p.mode == RowMode::block || status[i] == kFresh || (masked && masks_left > 0);
    if (masked) --masks_left;
    if (is_row[i] || status[i] != kAbsent) num_present = i + 1;
  }
  return num_present;
}

void build_current_block(RowWriter& writer, int seq, int slot, int32_t* tokens, uint8_t* status) {
  const BuildRowsParams& p = writer.p;
  const int block_length = p.state.block_length;
  OPTIMUS_CHECK(block_length <= kMaxBlockLength,
                "[build_rows] block_length must be <= ", kMaxBlockLength, ", got ", block_length);
  bool is_row[kMaxBlockLength];
  int num_present = select_positions(p, p.chunk_lengths[seq], status, is_row);
  int32_t start = p.state.block_start[slot];
  for (int i = 0; i < block_length; ++i) {
    if (!is_row[i]) continue;
    bool masked = status[i] == kAbsent || status[i] == kPresent;
    int row =
        writer.add_row(slot, masked ? p.mask_token_id : tokens[i], start + i, start + num_present);
    if (masked) {
      status[i] = kPresent;
      writer.add_logit_row(row, slot, i);
    } else if (p.mode == RowMode::chunk) {
      status[i] = kCached;
    }
  }
}

// Rows of no sequence, and sequences of no rows, for the buckets of a captured graph.
void add_padding(const BuildRowsParams& p, int rows, int logit_rows) {
  if (p.pad_rows_to > 0) {
    OPTIMUS_CHECK(p.pad_rows_to <= p.max_rows, "[build_rows] pad_rows_to must be in 0..",
                  p.max_rows, " (max_rows), got ", p.pad_rows_to);
  }
  for (int i = rows; i < p.pad_rows_to; ++i) {
    p.rows.token_ids[i] = 0;
    p.rows.positions[i] = 0;
    p.rows.kv_limits[i] = 1;
    p.rows.kv_slots[i] = -1;
  }
  for (int i = logit_rows; i < p.pad_rows_to; ++i) {
    p.rows.logit_rows[i] = 0;
    p.rows.logit_slots[i] = -1;
    p.rows.logit_offsets[i] = 0;
  }
  const int stride = p.state.page_table_stride;
  for (int seq = p.num_seqs; seq < p.pad_seqs_to; ++seq) {
    p.rows.cu_seqlens_q[seq + 1] = rows;
    std::fill_n(p.rows.page_table + int64_t(seq) * stride, stride, 0);
  }
}

}  // namespace

void build_rows(const BuildRowsParams& p, ThreadPool&) {
  const int block_length = p.state.block_length;
  RowWriter writer{p};
  p.rows.cu_seqlens_q[0] = 0;
  for (int seq = 0; seq < p.num_seqs; ++seq) {
    int slot = p.slots[seq];
    int32_t* tokens = p.state.window_tokens + int64_t(slot) * 2 * block_length;
    uint8_t* status = p.state.window_status + int64_t(slot) * 2 * block_length;
    if (p.prefill_lens[seq] > 0) {
      build_prefill(writer, seq, slot);
    } else if (p.state.ended[slot]) {
      // nothing
    } else if (p.mode == RowMode::ar) {
      build_ar(writer, slot, tokens, status);
    } else {
      build_previous_block(writer, seq, slot, tokens, status);
      build_current_block(writer, seq, slot, tokens + block_length, status + block_length);
    }
    p.rows.cu_seqlens_q[seq + 1] = writer.rows;
    std::memcpy(p.rows.page_table + int64_t(seq) * p.state.page_table_stride,
                p.state.page_table + int64_t(slot) * p.state.page_table_stride,
                sizeof(int32_t) * p.state.page_table_stride);
  }
  add_padding(p, writer.rows, writer.logit_rows);
  p.rows.counts[0] = writer.rows;
  p.rows.counts[1] = writer.logit_rows;
}

}  // namespace optimus::cpu

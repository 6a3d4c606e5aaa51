// build_rows against a slow re-implementation of the rules in ops.h over maps and sets: every valid
// window of a small block, then random windows, page tables and mixed batches in every mode.
#include <map>
#include <set>

#include "kernels/cpu/kernels.h"
#include "kernels/decode_state.h"

namespace optimus {
namespace {

using namespace testing;

constexpr int32_t kPoison = -77;
constexpr int32_t kMaskTokenId = 999;

struct Row {
  int32_t token, position, kv_limit, kv_slot;
  int32_t logit_offset;  // kPoison: no logits row

  bool operator==(const Row& other) const {
    return token == other.token && position == other.position && kv_limit == other.kv_limit &&
           kv_slot == other.kv_slot && logit_offset == other.logit_offset;
  }
};
void PrintTo(const Row& row, std::ostream* out) {
  *out << "{token " << row.token << " at " << row.position << ", limit " << row.kv_limit
       << ", kv slot " << row.kv_slot << ", logits of offset " << row.logit_offset << "}";
}

struct Sequence {
  int slot = 0;
  int chunk_length = 0;
  bool refresh = false;
  std::vector<int32_t> prompt;  // not empty: a prefill slice
  int prompt_start = 0;
};

struct Problem {
  RowMode mode = RowMode::chunk;
  DecodeStateArrays state;
  std::vector<Sequence> seqs;
  int page_size = 4;
  bool prefill_causal = false;
};

using Rows = std::vector<std::vector<Row>>;  // by sequence

// ------------------------------------------------------------------------------------- reference

int32_t kv_slot_of(const Problem& problem, int slot, int position) {
  int stride = problem.state.page_table_stride;
  int32_t page = problem.state.page_table[slot * stride + position / problem.page_size];
  return page * problem.page_size + position % problem.page_size;
}

std::vector<Row> expected_prefill(const Problem& problem, const Sequence& seq) {
  std::vector<Row> rows;
  int position = seq.prompt_start;
  for (int32_t token : seq.prompt) {
    int limit = position + 1;
    while (!problem.prefill_causal && limit % problem.state.block_length != 0) ++limit;
    rows.push_back({token, position, limit, kv_slot_of(problem, seq.slot, position), kPoison});
    ++position;
  }
  return rows;
}

// Which positions are fed: fresh ones of the previous block (refreshed: all of it if any is fresh);
// of the current block everything, or its fresh ones and its first masks.
std::set<int> fed_positions(const Problem& problem, const Sequence& seq,
                            const std::map<int, uint8_t>& status, int start) {
  std::set<int> fed, fresh_before;
  int masks_left = seq.chunk_length;
  for (auto [position, s] : status) {
    if (position < start) {
      if (s == kFresh) fresh_before.insert(position);
    } else if (problem.mode == RowMode::block || s == kFresh) {
      fed.insert(position);
    } else if (is_masked(s) && masks_left-- > 0) {
      fed.insert(position);
    }
  }
  if (seq.refresh && !fresh_before.empty()) {
    for (auto [position, s] : status) {
      if (position < start) fed.insert(position);
    }
  }
  fed.insert(fresh_before.begin(), fresh_before.end());
  return fed;
}

// Expected rows of a decode sequence; moves the statuses in `after`.
std::vector<Row> expected_decode(const Problem& problem, const Sequence& seq,
                                 DecodeStateArrays& after) {
  const int length = problem.state.block_length, start = problem.state.block_start[seq.slot];
  std::map<int, uint8_t> status;
  std::map<int, int32_t> token;
  for (int i = 0; i < 2 * length; ++i) {
    status[start - length + i] = problem.state.status[problem.state.first(seq.slot) + i];
    token[start - length + i] = problem.state.tokens[problem.state.first(seq.slot) + i];
  }
  std::set<int> fed = fed_positions(problem, seq, status, start);

  std::set<int> visible;  // positions of the current block that have KV during this step
  for (int position = start; position < start + length; ++position) {
    if (status[position] != kAbsent || fed.count(position)) visible.insert(position);
  }
  std::vector<Row> rows;
  for (int position : fed) {
    bool in_previous = position < start, masked = !in_previous && is_masked(status[position]);
    rows.push_back({masked ? kMaskTokenId : token[position], position,
                    in_previous ? start : *visible.rbegin() + 1,
                    kv_slot_of(problem, seq.slot, position), masked ? position - start : kPoison});
    // In block mode known positions of the current block stay fresh: the finished block is fed once
    // more, as a whole.
    bool stays = problem.mode == RowMode::block && !in_previous && !masked;
    uint8_t& moved = after.status[after.current(seq.slot) + position - start];
    if (!stays) moved = masked ? kPresent : kCached;
  }
  return rows;
}

std::vector<Row> expected_ar(const Problem& problem, const Sequence& seq,
                             DecodeStateArrays& after) {
  int first = problem.state.first(seq.slot), next = problem.state.block_start[seq.slot];
  after.status[first] = kCached;
  return {
      {problem.state.tokens[first], next - 1, next, kv_slot_of(problem, seq.slot, next - 1), 0}};
}

// ------------------------------------------------------------------------------------ the op

struct Outputs {
  Outputs(int max_rows, int num_seqs, int stride)
      : per_row(7, std::vector<int32_t>(max_rows + 1, kPoison)),
        cu_seqlens(num_seqs + 2, kPoison),
        page_table((num_seqs + 1) * stride, kPoison),
        counts(3, kPoison) {}

  StepRows view() {
    return {per_row[0].data(), per_row[1].data(), per_row[2].data(), per_row[3].data(),
            cu_seqlens.data(), page_table.data(), per_row[4].data(), per_row[5].data(),
            per_row[6].data(), counts.data()};
  }

  std::vector<std::vector<int32_t>> per_row;  // one guard entry behind each
  std::vector<int32_t> cu_seqlens, page_table, counts;
};

void run(Problem& problem, int max_rows, Outputs& out, int pad_rows_to = 0, int pad_seqs_to = 0) {
  std::vector<int32_t> slots, chunk_lengths, lens, starts, offsets, tokens;
  std::vector<uint8_t> refresh;
  for (const Sequence& seq : problem.seqs) {
    slots.push_back(seq.slot);
    chunk_lengths.push_back(seq.chunk_length);
    refresh.push_back(seq.refresh);
    lens.push_back(static_cast<int32_t>(seq.prompt.size()));
    starts.push_back(seq.prompt_start);
    offsets.push_back(static_cast<int32_t>(tokens.size()));
    tokens.insert(tokens.end(), seq.prompt.begin(), seq.prompt.end());
  }
  static ThreadPool pool(1);
  cpu::build_rows({problem.state.view(), slots.data(), chunk_lengths.data(), refresh.data(),
                   lens.data(), starts.data(), offsets.data(), tokens.data(), out.view(),
                   static_cast<int>(problem.seqs.size()), max_rows, problem.page_size, kMaskTokenId,
                   problem.prefill_causal, problem.mode, pad_rows_to, pad_seqs_to},
                  pool);
}

// Puts the logits rows beside the rows they belong to.
Rows collect(const Problem& problem, const Outputs& out) {
  std::map<int, int> logit_of;
  for (int i = 0; i < out.counts[1]; ++i) {
    EXPECT_TRUE(logit_of.emplace(out.per_row[4][i], i).second) << "two logits rows of one row";
    EXPECT_TRUE(i == 0 || out.per_row[4][i - 1] < out.per_row[4][i]);
  }
  Rows rows(problem.seqs.size());
  for (size_t s = 0; s < rows.size(); ++s) {
    for (int i = out.cu_seqlens[s]; i < out.cu_seqlens[s + 1]; ++i) {
      int32_t offset = kPoison;
      if (logit_of.count(i)) {
        offset = out.per_row[6][logit_of[i]];
        EXPECT_EQ(out.per_row[5][logit_of[i]], problem.seqs[s].slot);
      }
      rows[s].push_back(
          {out.per_row[0][i], out.per_row[1][i], out.per_row[2][i], out.per_row[3][i], offset});
    }
  }
  return rows;
}

void expect_untouched_tail(const std::vector<int32_t>& values, size_t used) {
  for (size_t i = used; i < values.size(); ++i) ASSERT_EQ(values[i], kPoison) << "entry " << i;
}

void check(Problem problem) {
  DecodeStateArrays after = problem.state;
  Rows expected;
  size_t num_rows = 0;
  for (const Sequence& seq : problem.seqs) {
    bool is_ar = problem.mode == RowMode::ar;
    expected.push_back(!seq.prompt.empty()             ? expected_prefill(problem, seq)
                       : problem.state.ended[seq.slot] ? std::vector<Row>()
                       : is_ar                         ? expected_ar(problem, seq, after)
                                                       : expected_decode(problem, seq, after));
    num_rows += expected.back().size();
  }
  const int stride = problem.state.page_table_stride;
  Outputs out(static_cast<int>(num_rows), static_cast<int>(problem.seqs.size()), stride);
  run(problem, static_cast<int>(num_rows), out);

  ASSERT_EQ(out.counts[0], static_cast<int>(num_rows));
  ASSERT_EQ(out.cu_seqlens[0], 0);
  ASSERT_EQ(out.cu_seqlens[problem.seqs.size()], static_cast<int>(num_rows));
  ASSERT_EQ(collect(problem, out), expected);
  for (size_t s = 0; s < problem.seqs.size(); ++s) {
    for (int i = 0; i < stride; ++i) {
      ASSERT_EQ(out.page_table[s * stride + i],
                problem.state.page_table[problem.seqs[s].slot * stride + i]);
    }
  }
  for (int array = 0; array < 7; ++array) {
    expect_untouched_tail(out.per_row[array], out.counts[array < 4 ? 0 : 1]);
  }
  expect_untouched_tail(out.cu_seqlens, problem.seqs.size() + 1);
  expect_untouched_tail(out.page_table, problem.seqs.size() * stride);
  expect_untouched_tail(out.counts, 2);
  ASSERT_EQ(problem.state.status, after.status);
  ASSERT_EQ(problem.state.tokens, after.tokens);
  ASSERT_EQ(problem.state.block_start, after.block_start);
  ASSERT_EQ(problem.state.denoise_step, after.denoise_step);
}

// ---------------------------------------------------------------------------------------- problems

// Random pages for `num_slots` slots; every slot somewhere in its own sequence.
Problem make_problem(Rng& rng, RowMode mode, int num_slots, int block_length, int page_size) {
  constexpr int kNumBlocks = 6;
  int stride = (kNumBlocks * block_length + page_size - 1) / page_size + random_int(rng, 0, 2);
  Problem problem{mode, DecodeStateArrays(num_slots, block_length, stride), {}, page_size, false};
  problem.state.page_table = random_permutation(rng, num_slots * stride);
  for (int slot = 0; slot < num_slots; ++slot) {
    problem.state.block_start[slot] = random_int(rng, 1, kNumBlocks - 1) * block_length;
    problem.state.ended[slot] = num_slots > 1 && random_int(rng, 0, 5) == 0;
  }
  return problem;
}

void set_window(Rng& rng, Problem& problem, int slot, const std::vector<uint8_t>& previous,
                const std::vector<uint8_t>& current) {
  DecodeStateArrays& state = problem.state;
  std::copy(previous.begin(), previous.end(), state.status.begin() + state.first(slot));
  std::copy(current.begin(), current.end(), state.status.begin() + state.current(slot));
  for (int i = 0; i < 2 * state.block_length; ++i) {
    bool known = is_known(state.status[state.first(slot) + i]);
    // A prompt may hold the mask token's id; that does not make it a mask.
    state.tokens[state.first(slot) + i] = !known                       ? -1
                                          : random_int(rng, 0, 7) == 0 ? kMaskTokenId
                                                                       : random_int(rng, 0, 500);
  }
}

std::vector<uint8_t> digits(int number, int base, int count, int low) {
  std::vector<uint8_t> values;
  for (int i = 0; i < count; ++i, number /= base) values.push_back(low + number % base);
  return values;
}

std::vector<int32_t> random_prompt(Rng& rng, int length) {
  std::vector<int32_t> prompt(length);
  for (int32_t& token : prompt) token = random_int(rng, 0, 500);
  return prompt;
}

TEST(BuildRows, EveryValidWindowOfASmallBlock) {
  constexpr int kLength = 4;
  Rng rng(1);
  for (RowMode mode : {RowMode::chunk, RowMode::block}) {
    for (int code = 0; code < 256; ++code) {
      std::vector<uint8_t> current = digits(code, 4, kLength, kAbsent);
      if (!is_valid_block(current)) continue;
      if (std::all_of(current.begin(), current.end(), is_known)) continue;  // slid away by unmask
      for (int previous : {0, 1, 6, 8, 15}) {
        for (int chunk = 1; chunk <= kLength; ++chunk) {
          Problem problem = make_problem(rng, mode, 1, kLength, 1 << random_int(rng, 0, 3));
          set_window(rng, problem, 0, digits(previous, 2, kLength, kFresh), current);
          problem.seqs = {{0, chunk, random_int(rng, 0, 1) == 1, {}, 0}};
          ASSERT_NO_FATAL_FAILURE(check(problem))
              << "window " << code << " after " << previous << ", chunk " << chunk;
        }
      }
    }
  }
}

TEST(BuildRows, RandomMixedBatches) {
  Rng rng(2);
  for (int trial = 0; trial < 400; ++trial) {
    RowMode mode = trial % 2 ? RowMode::chunk : RowMode::block;
    int length = 1 << random_int(rng, 0, 5), num_slots = random_int(rng, 1, 6);
    Problem problem = make_problem(rng, mode, num_slots, length, 1 << random_int(rng, 0, 6));
    problem.prefill_causal = random_int(rng, 0, 3) == 0;
    for (int32_t slot : random_permutation(rng, num_slots)) {
      if (random_int(rng, 0, 4) == 0) continue;  // not in this step
      set_window(rng, problem, slot, digits(random_int(rng, 0, 1 << 30), 2, length, kFresh),
                 random_block(rng, length));
      Sequence seq{slot, random_int(rng, 1, length), random_int(rng, 0, 1) == 1, {}, 0};
      if (random_int(rng, 0, 2) == 0) {
        seq.prompt = random_prompt(rng, random_int(rng, 1, 3) * length);
        seq.prompt_start = random_int(rng, 0, 3) * length;
      }
      problem.seqs.push_back(seq);
    }
    ASSERT_NO_FATAL_FAILURE(check(problem)) << "trial " << trial;
  }
}

TEST(BuildRows, AutoregressiveRowsAndCausalPrompts) {
  Rng rng(3);
  for (int trial = 0; trial < 200; ++trial) {
    int num_slots = random_int(rng, 1, 5);
    Problem problem = make_problem(rng, RowMode::ar, num_slots, 1, random_int(rng, 1, 7));
    problem.prefill_causal = true;
    for (int32_t slot : random_permutation(rng, num_slots)) {
      set_window(rng, problem, slot, {kFresh}, {kAbsent});
      Sequence seq{slot, 1, false, {}, 0};
      if (random_int(rng, 0, 1) == 0) seq.prompt = random_prompt(rng, random_int(rng, 1, 4));
      seq.prompt_start = random_int(rng, 0, 2);
      problem.seqs.push_back(seq);
    }
    ASSERT_NO_FATAL_FAILURE(check(problem)) << "trial " << trial;
  }
}

TEST(BuildRows, PrefillSliceInTheMiddleOfABlock) {
  Rng rng(4);
  for (bool causal : {false, true}) {
    Problem problem = make_problem(rng, RowMode::chunk, 2, 8, 4);
    problem.prefill_causal = causal;
    problem.seqs = {{1, 0, false, random_prompt(rng, 13), 3}};
    check(problem);
  }
}

TEST(BuildRows, NothingToDo) {
  Rng rng(5);
  check(make_problem(rng, RowMode::chunk, 2, 4, 4));
}

TEST(BuildRows, PaddingFillsTheBucket) {
  Rng rng(8);
  Problem problem = make_problem(rng, RowMode::chunk, 2, 4, 4);
  set_window(rng, problem, 1, {kFresh, kCached, kCached, kCached},
             {kPresent, kFresh, kAbsent, kAbsent});
  problem.seqs = {{1, 2, false, {}, 0}};  // rows: the fresh ones, and two masks
  const int stride = problem.state.page_table_stride;
  Outputs out(7, 3, stride);
  run(problem, 7, out, /*pad_rows_to=*/6, /*pad_seqs_to=*/3);
  EXPECT_EQ(out.counts, (std::vector<int32_t>{4, 2, kPoison}));
  EXPECT_EQ(out.cu_seqlens, (std::vector<int32_t>{0, 4, 4, 4, kPoison}));
  const std::vector<int32_t> padding = {0, 0, 1, -1, 0, -1, 0};  // by array
  for (int array = 0; array < 7; ++array) {
    for (int i = out.counts[array < 4 ? 0 : 1]; i < 6; ++i) {
      EXPECT_EQ(out.per_row[array][i], padding[array]) << "array " << array << ", entry " << i;
    }
    expect_untouched_tail(out.per_row[array], 6);
  }
  for (int i = stride; i < 3 * stride; ++i) EXPECT_EQ(out.page_table[i], 0);
  expect_untouched_tail(out.page_table, 3 * stride);
}

TEST(BuildRows, TooManyRowsThrow) {
  Rng rng(6);
  Problem problem = make_problem(rng, RowMode::block, 1, 4, 4);
  problem.seqs = {{0, 4, false, {}, 0}};
  Outputs out(4, 1, problem.state.page_table_stride);
  expect_invalid([&] { run(problem, 3, out); },
                 "[build_rows] the plan needs more than max_rows 3 rows");
  for (int array = 0; array < 4; ++array) expect_untouched_tail(out.per_row[array], 3);
  Outputs padded(4, 1, problem.state.page_table_stride);
  expect_invalid([&] { run(problem, 4, padded, 5); },
                 "[build_rows] pad_rows_to must be in 0..4 (max_rows), got 5");
}

TEST(BuildRows, TooLongBlockThrows) {
  Rng rng(7);
  Problem problem = make_problem(rng, RowMode::block, 1, 1025, 1025);
  problem.seqs = {{0, 1, false, {}, 0}};
  Outputs out(1025, 1, problem.state.page_table_stride);
  expect_invalid([&] { run(problem, 1025, out); },
                 "[build_rows] block_length must be <= 1024, got 1025");
}

}  // namespace
}  // namespace optimus

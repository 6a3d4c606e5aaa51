// block_attention: values over ragged, paged problems, and bitwise independence of a row from the
// rest of its batch, from threads and from page sizes.
#include "kernels/cpu/kernels.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

struct Shape {
  int num_q_heads, num_kv_heads, head_dim, page_size;
};

// K and V of each sequence as plain [position][kv head][head_dim], and scattered over random pages.
// Entries past a sequence's last limit stay NaN: reading them shows.
struct Problem {
  Problem(Rng& rng, Shape shape, DType dtype, std::vector<std::vector<int>> limits)
      : shape(shape), dtype(dtype), q(dtype, 0), k_pages(dtype, 0), v_pages(dtype, 0) {
    for (auto& seq : limits) {
      cu_seqlens.push_back(cu_seqlens.back() + static_cast<int>(seq.size()));
      kv_limits.insert(kv_limits.end(), seq.begin(), seq.end());
      int last = seq.empty() ? 0 : seq.back();
      k.push_back(random_tensor(rng, dtype, last * shape.num_kv_heads * shape.head_dim));
      v.push_back(random_tensor(rng, dtype, last * shape.num_kv_heads * shape.head_dim));
      max_len = std::max(max_len, last);
    }
    q = random_tensor(rng, dtype,
                      static_cast<size_t>(cu_seqlens.back()) * shape.num_q_heads * shape.head_dim);
    scatter(rng, shape.page_size);
  }

  void scatter(Rng& rng, int page_size) {
    shape.page_size = page_size;
    table_stride = (max_len + page_size - 1) / page_size + 1;
    int num_seqs = static_cast<int>(k.size());
    page_table = random_permutation(rng, num_seqs * table_stride);
    size_t size = page_table.size() * shape.num_kv_heads * page_size * shape.head_dim;
    k_pages = Tensor(dtype, size);
    v_pages = Tensor(dtype, size);
    for (int s = 0; s < num_seqs; ++s) {
      for (size_t i = 0; i < k[s].size(); ++i) {
        int d = i % shape.head_dim, h = i / shape.head_dim % shape.num_kv_heads;
        int position = static_cast<int>(i / shape.head_dim / shape.num_kv_heads);
        size_t page = page_table[s * table_stride + position / page_size];
        size_t at =
            ((page * shape.num_kv_heads + h) * page_size + position % page_size) * shape.head_dim +
            d;
        k_pages.set(at, k[s].get(i));
        v_pages.set(at, v[s].get(i));
      }
    }
  }

  size_t row_width() const { return static_cast<size_t>(shape.num_q_heads) * shape.head_dim; }

  BlockAttentionParams params(Tensor& out) const {
    return {q.data(),
            k_pages.data(),
            v_pages.data(),
            cu_seqlens.data(),
            kv_limits.data(),
            page_table.data(),
            out.data(),
            static_cast<int>(k.size()),
            shape.num_q_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
            table_stride,
            kScale,
            dtype};
  }

  Tensor run(ThreadPool& pool) const {
    Tensor out(dtype, q.size());
    cpu::block_attention(params(out), pool);
    return out;
  }

  // Row `row` of sequence `seq` in a call of its own.
  Tensor run_row(int seq, int row, ThreadPool& pool) const {
    Tensor out(dtype, row_width());
    BlockAttentionParams alone = params(out);
    int32_t cu[2] = {0, 1};
    alone.q = static_cast<const char*>(q.data()) + row * row_width() * dtype_size(dtype);
    alone.cu_seqlens_q = cu;
    alone.kv_limits = &kv_limits[row];
    alone.page_table = &page_table[seq * table_stride];
    alone.num_seqs = 1;
    cpu::block_attention(alone, pool);
    return out;
  }

  std::vector<double> reference() const {
    std::vector<double> out;
    for (size_t s = 0; s < k.size(); ++s) {
      for (int row = cu_seqlens[s]; row < cu_seqlens[s + 1]; ++row) {
        for (int h = 0; h < shape.num_q_heads; ++h) append_head(s, row, h, out);
      }
    }
    return out;
  }

  void append_head(size_t s, int row, int head, std::vector<double>& out) const {
    int kv_head = head / (shape.num_q_heads / shape.num_kv_heads), head_dim = shape.head_dim;
    std::vector<double> p(kv_limits[row]), values(head_dim);
    auto entry = [&](int position) {
      return (static_cast<size_t>(position) * shape.num_kv_heads + kv_head) * head_dim;
    };
    double total = 0;
    for (int i = 0; i < kv_limits[row]; ++i) {
      double score = 0;
      for (int d = 0; d < head_dim; ++d) {
        score += double{q.get(row * row_width() + head * head_dim + d)} * k[s].get(entry(i) + d);
      }
      total += p[i] = std::exp(score * kScale);
    }
    for (int i = 0; i < kv_limits[row]; ++i) {
      for (int d = 0; d < head_dim; ++d) values[d] += p[i] / total * v[s].get(entry(i) + d);
    }
    out.insert(out.end(), values.begin(), values.end());
  }

  static constexpr float kScale = 0.125f;
  Shape shape;
  DType dtype;
  std::vector<int32_t> cu_seqlens = {0}, kv_limits, page_table;
  std::vector<Tensor> k, v;
  Tensor q, k_pages, v_pages;
  int table_stride = 0, max_len = 0;
};

// Rows of a staircase: `rows` rows whose limits climb in blocks of `block` up to `last`.
std::vector<int> staircase(int rows, int block, int last) {
  std::vector<int> limits;
  for (int i = 0; i < rows; ++i)
    limits.push_back(std::max(1, last - (rows - 1 - i) / block * block));
  return limits;
}

TEST(BlockAttention, MatchesPlainLoops) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(13);
    ThreadPool pool(2);
    Shape shapes[] = {{1, 1, 64, 16}, {6, 3, 64, 32}, {8, 2, 128, 16}, {8, 1, 64, 64},
                      {4, 4, 80, 8},  {2, 1, 96, 1},  {3, 1, 20, 5},   {40, 1, 16, 16}};
    for (const auto& shape : shapes) {
      SCOPED_TRACE(::testing::Message() << shape.num_q_heads << "/" << shape.num_kv_heads << " x "
                                        << shape.head_dim << ", pages of " << shape.page_size);
      Problem problem(rng, shape, dtype,
                      {{1},
                       {},
                       staircase(5, 1, 70),
                       staircase(32, 32, 200),
                       staircase(40, 8, 63),
                       {64},
                       {65, 65, 128, 129},
                       {}});
      expect_close(problem.run(pool), problem.reference());
    }
  });
}

TEST(BlockAttention, RowsDoNotDependOnTheirBatch) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(14);
    ThreadPool one(1), three(3);
    for (Shape shape : {Shape{6, 3, 64, 16}, Shape{8, 1, 80, 32}}) {
      Problem problem(rng, shape, dtype,
                      {staircase(45, 1, 260), {3}, staircase(33, 32, 100), {200}, {77, 140}});
      Tensor all = problem.run(three);
      expect_same_bits(problem.run(one), 0, all, 0, all.size());
      for (size_t s = 0; s + 1 < problem.cu_seqlens.size(); ++s) {
        for (int row = problem.cu_seqlens[s]; row < problem.cu_seqlens[s + 1]; ++row) {
          Tensor alone = problem.run_row(static_cast<int>(s), row, one);
          expect_same_bits(alone, 0, all, row * problem.row_width(), problem.row_width());
        }
      }
      for (int page_size : {1, 7, 64, 100}) {
        problem.scatter(rng, page_size);
        expect_same_bits(problem.run(three), 0, all, 0, all.size());
      }
    }
  });
}

TEST(BlockAttention, LargeScoresDoNotOverflow) {
  for_each_isa_and_dtype([](DType dtype) {
    Rng rng(15);
    ThreadPool pool(1);
    Problem problem(rng, {2, 1, 64, 16}, dtype, {staircase(8, 4, 150)});
    for (size_t i = 0; i < problem.q.size(); ++i) problem.q.set(i, problem.q.get(i) * 8);
    expect_close(problem.run(pool), problem.reference());
    for (size_t i = 0; i < problem.q.size(); ++i) problem.q.set(i, problem.q.get(i) * 1e4f);
    Tensor out = problem.run(pool);
    for (size_t i = 0; i < out.size(); ++i) ASSERT_TRUE(std::isfinite(out.get(i)));
  });
}

TEST(BlockAttention, RejectsBadArguments) {
  Rng rng(16);
  ThreadPool pool(1);
  Problem problem(rng, {4, 2, 64, 16}, DType::float32, {{5, 6}, {20}});
  Tensor out(DType::float32, problem.q.size());
  BlockAttentionParams good = problem.params(out), bad = good;
  auto run = [&] { cpu::block_attention(bad, pool); };
  bad.num_q_heads = 3;
  expect_invalid(run, "num_q_heads must be a multiple of num_kv_heads, got 3 and 2");
  bad = good;
  bad.head_dim = 513;
  expect_invalid(run, "head_dim must be in 1..512, got 513");
  bad = good;
  bad.page_table_stride = 1;
  expect_invalid(run, "sequence 1 needs 2 pages, page_table_stride is 1");
  bad = good;
  bad.out = nullptr;
  expect_invalid(run, "[block_attention] null pointer");
  bad = good;
  int32_t limits[3] = {6, 5, 20};
  bad.kv_limits = limits;
  expect_invalid(run, "kv_limits[1] must be >= 6");
  limits[0] = 0;
  expect_invalid(run, "kv_limits[0] must be >= 1");
  bad = good;
  int32_t cu[3] = {0, 2, 1};
  bad.cu_seqlens_q = cu;
  expect_invalid(run, "cu_seqlens_q must not decrease, got 2 then 1");
  bad = good;
  problem.page_table[0] = -1;
  expect_invalid(run, "page 0 of sequence 0 must be >= 0, got -1");
  bad.num_seqs = 0;
  cpu::block_attention(bad, pool);  // nothing to do
}

}  // namespace
}  // namespace optimus

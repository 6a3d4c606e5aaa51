// embedding: rows of the table, bit for bit.
#include "kernels/cpu/kernels.h"
#include "testing.h"

namespace optimus {
namespace {

using namespace testing;

TEST(Embedding, CopiesRows) {
  Rng rng(1);
  ThreadPool pool(2);
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    for (int rows : {0, 1, 7, 300}) {
      int vocab = 50, hidden = 129;
      Tensor table = random_tensor(rng, dtype, vocab * hidden);
      std::vector<int32_t> ids(rows);
      for (auto& id : ids) id = random_int(rng, 0, vocab - 1);
      Tensor out(dtype, rows * hidden);
      cpu::embedding({table.data(), ids.data(), out.data(), rows, hidden, dtype}, pool);
      for (int r = 0; r < rows; ++r) {
        expect_same_bits(out, r * hidden, table, ids[r] * hidden, hidden);
      }
      EXPECT_TRUE(out.guards_intact());
    }
  }
}

TEST(Embedding, ReadsPackedPanels) {
  Rng rng(2);
  ThreadPool pool(2);
  for (DType dtype : {DType::float32, DType::bfloat16}) {
    for (int vocab : {1, 32, 33, 100}) {
      int hidden = 129, rows = 300;
      Tensor table = random_tensor(rng, dtype, vocab * hidden);
      Tensor packed(dtype, packed_gemm_weight_size(vocab, hidden));
      pack_gemm_weight(table.data(), packed.data(), vocab, hidden, dtype);
      std::vector<int32_t> ids(rows);
      for (auto& id : ids) id = random_int(rng, 0, vocab - 1);
      Tensor out(dtype, rows * hidden);
      cpu::embedding({packed.data(), ids.data(), out.data(), rows, hidden, dtype, /*packed=*/true},
                     pool);
      for (int r = 0; r < rows; ++r) {
        expect_same_bits(out, r * hidden, table, ids[r] * hidden, hidden);
      }
      EXPECT_TRUE(out.guards_intact());
    }
  }
}

TEST(Embedding, RejectsBadArguments) {
  ThreadPool pool(1);
  Tensor table(DType::float32, 8), out(DType::float32, 8);
  int32_t id = -3;
  EmbeddingParams params{table.data(), &id, out.data(), 1, 4, DType::float32};
  expect_invalid([&] { cpu::embedding(params, pool); },
                 "[embedding] token_ids[0] must be >= 0, got -3");
  params.hidden = 0;
  expect_invalid([&] { cpu::embedding(params, pool); }, "[embedding] need rows >= 0");
  params.hidden = 4;
  params.out = nullptr;
  expect_invalid([&] { cpu::embedding(params, pool); }, "[embedding] null pointer");
}

}  // namespace
}  // namespace optimus

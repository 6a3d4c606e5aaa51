// block_attention on the GPU against the CPU twin in fp32 over the same bf16 values: ragged, paged,
// split and whole, every tile height; poison everywhere a kernel must not look or must write.
#include "kernels/cuda/block_attention_testing.h"

namespace optimus {
namespace {

using namespace testing;
using namespace testing::attention;

using CudaBlockAttention = GpuTest;

// Runs one step with some room to spare in every bound, and compares.
void check_step(Rng& rng, Shape shape, const Limits& limits, ThreadPool& pool) {
  SCOPED_TRACE(::testing::Message()
               << shape.num_q_heads << "/" << shape.num_kv_heads << " x " << shape.head_dim
               << ", pages of " << shape.page_size << ", " << limits.size() << " sequences");
  int stride = (longest(limits) - 1) / shape.page_size + 3;
  int num_pages = pages_of(limits, shape.page_size) + 2;
  Step step(rng, limits, shape.page_size, num_pages, stride);
  Fixture fixture(rng, shape, num_pages, stride, static_cast<int>(limits.size()) + 2,
                  step.num_rows() + 3);
  fixture.poison_pages(step);
  fixture.upload_pools();
  fixture.upload_step(step);
  Tensor actual = fixture.run();
  fixture.expect_near(actual, fixture.expected(step, pool), step);
  expect_same_bits(fixture.run(), 0, actual, 0, actual.size());
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinSmall) {
  Rng rng(301);
  Limits limits = {{1},
                   {},
                   staircase(5, 1, 70),
                   staircase(32, 32, 200),
                   staircase(40, 8, 63),
                   {64},
                   {},
                   {65, 65, 128, 129, 130},
                   {}};
  for (Shape shape : {Shape{1, 1, 64, 16}, Shape{6, 2, 128, 32}, Shape{8, 2, 128, 64},
                      Shape{16, 1, 64, 128}, Shape{5, 1, 128, 16}}) {
    check_step(rng, shape, limits, pool);
  }
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinAtEveryTileHeight) {
  Rng rng(302);
  for (int rows : {1, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 65}) {
    for (int head_dim : {64, 128}) {
      Limits limits = {staircase(rows, 32, 777), std::vector<int>(rows, 1300),
                       staircase(rows, 1, 500)};
      check_step(rng, {8, 2, head_dim, 64}, limits, pool);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnLongSequences) {
  Rng rng(303);
  check_step(rng, {4, 1, 128, 64}, {{32768}, {1}, {31999, 32000}, {63}}, pool);
  check_step(rng, {8, 1, 128, 128}, {staircase(8, 8, 20000)}, pool);
  check_step(rng, {4, 1, 64, 16}, {std::vector<int>(32, 9999), {17}}, pool);
}

// Case by case: sanitizers take long.
class CudaBlockAttentionSeqs : public GpuTest, public ::testing::WithParamInterface<int> {};
class CudaBlockAttentionRows : public GpuTest, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(CudaBlockAttention, CudaBlockAttentionSeqs,
                         ::testing::Values(1, 2, 4, 16, 33));
// 0: rows of all kinds.
INSTANTIATE_TEST_SUITE_P(CudaBlockAttention, CudaBlockAttentionRows,
                         ::testing::Values(0, 4, 8, 16));

// As many as the case has, or any number of them.
int random_rows(Rng& rng, int rows) {
  const int of_all_kinds[] = {1, 4, 5, 8, 9, 16, 20, 32};
  return rows > 0 ? rows : of_all_kinds[random_int(rng, 0, 7)];
}

// Requests of one length: heads in equal parts, or several whole heads per share.
TEST_P(CudaBlockAttentionSeqs, MatchTheCpuTwinOnEvenSteps) {
  const int num_seqs = GetParam();
  Rng rng(311 + num_seqs);
  for (int rows : {1, 5, 9, 40}) {
    for (int last : {50, 64 + rows, 700}) {
      Limits limits(num_seqs, staircase(rows, 32, last));
      check_step(rng, {16, 8, 64, 64}, limits, pool);
      if (HasFatalFailure()) return;
    }
  }
  if (num_seqs == 1) check_step(rng, {8, 2, 128, 64}, {std::vector<int>(32, 4100)}, pool);
}

// Few pairs of 128 packed rows and few keys: items are halved, if halves are of one cost.
TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnHalvedItems) {
  Rng rng(320);
  for (int head_dim : {64, 128}) {
    for (int keys : {70, 256, 500, 1024, 1030}) {
      check_step(rng, {32, 8, head_dim, 64}, {std::vector<int>(32, keys)}, pool);
      check_step(rng, {32, 8, head_dim, 16}, {staircase(32, 16, keys)}, pool);
      if (HasFatalFailure()) return;
    }
    check_step(rng, {8, 4, head_dim, 32}, Limits(3, std::vector<int>(64, 400)), pool);
    // Two items of one cost, of which the second is too short to be halved.
    Limits limits = {std::vector<int>(32, 1920)};
    limits[0].insert(limits[0].end(), 5, 2240);
    check_step(rng, {4, 1, head_dim, 64}, limits, pool);
  }
}

// Three pairs to a share and a third, of few rows two and two thirds: on 132 SMs too uneven to deal, so all
// shares are cut, and between the cuts lie whole pieces of two heads. Of all kinds, they are dealt.
TEST_P(CudaBlockAttentionRows, MatchTheCpuTwinOnTwoHeads) {
  Rng rng(313 + GetParam());
  const int rows = GetParam(), keys = rows == 4 ? 400 : rows == 8 ? 1400 : 1000;
  Limits limits(rows == 4 ? 117 : 146);
  for (auto& seq : limits) {
    const int count = random_rows(rng, rows);
    seq = staircase(count, 4, rows > 0 ? keys : random_int(rng, count, 300));
  }
  check_step(rng, {12, 3, rows == 8 ? 64 : 128, 64}, limits, pool);
}
TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnTwoHeads) {
  Rng rng(319);
  check_step(rng, {32, 8, 128, 64}, Limits(66, staircase(16, 4, 470)), pool);
}

// Many pairs of few rows, beyond two for each share: of a tile or several, equal or not; so many that
// a CTA claims more than its ring of claims holds. By head_dim.
class CudaBlockAttentionClaims : public GpuTest, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(CudaBlockAttention, CudaBlockAttentionClaims, ::testing::Values(64, 128));

TEST_P(CudaBlockAttentionClaims, MatchTheCpuTwinOnEqualPairs) {
  Rng rng(321);
  const Shape shape = {8, 8, GetParam(), 64};
  for (int last : {1, 64, 330}) {
    check_step(rng, shape, Limits(60, std::vector<int>(1, last)), pool);
  }
  check_step(rng, {16, 4, GetParam(), 32}, Limits(110, staircase(4, 4, 200)), pool);
  check_step(rng, {2, 1, GetParam(), 64}, Limits(700, {90}), pool);
}
// The host knows how many requests there are at most, the schedule how many there are.
TEST_P(CudaBlockAttentionClaims, MatchTheCpuTwinAroundTheFewestPairs) {
  Rng rng(324);
  int num_sms = 0;
  OPTIMUS_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  for (int fewer : {3, 2, 0}) {  // check_step leaves room for two more
    Limits limits(3 * num_sms - fewer, {90});
    check_step(rng, {4, 1, GetParam(), 64}, limits, pool);
    limits[7] = {};
    check_step(rng, {4, 1, GetParam(), 64}, limits, pool);
    if (HasFatalFailure()) return;
  }
}
TEST_P(CudaBlockAttentionClaims, MatchTheCpuTwinOnVeryManyPairs) {
  Rng rng(322);
  check_step(rng, {8, 8, GetParam(), 16}, Limits(410, std::vector<int>(1, 40)), pool);
}
TEST_P(CudaBlockAttentionClaims, MatchTheCpuTwinOnUnequalPairs) {
  Rng rng(323);
  for (int num_kv_heads : {2, 7}) {
    Limits limits(num_kv_heads == 7 ? 130 : 750);
    for (auto& seq : limits) seq = staircase(2, 2, random_int(rng, 2, 300));
    limits[5] = {900};
    limits[50] = {};
    check_step(rng, {3 * num_kv_heads, num_kv_heads, GetParam(), 64}, limits, pool);
  }
}

// Requests of similar length, of one kind or of all: pairs are dealt whole, fewer than there are
// shares or in several rounds.
TEST_P(CudaBlockAttentionRows, MatchTheCpuTwinOnSimilarLengths) {
  Rng rng(314 + GetParam());
  for (int num_seqs : {9, 14, 33}) {
    Limits limits(num_seqs);
    for (auto& seq : limits) {
      seq = staircase(random_rows(rng, GetParam()), 4, random_int(rng, 700, 900));
    }
    check_step(rng, {32, 8, 64, num_seqs == 14 ? 16 : 64}, limits, pool);
    if (HasFatalFailure()) return;
  }
}

// Long requests among short ones: parts of the long ones come first in some shares, before whole pairs.
TEST_P(CudaBlockAttentionRows, MatchTheCpuTwinOnUnequalLengths) {
  Rng rng(315 + GetParam());
  for (int head_dim : {64, 128}) {
    Limits limits(36);
    for (auto& seq : limits) {
      const int count = random_rows(rng, GetParam());
      seq = staircase(count, 4, random_int(rng, count, 32 << random_int(rng, 0, 4)));
    }
    limits[3] = staircase(random_rows(rng, GetParam()), 4, 2500);
    limits[20] = staircase(random_rows(rng, GetParam()), 1, 4000);
    check_step(rng, {16, 4, head_dim, head_dim == 64 ? 32 : 64}, limits, pool);
    if (HasFatalFailure()) return;
  }
}

// Shares of many tiles: the ring of slots goes round several times, within and across pieces.
TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnLongShares) {
  Rng rng(310);
  for (int head_dim : {64, 128}) {
    for (int rows : {4, 9, 16, 33}) {
      Limits limits(6, std::vector<int>(rows, 4000));
      limits[3] = {};
      limits[4] = staircase(rows, 32, 9000);
      limits[5] = std::vector<int>(rows > 4 ? 2 : 20, 2000);
      check_step(rng, {8, 4, head_dim, 64}, limits, pool);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnPrefillBesideDecode) {
  Rng rng(304);
  check_step(rng, {8, 2, 128, 64},
             {staircase(300, 32, 300), {900}, staircase(160, 32, 480), std::vector<int>(8, 1500)},
             pool);
  check_step(rng, {4, 1, 64, 32}, {staircase(700, 1, 700), std::vector<int>(2, 3000)}, pool);
}

// Rows that see few keys and many: pairs of item and head are dealt to the shares whole, in several
// rounds, or in less than one.
TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnPrompts) {
  Rng rng(312);
  check_step(rng, {24, 8, 64, 64}, {staircase(1500, 32, 1500)}, pool);
  check_step(rng, {6, 3, 128, 32}, {staircase(700, 16, 700), {}, staircase(40, 1, 40)}, pool);
  check_step(rng, {15, 5, 64, 16},
             {staircase(129, 1, 400), staircase(900, 32, 900), {}, staircase(1300, 32, 1333)},
             pool);
  check_step(rng, {16, 1, 128, 64}, {staircase(1000, 32, 1000), staircase(999, 8, 1000)}, pool);
  check_step(rng, {1, 1, 128, 16}, {staircase(300, 32, 300)}, pool);
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnManySequences) {
  Rng rng(305);
  for (int num_seqs : {300, 5000}) {  // beyond one chunk of the schedule, beyond its cached offsets
    Limits limits(num_seqs);
    for (auto& seq : limits) {
      if (random_int(rng, 0, 3) > 0) seq = staircase(1, 1, random_int(rng, 1, 40));
    }
    check_step(rng, {2, 1, 64, 16}, limits, pool);
  }
}

// Limits of `rows` rows of one request: causal, block staircase, chunk window, or anything.
std::vector<int> random_limits(Rng& rng, int rows, int longest) {
  int last = random_int(rng, rows, std::max(rows, longest));
  switch (random_int(rng, 0, 3)) {
    case 0:
      return staircase(rows, 1, last);
    case 1:
      return staircase(rows, 32, last);
    case 2:
      return std::vector<int>(rows, last);
    default: {
      std::vector<int> limits(rows);
      for (auto& limit : limits) limit = random_int(rng, 1, last);
      std::sort(limits.begin(), limits.end());
      return limits;
    }
  }
}

TEST_F(CudaBlockAttention, MatchesTheCpuTwinOnRandomSteps) {
  Rng rng(306);
  for (int trial = 0; trial < 40; ++trial) {
    int group = random_int(rng, 1, 16), num_kv_heads = random_int(rng, 1, 3);
    Shape shape = {group * num_kv_heads, num_kv_heads, random_int(rng, 0, 1) ? 64 : 128,
                   16 << random_int(rng, 0, 3)};
    Limits limits(random_int(rng, 1, 12));
    for (auto& seq : limits) {
      int rows = random_int(rng, 0, 4) == 0 ? 0 : 1 << random_int(rng, 0, 5);
      if (rows > 0) seq = random_limits(rng, rows, random_int(rng, 0, 3) == 0 ? 2500 : 200);
    }
    check_step(rng, shape, limits, pool);
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaBlockAttention, LargeScoresDoNotOverflow) {
  Rng rng(307);
  Limits limits = {staircase(8, 4, 150)};
  Step step(rng, limits, 16, 12, 12);
  Fixture fixture(rng, {2, 1, 64, 16}, 12, 12, 1, 8);
  for (size_t i = 0; i < fixture.q.bf16.size(); ++i) fixture.q.set(i, fixture.q.bf16.get(i) * 1e4f);
  fixture.device_q = std::make_unique<DeviceTensor>(fixture.q.bf16);
  fixture.upload_pools();
  fixture.upload_step(step);
  Tensor out = fixture.run();
  for (size_t i = 0; i < out.size(); ++i) ASSERT_TRUE(std::isfinite(out.get(i)));
}

TEST_F(CudaBlockAttention, RejectsBadArguments) {
  Rng rng(309);
  Fixture fixture(rng, {4, 2, 64, 16}, 4, 4, 1, 8);
  fixture.upload_pools();
  BlockAttentionParams good = fixture.device_params(fixture.device_q->data()), bad = good;
  auto run = [&] { cuda::block_attention(bad, nullptr); };
  bad.dtype = DType::float32;
  expect_invalid(run, "dtype must be bfloat16, got float32");
  bad = good;
  bad.head_dim = 80;
  expect_invalid(run, "head_dim must be 64 or 128, got 80");
  bad = good;
  bad.page_size = 48;
  expect_invalid(run, "page_size must be 16, 32, 64 or 128, got 48");
  bad = good;
  bad.num_q_heads = 34;
  expect_invalid(run, "num_q_heads must be 1 to 16 times num_kv_heads, got 34 and 2");
  bad = good;
  bad.scale = 0;
  expect_invalid(run, "scale must be > 0, got 0");
  bad = good;
  bad.workspace_bytes = 16;
  expect_invalid(run, "workspace_bytes must be >= ");
  bad = good;
  bad.workspace = nullptr;
  expect_invalid(run, "workspace must not be null");
  bad = good;
  bad.k_pages = nullptr;
  expect_invalid(run, "null pointer");
  bad.num_seqs = 0;
  cuda::block_attention(bad, nullptr);  // nothing to do
  cuda::block_attention_schedule(bad, nullptr);
}

}  // namespace
}  // namespace optimus

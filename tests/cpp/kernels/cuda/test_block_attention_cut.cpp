// How a step is cut into shares, without a GPU: whichever way, its shares hold every tile once, and
// those that have parts of a pair agree about who they are.
#include <algorithm>
#include <vector>

#include "kernels/cuda/block_attention_cut.h"
#include "testing.h"

namespace optimus::cuda::attention {
namespace {

using optimus::testing::random_int;
using optimus::testing::Rng;

struct Sequence {
  int rows, keys;
};

// Items in the schedule's order, and the line they lie on.
struct Step {
  std::vector<Item> items;
  std::vector<int> offsets;
  PairCost costs[4], dealing[4];
  uint32_t kinds = 0;
  int num_kv_heads, num_shares;
  int length = 0;

  Step(const std::vector<Sequence>& seqs, int group, int num_kv_heads_, int num_shares_,
       int item_rows = kMaxPackedRows)
      : num_kv_heads(num_kv_heads_), num_shares(num_shares_) {
    HeadLoad load = {};
    for (size_t s = 0; s < seqs.size(); ++s) {
      const int packed = seqs[s].rows * group;
      const int tiles = tiles_of(seqs[s].keys);
      for (int begin = 0; begin < packed; begin += item_rows) {
        Item item = {};
        item.seq = static_cast<int>(s);
        item.packed_begin = begin;
        item.packed_count = std::min(item_rows, packed - begin);
        item.num_tiles = tiles;
        const Cost cost = cost_of(kind_of(item.packed_count), false);
        load.arithmetic += cost.piece + cost.tile * tiles;
        items.push_back(item);
      }
      load.unique_tiles += tiles;
      kinds |= 1u << kind_of(packed);
    }
    const bool several = (kinds & (kinds - 1)) != 0;
    for (int kind = 0; kind < 4; ++kind) dealing[kind] = dealt_cost(kind, load, 128);
    for (int kind = 0; kind < 4; ++kind) {
      costs[kind] =
          several ? fitted_cost(kind, load, num_kv_heads, 128, num_shares) : plain_cost(kind);
    }
    if (several) {
      std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {
        return kind_of(seqs[a.seq].rows * group) < kind_of(seqs[b.seq].rows * group);
      });
    }
    for (const Item& item : items) {
      offsets.push_back(length);
      length += pair_cost(costs, item) * num_kv_heads;
    }
  }
  Line line() const {
    return {items.data(), offsets.data(), costs, static_cast<int>(items.size()),
            num_kv_heads, length};
  }
  bool is_equal() const {
    return std::all_of(items.begin(), items.end(), [&](const Item& item) {
      return pair_cost(costs, item) == pair_cost(costs, items[0]);
    });
  }
};

struct Part {
  int share, begin, end;
  Merge merge;  // as the share has it
};

bool is_before(Position a, Position b) {
  return a.pair < b.pair || (a.pair == b.pair && a.tile < b.tile);
}

// The parts of every pair, share by share, as a CTA walks them.
std::vector<std::vector<Part>> walk(const std::vector<Item>& items, int num_kv_heads,
                                    const std::vector<Share>& shares,
                                    const std::vector<int>& next_pairs) {
  std::vector<std::vector<Part>> parts(items.size() * num_kv_heads);
  for (size_t c = 0; c < shares.size(); ++c) {
    const Share& share = shares[c];
    if (!is_before(share.begin, share.end)) continue;
    const Item& first = items[share.begin.pair / num_kv_heads];
    EXPECT_EQ(share.item.seq, first.seq);
    EXPECT_EQ(share.item.packed_begin, first.packed_begin);
    const auto add = [&](Position at, int end) {
      parts[at.pair].push_back(
          {static_cast<int>(c), at.tile, end, at.tile > 0 ? share.earlier : share.later});
    };
    add(share.begin, share.end_tile);
    for (int pair = share.next_pair; is_before({pair, 0}, share.end);
         pair = share.chained ? next_pairs[pair] : pair + 1) {
      add({pair, 0},
          pair == share.end.pair ? share.end.tile : items[pair / num_kv_heads].num_tiles);
      if (parts[pair].size() > shares.size()) return parts;  // an endless chain
    }
  }
  // Claimed ones: every CTA has to know which, and begins with a piece of its own.
  if (shares[0].first_claimed == shares[0].num_pairs) return parts;
  EXPECT_TRUE(may_claim(static_cast<int>(parts.size()), static_cast<int>(shares.size())));
  for (const Share& share : shares) {
    EXPECT_EQ(share.first_claimed, shares[0].first_claimed);
    EXPECT_EQ(share.num_pairs, static_cast<int>(parts.size()));
    EXPECT_TRUE(is_before(share.begin, share.end));
  }
  for (size_t pair = shares[0].first_claimed; pair < parts.size(); ++pair) {
    parts[pair].push_back({0, 0, items[pair / num_kv_heads].num_tiles, {}});
  }
  return parts;
}

void expect_every_tile_once(const std::vector<Item>& items, int num_kv_heads,
                            const std::vector<Share>& shares, const std::vector<int>& next_pairs) {
  const auto parts = walk(items, num_kv_heads, shares, next_pairs);
  for (size_t pair = 0; pair < parts.size(); ++pair) {
    SCOPED_TRACE(::testing::Message() << "pair " << pair << " of " << parts.size());
    int next = 0;
    for (size_t i = 0; i < parts[pair].size(); ++i) {
      const Part& part = parts[pair][i];
      ASSERT_EQ(part.begin, next);
      ASSERT_LT(part.begin, part.end);
      next = part.end;
      if (parts[pair].size() == 1) continue;
      ASSERT_EQ(part.share, parts[pair][0].share + static_cast<int>(i));
      ASSERT_EQ(part.merge.first_share, parts[pair][0].share);
      ASSERT_EQ(part.merge.num_parts, static_cast<int>(parts[pair].size()));
    }
    ASSERT_EQ(next, items[pair / num_kv_heads].num_tiles);
  }
}

int dealt_part(const Step& step) {
  int cost = 0;
  for (const Item& item : step.items) cost += pair_cost(step.dealing, item);
  return cost * step.num_kv_heads / step.num_shares;
}

struct Dealt {
  std::vector<Item> items;  // in the order that pairs are counted in
  std::vector<Share> shares;
  std::vector<int> next_pairs;
  int largest = 0;  // cost of a share
};

std::vector<Item> by_falling_cost(const Step& step) {
  std::vector<Item> items = step.items;
  std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {
    return pair_cost(step.dealing, a) > pair_cost(step.dealing, b);
  });
  return items;
}

// As the schedule does, one dealer after the other. No shares: the parts do not fit.
Dealt deal(const Step& step, int way) {
  const int heads = step.num_kv_heads, num_pairs = step.line().num_pairs();
  Dealt dealt;
  dealt.next_pairs.resize(num_pairs, -1);
  dealt.items = by_falling_cost(step);
  const auto item_of = [&](int rank) -> const Item& { return dealt.items[rank]; };
  std::vector<CutPairs> cut;
  std::vector<uint32_t> orders;
  for (int c = 0; c < step.num_shares; ++c) {
    cut.push_back(cut_long_pairs(c, item_of, static_cast<int>(dealt.items.size()), step.dealing,
                                 longest_pair(way, dealt_part(step)), heads, step.num_shares));
    orders.push_back(dealing_order(cut[c].part.cost, c));
  }
  if (!cut[0].fit || step.num_shares < kDealers) return dealt;
  std::vector<int> last_pairs(step.num_shares, num_pairs);
  for (int pair = cut[0].first_whole; pair < num_pairs; ++pair) {
    int least = (pair - cut[0].first_whole) % kDealers;
    for (int c = least; c < step.num_shares; c += kDealers) {
      if (orders[c] < orders[least]) least = c;
    }
    dealt.next_pairs[pair] = last_pairs[least];
    last_pairs[least] = pair;
    orders[least] += dealing_order(pair_cost(step.dealing, dealt.items[pair / heads]), 0);
  }
  for (int c = 0; c < step.num_shares; ++c) {
    const int first = cut[c].part.parts > 0 ? cut[c].part.pair : last_pairs[c];
    const Item& item = dealt.items[std::min<size_t>(first / heads, dealt.items.size() - 1)];
    dealt.shares.push_back(
        dealt_share(cut[c].part, last_pairs[c], dealt.next_pairs.data(), item, num_pairs, c));
    dealt.largest = std::max(dealt.largest, load_of(orders[c]));
  }
  return dealt;
}

// Unequal pairs that are claimed, but for two of each share.
Dealt claim(const Step& step) {
  const int heads = step.num_kv_heads, num_pairs = step.line().num_pairs();
  Dealt claimed;
  if (step.kinds != 1 || !claims_pay(0, num_pairs, kLeastUnequalToClaim, step.num_shares)) {
    return claimed;
  }
  claimed.items = by_falling_cost(step);
  claimed.next_pairs.resize(num_pairs, -1);
  for (int c = 0; c < step.num_shares; ++c) {
    claimed.shares.push_back(
        claiming_share(claimed.items[c / heads], c, num_pairs, step.num_shares));
    claimed.next_pairs[second_held_pair(c, step.num_shares)] = num_pairs;
  }
  return claimed;
}

// All ways that the step allows.
void check(const Step& step) {
  const Line line = step.line();
  std::vector<Share> shares(step.num_shares);
  const Cut cut = cut_line(line.length, step.num_shares);
  for (int c = 0; c < step.num_shares; ++c) shares[c] = cut_share(line, cut, c);
  {
    SCOPED_TRACE("cut");
    expect_every_tile_once(step.items, step.num_kv_heads, shares, {});
  }
  const Even even = step.is_equal() ? cut_evenly(line, step.num_shares) : Even{};
  if (even.used()) {
    SCOPED_TRACE(::testing::Message() << even.pairs << " pairs, " << even.parts << " parts");
    for (int c = 0; c < step.num_shares; ++c)
      shares[c] = even_share(line, even, c, step.num_shares);
    expect_every_tile_once(step.items, step.num_kv_heads, shares, {});
  }
  const Dealt claimed = claim(step);
  if (!claimed.shares.empty()) {
    SCOPED_TRACE("claimed");
    expect_every_tile_once(claimed.items, step.num_kv_heads, claimed.shares, claimed.next_pairs);
  }
  for (int way = 0; way < kDealingWays; ++way) {
    const Dealt dealt = deal(step, way);
    if (dealt.shares.empty()) continue;
    SCOPED_TRACE(::testing::Message() << "dealt, way " << way);
    expect_every_tile_once(dealt.items, step.num_kv_heads, dealt.shares, dealt.next_pairs);
  }
}

TEST(EqualParts, EveryPlaceHasItsOwner) {
  for (uint32_t num_parts : {1u, 2u, 7u, 132u}) {
    for (uint32_t length : {1u, 6u, 7u, 131u, 132u, 133u, 1000u}) {
      const EqualParts<uint32_t> parts(length, num_parts);
      ASSERT_EQ(parts.begin(0), 0u);
      ASSERT_EQ(parts.begin(num_parts), length);
      for (uint32_t place = 0; place < length; ++place) {
        const uint32_t owner = parts.owner(place);
        ASSERT_LE(parts.begin(owner), place);
        ASSERT_LT(place, parts.begin(owner + 1));
        ASSERT_LE(parts.begin(owner + 1) - parts.begin(owner), (length - 1) / num_parts + 1);
      }
    }
  }
}

TEST(BlockAttentionCut, SharesHoldEveryTileOnce) {
  Rng rng(401);
  for (int trial = 0; trial < 3000; ++trial) {
    const int num_shares[] = {1, 2, 20, 108, 132, 148};
    const int most_keys = 1 << random_int(rng, 6, 15), shape = random_int(rng, 0, 3);
    std::vector<Sequence> seqs(1 << random_int(rng, 0, trial % 50 == 0 ? 8 : 5));
    if (seqs.size() > 2) seqs.resize(seqs.size() - random_int(rng, 0, 1));
    const Sequence common = {1 << random_int(rng, 0, 5), random_int(rng, 1, most_keys)};
    for (Sequence& seq : seqs) {
      seq = common;
      if (shape == 1) seq.keys = random_int(rng, most_keys - most_keys / 4, most_keys);
      if (shape > 1) seq = {random_int(rng, 1, 40), random_int(rng, 1, most_keys)};
      if (shape == 3 && random_int(rng, 0, 9) == 0) seq.rows = random_int(rng, 40, 700);
    }
    SCOPED_TRACE(::testing::Message() << "trial " << trial);
    check(Step(seqs, random_int(rng, 1, 16), 1 << random_int(rng, 0, 3),
               num_shares[random_int(rng, 0, 5)],
               random_int(rng, 0, 4) == 0 ? kHalfPackedRows : kMaxPackedRows));
    if (HasFatalFailure()) return;
  }
}

// Eight KV heads of four query heads, requests of 8 rows: what was fastest on 132 SMs.
TEST(BlockAttentionCut, FewRequestsAreCutAsMeasured) {
  const auto parts = [](int num_seqs, int keys) {
    const Step step(std::vector<Sequence>(num_seqs, {8, keys}), 4, 8, 132);
    return cut_evenly(step.line(), step.num_shares).parts;
  };
  EXPECT_EQ(parts(1, 256), 1);
  EXPECT_EQ(parts(1, 512), 4);
  EXPECT_EQ(parts(1, 1024), 8);
  EXPECT_EQ(parts(2, 512), 4);
  EXPECT_EQ(parts(2, 1024), 4);
  EXPECT_EQ(parts(2, 2048), 4);
  EXPECT_EQ(parts(3, 1024), 4);
  EXPECT_EQ(parts(4, 512), 3);
  EXPECT_EQ(parts(4, 1024), 3);
  EXPECT_EQ(parts(8, 11 * kTileKeys), 1);
  EXPECT_EQ(parts(8, 12 * kTileKeys), 2);
  EXPECT_EQ(parts(8, 1024), 2);
  EXPECT_EQ(parts(16, 1024), 1);
}

TEST(BlockAttentionCut, ItemsAreHalvedWhereHalfTheSharesAreIdle) {
  const auto halved = [](int num_seqs, int rows, int keys) {
    const Step step(std::vector<Sequence>(num_seqs, {rows, keys}), 4, 8, 132);
    return halving_pays(step.line(), cut_evenly(step.line(), step.num_shares), step.num_shares);
  };
  EXPECT_TRUE(halved(1, 32, 1024));
  EXPECT_TRUE(halved(2, 32, 512));
  EXPECT_TRUE(halved(1, 32, 512));
  EXPECT_FALSE(halved(1, 32, 448));  // halves would be whole
  EXPECT_FALSE(halved(1, 32, 256));
  EXPECT_FALSE(halved(3, 32, 512));   // 48 pairs are not cut evenly
  EXPECT_FALSE(halved(1, 32, 2048));  // shares are busy with parts
  EXPECT_FALSE(halved(2, 32, 1024));
  EXPECT_FALSE(halved(1, 16, 1024));  // already half
  EXPECT_FALSE(halved(9, 32, 1024));  // not in equal parts
}

// No share of many requests is much longer than the mean, however unequal they are.
TEST(BlockAttentionCut, DealingLevelsUnequalRequests) {
  constexpr int kTrials = 20;
  Rng rng(402);
  for (int num_seqs : {32, 48, 64, 128, 256}) {
    int num_dealt = 0;
    double over_mean = 0;
    for (int trial = 0; trial < kTrials; ++trial) {
      std::vector<Sequence> seqs(num_seqs);
      for (Sequence& seq : seqs) {
        const int octave = random_int(rng, 7, 11);
        seq = {1 << random_int(rng, 0, 5), random_int(rng, 1 << octave, 2 << octave)};
      }
      const Step step(seqs, 4, 8, 132);
      const int part = dealt_part(step);
      int largest = INT_MAX;
      for (int way = 0; way < kDealingWays; ++way) {
        const Dealt dealt = deal(step, way);
        if (!dealt.shares.empty()) largest = std::min(largest, dealt.largest);
      }
      num_dealt += largest <= longest_dealt(part, step.kinds, num_seqs * 8, 132);
      over_mean += static_cast<double>(largest) / part / kTrials;
    }
    EXPECT_GE(num_dealt, kTrials * 8 / 10) << num_seqs;
    EXPECT_LT(over_mean, num_seqs >= 64 ? 1.1 : 1.25) << num_seqs;
  }
}

// The longest share may take so much longer than an equal part of the line.
TEST(BlockAttentionCut, SeveralKindsCostWhatTheDearestDoes) {
  const auto more = [](uint32_t kinds, int num_pairs) {
    return longest_dealt(1000, kinds, num_pairs, 132) - 1000;
  };
  EXPECT_EQ(more(1, 200), cost_of(0, true).cutting);
  EXPECT_EQ(more(1 | 2, 200), cost_of(1, true).cutting);
  EXPECT_EQ(more(2 | 4, 200), cost_of(2, true).cutting);
  EXPECT_EQ(more(1 | 8, 200), cost_of(3, true).cutting);
  EXPECT_GT(more(1, 132), more(1, 133));
}

}  // namespace
}  // namespace optimus::cuda::attention

// PrefixCache: hits, alignment, sharing, eviction order, hash collisions. Random traffic against a
// naive model is in test_prefix_cache_random.cpp.
#include "engine/prefix_cache.h"

#include <gtest/gtest.h>

#include <random>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace optimus {
namespace {

using Tokens = std::vector<int32_t>;

std::vector<int32_t> allocate(PagePool& pool, int count) {
  std::vector<int32_t> pages;
  for (int i = 0; i < count; ++i) pages.push_back(pool.allocate());
  return pages;
}

void release(PagePool& pool, const std::vector<int32_t>& pages) {
  for (int32_t page : pages) pool.release(page);
}

// Computes and registers all full pages of `tokens`, as a request would that had no hit.
std::vector<int32_t> fill(PagePool& pool, PrefixCache& cache, int page_size, const Tokens& tokens) {
  const int count = static_cast<int>(tokens.size()) / page_size;
  std::vector<int32_t> pages = allocate(pool, count);
  cache.insert(tokens.data(), pages, 0, count);
  return pages;
}

PrefixCache::Match match(PrefixCache& cache, const Tokens& tokens) {
  return cache.match(tokens.data(), static_cast<int>(tokens.size()));
}

TEST(PrefixCache, HitsFullPagesOfTheSamePrefixOnly) {
  PagePool pool(8);
  PrefixCache cache(pool, 2, 1, true);
  const auto pages = fill(pool, cache, 2, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(cache.num_cached(), 3);

  const auto hit = match(cache, {1, 2, 3, 4, 5, 9, 9});
  EXPECT_EQ(hit.pages, (std::vector<int32_t>{pages[0], pages[1]}));
  EXPECT_EQ(hit.num_tokens, 4);
  EXPECT_EQ(pool.ref_count(pages[0]), 3) << "the writer, the cache, the match";
  EXPECT_EQ(pool.ref_count(pages[2]), 2);
  EXPECT_EQ(match(cache, {1, 2, 3}).pages.size(), 1u) << "half a page is no hit";
  EXPECT_TRUE(match(cache, {3, 4, 5, 6}).pages.empty()) << "same page tokens, other prefix";
  EXPECT_TRUE(match(cache, {}).pages.empty());
}

TEST(PrefixCache, KeysPagesByTheirWholeBlock) {
  PagePool pool(8);
  PrefixCache cache(pool, 2, 4, true);
  const auto pages = fill(pool, cache, 2, {1, 2, 3, 4, 5, 6});
  const auto hit = match(cache, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(hit.num_tokens, 4);
  EXPECT_EQ(hit.pages.size(), 2u);
  EXPECT_EQ(pool.ref_count(pages[2]), 1) << "half a block must not be cached";
  EXPECT_TRUE(match(cache, {1, 2, 9, 9}).pages.empty());

  // Same first page, other block: KV of its positions saw other neighbours, so it is another page.
  const auto others = fill(pool, cache, 2, {1, 2, 9, 9});
  EXPECT_EQ(match(cache, {1, 2, 9, 9}).pages, others);
  EXPECT_EQ(match(cache, {1, 2, 3, 4}).pages, (std::vector<int32_t>{pages[0], pages[1]}));

  PagePool other_pool(4);
  PrefixCache two_blocks_a_page(other_pool, 4, 2, true);
  fill(other_pool, two_blocks_a_page, 4, {1, 2, 3, 4});
  EXPECT_EQ(match(two_blocks_a_page, {1, 2, 3, 4, 5}).num_tokens, 4);
}

TEST(PrefixCache, DisabledGivesAndKeepsNothing) {
  PagePool pool(4);
  PrefixCache cache(pool, 2, 1, false);
  const auto pages = fill(pool, cache, 2, {1, 2, 3, 4});
  EXPECT_TRUE(match(cache, {1, 2, 3, 4}).pages.empty());
  EXPECT_EQ(pool.ref_count(pages[0]), 1);
  EXPECT_EQ(cache.num_cached() + cache.num_evictable() + cache.evict(4), 0);
}

TEST(PrefixCache, RejectsBadArguments) {
  PagePool pool(4);
  EXPECT_THROW(PrefixCache(pool, 0, 1, true), std::invalid_argument);
  EXPECT_THROW(PrefixCache(pool, 4, 0, true), std::invalid_argument);
  EXPECT_THROW(PrefixCache(pool, 4, 6, true), std::invalid_argument);
  PrefixCache cache(pool, 2, 1, true);
  EXPECT_THROW(PrefixCache(pool, 2, 1, true), std::logic_error) << "one cache a pool";
  const Tokens tokens = {1, 2, 3, 4};
  EXPECT_THROW(cache.insert(tokens.data(), {0}, 0, 2), std::invalid_argument);
  EXPECT_THROW(cache.insert(tokens.data(), {0}, 0, 1), std::logic_error) << "page 0 is free";
  EXPECT_EQ(cache.num_cached(), 0);
  EXPECT_TRUE(match(cache, tokens).pages.empty());
}

TEST(PrefixCache, EvictsUnheldLeavesLeastRecentlyUsedFirst) {
  PagePool pool(8);
  PrefixCache cache(pool, 1, 1, true);
  const auto a = fill(pool, cache, 1, {1, 2});
  const auto b = fill(pool, cache, 1, {3, 4});
  EXPECT_EQ(cache.num_evictable(), 0);
  EXPECT_EQ(cache.evict(1), 0) << "everything is held";
  release(pool, a);
  EXPECT_EQ(cache.num_evictable(), 2);
  release(pool, b);
  EXPECT_EQ(cache.num_evictable(), 4);
  release(pool, match(cache, {1, 2}).pages);  // now b is older

  EXPECT_EQ(cache.evict(1), 1);
  EXPECT_EQ(pool.ref_count(b[1]), 0) << "the leaf before its parent";
  EXPECT_EQ(pool.ref_count(b[0]), 1);
  EXPECT_EQ(cache.evict(2), 2);
  EXPECT_EQ(pool.ref_count(b[0]), 0);
  EXPECT_EQ(pool.ref_count(a[1]), 0);
  EXPECT_EQ(match(cache, {1, 2}).num_tokens, 1);
  EXPECT_EQ(cache.evict(5), 0) << "the match holds it";
}

TEST(PrefixCache, AHeldPageKeepsThePagesBeforeIt) {
  PagePool pool(8);
  PrefixCache cache(pool, 1, 1, true);
  const auto first = fill(pool, cache, 1, {1});
  // The same content again, and one page more: the copy is skipped, the page after it hangs on the
  // first sequence's page, which this sequence does not hold.
  const auto second = fill(pool, cache, 1, {1, 2});
  EXPECT_EQ(cache.num_cached(), 2);
  EXPECT_EQ(pool.ref_count(second[0]), 1);
  release(pool, first);
  EXPECT_EQ(pool.ref_count(first[0]), 1);
  EXPECT_EQ(cache.num_evictable(), 0);
  EXPECT_EQ(cache.evict(2), 0);
  release(pool, second);
  EXPECT_EQ(cache.num_evictable(), 2);
  cache.clear();
  EXPECT_EQ(pool.num_free(), 8);
}

TEST(PrefixCache, OwnCopyReplacesAnEvictedOne) {
  PagePool pool(8);
  PrefixCache cache(pool, 1, 1, true);
  const auto first = fill(pool, cache, 1, {1});
  const auto second = allocate(pool, 2);
  const Tokens tokens = {1, 2};
  cache.insert(tokens.data(), second, 0, 1);  // skipped
  release(pool, first);
  EXPECT_EQ(cache.evict(1), 1);
  cache.insert(tokens.data(), second, 1, 2);
  EXPECT_EQ(match(cache, tokens).pages, second);
}

TEST(PrefixCache, GivesItsReferencesBackWhenDestroyed) {
  PagePool pool(4);
  std::vector<int32_t> pages;
  {
    PrefixCache cache(pool, 1, 1, true);
    pages = fill(pool, cache, 1, {1, 2, 3});
    pool.release(pages[2]);
  }
  EXPECT_EQ(pool.num_free(), 2);
  release(pool, {pages[0], pages[1]});
  EXPECT_EQ(pool.num_free(), 4);
}

TEST(PrefixCache, EqualHashesDoNotMixUpContents) {
  // Two pages of two tokens whose first tokens agree in the upper half of the running hash: the
  // second token can then cancel the difference in the lower half.
  const auto after_first = [](int32_t token) {
    return ((0 + 0x9E3779B97F4A7C15ull) ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15ull;
  };
  std::unordered_map<uint32_t, int32_t> by_upper_half;
  Tokens a, b;
  std::mt19937 random(1);
  for (int i = 0; a.empty() && i < 2000000; ++i) {
    const int32_t token = static_cast<int32_t>(random());
    const auto [found, is_new] =
        by_upper_half.emplace(static_cast<uint32_t>(after_first(token) >> 32), token);
    if (is_new || found->second == token) continue;
    a = {found->second, 7};
    const uint64_t difference = after_first(a[0]) ^ after_first(token);
    b = {token, 7 ^ static_cast<int32_t>(static_cast<uint32_t>(difference))};
  }
  ASSERT_FALSE(a.empty());
  ASSERT_NE(a, b);
  ASSERT_EQ(PrefixCache::hash_page(0, a.data(), 2), PrefixCache::hash_page(0, b.data(), 2));

  // The pages after them have equal tokens, and equal hashes again.
  a.insert(a.end(), {1, 2});
  b.insert(b.end(), {1, 2});
  for (const bool older_goes : {true, false}) {
    PagePool pool(8);
    PrefixCache cache(pool, 2, 1, true);
    const auto pages_a = fill(pool, cache, 2, a);
    EXPECT_TRUE(match(cache, b).pages.empty());
    const auto pages_b = fill(pool, cache, 2, b);
    EXPECT_EQ(cache.num_cached(), 4);
    release(pool, older_goes ? pages_a : pages_b);
    EXPECT_EQ(cache.evict(4), 2);
    EXPECT_EQ(match(cache, a).pages, older_goes ? std::vector<int32_t>() : pages_a);
    EXPECT_EQ(match(cache, b).pages, older_goes ? pages_b : std::vector<int32_t>());
  }
}

}  // namespace
}  // namespace optimus

// PrefixCache under random traffic, against a naive model: requests start, register their pages,
// finish, and pages are evicted; after every operation all counts must agree.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "engine/prefix_cache.h"

namespace optimus {
namespace {

using Tokens = std::vector<int32_t>;

// The model: prefixes in a map, holders counted apart from the pool, everything recomputed from
// scratch. A page's content is what was computed into it; reusing the page changes it, so that a
// hit on a page the cache should have forgotten shows.
class RandomTraffic {
 public:
  RandomTraffic(int num_pages, int page_size, int alignment, uint32_t seed)
      : page_size_(page_size),
        alignment_(alignment),
        random_(seed),
        pool_(num_pages),
        cache_(pool_, page_size, alignment, true),
        holders_(num_pages, 0),
        content_(num_pages) {}

  void run(int num_steps) {
    for (int step = 0; step < num_steps; ++step) {
      const int operation = below(8);
      if (operation < 3) {
        start();
      } else if (operation < 5) {
        advance();
      } else if (operation < 7) {
        finish();
      } else {
        evict(below(40) == 0 ? pool_.num_pages() : below(6));
      }
      verify();
      if (::testing::Test::HasFatalFailure()) FAIL() << "at step " << step;
    }
    EXPECT_GT(num_hit_pages_, num_steps / 20) << "the traffic must exercise hits";
    EXPECT_GT(num_evicted_, num_steps / 20) << "the traffic must exercise eviction";
    EXPECT_GT(num_replaced_, 0) << "the traffic must exercise evicted copies";
    while (!sequences_.empty()) finish();
    evict(pool_.num_pages());
    EXPECT_EQ(pool_.num_free(), pool_.num_pages());
  }

 private:
  struct Sequence {
    Tokens tokens;
    std::vector<int32_t> pages;
    int num_registered = 0;
  };
  struct Node {
    int32_t page;
    uint64_t last_used;
  };

  int below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }
  // What the last of `num_pages` pages stands for: page after page, the tokens of its whole block,
  // whose missing end (-1) matches nothing.
  Tokens prefix(const Tokens& tokens, int num_pages) const {
    const int unit = std::max(page_size_, alignment_);
    Tokens key;
    for (int page = 0; page < num_pages; ++page) {
      const size_t begin = page * page_size_ / unit * unit;
      for (size_t i = begin; i < begin + unit; ++i) {
        key.push_back(i < tokens.size() ? tokens[i] : -1);
      }
    }
    return key;
  }
  int whole_blocks(int num_pages) const {
    return num_pages - num_pages % std::max(1, alignment_ / page_size_);
  }

  static bool starts_with(const Tokens& tokens, const Tokens& start) {
    return tokens.size() >= start.size() && std::equal(start.begin(), start.end(), tokens.begin());
  }

  // Nobody but the cache holds the node or a node below it.
  bool evictable(const Tokens& key) const {
    return std::all_of(nodes_.begin(), nodes_.end(), [&](const auto& item) {
      return !starts_with(item.first, key) || holders_[item.second.page] == 0;
    });
  }

  bool leaf(const Tokens& key) const {
    return std::none_of(nodes_.begin(), nodes_.end(), [&](const auto& item) {
      return item.first.size() > key.size() && starts_with(item.first, key);
    });
  }

  bool is_cached(int32_t page) const {
    return std::any_of(nodes_.begin(), nodes_.end(),
                       [&](const auto& item) { return item.second.page == page; });
  }

  void start() {
    if (sequences_.size() >= 5) return;
    Sequence sequence;
    const int num_pages = 1 + below(5);
    for (int i = 1; i <= num_pages * page_size_; ++i) {
      sequence.tokens.push_back(i % page_size_ == 0 && below(3) == 0);
    }
    const int num_queried = num_pages * page_size_ - below(page_size_ + 1);
    int expected = 0;
    while (expected < whole_blocks(num_queried / page_size_) &&
           nodes_.count(prefix(sequence.tokens, expected + 1))) {
      ++expected;
    }
    expected = whole_blocks(expected);

    const auto hit = cache_.match(sequence.tokens.data(), num_queried);
    ASSERT_EQ(hit.num_tokens, expected * page_size_);
    ASSERT_EQ(static_cast<int>(hit.pages.size()), expected);
    ++clock_;
    for (int i = 0; i < expected; ++i) {
      ASSERT_EQ(content_[hit.pages[i]], prefix(sequence.tokens, i + 1));
      nodes_.at(prefix(sequence.tokens, i + 1)).last_used = clock_;
      ++holders_[hit.pages[i]];
    }
    num_hit_pages_ += expected;
    sequence.pages = hit.pages;
    sequence.num_registered = expected;
    evict(num_pages - expected - pool_.num_free());
    if (num_pages - expected <= pool_.num_free()) {
      for (int i = expected; i < num_pages; ++i) {
        const int32_t page = pool_.allocate();
        ASSERT_EQ(holders_[page], 0) << "page " << page << " was freed under its holder";
        holders_[page] = 1;
        content_[page] = prefix(sequence.tokens, i + 1);
        sequence.pages.push_back(page);
      }
    }
    sequences_.push_back(sequence);
  }

  void advance() {
    if (sequences_.empty()) return;
    Sequence& sequence = sequences_[below(static_cast<int>(sequences_.size()))];
    const int from = sequence.num_registered;
    const int to = from + below(static_cast<int>(sequence.pages.size()) - from + 1);
    cache_.insert(sequence.tokens.data(), sequence.pages, from, to);
    if (whole_blocks(to) <= from) return;
    sequence.num_registered = whole_blocks(to);
    ++clock_;
    const bool on_chain = from > 0 && is_cached(sequence.pages[from - 1]);
    for (int i = on_chain ? from : 0; i < sequence.num_registered; ++i) {
      const auto [node, is_new] =
          nodes_.try_emplace(prefix(sequence.tokens, i + 1), Node{sequence.pages[i], clock_});
      node->second.last_used = clock_;
      num_replaced_ += is_new && i < from;
    }
  }

  void finish() {
    if (sequences_.empty()) return;
    const auto chosen = sequences_.begin() + below(static_cast<int>(sequences_.size()));
    std::vector<int32_t> pages = chosen->pages;
    sequences_.erase(chosen);
    std::shuffle(pages.begin(), pages.end(), random_);
    for (int32_t page : pages) {
      pool_.release(page);
      if (--holders_[page] > 0) continue;
      for (auto& [key, node] : nodes_) {
        if (node.page == page) node.last_used = ++clock_;
      }
    }
  }

  void evict(int num_pages) {
    int expected = 0;
    for (; expected < num_pages; ++expected) {
      auto oldest = nodes_.end();
      for (auto node = nodes_.begin(); node != nodes_.end(); ++node) {
        if (holders_[node->second.page] > 0 || !leaf(node->first)) continue;
        if (oldest == nodes_.end() || node->second.last_used < oldest->second.last_used) {
          oldest = node;
        }
      }
      if (oldest == nodes_.end()) break;
      nodes_.erase(oldest);
    }
    num_evicted_ += expected;
    ASSERT_EQ(cache_.evict(num_pages), expected);
  }

  void verify() {
    std::vector<int> expected = holders_;
    int num_evictable = 0;
    for (const auto& [key, node] : nodes_) {
      ++expected[node.page];
      num_evictable += evictable(key);
    }
    for (int32_t page = 0; page < pool_.num_pages(); ++page) {
      ASSERT_EQ(pool_.ref_count(page), expected[page]) << "page " << page;
    }
    ASSERT_EQ(pool_.num_free(), std::count(expected.begin(), expected.end(), 0));
    ASSERT_EQ(cache_.num_cached(), static_cast<int>(nodes_.size()));
    ASSERT_EQ(cache_.num_evictable(), num_evictable);
  }

  int page_size_, alignment_;
  std::mt19937 random_;
  PagePool pool_;
  PrefixCache cache_;
  std::vector<int> holders_;     // by page: sequences that hold it
  std::vector<Tokens> content_;  // by page: the prefix it was computed for
  std::map<Tokens, Node> nodes_;
  std::vector<Sequence> sequences_;
  uint64_t clock_ = 0;
  int num_hit_pages_ = 0, num_evicted_ = 0, num_replaced_ = 0;
};

TEST(PrefixCacheRandom, PagesAreBlocks) { RandomTraffic(24, 2, 2, 1).run(20000); }
TEST(PrefixCacheRandom, OneTokenPages) { RandomTraffic(24, 1, 1, 2).run(20000); }
TEST(PrefixCacheRandom, BlocksOfTwoPages) { RandomTraffic(24, 2, 4, 3).run(20000); }
TEST(PrefixCacheRandom, PagesOfTwoBlocks) { RandomTraffic(40, 4, 2, 4).run(20000); }

}  // namespace
}  // namespace optimus

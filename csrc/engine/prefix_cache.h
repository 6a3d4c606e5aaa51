// Full KV pages by content, so that a request whose prompt starts like an earlier one skips that
// part.
//
// A page is keyed by the chain of pages before it and its tokens (compared, not only hashed).
// The cache holds one reference to each of its pages; a page that nobody else holds is evictable,
// children before parents, least recently used first (in use until its last holder releases it).
// Only pages whose KV is clean (computed from real tokens in a clean context) may be registered: a
// hit must not change anyone's tokens.
#pragma once

#include <cstdint>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/page_pool.h"

namespace optimus {

class PrefixCache : private PagePool::Listener {
 public:
  // `alignment`: matches end at a multiple of it (the block length, or 1 in ar mode). The pool must
  // outlive the cache and serve no other enabled cache.
  PrefixCache(PagePool& pool, int page_size, int alignment, bool enabled);
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  struct Match {
    std::vector<int32_t> pages;  // retained for the caller, who releases them
    int num_tokens = 0;          // pages.size() * page_size, a multiple of `alignment`
  };
  // Longest cached prefix of tokens[0, num_tokens).
  Match match(const int32_t* tokens, int num_tokens);

  // Registers pages[num_registered ...num_full) of a sequence whose first num_full * page_size
  // tokens are given; of a last block that is not whole, none. A page whose content is already cached is skipped (the sequence keeps its own
  // copy). Pages [0, num_registered) must have been registered or matched before; where another
  // sequence's copy of such a page has been evicted since, this sequence's own takes its place.
  void insert(const int32_t* tokens, const std::vector<int32_t>& pages, int num_registered,
              int num_full);

  // Exactly what evict() could free in total: cached pages such that nobody else holds them or a
  // cached page after them. O(1).
  int num_evictable() const { return num_cached_ - num_blocked_; }
  int num_cached() const { return num_cached_; }
  int page_size() const { return page_size_; }
  // Frees min(num_pages, num_evictable()) pages and returns that number. O(log n) a page.
  int evict(int num_pages);
  void clear() { evict(num_cached_); }  // drops every evictable page

  // Hash of a page from that of the page before it (0 for the first). Public so that tests can
  // construct a collision.
  static uint64_t hash_page(uint64_t parent_hash, const int32_t* tokens, int num_tokens);

 private:
  static constexpr int32_t kNone = -1;

  // A cached page is a node of a forest: its parent is the page before it. Indexed by page id.
  struct Entry {
    bool cached = false;
    bool held = false;  // somebody else has a reference
    int32_t parent = kNone;
    int32_t next_same_hash = kNone;
    int num_children = 0;
    int num_blocked_children = 0;
    uint64_t hash = 0;
    uint64_t last_used = 0;  // set when the last holder releases it, or its content is met again

    // Not evictable, and neither are the pages before it.
    bool blocked() const { return held || num_blocked_children > 0; }
    bool evictable_leaf() const { return cached && !held && num_children == 0; }
  };

  void on_shared_changed(int32_t page, bool shared) override;
  void set_held(int32_t page, bool held);
  void touch(int32_t page, uint64_t time);
  // The tokens that key a page: its own, or where several pages make a block, the whole block's,
  // since positions of a block see each other.
  const int32_t* key_tokens(const int32_t* tokens, int page_idx) const;
  int32_t find(int32_t parent, uint64_t hash, const int32_t* tokens) const;
  uint64_t hash_after(int32_t parent, const int32_t* tokens) const;
  void add(int32_t page, int32_t parent, uint64_t hash, const int32_t* tokens);
  void remove(int32_t page);

  PagePool& pool_;
  int page_size_;
  int unit_;  // tokens a page's content depends on besides the pages before it: see key_tokens
  bool enabled_;
  std::vector<Entry> entries_;   // [num_pages]
  std::vector<int32_t> tokens_;  // [num_pages, unit]
  std::unordered_map<uint64_t, int32_t> first_by_hash_;
  std::set<std::pair<uint64_t, int32_t>> leaves_;  // evictable leaves, (last_used, page)
  uint64_t clock_ = 0;
  int num_cached_ = 0, num_blocked_ = 0;
};

}  // namespace optimus

// The prefix cache as a forest over page ids.
//
// A page is in the cache at most once, so the page id is the node id and nothing is allocated per
// node. Whether a page is evictable depends on references taken and dropped elsewhere; the pool
// reports those, and each node counts its blocked children, so that a change travels towards the
// root only as far as it changes anything: retaining or releasing a whole chain costs O(1) a page.
#include "engine/prefix_cache.h"

#include <algorithm>

#include "core/check.h"

namespace optimus {

PrefixCache::PrefixCache(PagePool& pool, int page_size, int alignment, bool enabled)
    : pool_(pool), page_size_(page_size), unit_(std::max(page_size, alignment)), enabled_(enabled) {
  OPTIMUS_CHECK(page_size > 0, "[prefix_cache] page_size must be positive, got ", page_size);
  OPTIMUS_CHECK(alignment > 0, "[prefix_cache] alignment must be positive, got ", alignment);
  OPTIMUS_CHECK(page_size % alignment == 0 || alignment % page_size == 0,
                "[prefix_cache] page_size must be a multiple of alignment or divide it, got ",
                page_size, " and ", alignment);
  if (!enabled) return;
  entries_.resize(pool.num_pages());
  tokens_.resize(static_cast<size_t>(pool.num_pages()) * unit_);
  pool.set_listener(this);
}

PrefixCache::~PrefixCache() {
  if (!enabled_) return;
  pool_.set_listener(nullptr);
  for (size_t page = 0; page < entries_.size(); ++page) {
    if (entries_[page].cached) pool_.release(static_cast<int32_t>(page));
  }
}

uint64_t PrefixCache::hash_page(uint64_t parent_hash, const int32_t* tokens, int num_tokens) {
  constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15ull;
  uint64_t hash = parent_hash + kMultiplier;
  for (int i = 0; i < num_tokens; ++i) {
    hash = (hash ^ static_cast<uint32_t>(tokens[i])) * kMultiplier;
  }
  return hash ^ (hash >> 32);  // multiplication moves information upwards only
}

uint64_t PrefixCache::hash_after(int32_t parent, const int32_t* tokens) const {
  return hash_page(parent == kNone ? 0 : entries_[parent].hash, tokens, unit_);
}

const int32_t* PrefixCache::key_tokens(const int32_t* tokens, int page_idx) const {
  return tokens + static_cast<size_t>(page_idx) * page_size_ / unit_ * unit_;
}

int32_t PrefixCache::find(int32_t parent, uint64_t hash, const int32_t* tokens) const {
  const auto bucket = first_by_hash_.find(hash);
  int32_t page = bucket == first_by_hash_.end() ? kNone : bucket->second;
  for (; page != kNone; page = entries_[page].next_same_hash) {
    // Same parent page and same tokens are, by induction, the same whole prefix.
    const int32_t* own = tokens_.data() + static_cast<size_t>(page) * unit_;
    if (entries_[page].parent == parent && std::equal(own, own + unit_, tokens)) break;
  }
  return page;
}

PrefixCache::Match PrefixCache::match(const int32_t* tokens, int num_tokens) {
  OPTIMUS_CHECK(num_tokens >= 0, "[prefix_cache] match: num_tokens is negative: ", num_tokens);
  Match match;
  if (!enabled_) return match;
  const int pages_per_unit = unit_ / page_size_;
  int32_t parent = kNone;
  for (int i = 0; i < num_tokens / unit_ * pages_per_unit; ++i) {
    const int32_t* key = key_tokens(tokens, i);
    const int32_t page = find(parent, hash_after(parent, key), key);
    if (page == kNone) break;
    match.pages.push_back(page);
    parent = page;
  }
  match.pages.resize(match.pages.size() / pages_per_unit * pages_per_unit);
  match.num_tokens = static_cast<int>(match.pages.size()) * page_size_;
  // In use from here on; the release that ends it sets the time of last use.
  for (int32_t page : match.pages) pool_.retain(page);
  return match;
}

void PrefixCache::insert(const int32_t* tokens, const std::vector<int32_t>& pages,
                         int num_registered, int num_full) {
  OPTIMUS_CHECK(0 <= num_registered && num_registered <= num_full &&
                    num_full <= static_cast<int>(pages.size()),
                "[prefix_cache] insert: pages [", num_registered, ", ", num_full, ") of ",
                pages.size());
  num_full -= num_full % (unit_ / page_size_);
  if (!enabled_ || num_registered >= num_full) return;
  // Usually the sequence's last registered page is in the cache itself and the chain goes on from
  // there. Where its content was cached already it kept its own copy, which is not a node: walk the
  // chain by content from the start.
  int first = num_registered;
  int32_t parent = first > 0 ? pages[first - 1] : kNone;
  if (parent != kNone && !entries_.at(parent).cached) {
    first = 0;
    parent = kNone;
  }
  ++clock_;
  for (int i = first; i < num_full; ++i) {
    const int32_t* key = key_tokens(tokens, i);
    const uint64_t hash = hash_after(parent, key);
    int32_t page = find(parent, hash, key);
    if (page == kNone) {
      page = pages[i];
      add(page, parent, hash, key);
    }
    touch(page, clock_);
    parent = page;
  }
}

void PrefixCache::add(int32_t page, int32_t parent, uint64_t hash, const int32_t* tokens) {
  OPTIMUS_INVARIANT(!entries_.at(page).cached, "[prefix_cache] insert: page ", page,
                    " is cached with other content");
  pool_.retain(page);  // throws for a free page, before anything has changed
  Entry entry;
  entry.cached = true;
  entry.parent = parent;
  entry.hash = hash;
  const auto [bucket, is_new] = first_by_hash_.try_emplace(hash, page);
  if (!is_new) entry.next_same_hash = std::exchange(bucket->second, page);
  entries_[page] = entry;
  std::copy_n(tokens, unit_, tokens_.data() + static_cast<size_t>(page) * unit_);
  if (parent != kNone) {
    Entry& above = entries_[parent];
    if (above.evictable_leaf()) leaves_.erase({above.last_used, parent});
    ++above.num_children;
  }
  ++num_cached_;
  set_held(page, true);  // by the inserting sequence
}

void PrefixCache::touch(int32_t page, uint64_t time) {
  Entry& entry = entries_[page];
  const bool is_leaf = entry.evictable_leaf();
  if (is_leaf) leaves_.erase({entry.last_used, page});
  entry.last_used = time;
  if (is_leaf) leaves_.insert({time, page});
}

void PrefixCache::on_shared_changed(int32_t page, bool shared) {
  if (!entries_[page].cached) return;
  set_held(page, shared);
  if (!shared) touch(page, ++clock_);  // in use until now
}

void PrefixCache::set_held(int32_t page, bool held) {
  Entry& entry = entries_[page];
  if (entry.held == held) return;
  const bool was_blocked = entry.blocked();
  if (entry.evictable_leaf()) leaves_.erase({entry.last_used, page});
  entry.held = held;
  if (entry.evictable_leaf()) leaves_.insert({entry.last_used, page});
  if (entry.blocked() == was_blocked) return;

  const int delta = was_blocked ? -1 : 1;
  num_blocked_ += delta;
  for (int32_t above = entry.parent; above != kNone; above = entries_[above].parent) {
    const bool above_was_blocked = entries_[above].blocked();
    entries_[above].num_blocked_children += delta;
    if (entries_[above].blocked() == above_was_blocked) break;
    num_blocked_ += delta;
  }
}

int PrefixCache::evict(int num_pages) {
  int num_freed = 0;
  // Every evictable page has only evictable pages below it, so leaves do not run out before them.
  while (num_freed < num_pages && !leaves_.empty()) {
    const int32_t page = leaves_.begin()->second;
    remove(page);
    const bool freed = pool_.release(page);
    OPTIMUS_INVARIANT(freed, "[prefix_cache] evicted page ", page, " is still held");
    ++num_freed;
  }
  return num_freed;
}

// Takes an evictable leaf out of the forest.
void PrefixCache::remove(int32_t page) {
  const Entry entry = entries_[page];
  leaves_.erase({entry.last_used, page});
  entries_[page] = Entry();
  --num_cached_;

  const auto bucket = first_by_hash_.find(entry.hash);
  int32_t* link = &bucket->second;
  while (*link != page) link = &entries_[*link].next_same_hash;
  *link = entry.next_same_hash;
  if (bucket->second == kNone) first_by_hash_.erase(bucket);

  if (entry.parent == kNone) return;
  Entry& above = entries_[entry.parent];
  --above.num_children;
  if (above.evictable_leaf()) leaves_.insert({above.last_used, entry.parent});
}

}  // namespace optimus

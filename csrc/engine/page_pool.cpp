// Reference counts over a stack of free page ids. Every misuse (a page that does not exist, a
// reference to a free page) throws at once: a double release would otherwise surface much later, as
// one request reading another one's KV.
#include "engine/page_pool.h"

#include "core/check.h"

namespace optimus {

PagePool::PagePool(int num_pages) {
  OPTIMUS_CHECK(num_pages >= 0, "[page_pool] num_pages must not be negative, got ", num_pages);
  ref_counts_.assign(num_pages, 0);
  free_.reserve(num_pages);
  // Lowest id on top, so that a fresh pool hands out 0, 1, 2, ...: readable page tables.
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

void PagePool::check_page(int32_t page, const char* what) const {
  OPTIMUS_INVARIANT(page >= 0 && page < num_pages(), "[page_pool] ", what, " of page ", page,
                    ", the pool has ", num_pages());
}

int PagePool::ref_count(int32_t page) const {
  check_page(page, "ref_count");
  return ref_counts_[page];
}

int32_t PagePool::allocate() {
  OPTIMUS_INVARIANT(!free_.empty(), "[page_pool] allocate: none of ", num_pages(),
                    " pages is free");
  const int32_t page = free_.back();
  free_.pop_back();
  ref_counts_[page] = 1;
  return page;
}

void PagePool::retain(int32_t page) {
  check_page(page, "retain");
  OPTIMUS_INVARIANT(ref_counts_[page] > 0, "[page_pool] retain of page ", page, ", which is free");
  if (++ref_counts_[page] == 2 && listener_) listener_->on_shared_changed(page, true);
}

bool PagePool::release(int32_t page) {
  check_page(page, "release");
  OPTIMUS_INVARIANT(ref_counts_[page] > 0, "[page_pool] release of page ", page, ", which is free");
  const int left = --ref_counts_[page];
  if (left == 1 && listener_) listener_->on_shared_changed(page, false);
  if (left > 0) return false;
  free_.push_back(page);
  return true;
}

void PagePool::set_listener(Listener* listener) {
  OPTIMUS_INVARIANT(!listener || !listener_ || listener == listener_,
                    "[page_pool] set_listener: the pool already has another listener");
  listener_ = listener;
}

}  // namespace optimus

// KV pages as reference-counted ids: pages are shared between requests and the prefix cache without
// copying. A page is writable by its only owner; shared pages are read-only.
#pragma once

#include <cstdint>
#include <vector>

namespace optimus {

class PagePool {
 public:
  // Told when a page gains its second reference and when it falls back to one. The prefix cache
  // holds one reference to each of its pages, so this is how it knows, without scanning, which of
  // them nobody else holds. Must not call back into the pool.
  class Listener {
   public:
    virtual void on_shared_changed(int32_t page, bool shared) = 0;

   protected:
    ~Listener() = default;
  };

  explicit PagePool(int num_pages);
  // A copy would hand out the same pages twice.
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  int num_pages() const { return static_cast<int>(ref_counts_.size()); }
  int num_free() const { return static_cast<int>(free_.size()); }
  int ref_count(int32_t page) const;  // 0 = free

  // Takes a free page with reference count 1; throws std::logic_error when none is free.
  int32_t allocate();
  void retain(int32_t page);
  // Drops one reference; the last one frees the page. Returns true when the page became free.
  bool release(int32_t page);

  // At most one listener at a time; nullptr removes it.
  void set_listener(Listener* listener);

 private:
  void check_page(int32_t page, const char* what) const;

  std::vector<int32_t> free_;  // a stack: the page freed last is reused first
  std::vector<int> ref_counts_;
  Listener* listener_ = nullptr;
};

}  // namespace optimus

// PagePool: reference counts, misuse, the listener, and conservation under random operations.
#include "engine/page_pool.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

namespace optimus {
namespace {

TEST(PagePool, HandsOutEveryPageOnceInOrder) {
  PagePool pool(4);
  EXPECT_EQ(pool.num_pages(), 4);
  for (int32_t page = 0; page < 4; ++page) {
    EXPECT_EQ(pool.ref_count(page), 0);
    EXPECT_EQ(pool.allocate(), page);
    EXPECT_EQ(pool.ref_count(page), 1);
    EXPECT_EQ(pool.num_free(), 3 - page);
  }
  EXPECT_THROW(pool.allocate(), std::logic_error);
  EXPECT_EQ(pool.num_free(), 0);
}

TEST(PagePool, LastReleaseFrees) {
  PagePool pool(2);
  const int32_t page = pool.allocate();
  pool.retain(page);
  EXPECT_EQ(pool.ref_count(page), 2);
  EXPECT_FALSE(pool.release(page));
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_TRUE(pool.release(page));
  EXPECT_EQ(pool.num_free(), 2);
  EXPECT_EQ(pool.allocate(), page) << "the page freed last is reused first";
}

TEST(PagePool, MisuseThrowsAndChangesNothing) {
  EXPECT_THROW(PagePool(-1), std::invalid_argument);
  EXPECT_THROW(PagePool(0).allocate(), std::logic_error);
  PagePool pool(2);
  EXPECT_THROW(pool.release(0), std::logic_error);
  EXPECT_THROW(pool.retain(0), std::logic_error);
  EXPECT_THROW(pool.retain(-1), std::logic_error);
  EXPECT_THROW(pool.release(2), std::logic_error);
  EXPECT_THROW(pool.ref_count(2), std::logic_error);
  EXPECT_EQ(pool.num_free(), 2);
  EXPECT_EQ(pool.ref_count(0), 0);
}

struct Recorder : PagePool::Listener {
  void on_shared_changed(int32_t page, bool shared) override { events.push_back({page, shared}); }
  std::vector<std::pair<int32_t, bool>> events;
};

TEST(PagePool, ListenerHearsOnlyTheSecondReference) {
  PagePool pool(2);
  Recorder recorder, other;
  pool.set_listener(&recorder);
  EXPECT_THROW(pool.set_listener(&other), std::logic_error);
  pool.allocate();
  const int32_t page = pool.allocate();
  pool.retain(page);
  pool.retain(page);
  pool.release(page);
  pool.release(page);
  pool.release(page);
  const std::vector<std::pair<int32_t, bool>> expected = {{page, true}, {page, false}};
  EXPECT_EQ(recorder.events, expected);
  pool.set_listener(nullptr);
  pool.retain(0);
  EXPECT_EQ(recorder.events, expected);
}

TEST(PagePool, RandomOperationsConserveReferences) {
  constexpr int kNumPages = 17;
  PagePool pool(kNumPages);
  std::vector<int> counts(kNumPages, 0);  // the model
  std::vector<int32_t> references;        // one entry per reference somebody has
  std::mt19937 random(1);
  for (int step = 0; step < 20000; ++step) {
    const int operation = static_cast<int>(random() % 3);
    if (operation == 0) {
      const std::set<int32_t> held(references.begin(), references.end());
      if (held.size() == kNumPages) {
        ASSERT_THROW(pool.allocate(), std::logic_error);
        continue;
      }
      const int32_t page = pool.allocate();
      ASSERT_EQ(held.count(page), 0u) << "page " << page << " was handed out twice";
      counts.at(page) = 1;
      references.push_back(page);
    } else if (!references.empty()) {
      const size_t i = random() % references.size();
      const int32_t page = references[i];
      // Drift between an empty and an exhausted pool.
      if (operation == 1 && (step / 1000) % 2 == 0) {
        pool.retain(page);
        ++counts[page];
        references.push_back(page);
      } else {
        ASSERT_EQ(pool.release(page), --counts[page] == 0);
        references.erase(references.begin() + static_cast<std::ptrdiff_t>(i));
      }
    }
    int num_free = 0;
    for (int32_t page = 0; page < kNumPages; ++page) {
      ASSERT_EQ(pool.ref_count(page), counts[page]);
      num_free += counts[page] == 0;
    }
    ASSERT_EQ(pool.num_free(), num_free);
  }
}

}  // namespace
}  // namespace optimus

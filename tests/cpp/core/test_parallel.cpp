// ThreadPool: partition, grain, exceptions, many short jobs.
#include <sys/resource.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <system_error>

#include "core/parallel.h"
#include "testing.h"

namespace optimus {
namespace {

TEST(ThreadPool, PartitionsTheRange) {
  for (int num_threads : {1, 2, 3, 7}) {
    ThreadPool pool(num_threads);
    EXPECT_EQ(pool.num_threads(), num_threads);
    for (int64_t count : {0, 1, 2, 5, 100, 1001}) {
      for (int64_t grain : {0, 1, 10, 400}) {
        std::mutex mutex;
        std::vector<std::pair<int64_t, int64_t>> ranges;
        pool.parallel_for(count, grain, [&](int64_t begin, int64_t end) {
          std::lock_guard<std::mutex> lock(mutex);
          ranges.emplace_back(begin, end);
        });
        std::sort(ranges.begin(), ranges.end());
        int64_t next = 0;
        for (auto [begin, end] : ranges) {
          EXPECT_EQ(begin, next);
          EXPECT_GE(end - begin, std::min(count, grain));
          EXPECT_LT(begin, end);
          next = end;
        }
        EXPECT_EQ(next, count);
        EXPECT_LE(static_cast<int>(ranges.size()), num_threads);
      }
    }
  }
}

TEST(ThreadPool, UsesEveryCoreByDefault) {
  EXPECT_EQ(ThreadPool().num_threads(), std::max(1u, std::thread::hardware_concurrency()));
}

TEST(ThreadPool, RethrowsTheFirstExceptionAndGoesOn) {
  ThreadPool pool(4);
  for (int round = 0; round < 100; ++round) {
    std::atomic<int> calls{0};
    auto job = [&](int64_t begin, int64_t) {
      ++calls;
      if (begin == round % 4) throw std::invalid_argument("item " + std::to_string(begin));
    };
    testing::expect_invalid([&] { pool.parallel_for(4, 1, job); },
                            "item " + std::to_string(round % 4));
    EXPECT_EQ(calls, 4);
    int64_t sum = 0;
    std::mutex mutex;
    pool.parallel_for(10, 1, [&](int64_t begin, int64_t end) {
      std::lock_guard<std::mutex> lock(mutex);
      for (int64_t i = begin; i < end; ++i) sum += i;
    });
    EXPECT_EQ(sum, 45);
  }
}

TEST(ThreadPool, ManyQuickJobsSeeEachOthersWrites) {
  ThreadPool pool(3);
  std::vector<int> values(64);  // plain ints: jobs must order their memory accesses
  for (int round = 0; round < 5000; ++round) {
    pool.parallel_for(64, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++values[i];
    });
  }
  EXPECT_THAT(values, ::testing::Each(5000));
}

TEST(ThreadPool, WakesSleepingWorkers) {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int> started{0};
    // Each share waits for the other one, so this returns only if the worker wakes up.
    pool.parallel_for(2, 1, [&](int64_t, int64_t) {
      ++started;
      while (started < 2) std::this_thread::yield();
    });
    EXPECT_EQ(started, 2);
  }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// Memory is limited in a child: threads need stacks.
TEST(ThreadPool, SaysWhenThereAreNoMoreThreads) {
  const auto construct = [] {
    const rlimit limit{size_t(1) << 30, size_t(1) << 30};
    if (setrlimit(RLIMIT_AS, &limit) != 0) std::_Exit(2);
    try {
      ThreadPool pool(5000);
    } catch (const std::system_error&) {
      std::_Exit(0);
    }
    std::_Exit(1);
  };
  EXPECT_EXIT(construct(), ::testing::ExitedWithCode(0), "");
}
#endif

}  // namespace
}  // namespace optimus

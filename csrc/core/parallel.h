// A fixed team of threads for the CPU kernels.
//
// Not OpenMP: PyTorch wheels bundle an OpenMP runtime of their own, and two teams that both spin on
// the same cores cost milliseconds an operation. Workers spin briefly between the kernels of a step
// (they follow each other within microseconds), then sleep. Shares of a job are claimed, not
// assigned: on a busy machine the caller does the share of a worker that has not woken up, instead
// of waiting.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace optimus {

class ThreadPool {
 public:
  // `num_threads` counts the calling thread; 0 means one per available core.
  explicit ThreadPool(int num_threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs body(begin, end) over a partition of [0, count) into at most num_threads() contiguous
  // ranges of at least `grain` items. Returns when all are done; rethrows the first exception.
  // One caller at a time; does not nest; never allocates.
  template <class Body>
  void parallel_for(int64_t count, int64_t grain, const Body& body) {
    run(
        count, grain,
        [](const void* erased, int64_t begin, int64_t end) {
          (*static_cast<const Body*>(erased))(begin, end);
        },
        &body);
  }

 private:
  using Call = void (*)(const void* body, int64_t begin, int64_t end);
  void run(int64_t count, int64_t grain, Call call, const void* body);
  void work();
  void stop();
  int claim_share();
  void run_share(int share);

  std::vector<std::thread> workers_;
  std::mutex mutex_;  // of sleeping, waking and error_
  std::condition_variable wake_;
  // job number << 32 | shares << 16 | next share to claim. Whoever moves the ticket owns the share
  // and may read the job below: the caller does not leave, and so writes no new job, before it is
  // done.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int> pending_{0};  // shares that are not done
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;
  const void* body_ = nullptr;
  int64_t count_ = 0;
  int shares_ = 0;
  std::exception_ptr error_;
};

}  // namespace optimus

#include "core/parallel.h"

#include <algorithm>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace optimus {
namespace {

// About 20 to 90 microseconds: longer than the gap between two kernels, far shorter than a
// scheduler slice.
constexpr int kSpinIterations = 2000;

constexpr int kMaxShares = 0xffff;  // a field of the ticket

bool has_unclaimed(uint64_t ticket) { return (ticket & 0xffff) < (ticket >> 16 & 0xffff); }

void cpu_relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads <= 0) num_threads = static_cast<int>(std::thread::hardware_concurrency());
  num_threads = std::min(std::max(1, num_threads), kMaxShares);
  try {
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
  } catch (...) {  // no more threads to be had: those that wait must not outlive what they wait on
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

// The next share of the current job, or -1.
int ThreadPool::claim_share() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while (has_unclaimed(ticket)) {
    if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
      return static_cast<int>(ticket & 0xffff);
    }
  }
  return -1;
}

void ThreadPool::run_share(int share) {
  int64_t begin = count_ * share / shares_;
  int64_t end = count_ * (share + 1) / shares_;
  try {
    call_(body_, begin, end);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
  pending_.fetch_sub(1, std::memory_order_release);
}

void ThreadPool::run(int64_t count, int64_t grain, Call call, const void* body) {
  if (count <= 0) return;
  int64_t max_shares = std::max<int64_t>(1, count / std::max<int64_t>(1, grain));
  int shares = static_cast<int>(std::min<int64_t>(num_threads(), max_shares));
  if (shares == 1) {
    call(body, 0, count);
    return;
  }
  call_ = call;
  body_ = body;
  count_ = count;
  shares_ = shares;
  pending_.store(shares, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(job << 32 | static_cast<uint64_t>(shares) << 16, std::memory_order_release);
  }
  wake_.notify_all();
  for (int share = claim_share(); share >= 0; share = claim_share()) run_share(share);
  // A worker that lost its core cannot finish while the caller spins on that core: give way.
  for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpinIterations) {
      cpu_relax();
    } else {
      std::this_thread::yield();
    }
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::work() {
  while (true) {
    for (int share = claim_share(); share >= 0; share = claim_share()) run_share(share);
    for (int i = 0; i < kSpinIterations && !has_unclaimed(ticket_) && !stop_; ++i) cpu_relax();
    if (has_unclaimed(ticket_)) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return stop_ || has_unclaimed(ticket_); });
    if (stop_) return;
  }
}

}  // namespace optimus

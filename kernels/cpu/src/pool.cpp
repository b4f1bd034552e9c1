#include "pool.h"

#include <pthread.h>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace dt {
namespace {

constexpr int kSpins = 2000;

// The chunks of one thread that nobody has taken yet, next .. end, and which region they are of, in one word: a worker that
// comes late takes either a chunk of the present region or none.
struct alignas(64) Share {
  static constexpr uint64_t kOne = 1, kMask = (kOne << 24) - 1;
  std::atomic<uint64_t> word{0};

  void set(uint64_t region, int next, int end) {
    word.store((region << 48) | (uint64_t(end) << 24) | uint64_t(next), std::memory_order_seq_cst);
  }
  bool is_empty() const {
    uint64_t seen = word.load(std::memory_order_seq_cst);
    return (seen & kMask) >= ((seen >> 24) & kMask);
  }
  // A chunk from the front, for the thread whose share it is, or from the back; -1 when there is none.
  int take(bool is_own) {
    uint64_t seen = word.load(std::memory_order_acquire);
    for (;;) {
      uint64_t next = seen & kMask, end = (seen >> 24) & kMask;
      if (next >= end) return -1;
      if (word.compare_exchange_weak(seen, is_own ? seen + 1 : seen - (kOne << 24), std::memory_order_acq_rel))
        return int(is_own ? next : end - 1);
    }
  }
};

struct Pool {
  std::vector<Share> shares;
  uint64_t region = 0;
  std::atomic<int> completed{0};
  Body body = nullptr;
  void* context = nullptr;
  std::atomic<bool> is_stopping{false};
  std::atomic<int> sleeping{0};
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;

  explicit Pool(int count) : shares(count) {
    for (int i = 1; i < count; i++) workers.emplace_back([this, i] { work(i); });
  }

  // A thread's own chunks in their order, so that it reads what they are of from one end to the other, and then what others
  // have not come to.
  void take_chunks(int thread) {
    const int count = int(shares.size());
    for (int i = 0; i < count; i++) {
      Share& share = shares[thread + i < count ? thread + i : thread + i - count];
      for (int chunk; (chunk = share.take(i == 0)) >= 0;) {
        // The region can't end before this chunk does, so body and context are its own.
        body(context, chunk, thread);
        completed.fetch_add(1, std::memory_order_acq_rel);
      }
    }
  }

  bool has_chunks() const {
    for (const Share& share : shares)
      if (!share.is_empty()) return true;
    return false;
  }

  void work(int thread) {
    while (!is_stopping.load(std::memory_order_acquire)) {
      take_chunks(thread);
      int spins = 0;
      while (!has_chunks() && !is_stopping.load(std::memory_order_relaxed)) {
        if (++spins < kSpins) {
          pause_briefly();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [this] { return has_chunks() || is_stopping.load(); });
        sleeping.fetch_sub(1);
      }
    }
  }

  void run(int count, Body new_body, void* new_context) {
    body = new_body;
    context = new_context;
    completed.store(0, std::memory_order_relaxed);
    region++;
    const int64_t threads = int64_t(shares.size());
    for (int64_t t = 0; t < threads; t++) shares[t].set(region, int(count * t / threads), int(count * (t + 1) / threads));
    if (sleeping.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
    take_chunks(0);
    wait_until([&] { return completed.load(std::memory_order_acquire) >= count; });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      is_stopping.store(true);
      wake.notify_all();
    }
    for (auto& worker : workers) worker.join();
  }
};

std::mutex region_mutex;  // of one region at a time
Pool* pool = nullptr;
std::atomic<int> wanted{1};
int made = 0;
thread_local bool is_alone = false;

// Threads do not survive a fork: the child makes its own pool, and leaves what the parent's was made of alone.
void forget_after_fork() {
  new (&region_mutex) std::mutex();
  pool = nullptr;
  made = 0;
}

}  // namespace

void set_threads(int count) {
  std::lock_guard<std::mutex> lock(region_mutex);
  wanted = count < 1 ? 1 : count > kMaxThreads ? kMaxThreads : count;
}

int num_threads() { return is_alone ? 1 : wanted.load(std::memory_order_relaxed); }

Alone::Alone() { is_alone = true; }
Alone::~Alone() { is_alone = false; }

void run_chunks(int count, Body body, void* context, bool waits) {
  if (count <= 0) return;
  auto run_here = [&] {
    for (int i = 0; i < count; i++) body(context, i, 0);
  };
  if (is_alone) return run_here();
  std::unique_lock<std::mutex> lock(region_mutex, std::defer_lock);
  if (waits)
    lock.lock();
  else if (!lock.try_lock())
    return run_here();
  if (wanted == 1) return run_here();
  if (made != wanted) {
    static bool is_registered = false;
    if (!is_registered) {
      pthread_atfork(nullptr, nullptr, forget_after_fork);
      is_registered = true;
    }
    delete pool;
    pool = new Pool(wanted);
    made = wanted;
  }
  pool->run(count, body, context);
}

}  // namespace dt

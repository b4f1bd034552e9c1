// A pool of threads for the short parallel regions of a step.
//
// Regions follow each other within microseconds, so workers spin for a moment before they sleep. Each thread has an equal share
// of the chunks, one behind the other, and takes them one at a time, then those that others have not come to. A region ends
// when its chunks are done, not when its workers are: a thread that the system has put aside holds up nobody unless it is in the
// middle of a chunk.
#pragma once
#include <thread>
#include <type_traits>

namespace dt {

using Body = void (*)(void* context, int chunk, int thread);

// Runs body for chunks 0 .. count - 1 on all threads and returns when all are done. Within a body, only while an Alone lives.
// While they work for another caller (a second engine, new parts that are tried beside the old ones), the caller runs all chunks by
// itself: a whole step in one region takes up to a quarter of a second, and many small ones would wait for it each time. Who waits
// has such a region itself.
void run_chunks(int count, Body body, void* context, bool waits);

// Threads that take part, the caller included. A pool that exists is made anew when the number changes.
void set_threads(int count);
int num_threads();

// While it lives, its thread runs regions by itself and num_threads() is 1: in a body that is a whole piece of work.
struct Alone {
  Alone();
  ~Alone();
};

static inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins for a moment, since what is waited for mostly comes within microseconds, then lets other threads run in between.
template <class F>
static inline void wait_until(F&& is_done) {
  constexpr int kSpins = 2000;
  for (int spins = 0; !is_done(); spins++) {
    if (spins < kSpins)
      pause_briefly();
    else
      std::this_thread::yield();
  }
}

constexpr int kMaxThreads = 256;

template <class F>
static inline void parallel(int count, F&& body, bool waits = false) {
  using Function = typename std::remove_reference<F>::type;
  if (count == 1) {
    body(0, 0);
    return;
  }
  run_chunks(
      count, [](void* context, int chunk, int thread) { (*static_cast<Function*>(context))(chunk, thread); },
      const_cast<void*>(static_cast<const void*>(&body)), waits);
}

}  // namespace dt

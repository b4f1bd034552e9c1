// The matrix unit (AMX): all eight tiles as 16 rows of 64 bytes.
//
// Written as assembly: the compilers' own functions for it differ, and GCC 12 drops stores that only a tile load reads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dt {

struct alignas(64) Shape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The unit is this thread's while this lives. It is given back after each chunk (both take 50 ns together), because the system
// saves 8 KiB more of a thread that holds it, and other libraries keep shapes of their own.
class Holds {
 public:
  Holds() {
    static const Shape shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Holds() { asm volatile("tilerelease"); }
  Holds(const Holds&) = delete;
};

template <int N>
static inline void load_tile(const void* from, size_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(N) : "memory");
}

}  // namespace dt

// The threads of a CTA as fibers: up to 512 functions with a stack each that take turns on one CPU
// thread.
//
// A fiber runs until it calls wait(), and goes on once everybody it waits for has come as far: the
// lanes of its warp, the arrivals of a barrier's phase, or the whole CTA. A warp runs as far as it
// can before the next one begins, in one order or the other, so that a missing __syncthreads shows
// as a wrong result in one of them.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdio>

namespace emulation {

constexpr int kMaxThreads = 512, kLanes = 32;

struct Index {
  unsigned x, y, z;
};

enum class Wait { kNothing, kWarp, kPhase, kBlock, kEnd };

struct Fiber {
  std::jmp_buf here;
  bool started;
  Wait wait;
  int exchanges;  // with other lanes, so far
};

static Fiber fibers[kMaxThreads];
alignas(64) static char stacks[kMaxThreads][1 << 16];
static std::jmp_buf scheduler;
static int current;  // fiber
static void (*body)();
static Index thread_index, block_index, grid;
static int threads;        // of a CTA
static int arrivals;       // at barriers, so far
static char failure[256];  // the first one; empty: all is well

inline void fail(const char* what, const char* where = "", int line = 0) {
  if (!failure[0]) std::snprintf(failure, sizeof failure, "%s %s %d", what, where, line);
}

// Hands over to the scheduler.
__attribute__((noinline)) static void wait(Wait what) {
  fibers[current].wait = what;
  if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

static void run_body() {
  body();
  wait(Wait::kEnd);
}

// Lets a fiber run until it waits.
__attribute__((noinline)) static void resume(int fiber) {
  current = fiber, thread_index = {unsigned(fiber), 0, 0};
  if (_setjmp(scheduler)) return;
  if (fibers[fiber].started) _longjmp(fibers[fiber].here, 1);
  fibers[fiber].started = true;
  ucontext_t start;  // switching by ucontext alone would cost two system calls each time
  getcontext(&start);
  start.uc_stack = {stacks[fiber], 0, sizeof stacks[fiber]};
  makecontext(&start, run_body, 0);
  setcontext(&start);
}

// What all of these fibers wait for.
static Wait common_wait(int first, int count) {
  for (int i = 1; i < count; ++i) {
    if (fibers[first + i].wait != fibers[first].wait) fail("threads wait for different things");
  }
  return fibers[first].wait;
}

static void run_warp(int first, bool reversed) {
  do {
    for (int i = 0; i < kLanes; ++i) resume(first + (reversed ? kLanes - 1 - i : i));
  } while (common_wait(first, kLanes) == Wait::kWarp && !failure[0]);
}

// Lets warps go on that wait for a phase, until none does.
static void run_phases(int warps, bool reversed) {
  for (bool waiting = true; waiting && !failure[0];) {
    const int before = arrivals;
    waiting = false;
    for (int i = 0; i < warps; ++i) {
      const int first = (reversed ? warps - 1 - i : i) * kLanes;
      if (fibers[first].wait != Wait::kPhase) continue;
      run_warp(first, reversed);
      waiting |= fibers[first].wait == Wait::kPhase;
    }
    if (waiting && arrivals == before) fail("a phase that nobody completes");
  }
}

static void run_block(bool reversed) {
  const int warps = threads / kLanes;
  for (Fiber& fiber : fibers) fiber = {};
  do {
    for (int i = 0; i < warps && !failure[0]; ++i) {
      run_warp((reversed ? warps - 1 - i : i) * kLanes, reversed);
    }
    run_phases(warps, reversed);
  } while (!failure[0] && common_wait(0, threads) == Wait::kBlock);
}

// An mbarrier: a phase is complete after `expected` arrivals.
struct Barrier {
  uint16_t expected, pending;
  uint32_t phase;

  void arrive() {
    ++arrivals;
    if (--pending == 0) pending = expected, phase ^= 1;
  }
  // By a whole warp, whose lanes have all arrived that will.
  void wait_for(uint32_t parity) const {
    wait(Wait::kWarp);
    while (phase == parity) wait(Wait::kPhase);
  }
};

// Every lane gives a value and gets that of lane `source`.
template <class T>
T exchange(T value, int source) {
  // Two: the next exchange begins before the last has read.
  static T given[kMaxThreads / kLanes][2][kLanes];
  const int warp = current / kLanes, turn = fibers[current].exchanges++ % 2;
  given[warp][turn][current % kLanes] = value;
  wait(Wait::kWarp);
  return given[warp][turn][source];
}

}  // namespace emulation

// ---- What -fsanitize=alignment,bounds,signed-integer-overflow calls -----------------------------

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

#define HANDLER(name, what)                                                                   \
  extern "C" void __ubsan_handle_##name(const SourceLocation* at, const void*, const void*) { \
    emulation::fail(what, at->file, int(at->line));                                           \
  }
HANDLER(type_mismatch_v1, "misaligned or null access")
HANDLER(out_of_bounds, "index out of bounds")
HANDLER(add_overflow, "integer overflow")
HANDLER(sub_overflow, "integer overflow")
HANDLER(mul_overflow, "integer overflow")
HANDLER(negate_overflow, "integer overflow")
HANDLER(divrem_overflow, "division overflow")
#undef HANDLER

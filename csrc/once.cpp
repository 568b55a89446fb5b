#include "once.h"

#include <pthread.h>

#include <thread>
#include <vector>

namespace fp8gemm {
namespace {

using Clock = std::chrono::steady_clock;

// Leaked on purpose, since XLA may still destroy executables while the process ends.
struct Shared {
  std::mutex mutex;
  std::vector<ForkedTable*> tables;
  int working = 0;  // how many ForkWaits there are
  int forking = 0;  // threads that wait in a fork
  Shared();
};
Shared& shared() {
  static Shared& it = *new Shared;
  return it;
}

thread_local int own_work = 0;  // ForkWaits of this thread, for which its own fork cannot wait

// Takes the mutex when `ready`, or when `until` has come. Polls: a condition variable that threads
// wait for cannot be used in a child.
template <class Ready>
void lock_when(Clock::time_point until, Ready ready) {
  shared().mutex.lock();
  while (!ready() && Clock::now() < until) {
    shared().mutex.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    shared().mutex.lock();
  }
}

void before_fork() {
  {
    std::lock_guard<std::mutex> lock(shared().mutex);
    ++shared().forking;
  }
  lock_when(Clock::now() + kLongestForkWait, [] { return shared().working == own_work; });
  --shared().forking;
}

void in_parent() { shared().mutex.unlock(); }

void in_child() {
  shared().working = own_work;
  shared().forking = 0;
  for (ForkedTable* table : shared().tables) table->forget_unfinished();
  shared().mutex.unlock();
}

Shared::Shared() { pthread_atfork(before_fork, in_parent, in_child); }

}  // namespace

std::mutex& shared_state() { return shared().mutex; }

ForkedTable::ForkedTable() { shared().tables.push_back(this); }

ForkWaits::ForkWaits() {
  lock_when(Clock::time_point::max(), [] { return shared().forking == 0 || own_work > 0; });
  ++shared().working;
  ++own_work;
  shared().mutex.unlock();
}

ForkWaits::~ForkWaits() {
  std::lock_guard<std::mutex> lock(shared().mutex);
  --shared().working;
  --own_work;
}

}  // namespace fp8gemm

// Values that are made once in a process, whatever the number of threads, and in spite of forks.
//
// A forked child has one thread. Of the others it inherits what they were in the middle of: locked
// mutexes that nobody will unlock, and values that nobody will finish. Therefore:
// - one mutex guards everything that threads share, and is held for look-ups only. A fork takes it
//   first, so the child finds it in order;
// - a fork waits for NVRTC, which has locks of its own, but not for ever: see ForkWaits;
// - the child forgets what was being made, and makes it itself.
#pragma once

#include <chrono>
#include <exception>
#include <future>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "status.h"

namespace fp8gemm {

std::mutex& shared_state();

// While one of these lives, a fork in another thread waits, for at most kLongestForkWait.
class ForkWaits {
 public:
  ForkWaits();
  ~ForkWaits();
  ForkWaits(const ForkWaits&) = delete;
};
constexpr std::chrono::seconds kLongestForkWait{5};  // a kernel compiles in 0.3 to 2 s

// What a child does about one table. Tables are made when the extension loads, and live for ever.
class ForkedTable {
 protected:
  ForkedTable();
  ~ForkedTable() = default;

 public:
  virtual void forget_unfinished() = 0;
};

template <class Key, class Value>
class OnceTable final : ForkedTable {
 public:
  // The value of `key`; by make(), where it has not been made. Who asks meanwhile waits for it. An
  // error is told to all who wait, and is forgotten: what failed may be fixed before the next try.
  template <class Make>
  Result<Value> get(const Key& key, Make&& make) {
    if (const Future made = find(key); made.valid()) return made.get();
    std::promise<Result<Value>> promise;
    if (const Future made = find_or_add(key, promise.get_future().share()); made.valid()) {
      return made.get();
    }
    Result<Value> made = made_or_error(make);
    promise.set_value(made);
    if (!made.ok()) {
      std::lock_guard<std::mutex> lock(shared_state());
      values_.erase(key);
    }
    return made;
  }

 private:
  using Future = std::shared_future<Result<Value>>;

  Future find(const Key& key) {
    std::lock_guard<std::mutex> lock(shared_state());
    const auto entry = values_.find(key);
    return entry == values_.end() ? Future() : entry->second;
  }

  // Invalid where `future` was added.
  Future find_or_add(const Key& key, const Future& future) {
    std::lock_guard<std::mutex> lock(shared_state());
    const auto [entry, added] = values_.try_emplace(key, future);
    return added ? Future() : entry->second;
  }

  // NOTE: others wait for the result, so that there must be one, whatever happens.
  template <class Make>
  static Result<Value> made_or_error(Make& make) {
    try {
      return make();
    } catch (const std::exception& e) {
      return Status::error(
          message("a kernel could not be made", e.what(), "free memory", "free some memory"));
    }
  }

  void forget_unfinished() override {
    std::erase_if(values_, [](const auto& entry) {
      const Future& value = entry.second;
      return value.wait_for(std::chrono::seconds(0)) != std::future_status::ready ||
             !value.get().ok();
    });
  }

  std::map<Key, Future> values_;
};

}  // namespace fp8gemm

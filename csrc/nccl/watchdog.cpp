#include "watchdog.hpp"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace meshring {

namespace {

constexpr auto kEvery = std::chrono::milliseconds(10);

// Never destroyed: its thread may be alive when the process ends.
struct Watchdog {
  std::mutex lock;
  std::condition_variable changed;
  std::vector<Watched*> watched;
  std::thread thread;
  unsigned shift = 0;  // of the thread that is to run; an older one ends

  void run(unsigned mine) {
    pthread_setname_np(pthread_self(), "meshring-watch");
    std::unique_lock<std::mutex> guard(lock);
    while (shift == mine) {
      for (Watched* w : watched) w->look();
      changed.wait_for(guard, kEvery, [&] { return shift != mine; });
    }
  }
};

Watchdog& watchdog() {
  static auto* const instance = new Watchdog;
  return *instance;
}

}  // namespace

void watch(Watched* backend) {
  Watchdog& w = watchdog();
  std::lock_guard<std::mutex> guard(w.lock);
  w.watched.push_back(backend);
  if (!w.thread.joinable()) w.thread = std::thread([&w, mine = w.shift] { w.run(mine); });
}

void unwatch(Watched* backend) {
  Watchdog& w = watchdog();
  std::thread done;
  {
    std::lock_guard<std::mutex> guard(w.lock);
    const auto end = std::remove(w.watched.begin(), w.watched.end(), backend);
    if (end == w.watched.end()) return;
    w.watched.erase(end, w.watched.end());
    if (!w.watched.empty()) return;
    ++w.shift;
    done = std::move(w.thread);
  }
  w.changed.notify_all();
  done.join();
}

}  // namespace meshring

// F4. One thread that runs a communicator's asynchronous collectives in the order of their calls.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "deadline.hpp"
#include "wait.hpp"

namespace meshring {

class Worker {
 public:
  ~Worker();
  void add(std::function<void()> task);  // the task must not throw
  enum class Outcome { done, late, interrupted };
  // Blocks until done() holds, which some task makes true.
  Outcome wait(const std::function<bool()>& done, Deadline deadline, Hooks& hooks);
  Outcome wait_idle(Deadline deadline, Hooks& hooks);  // until nothing is queued or runs

 private:
  void loop();

  std::mutex lock_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  std::atomic<int> unfinished_{0};  // tasks that wait or run
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace meshring

#include "worker.hpp"

#include <chrono>

#include "deadline.hpp"

namespace meshring {

Worker::~Worker() {
  {
    std::lock_guard<std::mutex> guard(lock_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Worker::add(std::function<void()> task) {
  {
    std::lock_guard<std::mutex> guard(lock_);
    tasks_.push_back(std::move(task));
    if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  }
  changed_.notify_all();
}

bool Worker::idle() {
  std::lock_guard<std::mutex> guard(lock_);
  return tasks_.empty() && !running_;
}

bool Worker::wait(const std::function<bool()>& done, double seconds, Hooks& hooks) {
  hooks.release();
  Deadline deadline(seconds);
  for (;;) {
    {
      std::unique_lock<std::mutex> guard(lock_);
      changed_.wait_for(guard, std::chrono::milliseconds(20), done);
      if (done()) return true;
    }
    if (deadline.passed() || hooks.interrupted()) return false;
  }
}

void Worker::loop() {
  std::unique_lock<std::mutex> guard(lock_);
  for (;;) {
    changed_.wait(guard, [this] { return stop_ || !tasks_.empty(); });
    if (tasks_.empty()) return;  // asked to stop, and everything is done
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    running_ = true;
    guard.unlock();
    task();
    task = nullptr;
    guard.lock();
    running_ = false;
    changed_.notify_all();
  }
}

}  // namespace meshring

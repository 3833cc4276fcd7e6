#include "worker.hpp"

#include <chrono>

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
    unfinished_.fetch_add(1);
    if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  }
  changed_.notify_all();
}

Worker::Outcome Worker::wait_idle(Deadline deadline, Hooks& hooks) {
  if (unfinished_.load() == 0) return Outcome::done;
  return wait([this] { return unfinished_.load() == 0; }, deadline, hooks);
}

Worker::Outcome Worker::wait(const std::function<bool()>& done, Deadline deadline, Hooks& hooks) {
  hooks.release();
  for (;;) {
    if (done()) return Outcome::done;
    const double left = deadline.limit() - deadline.elapsed();
    if (left <= 0) return Outcome::late;
    if (hooks.interrupted()) return Outcome::interrupted;
    std::unique_lock<std::mutex> guard(lock_);
    changed_.wait_for(guard, std::chrono::duration<double>(left < 0.02 ? left : 0.02), done);
  }
}

void Worker::loop() {
  std::unique_lock<std::mutex> guard(lock_);
  for (;;) {
    changed_.wait(guard, [this] { return stop_ || !tasks_.empty(); });
    if (tasks_.empty()) return;  // asked to stop, and everything is done
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    guard.unlock();
    task();
    task = nullptr;
    guard.lock();
    unfinished_.fetch_sub(1);
    changed_.notify_all();
  }
}

}  // namespace meshring

// F0. A limit on waiting. The clock is first read when somebody really waits.
#pragma once

#include <chrono>
#include <cmath>

namespace meshring {

class Deadline {
 public:
  explicit Deadline(double seconds) : seconds_(seconds) {}

  // Seconds since the first call of elapsed() or passed().
  double elapsed() {
    const auto now = std::chrono::steady_clock::now();
    if (!started_) {
      started_ = true;
      start_ = now;
    }
    return std::chrono::duration<double>(now - start_).count();
  }
  bool passed() { return elapsed() >= seconds_; }
  double limit() const { return seconds_; }

 private:
  double seconds_;  // may be infinite
  bool started_ = false;
  std::chrono::steady_clock::time_point start_{};
};

}  // namespace meshring

// F2. What was enqueued on which stream, and how far the GPU has come with it.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "../device/driver.hpp"

namespace meshring::nccl {

using device::Stream;

// Under one lock, with the device current. Times are of one clock, whichever the caller takes.
class Lanes {
 public:
  explicit Lanes(std::function<void(uint64_t record)> finished) : finished_(std::move(finished)) {}

  // Right after a call was enqueued. False: it went into the capture of a CUDA graph, whose replays
  // are not looked after.
  bool note(Stream stream, uint64_t record, int64_t expires);
  // Asks the driver. Throws Error(backend) when the GPU has failed.
  void advance();
  bool busy() const;
  bool expired(int64_t now) const;
  uint64_t oldest() const;  // record of the call that may be the one that is stuck; 0: none is
  std::vector<Stream> busy_streams() const;
  void clear() { lanes_.clear(); }

 private:
  static constexpr size_t kKept = 32;
  struct Mark {
    device::Marker marker;
    uint64_t upto = 0;  // calls of the lane before it
    int64_t expires = INT64_MAX;
  };
  // Every call has a mark behind it, while there is room; the calls after those share a later one.
  struct Lane {
    Stream stream = nullptr;
    std::array<uint64_t, kKept> records{};
    std::array<Mark, kKept> marks;
    size_t first = 0, count = 0;  // outstanding marks
    uint64_t enqueued = 0, covered = 0, done = 0;
    int64_t expires = INT64_MAX;  // of the calls without a mark

    bool idle() const { return done == enqueued; }
  };

  static void mark(Lane& lane, int64_t expires);
  void finish(Lane& lane, uint64_t upto);

  std::function<void(uint64_t)> finished_;
  std::vector<Lane> lanes_;
};

}  // namespace meshring::nccl

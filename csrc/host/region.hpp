// F3. The layout of the host backend's part of one communicator's region.
//
//   Event | Control[n] | Line[n][2] | Channel[n][n] | slots [n][2][kSlotBytes]
//
// Pages take memory when they are first touched: what a program does not use costs nothing.
#pragma once

#include <atomic>
#include <cstdint>

#include "../board.hpp"
#include "../wait.hpp"

namespace meshring::host {

inline constexpr int64_t kInlineBytes = 48;
inline constexpr int64_t kSlotBytes = 256 << 10;
inline constexpr int kHeaders = 4;                // messages announced ahead, per ordered pair
inline constexpr int kChunks = 4;                 // chunks in flight, per ordered pair
inline constexpr int64_t kChunkBytes = 32 << 10;  // also the largest message sent eagerly

// One step of one rank: the flag and up to 48 bytes of data in one cache line. Two lines by parity
// of the step: a rank writes step s + 2 only after all have written s + 1, so all have read s.
struct alignas(128) Line {
  std::atomic<uint64_t> step;
  uint64_t signature;
  char data[kInlineBytes];
};
static_assert(sizeof(Line) == 128);

struct alignas(128) Control {
  std::atomic<uint32_t> withdrawn;  // 0, or 1 + Trouble
  std::atomic<int32_t> culprit;     // the rank that this one blames, or -1
};

enum class Mode : uint8_t { eager, direct, staged };

struct Header {
  uint64_t address;  // of the sender's bytes, for direct
  int64_t bytes;
  int64_t count;
  DType dtype;
  Mode mode;
  Word<uint8_t> refused;  // by the receiver, which expected the following
  DType wanted_dtype;
  int64_t wanted_count;
};

// Messages from one rank to another, in order. Counters only grow; each has one writer.
struct Channel {
  alignas(128) std::atomic<uint64_t> posted;  // by the sender
  std::atomic<uint64_t> chunks_in;
  alignas(128) std::atomic<uint64_t> accepted;  // by the receiver
  std::atomic<uint64_t> consumed;
  std::atomic<uint64_t> chunks_out;
  alignas(128) Header headers[kHeaders];
  alignas(128) char chunks[kChunks][kChunkBytes];
};

class Region {
 public:
  Region(char* base, int n) : base_(base), n_(n) {}

  static size_t bytes(int n) {
    Region r(nullptr, n);
    return static_cast<size_t>(reinterpret_cast<uintptr_t>(r.slot(n, 0)));
  }
  Event& event() const { return *reinterpret_cast<Event*>(base_); }
  Control& control(int p) const { return at<Control>(controls(), p); }
  Line& line(int p, uint64_t step) const {
    return at<Line>(lines(), 2 * p + static_cast<int>(step & 1));
  }
  Channel& channel(int from, int to) const { return at<Channel>(channels(), from * n_ + to); }
  char* slot(int p, uint64_t turn) const {
    return base_ + slots() + (2 * p + static_cast<int64_t>(turn & 1)) * kSlotBytes;
  }

 private:
  template <class T>
  T& at(int64_t offset, int64_t i) const {
    return *reinterpret_cast<T*>(base_ + offset + i * static_cast<int64_t>(sizeof(T)));
  }
  int64_t controls() const { return sizeof(Event); }
  int64_t lines() const { return controls() + n_ * static_cast<int64_t>(sizeof(Control)); }
  int64_t channels() const { return page(lines() + 2 * n_ * static_cast<int64_t>(sizeof(Line))); }
  int64_t slots() const {
    return page(channels() + static_cast<int64_t>(n_) * n_ * static_cast<int64_t>(sizeof(Channel)));
  }
  static int64_t page(int64_t offset) { return (offset + 4095) / 4096 * 4096; }

  char* base_;
  int64_t n_;
};

}  // namespace meshring::host

// The memory that the ranks of one communicator share: a file in STANDIN_DIR, named by the unique
// id and unlinked once every rank has joined.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace standin {

// What a rank says about the collective that it is about to run; it must agree on all ranks.
struct Description {
  int function = 0, dtype = 0, op = 0, root = 0;
  uint64_t count = 0;
  bool operator==(const Description& o) const {
    return function == o.function && dtype == o.dtype && op == o.op && root == o.root &&
           count == o.count;
  }
};

enum class Presence : int { absent, joined, left };

// Bytes from one rank to another, in order.
struct Channel {
  static constexpr size_t kBytes = 64 << 10;
  std::atomic<uint64_t> written, read;
  char bytes[kBytes];

  size_t put(const void* from, size_t bytes_left);  // returns how many went in
  size_t take(void* to, size_t bytes_left);
};

struct Seat {  // one rank's
  static constexpr size_t kStaging = 128 << 10;
  std::atomic<int> presence;
  std::atomic<uint64_t> phase;  // barriers of collectives
  std::atomic<uint64_t> talks;  // splits
  int color[2], key[2];         // by the parity of the split
  Description description;
  alignas(64) char staging[kStaging];
};

using Stop = std::function<bool()>;

class Segment {
 public:
  Segment() = default;
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  // Takes this rank's seat; returns an empty string, or what is wrong.
  std::string join(const std::string& name, int rank, int size);
  bool complete();  // every rank has joined
  void leave();

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& name() const { return name_; }
  Seat& seat(int rank) const { return seats_[rank]; }
  Seat& own() const { return seats_[rank_]; }
  Channel& channel(int from, int to) const { return channels_[from * size_ + to]; }

  bool barrier(const Stop& stop);  // false: stopped
  int missing_peer() const;        // a rank that left or died, or -1
  void poison() const { shared_->poisoned.store(1); }
  bool poisoned() const { return shared_ != nullptr && shared_->poisoned.load() != 0; }

 private:
  struct Shared {
    std::atomic<int> size, poisoned;
  };
  bool alive(int rank) const;

  std::string name_, path_;
  int rank_ = 0, size_ = 0, fd_ = -1;
  size_t bytes_ = 0;
  bool whole_ = false;
  Shared* shared_ = nullptr;
  Seat* seats_ = nullptr;
  Channel* channels_ = nullptr;
};

}  // namespace standin

// F2. One rank's place in a job: who the others are, whether they live, how their memory is read.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "segment.hpp"
#include "view.hpp"
#include "wait.hpp"

namespace meshring {

enum class Transport : uint8_t {
  threads,           // all ranks are threads of this process: plain loads
  process_vm_readv,  // one copy, by the kernel, out of the peer's memory
  shared_slots,      // two copies, through the segment, where the kernel forbids the other
};
const char* name_of(Transport t);

class World {
 public:
  // Waits until all ranks are here. Throws Error(deadline or peer_lost) otherwise.
  World(std::shared_ptr<Segment> segment, int rank, bool threads, double timeout, Hooks& hooks);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int rank() const { return rank_; }
  int size() const { return segment_->size(); }
  bool threads() const { return threads_; }
  Transport transport() const { return transport_; }
  Segment& segment() const { return *segment_; }
  std::shared_ptr<Segment> shared_segment() const { return segment_; }
  RankEntry& self() const { return segment_->rank(rank_); }

  bool is_gone(int rank) const;  // it has died, or said that it leaves
  // How a rank that is gone came to its end; waits a moment for the launcher's word on it.
  std::string how_it_ended(int rank) const;
  int pid(int rank) const { return segment_->rank(rank).pid.load(std::memory_order_relaxed); }

  // Copies the logical bytes [lo, hi) of `remote`, which are addresses of that rank, to the
  // beginning of `local`.
  void read(int rank, const View& remote, int64_t lo, int64_t hi, const View& local) const;

 private:
  void meet(double timeout, Hooks& hooks);
  bool can_read_peers() const;

  std::shared_ptr<Segment> segment_;
  int rank_;
  bool threads_;
  Transport transport_ = Transport::threads;
  std::vector<int> pidfds_;
};

}  // namespace meshring

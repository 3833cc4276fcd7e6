// F4. Check, record, deadline, dispatch: the one path of every call on every backend.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend.hpp"
#include "board.hpp"
#include "nccl/api.hpp"
#include "worker.hpp"
#include "world.hpp"

namespace meshring {

namespace nccl {
class NcclBackend;
struct Health;
}  // namespace nccl

std::string ranks_text(const std::vector<int>& ranks);  // "ranks 1, 2 and 5"

// What all ranks have decided about GPUs, together.
struct DeviceChoice {
  int device = -1;  // of this rank; -1: NCCL is off
  std::string why_off =
      "ranks made by run_local() are threads of one process; start processes with `meshring run`";
  bool first = false;  // new arrays are made on the GPU where no array says otherwise
  bool check = false;  // compare the ranks' calls before each launch
  nccl::Config config;
  std::string net_name, comm_name;  // config points at them
};

// An asynchronous collective, or a posted send or receive. Whoever holds it keeps the arrays alive.
struct Pending {
  Call call;
  uint64_t number = 0;                 // of the collective, or of the transfer's record
  std::shared_ptr<Transfer> transfer;  // send and recv
  std::atomic<bool> finished{false};   // collectives
  std::optional<Error> error;
};

class Communicator {
 public:
  static std::shared_ptr<Segment> new_job(int size);  // a segment with the world's region in it

  Communicator(std::shared_ptr<World> world, double timeout);  // of all ranks
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(world_ranks_.size()); }
  double timeout() const { return timeout_; }
  void set_timeout(double seconds) { timeout_ = seconds; }
  bool closed() const { return closed_; }
  bool forked() const;           // this process is a fork of the rank
  std::string poisoned() const;  // why, or ""
  const std::vector<int>& world_ranks() const { return world_ranks_; }
  World& world() const { return *world_; }
  const char* backend() const;

  void run(const Call& call, double timeout, Hooks& hooks);
  std::shared_ptr<Pending> start(const Call& call, double timeout);
  // Sends and receives that may need one another: one, both sides of an exchange, or a group.
  std::vector<std::shared_ptr<Pending>> post(const std::vector<Call>& calls, bool beside);
  bool test(const Pending& pending) const;
  std::optional<Error> error_of(const Pending& pending) const;  // when it is done and failed
  void wait(Pending& pending, double timeout, Hooks& hooks);

  // One int64 of every rank.
  std::vector<int64_t> exchange(const std::vector<int64_t>& mine, const Call& on_behalf_of,
                                double timeout, Hooks& hooks);
  // The ranks of equal colour, ordered by (key, rank); null for colour -1. Collective.
  std::unique_ptr<Communicator> split(int64_t color, int64_t key, uint32_t site, double timeout,
                                      Hooks& hooks);
  // The ranks that `excluded` does not name; those call it, all with the same list. Works on a
  // communicator that cannot be used any more.
  std::unique_ptr<Communicator> shrink(std::vector<int> excluded, uint32_t site, double timeout,
                                       Hooks& hooks);
  // Waits until all that was started on this rank is done.
  void synchronize(double timeout, Hooks& hooks);

  // ---- arrays on a GPU: communicator_device.cpp ----
  void choose_device(DeviceChoice choice);
  // The calls up to now were init()'s own: the program's first one is number 1. Collective.
  void forget_calls();
  const DeviceChoice& choice() const { return choice_; }
  void check_device(int device) const;  // Error(usage) when arrays of that GPU cannot be sent
  bool device_open() const { return device_ != nullptr; }
  nccl::NcclBackend& device() const;  // Error(usage) when not open
  // Makes the NCCL communicator; collective. Done by the first collective on a GPU otherwise.
  void open_device(const Call& on_behalf_of, double timeout, Hooks& hooks);
  // Enqueues one collective, or sends and receives that go together.
  void enqueue(const Call* calls, size_t count, double timeout, Hooks& hooks);
  bool capturing(void* stream) const;  // into a CUDA graph
  // Something to wait for: done when what was enqueued up to now on the call's stream is done.
  std::shared_ptr<Pending> mark(const Call& call);

  // Lets queued operations end first (up to the default timeout).
  void close(Hooks& hooks);
  void abandon();  // closes without waiting for them
  void give_up();  // tells the peers, ends what runs; only close and trace work afterwards
  // Throws Error(usage) when closed, poisoned or in a forked child.
  void check_usable() const;
  void check_mine() const;  // closed or in a forked child only

  struct TraceRow {
    int rank;
    RecordCopy record;
    std::string site;
    double seconds_ago;
    double duration;
  };
  std::vector<TraceRow> trace(int rank) const;  // oldest first

 private:
  Communicator(std::shared_ptr<World> world, int region, std::vector<int> world_ranks, int rank,
               double timeout);
  static size_t region_bytes(int n);  // of n ranks
  uint64_t begin(const Call& call, uint64_t seq);
  void end(uint64_t record, CallState state);
  // Completes the sentence, poisons where the trouble asks for it, and throws.
  [[noreturn]] void fail(const Error& error, const Call& call, uint64_t seq, Deadline& deadline);
  void poison(const Error& error, const std::string& text);
  std::unique_ptr<nccl::NcclBackend> new_device();
  int64_t survivors_region(int leader, int n, uint64_t offer, const Call& call, Deadline& deadline,
                           Hooks& hooks);
  void shrink_device(Communicator* part, const std::vector<int>& excluded, const Call& call,
                     double timeout, Hooks& hooks);
  void split_device(Communicator* part, int color, int key, double timeout, Hooks& hooks);
  void compare(const Call& call, WaitContext& wait);
  void device_failed(const Error& error, uint64_t record);
  RecordCopy stuck_call(uint64_t record) const;
  bool has_made(int p, uint64_t seq) const;
  void device_finished(uint64_t record);
  [[noreturn]] void device_stuck();
  void close_device(Hooks& hooks);
  void let_device_end();
  void wait_for_device(Pending& pending, double timeout, Hooks& hooks);
  Error completed(const Error& error, const Call& call, uint64_t seq, double limit) const;

  // report.cpp
  std::string door(const Call& call, uint64_t seq) const;  // "all_reduce #3 (rank 1/4)"
  std::string not_done_text(const Pending& pending, double limit) const;
  Error completed_device(const Error& error, const Call& call, uint64_t seq, double limit) const;
  std::string mismatch_text(const Call& call, uint64_t seq, std::vector<int>* culprits) const;
  std::string table(const std::vector<int>& missing) const;
  std::string doing(int p, bool missing) const;
  std::string last_call(int p) const;
  std::string at_site(int p, uint32_t site) const;
  std::optional<RecordCopy> record_of(int p, uint64_t seq) const;
  std::optional<RecordCopy> latest(int p) const;
  std::optional<RecordCopy> latest_collective(int p) const;

  std::shared_ptr<World> world_;
  int region_;
  uint64_t id_;
  std::vector<int> world_ranks_;
  int rank_;
  double timeout_;
  std::shared_ptr<Mapping> mapping_;
  RecordRing* rings_;  // one per rank, at the beginning of the region
  std::unique_ptr<Backend> backend_;
  RankEntry* entry_;
  uint64_t seq_ = 0;      // collectives so far
  uint64_t written_ = 0;  // records so far
  uint64_t shrinks_ = 0;
  std::atomic<bool> closed_{false};
  std::atomic<bool> abort_{false};  // the worker is to leave its collective
  std::atomic<bool> is_poisoned_{false};
  mutable std::mutex poison_lock_;
  std::string poisoned_;
  unsigned forks_;
  std::unique_ptr<Worker> worker_;
  DeviceChoice choice_;
  std::unique_ptr<nccl::NcclBackend> device_;
  std::shared_ptr<nccl::Health> device_health_;
  mutable std::atomic<bool> told_{false};  // somebody was told how the device failed
};

}  // namespace meshring

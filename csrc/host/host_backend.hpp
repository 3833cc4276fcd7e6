// F3. The host backend: processes of one host, or threads of one process, over a shared segment.
#pragma once

#include <condition_variable>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../backend.hpp"
#include "../world.hpp"
#include "region.hpp"

namespace meshring::host {

class HostTransfer;

// Every collective is a sequence of steps. In a step each rank publishes its Line and then waits
// for the lines of all others, so the first step compares the signatures of the call on all ranks.
// Data goes, by size: in the lines; through the ranks' slots, once or in rounds; or straight out of
// the peers' memory (threads, process_vm_readv). Each path is the same for all kinds of call: ranks
// stage blocks of their input, and take from their peers the blocks that are for them.
class HostBackend final : public Backend {
 public:
  // `memory` holds Region::bytes(n) zeroed bytes that all ranks of the communicator share.
  HostBackend(std::shared_ptr<World> world, char* memory, std::vector<int> world_ranks, int rank);
  ~HostBackend() override;

  const char* name() const override { return "host"; }
  void execute(const Call& call, WaitContext& wait) override;
  std::vector<std::shared_ptr<Transfer>> post(const std::vector<Call>& calls, bool beside) override;
  void wait(Transfer& transfer, WaitContext& wait) override;
  void withdraw(Trouble why, int culprit) override;
  void close() override;
  bool has_left(int p) const override;
  int first_cause(int p) const override;
  std::string how_it_left(int p) const override;

 private:
  friend class HostTransfer;

  // collectives (host_backend.cpp)
  void publish(uint64_t signature);
  void await(WaitContext& wait);
  void step(uint64_t signature, WaitContext& wait);
  bool goes_direct(const Call& call, const Blocks& blocks) const;
  void alone(const Call& call, const Blocks& blocks);
  void in_rounds(const Call& call, const Blocks& blocks, WaitContext& wait);
  void reduce_in_rounds(const Call& call, int64_t bytes, WaitContext& wait);
  void directly(const Call& call, const Blocks& blocks, WaitContext& wait);
  void read(int p, const View& remote, int64_t lo, int64_t hi, const View& local);
  void all_reduce_directly(const Call& call, WaitContext& wait);
  void stage(const Call& call, const Blocks& blocks, int64_t lo, int64_t hi, int64_t stride,
             char* to);
  void consume(const Call& call, const Blocks& blocks, int64_t lo, int64_t hi, int64_t stride,
               char* const* staged);
  void reduce_piece(const Call& call, char* out, const View* inputs, int64_t bytes);
  bool publishes(const Call& call) const {
    return !(call.kind == CallKind::broadcast || call.kind == CallKind::scatter) ||
           call.root == me_;
  }

  // hope (host_backend.cpp): check() throws when missing ranks will not come
  void check(const std::function<std::vector<int>()>& find_missing, WaitContext& wait);
  void give_up_on(const std::vector<int>& missing, const std::vector<int>& left, bool late);
  void leave(uint32_t why, int culprit);
  void check_sources();

  // transfers (transfers.cpp)
  void progress();  // under transfers_lock_
  bool advance(const HostTransfer& transfer);
  void pump();

  std::shared_ptr<World> world_;
  std::vector<int> world_ranks_;
  int n_;
  int me_;
  Region region_;
  Patience patience_;
  uint64_t step_ = 0;
  uint64_t signature_ = 0;
  uint64_t turn_ = 0;  // of the slots; counts rounds
  std::vector<char*> staged_;
  std::vector<const void*> sources_;
  std::vector<View> views_;
  std::unique_ptr<char[]> scratch_;

  std::mutex transfers_lock_;
  std::condition_variable pump_wakes_;
  std::list<std::shared_ptr<HostTransfer>> transfers_;  // unfinished, in the order of posting
  std::vector<uint64_t> sent_, received_;               // messages posted so far, per peer
  std::thread pump_;
  bool stop_ = false;
};

}  // namespace meshring::host

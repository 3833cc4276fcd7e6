// F3. The NCCL backend: calls enqueued on CUDA streams.
//
// NCCL's communicator is nonblocking for life. Whoever enters NCCL holds the device's turn: one
// thread per device at a time, so that several communicators launch in one order. A call that says
// "in progress" is polled to its end before it returns, so that stream order holds. The watchdog
// never waits for the turn: where it cannot have it, it asks the thread inside to abort.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../backend.hpp"
#include "../device/driver.hpp"
#include "../device/kernels.hpp"
#include "lanes.hpp"
#include "nccl.hpp"
#include "watchdog.hpp"

namespace meshring::nccl {

// A lock that nobody waits in: who cannot have it tries again, with a deadline, or goes away.
class TryLock {
 public:
  bool try_lock() { return !held_.exchange(true, std::memory_order_acquire); }
  void unlock() { held_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool> held_{false};
};

// What the communicator wants to hear, some of it from the watchdog's thread.
struct Listener {
  // What was enqueued as `record` or a little later failed; everything enqueued has ended.
  std::function<void(const Error& error, uint64_t record)> trouble;
  std::function<void(uint64_t record)> finished;  // on the device
  std::function<void()> stuck;  // a thread does not come out of NCCL: say so and end the process
};

// How a communicator failed, for those that still hold its transfers.
struct Health {
  std::atomic<bool> failed{false};
  std::mutex lock;
  std::optional<Error> error;

  void fail(const Error& e);
  std::optional<Error> get();
};

class NcclBackend final : public DeviceBackend, public Watched {
 public:
  NcclBackend(Backend& host, int rank, int size, int device, Listener listener);
  ~NcclBackend() override;

  // Collective, one of these three: of the ranks that hold the id; of those of the parent that give
  // the same color; of the parent's without the excluded ones.
  void join(const UniqueId& id, Config config, WaitContext& wait);
  void split_from(NcclBackend& parent, int color, int key, Config config, WaitContext& wait);
  void shrink_from(NcclBackend& parent, const std::vector<int>& excluded, Config config,
                   WaitContext& wait);
  // A rank that is in no part takes part in the making of the parts.
  void split_nothing(WaitContext& wait);

  const char* name() const override { return "nccl"; }
  int device() const { return device_; }
  bool alive() const { return !health_->failed.load() && !give_up_.load(); }
  const std::shared_ptr<Health>& health() const { return health_; }
  void enqueue(const Call* calls, size_t count, uint64_t record, WaitContext& wait) override;
  std::shared_ptr<Transfer> mark(const Call& call) override;
  void wait_for(Transfer& transfer, WaitContext& wait) override;
  void synchronize(WaitContext& wait) override;
  void give_up() override;
  void close(WaitContext& wait) override;

  // Registers memory with NCCL for as long as the communicator lives, or until deregister().
  void* register_buffer(void* data, size_t bytes, bool window, WaitContext& wait);
  void deregister_buffer(void* handle, bool window, WaitContext& wait);

  void look() override;

 private:
  friend class Enqueue;

  // The right to enter NCCL on this device, for one thread, with its deadline.
  class Turn {
   public:
    Turn(NcclBackend& backend, WaitContext& wait);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    const int64_t expires;  // of the call, on the coarse clock

   private:
    NcclBackend& backend_;
  };

  void check(Result result, const char* function, WaitContext& wait);
  void settle(Handle handle, const char* function, WaitContext& wait, bool with_peers = true);
  void made(const char* function, WaitContext& wait);
  void begot(Result result, const char* function, WaitContext& wait);
  void finish(WaitContext& wait);
  void abort_later(Handle handle);
  void join_aborts(WaitContext& wait);
  void check_alive();
  void ask_nccl(WaitContext& wait);
  // What is wrong, if anything is, with what was enqueued. Under the turn.
  std::optional<Error> diagnose(int64_t now);
  void abort(const Error& error);  // under the turn
  // A peer that has left, where that matters.
  std::optional<int> lost_peer(bool matters, int64_t now);

  Backend& host_;
  const Nccl& nccl_;
  const int rank_;
  const int size_;
  const int device_;
  Listener listener_;
  std::shared_ptr<Health> health_;
  TryLock& turn_;
  Handle handle_ = nullptr;
  const device::Kernels* kernels_ = nullptr;  // of an open communicator
  Lanes lanes_;
  bool captured_ = false;  // some calls are part of a CUDA graph
  // NCCL waits inside ncclCommAbort for what the program has put on the streams before: each abort
  // has a thread, which may live longer than this object.
  std::shared_ptr<std::atomic<int>> aborting_ = std::make_shared<std::atomic<int>>(0);
  int64_t peer_left_since_ = 0;
  int64_t failed_since_ = 0;  // NCCL's own thread said so
  std::atomic<bool> give_up_{false};
  std::atomic<int64_t> inside_until_{0};  // when the thread inside NCCL should be out; 0: nobody is
};

}  // namespace meshring::nccl

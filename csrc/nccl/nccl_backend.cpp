#include "nccl_backend.hpp"

#include <algorithm>
#include <array>
#include <thread>

#include "../board.hpp"
#include "enqueue.hpp"
#include "ras.hpp"

namespace meshring::nccl {

namespace {

constexpr int64_t kSecond = 1000000000;
constexpr int64_t kPeerGrace = kSecond / 2;  // what a peer that left has enqueued may yet end well
constexpr int64_t kStuckAfter = 5 * kSecond;
constexpr double kFarAway = 1e9;   // seconds; stands for ever
constexpr double kLongAbort = 10;  // seconds

int64_t now_ns() { return coarse_now_ns(); }

int64_t expiry(int64_t now, double seconds) {
  if (!(seconds < kFarAway)) return INT64_MAX;
  return now + static_cast<int64_t>(seconds * 1e9);
}

TryLock& turn_of(int device) {
  static std::array<TryLock, 64> turns;
  return turns[static_cast<size_t>(device) % turns.size()];
}

}  // namespace

void Health::fail(const Error& e) {
  {
    std::lock_guard<std::mutex> guard(lock);
    if (!error) error = e;
  }
  failed.store(true, std::memory_order_release);
}

std::optional<Error> Health::get() {
  std::lock_guard<std::mutex> guard(lock);
  return error;
}

namespace {

class DeviceTransfer final : public Transfer {
 public:
  DeviceTransfer(const Call& call, std::shared_ptr<Health> health)
      : call_(call), health_(std::move(health)) {
    const device::OnDevice here(call.device);
    marker_.record(call.stream);
  }
  bool done() const override {
    if (health_->failed.load(std::memory_order_acquire)) return true;
    try {
      const device::OnDevice here(call_.device);
      const device::RelaxedCapture relaxed;
      return marker_.reached();
    } catch (const Error& error) {
      own_.fail(error);
      return true;
    }
  }
  std::optional<Error> error() const override {
    for (Health* health : {health_.get(), &own_})
      if (health->failed.load(std::memory_order_acquire)) return health->get();
    return std::nullopt;
  }
  const Call& call() const override { return call_; }

 private:
  Call call_;
  std::shared_ptr<Health> health_;
  mutable Health own_;  // the GPU failed where NCCL did not see it
  device::Marker marker_;
};

}  // namespace

NcclBackend::NcclBackend(Backend& host, int rank, int size, int device, Listener listener)
    : host_(host),
      nccl_(Nccl::get()),
      rank_(rank),
      size_(size),
      device_(device),
      listener_(std::move(listener)),
      health_(std::make_shared<Health>()),
      turn_(turn_of(device)),
      lanes_(listener_.finished) {}

NcclBackend::~NcclBackend() {
  unwatch(this);
  if (handle_) abort_later(handle_);
}

// ---- entering NCCL --------------------------------------------------------------------------

NcclBackend::Turn::Turn(NcclBackend& backend, WaitContext& wait)
    : expires(expiry(now_ns(), wait.deadline.limit())), backend_(backend) {
  if (!backend.turn_.try_lock()) {
    wait.hooks.release();
    for (int round = 0; !backend.turn_.try_lock(); ++round) {
      wait_a_moment(round);
      if (wait.deadline.passed())
        throw Error(Trouble::deadline, "another communicator of this process kept GPU " +
                                           std::to_string(backend.device_) + " busy");
      if (wait.hooks.interrupted()) throw Error(Trouble::interrupted, "interrupted");
    }
  }
  backend.inside_until_.store(expires, std::memory_order_relaxed);
}

NcclBackend::Turn::~Turn() {
  backend_.inside_until_.store(0, std::memory_order_relaxed);
  backend_.turn_.unlock();
}

void NcclBackend::check_alive() {
  if (health_->failed.load(std::memory_order_acquire)) throw *health_->get();
  if (!handle_) usage("the NCCL communicator is not open");
}

void NcclBackend::check(Result result, const char* function, WaitContext& wait) {
  if (result == Result::success) return;
  if (result == Result::in_progress) {
    settle(handle_, function, wait);
    return;
  }
  throw nccl_.error(result, function, handle_);
}

// Polls until NCCL has done what it was asked for.
void NcclBackend::settle(Handle handle, const char* function, WaitContext& wait, bool with_peers) {
  wait.hooks.release();
  for (int round = 0;; ++round) {
    Result state = Result::success;
    const Result asked = nccl_.async_error(handle, &state);
    if (asked != Result::success) throw nccl_.error(asked, "ncclCommGetAsyncError", handle);
    if (state == Result::success) return;
    if (state != Result::in_progress) throw nccl_.error(state, function, handle);
    if (give_up_.load()) throw Error(Trouble::interrupted, std::string(function) + " was given up");
    if (wait.deadline.passed())
      throw Error(Trouble::deadline, std::string(function) + " did not end");
    if (round % 64 == 63) {
      if (wait.hooks.interrupted()) throw Error(Trouble::interrupted, "interrupted");
      for (int p = 0; with_peers && p < size_; ++p)
        if (p != rank_ && host_.has_left(p))
          throw Error(Trouble::peer_lost, "", {host_.first_cause(p)});
    }
    wait_a_moment(round);
  }
}

// ---- making and ending ----------------------------------------------------------------------

// The new handle settles, or is aborted.
void NcclBackend::made(const char* function, WaitContext& wait) {
  try {
    if (!handle_) throw Error(Trouble::backend, std::string(function) + " made no communicator");
    settle(handle_, function, wait);
    kernels_ = &device::Kernels::of(device_);  // not later: loading would break a capture
  } catch (const Error&) {
    if (handle_) abort_later(handle_);
    handle_ = nullptr;
    throw;
  }
  watch(this);
}

void NcclBackend::join(const UniqueId& id, Config config, WaitContext& wait) {
  const Turn turn(*this, wait);
  const device::OnDevice here(device_);
  wait.hooks.release();
  config.blocking = 0;
  const Result result = nccl_.init_rank(&handle_, size_, id, rank_, &config);
  if (result == Result::invalid_argument)
    throw Error(Trouble::backend, nccl_.error(result, "ncclCommInitRankConfig", nullptr).text +
                                      ". Look at the settings that init() got as nccl=");
  if (result != Result::success && result != Result::in_progress)
    throw nccl_.error(result, "ncclCommInitRankConfig", nullptr);
  made("ncclCommInitRankConfig", wait);
}

// Of a parent. Splitting and shrinking say "success" or "in progress" while they go on; the child's
// handle is written at their end. So a parent that does not settle is aborted here and now: NCCL
// must not write into a child that is gone.
void NcclBackend::begot(Result result, const char* function, WaitContext& wait) {
  if (result != Result::success && result != Result::in_progress)
    throw nccl_.error(result, function, handle_);
  try {
    settle(handle_, function, wait);
  } catch (const Error&) {
    const Handle handle = handle_;
    handle_ = nullptr;
    nccl_.abort(handle);
    throw;
  }
}

void NcclBackend::split_from(NcclBackend& parent, int color, int key, Config config,
                             WaitContext& wait) {
  const Turn turn(parent, wait);
  parent.check_alive();
  const device::OnDevice here(device_);
  wait.hooks.release();
  config.blocking = 0;
  parent.begot(nccl_.split(parent.handle_, color, key, &handle_, &config), "ncclCommSplit", wait);
  made("ncclCommSplit", wait);
}

void NcclBackend::split_nothing(WaitContext& wait) {
  const Turn turn(*this, wait);
  check_alive();
  const device::OnDevice here(device_);
  wait.hooks.release();
  Handle none = nullptr;
  begot(nccl_.split(handle_, kNoColor, 0, &none, nullptr), "ncclCommSplit", wait);
}

void NcclBackend::shrink_from(NcclBackend& parent, const std::vector<int>& excluded, Config config,
                              WaitContext& wait) {
  const Turn turn(parent, wait);
  parent.check_alive();
  const device::OnDevice here(device_);
  wait.hooks.release();
  config.blocking = 0;
  std::vector<int> out = excluded;
  parent.begot(nccl_.shrink(parent.handle_, out.data(), static_cast<int>(out.size()), &handle_,
                            &config, kShrinkDefault),
               "ncclCommShrink", wait);
  made("ncclCommShrink", wait);
}

void NcclBackend::abort_later(Handle handle) {
  aborting_->fetch_add(1);
  std::thread([&nccl = nccl_, handle, device = device_, left = aborting_] {
    try {
      const device::OnDevice here(device);
      const device::RelaxedCapture relaxed;
      nccl.abort(handle);
    } catch (const Error&) {  // the driver has gone, and the communicator with it
    }
    left->fetch_sub(1);
  }).detach();
}

void NcclBackend::join_aborts(WaitContext& wait) {
  Deadline enough(std::min(wait.deadline.limit(), kLongAbort));
  for (int round = 0; aborting_->load() > 0; ++round) {
    if (enough.passed())
      throw Error(Trouble::deadline,
                  "NCCL has not ended its communicator yet, since earlier work on its streams has "
                  "not ended");
    wait_a_moment(round);
  }
}

void NcclBackend::close(WaitContext& wait) {
  try {
    if (!health_->failed.load() && !give_up_.load() && handle_) synchronize(wait);
  } catch (const Error&) {
    give_up_.store(true);
  }
  unwatch(this);
  if (handle_) finish(wait);
  {
    const device::OnDevice here(device_);
    lanes_.clear();
  }
  join_aborts(wait);
}

// In peace where that is possible, else by an abort.
void NcclBackend::finish(WaitContext& wait) {
  const Turn turn(*this, wait);
  const device::OnDevice here(device_);
  wait.hooks.release();
  const Handle handle = handle_;
  handle_ = nullptr;
  // While a CUDA graph with our calls lives, NCCL waits for its end, in an abort too.
  WaitContext briefly{Deadline(std::min(wait.deadline.limit(), kLongAbort)), wait.hooks};
  try {
    if (health_->failed.load() || give_up_.load()) throw Error(Trouble::backend, "given up");
    const Result result = nccl_.finalize(handle);
    if (result != Result::success && result != Result::in_progress)
      throw nccl_.error(result, "ncclCommFinalize", handle);
    settle(handle, "ncclCommFinalize", captured_ ? briefly : wait, false);
    nccl_.destroy(handle);
  } catch (const Error&) {
    abort_later(handle);
    if (captured_)
      throw Error(
          Trouble::backend,
          "a CUDA graph with calls of this communicator is alive; delete it before close()");
  }
}

void NcclBackend::give_up() { give_up_.store(true); }

// ---- enqueueing -----------------------------------------------------------------------------

void NcclBackend::enqueue(const Call* calls, size_t count, uint64_t record, WaitContext& wait) {
  check_alive();
  wait.hooks.release();
  const Turn turn(*this, wait);
  check_alive();
  const device::OnDevice here(device_);
  Enqueue(*this, wait).go(calls, count);
  for (size_t i = 0; i < count; ++i)
    if (!lanes_.note(calls[i].stream, record + i, turn.expires)) captured_ = true;
}

std::shared_ptr<Transfer> NcclBackend::mark(const Call& call) {
  return std::make_shared<DeviceTransfer>(call, health_);
}

void NcclBackend::synchronize(WaitContext& wait) {
  check_alive();
  wait.hooks.release();
  std::vector<std::shared_ptr<Transfer>> ends;
  {
    const Turn turn(*this, wait);
    for (Stream stream : lanes_.busy_streams()) {
      Call call;
      call.device = static_cast<int16_t>(device_);
      call.stream = stream;
      ends.push_back(mark(call));
    }
  }
  for (const auto& end : ends) wait_for(*end, wait);
  const Turn turn(*this, wait);
  const device::OnDevice here(device_);
  lanes_.advance();
}

void NcclBackend::wait_for(Transfer& transfer, WaitContext& wait) {
  for (int round = 0; !transfer.done(); ++round) {
    if (round == 100) wait.hooks.release();
    if (wait.deadline.passed()) throw Error(Trouble::deadline, "the GPU has not come so far");
    if (round % 64 == 63 && wait.hooks.interrupted())
      throw Error(Trouble::interrupted, "interrupted");
    wait_a_moment(round);
  }
  if (const std::optional<Error> error = transfer.error()) throw *error;
  ask_nccl(wait);
}

// A stream may come to its end although NCCL has failed: ask before saying that all is well.
void NcclBackend::ask_nccl(WaitContext& wait) {
  for (int round = 0;; ++round) {
    {
      const Turn turn(*this, wait);
      check_alive();
      Result state = Result::success;
      const Result asked = nccl_.async_error(handle_, &state);
      if (asked == Result::success && (state == Result::success || state == Result::in_progress))
        return;
      const device::OnDevice here(device_);
      if (const std::optional<Error> error = diagnose(now_ns())) abort(*error);
    }
    wait_a_moment(round);
  }
}

void* NcclBackend::register_buffer(void* data, size_t bytes, bool window, WaitContext& wait) {
  if (window ? !nccl_.register_window : !nccl_.register_buffer)
    usage(std::string(window ? "window registration needs NCCL 2.27.3"
                             : "buffer registration needs NCCL 2.19.1") +
          " or newer; this is " + nccl_.identity());
  const Turn turn(*this, wait);
  check_alive();
  const device::OnDevice here(device_);
  wait.hooks.release();
  if (!window) {
    void* out = nullptr;
    check(nccl_.register_buffer(handle_, data, bytes, &out), "ncclCommRegister", wait);
    return out;
  }
  // NCCL says "success" while it goes on, and writes the window at the end: then it must be there.
  auto out = std::make_unique<void*>(nullptr);
  try {
    begot(nccl_.register_window(handle_, data, bytes, out.get(), kWindowSymmetric),
          "ncclCommWindowRegister", wait);
  } catch (const Error&) {
    static_cast<void>(out.release());
    throw;
  }
  return *out;
}

void NcclBackend::deregister_buffer(void* handle, bool window, WaitContext& wait) {
  const Turn turn(*this, wait);
  if (!handle_ || health_->failed.load()) return;  // gone with the communicator
  const device::OnDevice here(device_);
  wait.hooks.release();
  if (window)
    begot(nccl_.deregister_window(handle_, handle), "ncclCommWindowDeregister", wait);
  else
    check(nccl_.deregister_buffer(handle_, handle), "ncclCommDeregister", wait);
}

// ---- the watchdog's part --------------------------------------------------------------------

void NcclBackend::look() {
  const int64_t now = now_ns();
  if (!turn_.try_lock()) {
    const int64_t until = inside_until_.load(std::memory_order_relaxed);
    if (until != 0 && until < INT64_MAX - kStuckAfter && now > until + kStuckAfter)
      listener_.stuck();
    return;
  }
  const std::lock_guard<TryLock> guard(turn_, std::adopt_lock);
  if (!handle_) return;
  try {
    const device::OnDevice here(device_);
    const device::RelaxedCapture relaxed;
    if (const std::optional<Error> error = diagnose(now)) abort(*error);
  } catch (const Error& error) {
    abort(error);
  }
}

std::optional<Error> NcclBackend::diagnose(int64_t now) {
  if (give_up_.load()) return Error(Trouble::backend, "given up");
  Result state = Result::success;
  const Result asked = nccl_.async_error(handle_, &state);
  if (asked != Result::success) return nccl_.error(asked, "ncclCommGetAsyncError", handle_);
  const bool failed = state != Result::success && state != Result::in_progress;
  const std::optional<int> lost = lost_peer(failed || lanes_.busy(), now);
  if (lost && (failed || now - peer_left_since_ > kPeerGrace))
    return Error(Trouble::peer_lost, "", {*lost});
  if (failed) {
    // A remote error is most often that of a peer which is about to be found dead.
    if (failed_since_ == 0) failed_since_ = now;
    if (state == Result::remote_error && now - failed_since_ < kPeerGrace) return std::nullopt;
    return nccl_.error(state, "ncclCommGetAsyncError", handle_);
  }
  lanes_.advance();
  if (lanes_.expired(now)) return Error(Trouble::deadline, ras_report(nccl_.version()));
  return std::nullopt;
}

std::optional<int> NcclBackend::lost_peer(bool matters, int64_t now) {
  for (int p = 0; matters && p < size_; ++p) {
    if (p == rank_ || !host_.has_left(p)) continue;
    if (peer_left_since_ == 0) peer_left_since_ = now;
    return host_.first_cause(p);
  }
  peer_left_since_ = 0;
  return std::nullopt;
}

void NcclBackend::abort(const Error& error) {
  const Handle handle = handle_;
  handle_ = nullptr;
  listener_.trouble(error, lanes_.oldest());  // first: it reads the board as it is now
  abort_later(handle);
  lanes_.clear();
}

}  // namespace meshring::nccl

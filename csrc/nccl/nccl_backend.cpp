#include "nccl_backend.hpp"

#include <algorithm>
#include <array>

#include "../board.hpp"
#include "enqueue.hpp"
#include "ras.hpp"

namespace meshring::nccl {

namespace {

constexpr int64_t kSecond = 1000000000;
constexpr int64_t kPeerGrace = kSecond / 2;  // what a peer that left has enqueued may yet end well
constexpr int64_t kStuckAfter = 5 * kSecond;
constexpr double kFarAway = 1e9;  // seconds; stands for ever

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
    const device::OnDevice here(call_.device);
    const device::RelaxedCapture relaxed;
    return marker_.reached();
  }
  std::optional<Error> error() const override {
    if (!health_->failed.load(std::memory_order_acquire)) return std::nullopt;
    return health_->get();
  }
  const Call& call() const override { return call_; }

 private:
  Call call_;
  std::shared_ptr<Health> health_;
  device::Marker marker_;
};

}  // namespace

uint64_t NcclBackend::Lane::oldest() const {
  const uint64_t kept_from = enqueued > kKept ? enqueued - kKept : 0;
  return records[std::max(done, kept_from) % kKept];
}

NcclBackend::NcclBackend(Backend& host, int rank, int size, int device, Listener listener)
    : host_(host),
      nccl_(Nccl::get()),
      rank_(rank),
      size_(size),
      device_(device),
      listener_(std::move(listener)),
      health_(std::make_shared<Health>()),
      turn_(turn_of(device)) {}

NcclBackend::~NcclBackend() {
  unwatch(this);
  if (!handle_) return;
  for (int round = 0; !turn_.try_lock(); ++round) wait_a_moment(round);
  const std::lock_guard<TryLock> guard(turn_, std::adopt_lock);
  const device::OnDevice here(device_);
  nccl_.abort(handle_);
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
  Error error = nccl_.error(result, function, handle_);
  if (result == Result::invalid_argument) error.trouble = Trouble::usage;  // nothing was enqueued
  throw error;
}

// Polls until NCCL has done what it was asked for.
void NcclBackend::settle(Handle handle, const char* function, WaitContext& wait) {
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
      for (int p = 0; p < size_; ++p)
        if (p != rank_ && host_.has_left(p)) throw Error(Trouble::peer_lost, "", {p});
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
    if (handle_) nccl_.abort(handle_);
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

void NcclBackend::split_from(NcclBackend& parent, int color, int key, Config config,
                             WaitContext& wait) {
  parent.check_alive();
  const Turn turn(parent, wait);
  const device::OnDevice here(device_);
  wait.hooks.release();
  config.blocking = 0;
  parent.check(nccl_.split(parent.handle_, color, key, &handle_, &config), "ncclCommSplit", wait);
  made("ncclCommSplit", wait);
}

void NcclBackend::split_nothing(WaitContext& wait) {
  check_alive();
  const Turn turn(*this, wait);
  const device::OnDevice here(device_);
  wait.hooks.release();
  Handle none = nullptr;
  check(nccl_.split(handle_, kNoColor, 0, &none, nullptr), "ncclCommSplit", wait);
}

void NcclBackend::shrink_from(NcclBackend& parent, const std::vector<int>& excluded, Config config,
                              WaitContext& wait) {
  if (!nccl_.shrink)
    usage("ncclCommShrink needs NCCL 2.27.3 or newer; this is " + nccl_.identity());
  const Turn turn(parent, wait);
  const device::OnDevice here(device_);
  wait.hooks.release();
  config.blocking = 0;
  std::vector<int> out = excluded;
  const int flags = parent.health_->failed.load() ? kShrinkAbort : kShrinkDefault;
  parent.check(nccl_.shrink(parent.handle_, out.data(), static_cast<int>(out.size()), &handle_,
                            &config, flags),
               "ncclCommShrink", wait);
  made("ncclCommShrink", wait);
}

void NcclBackend::close(WaitContext& wait) {
  unwatch(this);
  if (!handle_) return;
  std::optional<Error> trouble;
  try {
    const Turn turn(*this, wait);
    const device::OnDevice here(device_);
    wait.hooks.release();
    // The watchdog may have aborted while we waited for the turn.
    if (!handle_) return;
    try {
      if (health_->failed.load() || give_up_.load()) throw Error(Trouble::backend, "given up");
      check(nccl_.finalize(handle_), "ncclCommFinalize", wait);
      const Result result = nccl_.destroy(handle_);
      if (result != Result::success && result != Result::in_progress)
        trouble = nccl_.error(result, "ncclCommDestroy", nullptr);
    } catch (const Error&) {
      nccl_.abort(handle_);
    }
    handle_ = nullptr;
    lanes_.clear();
  } catch (const Error& error) {
    trouble = error;
  }
  if (trouble) throw *trouble;
}

void NcclBackend::give_up() { give_up_.store(true); }

// ---- enqueueing -----------------------------------------------------------------------------

void NcclBackend::enqueue(const Call* calls, size_t count, uint64_t record, WaitContext& wait) {
  check_alive();
  wait.hooks.release();
  const Turn turn(*this, wait);
  check_alive();
  Enqueue(*this, wait).go(calls, count);
  for (size_t i = 0; i < count; ++i) note(calls[i].stream, record + i, turn.expires);
}

void NcclBackend::note(Stream stream, uint64_t record, int64_t expires) {
  Lane* lane = nullptr;
  for (Lane& l : lanes_)
    if (l.stream == stream) lane = &l;
  if (!lane) {
    const auto free = std::find_if(lanes_.begin(), lanes_.end(), [](Lane& l) { return l.idle(); });
    lane = free != lanes_.end() ? &*free : &lanes_.emplace_back();
    lane->stream = stream;
  }
  lane->records[lane->enqueued++ % Lane::kKept] = record;
  lane->fresh_expires = std::min(lane->fresh_expires, expires);
}

std::shared_ptr<Transfer> NcclBackend::mark(const Call& call) {
  return std::make_shared<DeviceTransfer>(call, health_);
}

void NcclBackend::synchronize(WaitContext& wait) {
  check_alive();
  std::vector<std::shared_ptr<Transfer>> ends;
  std::vector<uint64_t> reached;
  {
    const Turn turn(*this, wait);
    for (const Lane& lane : lanes_) {
      if (lane.idle()) continue;
      Call call;
      call.device = static_cast<int16_t>(device_);
      call.stream = lane.stream;
      ends.push_back(mark(call));
      reached.push_back(lane.enqueued);
    }
  }
  wait.hooks.release();
  for (const auto& end : ends) wait_for(*end, wait);
  const Turn turn(*this, wait);
  for (Lane& lane : lanes_) {
    const auto it = std::find_if(ends.begin(), ends.end(), [&](const auto& end) {
      return end->call().stream == lane.stream;
    });
    if (it != ends.end()) finish(lane, reached[static_cast<size_t>(it - ends.begin())]);
  }
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
  check_alive();
  if (window ? !nccl_.register_window : !nccl_.register_buffer)
    usage(std::string(window ? "window registration needs NCCL 2.27.3"
                             : "buffer registration needs NCCL 2.19.1") +
          " or newer; this is " + nccl_.identity());
  const Turn turn(*this, wait);
  const device::OnDevice here(device_);
  wait.hooks.release();
  void* out = nullptr;
  if (window) {
    const Result result = nccl_.register_window(handle_, data, bytes, &out, kWindowSymmetric);
    if (result == Result::invalid_argument)
      usage(nccl_.error(result, "ncclCommWindowRegister", handle_).text +
            ". A window needs memory of meshring.nccl.allocator()");
    check(result, "ncclCommWindowRegister", wait);
  } else
    check(nccl_.register_buffer(handle_, data, bytes, &out), "ncclCommRegister", wait);
  return out;
}

void NcclBackend::deregister_buffer(void* handle, bool window, WaitContext& wait) {
  if (!handle_ || health_->failed.load()) return;  // gone with the communicator
  const Turn turn(*this, wait);
  const device::OnDevice here(device_);
  wait.hooks.release();
  if (window)
    check(nccl_.deregister_window(handle_, handle), "ncclCommWindowDeregister", wait);
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

// The stream has come to the end of its first `upto` calls.
void NcclBackend::finish(Lane& lane, uint64_t upto) {
  const uint64_t kept_from = lane.enqueued > Lane::kKept ? lane.enqueued - Lane::kKept : 0;
  for (uint64_t i = std::max(lane.done, kept_from); i < upto; ++i)
    listener_.finished(lane.records[i % Lane::kKept]);
  lane.done = std::max(lane.done, upto);
  if (lane.idle()) lane.fresh_expires = INT64_MAX;
}

void NcclBackend::advance(Lane& lane) {
  if (lane.marked && lane.marker.reached()) {
    finish(lane, lane.covered);
    lane.marked = false;
    lane.marked_expires = INT64_MAX;
  }
  if (lane.marked || lane.done == lane.enqueued) return;
  int capturing = 0;
  if (device::Driver::get().stream_capturing(lane.stream, &capturing) == device::kSuccess &&
      capturing) {
    lane.done = lane.covered = lane.enqueued;  // into a graph: its replays are not ours to watch
    lane.fresh_expires = INT64_MAX;
    return;
  }
  lane.marker.record(lane.stream);
  lane.marked = true;
  lane.covered = lane.enqueued;
  lane.marked_expires = lane.fresh_expires;
  lane.fresh_expires = INT64_MAX;
}

bool NcclBackend::busy() const {
  return std::any_of(lanes_.begin(), lanes_.end(), [](const Lane& l) { return !l.idle(); });
}

std::optional<Error> NcclBackend::diagnose(int64_t now) {
  if (give_up_.load()) return Error(Trouble::backend, "given up");
  Result state = Result::success;
  const Result asked = nccl_.async_error(handle_, &state);
  if (asked != Result::success) return nccl_.error(asked, "ncclCommGetAsyncError", handle_);
  const bool failed = state != Result::success && state != Result::in_progress;
  const std::optional<int> lost = lost_peer(failed || busy(), now);
  if (lost && (failed || now - peer_left_since_ > kPeerGrace))
    return Error(Trouble::peer_lost, "", {*lost});
  if (failed) {
    // A remote error is most often that of a peer which is about to be found dead.
    if (failed_since_ == 0) failed_since_ = now;
    if (state == Result::remote_error && now - failed_since_ < kPeerGrace) return std::nullopt;
    return nccl_.error(state, "ncclCommGetAsyncError", handle_);
  }
  for (Lane& lane : lanes_) advance(lane);
  for (const Lane& lane : lanes_)
    if (now > std::min(lane.marked_expires, lane.fresh_expires))
      return Error(Trouble::deadline, ras_report(nccl_.version()));
  return std::nullopt;
}

std::optional<int> NcclBackend::lost_peer(bool matters, int64_t now) {
  for (int p = 0; matters && p < size_; ++p) {
    if (p == rank_ || !host_.has_left(p)) continue;
    if (peer_left_since_ == 0) peer_left_since_ = now;
    return p;
  }
  peer_left_since_ = 0;
  return std::nullopt;
}

void NcclBackend::abort(const Error& error) {
  uint64_t record = 0;
  for (const Lane& lane : lanes_)
    if (!lane.idle() && (record == 0 || lane.oldest() < record)) record = lane.oldest();
  const Handle handle = handle_;
  handle_ = nullptr;
  listener_.trouble(error, record);  // first: it reads the board as it is now
  nccl_.abort(handle);
  for (Lane& lane : lanes_) lane.done = lane.covered = lane.enqueued;
}

}  // namespace meshring::nccl

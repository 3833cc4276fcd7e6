// Sends and receives of the host backend: small state machines over a Channel, moved on by whoever
// waits, and by one pump thread while a program does something else (isend, irecv).
#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "host_backend.hpp"

namespace meshring::host {

class HostTransfer final : public Transfer {
 public:
  HostTransfer(HostBackend& backend, const Call& call, uint64_t number)
      : b_(backend),
        call_(call),
        number_(number),
        sends_(call.kind == CallKind::send),
        bytes_(call.length * call.unit),
        channel_(sends_ ? backend.region_.channel(backend.me_, call.root)
                        : backend.region_.channel(call.root, backend.me_)) {}

  bool done() const override { return done_.load(std::memory_order_seq_cst); }
  const Call& call() const override { return call_; }
  bool sends() const { return sends_; }
  int peer() const { return call_.root; }
  std::optional<Error> error() const override { return error_; }

  // Does what can be done now; true when anything was.
  bool move_on() { return sends_ ? send() : receive(); }

 private:
  enum class State : uint8_t { waiting, moving, closing };

  void finish() {
    done_.store(true, std::memory_order_seq_cst);
    b_.region_.event().notify();
  }
  Header& header() { return channel_.headers[number_ % kHeaders]; }

  bool send() {
    bool moved = false;
    if (state_ == State::waiting) {
      if (number_ >= channel_.consumed.load(std::memory_order_seq_cst) + kHeaders) return false;
      const bool eager = bytes_ <= kChunkBytes;
      const uint64_t chunk = channel_.chunks_in.load(std::memory_order_relaxed);
      if (eager && chunk >= channel_.chunks_out.load(std::memory_order_seq_cst) + kChunks)
        return false;
      Header& h = header();
      h.bytes = bytes_;
      h.count = call_.count;
      h.dtype = call_.dtype;
      h.refused = 0;
      h.address = reinterpret_cast<uint64_t>(call_.in);
      h.mode =
          eager ? Mode::eager
                : (b_.world_->transport() == Transport::shared_slots ? Mode::staged : Mode::direct);
      if (eager) {
        if (bytes_ > 0)
          std::memcpy(channel_.chunks[chunk % kChunks], call_.in, static_cast<size_t>(bytes_));
        channel_.chunks_in.store(chunk + 1, std::memory_order_seq_cst);
      }
      channel_.posted.store(number_ + 1, std::memory_order_seq_cst);
      if (eager) {
        finish();
        return true;
      }
      b_.region_.event().notify();
      state_ = h.mode == Mode::staged ? State::moving : State::closing;
      moved = true;
    }
    if (state_ == State::moving && channel_.accepted.load(std::memory_order_seq_cst) > number_) {
      while (at_ < bytes_) {
        const uint64_t chunk = channel_.chunks_in.load(std::memory_order_relaxed);
        if (chunk >= channel_.chunks_out.load(std::memory_order_seq_cst) + kChunks) break;
        const int64_t len = std::min(kChunkBytes, bytes_ - at_);
        std::memcpy(channel_.chunks[chunk % kChunks], static_cast<const char*>(call_.in) + at_,
                    static_cast<size_t>(len));
        channel_.chunks_in.store(chunk + 1, std::memory_order_seq_cst);
        b_.region_.event().notify();
        at_ += len;
        moved = true;
      }
    }
    if (channel_.consumed.load(std::memory_order_seq_cst) > number_) {
      Header& h = header();
      if (h.refused)
        error_ = Error(Trouble::mismatch, expected(h.wanted_dtype, h.wanted_count, "receives"),
                       {peer()});
      finish();
      moved = true;
    }
    return moved;
  }

  bool receive() {
    bool moved = false;
    Header& h = header();
    if (state_ == State::waiting) {
      if (channel_.posted.load(std::memory_order_seq_cst) <= number_) return false;
      moved = true;
      if (h.dtype != call_.dtype || h.count != call_.count) {
        error_ = Error(Trouble::mismatch, expected(h.dtype, h.count, "sends"), {peer()});
        h.wanted_dtype = call_.dtype;
        h.wanted_count = call_.count;
        h.refused = 1;
        if (h.mode == Mode::eager) pass_chunk();
        consume();
        return true;
      }
      if (h.mode == Mode::direct) {
        take_directly(h);
        consume();
        return true;
      }
      if (h.mode == Mode::staged) {
        channel_.accepted.store(number_ + 1, std::memory_order_seq_cst);
        b_.region_.event().notify();
      }
      state_ = State::moving;
    }
    const bool eager = h.mode == Mode::eager;
    while (at_ < bytes_ || (eager && bytes_ == 0)) {
      const uint64_t chunk = channel_.chunks_out.load(std::memory_order_relaxed);
      if (channel_.chunks_in.load(std::memory_order_seq_cst) <= chunk) return moved;
      const int64_t len = std::min(kChunkBytes, bytes_ - at_);
      if (len > 0)
        std::memcpy(static_cast<char*>(call_.out) + at_, channel_.chunks[chunk % kChunks],
                    static_cast<size_t>(len));
      pass_chunk();
      at_ += len;
      moved = true;
      if (eager) break;
    }
    if (at_ >= bytes_) consume();
    return moved;
  }

  void take_directly(const Header& h) {
    const View from{reinterpret_cast<char*>(h.address), 1, bytes_, bytes_};
    try {
      b_.read(peer(), from, 0, bytes_, {static_cast<char*>(call_.out), 1, bytes_, bytes_});
      // A sender that has left does not vouch for its bytes any more.
      if (b_.region_.control(peer()).withdrawn.load(std::memory_order_seq_cst) != 0)
        error_ = Error(Trouble::peer_lost, "it left during the transfer", {peer()});
    } catch (const Error& e) {
      error_ = e;
    }
  }
  void pass_chunk() {
    channel_.chunks_out.fetch_add(1, std::memory_order_seq_cst);
    b_.region_.event().notify();
  }
  void consume() {
    channel_.consumed.store(number_ + 1, std::memory_order_seq_cst);
    finish();
  }
  std::string expected(DType dtype, int64_t count, const char* verb) const {
    return "rank " + std::to_string(peer()) + " " + verb + " " + std::to_string(count) + " x " +
           name_of(dtype) + ", this rank " + (sends_ ? "sends " : "receives ") +
           std::to_string(call_.count) + " x " + name_of(call_.dtype);
  }

  HostBackend& b_;
  const Call call_;
  const uint64_t number_;  // of the message between the two ranks
  const bool sends_;
  const int64_t bytes_;
  Channel& channel_;
  State state_ = State::waiting;
  int64_t at_ = 0;
  std::optional<Error> error_;  // written before done_
  std::atomic<bool> done_{false};
};

std::vector<std::shared_ptr<Transfer>> HostBackend::post(const std::vector<Call>& calls,
                                                         bool beside) {
  std::vector<std::shared_ptr<Transfer>> out;
  std::lock_guard<std::mutex> guard(transfers_lock_);
  for (const Call& call : calls) {
    auto& counts = call.kind == CallKind::send ? sent_ : received_;
    auto t = std::make_shared<HostTransfer>(*this, call, counts[static_cast<size_t>(call.root)]++);
    transfers_.push_back(t);
    out.push_back(std::move(t));
  }
  const bool small = std::all_of(calls.begin(), calls.end(), [](const Call& call) {
    return call.length * call.unit <= kChunkBytes;
  });
  if (!beside || small) progress();
  if (beside && !transfers_.empty()) {
    if (!pump_.joinable()) pump_ = std::thread([this] { pump(); });
    pump_wakes_.notify_one();
  }
  return out;
}

// Moves the first unfinished transfer of each channel and direction on, until nothing moves.
void HostBackend::progress() {
  for (bool moved = true; moved;) {
    moved = false;
    for (auto it = transfers_.begin(); it != transfers_.end();) {
      HostTransfer& t = **it;
      const auto same_channel = [&t](const std::shared_ptr<HostTransfer>& o) {
        return o->peer() == t.peer() && o->sends() == t.sends();
      };
      if (std::any_of(transfers_.begin(), it, same_channel)) {
        ++it;
        continue;
      }
      moved = t.move_on() || moved;
      it = t.done() ? transfers_.erase(it) : std::next(it);
    }
  }
}

bool HostBackend::advance(const HostTransfer& transfer) {
  if (transfer.done()) return true;
  std::lock_guard<std::mutex> guard(transfers_lock_);
  progress();
  return transfer.done();
}

void HostBackend::wait(Transfer& transfer, WaitContext& wait) {
  auto& t = static_cast<HostTransfer&>(transfer);
  const auto ready = [&] { return advance(t); };
  const auto missing = [&] { return ready() ? std::vector<int>{} : std::vector<int>{t.peer()}; };
  if (!ready())
    wait_for(ready, [&] { check(missing, wait); }, region_.event(), patience_, wait.hooks);
}

void HostBackend::pump() {
  Patience patience = patience_;
  patience.spins = patience.more_spins = 0;  // the program's thread has the core
  patience.yield_ns = 50000;
  Hooks hooks;
  for (;;) {
    {
      std::unique_lock<std::mutex> guard(transfers_lock_);
      pump_wakes_.wait(guard, [this] { return stop_ || !transfers_.empty(); });
      if (stop_) return;
    }
    const auto idle = [this] {
      std::lock_guard<std::mutex> guard(transfers_lock_);
      progress();
      return stop_ || transfers_.empty();
    };
    wait_for(idle, [] {}, region_.event(), patience, hooks);
  }
}

HostBackend::~HostBackend() {
  {
    std::lock_guard<std::mutex> guard(transfers_lock_);
    stop_ = true;
    transfers_.clear();
  }
  pump_wakes_.notify_all();
  region_.event().wake();
  if (pump_.joinable()) pump_.join();
}

}  // namespace meshring::host

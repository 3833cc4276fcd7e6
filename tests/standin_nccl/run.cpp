// The collectives and transfers themselves, in host memory.
#include <algorithm>
#include <cstring>

#include "comm.hpp"

namespace standin {
namespace {

struct Header {
  uint64_t count;
  int64_t dtype;
};

class Runner {
 public:
  explicit Runner(const CommPointer& comm)
      : comm_(*comm), segment_(comm->segment), n_(comm->size()), rank_(comm->rank()) {}

  void collective(const Operation& o) {
    if (o.stall || comm_.lost.load()) return block();
    if (!agree(o)) return;
    const size_t size = size_of(o.dtype);
    const size_t stage = piece(o) / size;
    for (size_t done = 0; done < o.count; done += stage) {
      const size_t count = std::min(stage, o.count - done);
      give(o, done, count);
      if (!barrier()) return;
      take(o, done, count);
      if (!barrier()) return;
    }
    if (o.count == 0) barrier();
  }

  // Sends and receives progress together; between two ranks they keep their order.
  void transfers(const std::vector<Operation>& all) {
    std::vector<Transfer> left;
    for (const Operation& o : all) {
      if (o.stall || comm_.lost.load()) return block();
      Transfer t{&o, {o.count, static_cast<int64_t>(o.dtype)}, 0, 0};
      left.push_back(t);
    }
    for (int turn = 0; !left.empty(); ++turn) {
      if (stop()) return;
      std::vector<bool> busy(static_cast<size_t>(2 * n_));  // an earlier one with this peer is on
      bool moved = false;
      for (auto t = left.begin(); t != left.end();) {
        const bool sends = t->operation->function == Function::send;
        const auto key = static_cast<size_t>(2 * t->operation->peer + (sends ? 1 : 0));
        const size_t before = t->at;
        const bool done = !busy[key] && (sends ? push(*t) : pull(*t));
        moved = moved || t->at != before || done;
        busy[key] = true;
        if (done) {
          // A second transfer of this pair starts in the next round.
          t = left.erase(t);
        } else {
          ++t;
        }
      }
      if (moved) {
        turn = 0;
      } else {
        pause(turn);
      }
    }
  }

 private:
  struct Transfer {
    const Operation* operation;
    Header header;
    size_t at;  // bytes of header and data together
    uint64_t end;
  };

  bool stop() {
    // A look at the peers is a system call each: not at every turn.
    if (++looks_ % 256 == 0 && comm_.async.load() == Result::success) {
      const int gone = segment_.missing_peer();
      if (gone >= 0) {
        fail(Result::remote_error, text("rank %d has gone", gone));
        comm_.async.store(Result::remote_error);
      }
    }
    return comm_.stopped();
  }

  void block() {
    if (comm_.lost.load()) comm_.async.store(Result::remote_error);
    for (int turn = 0; !stop(); ++turn) pause(turn);
  }

  bool barrier() {
    return segment_.barrier([this] { return stop(); });
  }

  void quarrel(const std::string& what) {
    violation(what);
    fail(Result::remote_error, what);
    segment_.poison();
    block();
  }

  bool agree(const Operation& o) {
    const Description mine{static_cast<int>(o.function), static_cast<int>(o.dtype),
                           o.scaled ? -1 : static_cast<int>(o.op), o.peer, o.count};
    segment_.own().description = mine;
    if (!barrier()) return false;
    for (int r = 0; r < n_; ++r) {
      const Description d = segment_.seat(r).description;
      if (d == mine) continue;
      quarrel(
          text("rank %d is in %s count %zu dtype %s op %d root %d, rank %d in %s count %zu "
               "dtype %s op %d root %d",
               rank_, name_of(o.function), o.count, name_of(o.dtype), mine.op, mine.root, r,
               name_of(static_cast<Function>(d.function)), static_cast<size_t>(d.count),
               name_of(static_cast<DataType>(d.dtype)), d.op, d.root));
      return false;
    }
    return barrier();
  }

  // Each rank's own part for each other rank: the staging area is divided.
  static bool personal(Function f) {
    return f == Function::reduce_scatter || f == Function::all_to_all || f == Function::scatter;
  }

  size_t piece(const Operation& o) const {
    const size_t bytes =
        personal(o.function) ? Seat::kStaging / static_cast<size_t>(n_) : Seat::kStaging;
    return bytes / 64 * 64;
  }

  void put(const Operation& o, size_t element, char* target, size_t count) const {
    const size_t size = size_of(o.dtype);
    const char* const source = static_cast<const char*>(o.send) + element * size;
    if (o.scaled) {
      scale(target, source, o.scalar, count, o.dtype);
    } else {
      std::memcpy(target, source, count * size);
    }
  }

  void give(const Operation& o, size_t done, size_t count) const {
    char* const staging = segment_.own().staging;
    const bool rooted = o.function == Function::broadcast || o.function == Function::scatter;
    if (rooted && rank_ != o.peer) return;
    if (!personal(o.function)) return put(o, done, staging, count);
    for (int r = 0; r < n_; ++r) {
      const auto k = static_cast<size_t>(r);
      put(o, k * o.count + done, staging + k * piece(o), count);
    }
  }

  void take(const Operation& o, size_t done, size_t count) const {
    const size_t size = size_of(o.dtype);
    char* const target = static_cast<char*>(o.recv) + done * size;
    const size_t own = personal(o.function) ? static_cast<size_t>(rank_) * piece(o) : 0;
    const auto staged = [&](int r) -> const char* { return segment_.seat(r).staging + own; };
    const auto each = [&] {
      for (int r = 0; r < n_; ++r) {
        std::memcpy(target + static_cast<size_t>(r) * o.count * size, staged(r), count * size);
      }
    };
    std::vector<const char*> all;
    for (int r = 0; r < n_; ++r) all.push_back(staged(r));
    switch (o.function) {
      case Function::all_reduce:
      case Function::reduce_scatter:
        return standin::reduce(target, all.data(), n_, count, o.dtype, o.op);
      case Function::reduce:
        if (rank_ == o.peer) standin::reduce(target, all.data(), n_, count, o.dtype, o.op);
        return;
      case Function::broadcast:
      case Function::scatter:
        std::memcpy(target, staged(o.peer), count * size);
        return;
      case Function::gather:
        if (rank_ == o.peer) each();
        return;
      case Function::all_gather:
      case Function::all_to_all:
        return each();
      case Function::send:
      case Function::recv:
        return;
    }
  }

  // One step; true when the receiver has taken everything.
  bool push(Transfer& t) {
    const Operation& o = *t.operation;
    Channel& channel = segment_.channel(rank_, o.peer);
    const size_t total = sizeof(Header) + o.count * size_of(o.dtype);
    if (t.at < sizeof(Header)) {
      t.at += channel.put(reinterpret_cast<const char*>(&t.header) + t.at, sizeof(Header) - t.at);
    } else if (t.at < total) {
      t.at += channel.put(static_cast<const char*>(o.send) + t.at - sizeof(Header), total - t.at);
    }
    if (t.at == total && t.end == 0) t.end = channel.written.load();
    return t.at == total && channel.read.load() >= t.end;
  }

  bool pull(Transfer& t) {
    const Operation& o = *t.operation;
    Channel& channel = segment_.channel(o.peer, rank_);
    const size_t total = sizeof(Header) + o.count * size_of(o.dtype);
    if (t.at < sizeof(Header)) {
      t.at += channel.take(reinterpret_cast<char*>(&t.header) + t.at, sizeof(Header) - t.at);
      if (t.at < sizeof(Header)) return false;
      const auto dtype = static_cast<DataType>(t.header.dtype);
      if (t.header.count != o.count || dtype != o.dtype) {
        quarrel(text("rank %d receives %zu of %s from rank %d, which sends %zu of %s", rank_,
                     o.count, name_of(o.dtype), o.peer, static_cast<size_t>(t.header.count),
                     name_of(dtype)));
        return false;
      }
    } else {
      t.at += channel.take(static_cast<char*>(o.recv) + t.at - sizeof(Header), total - t.at);
    }
    return t.at == total;
  }

  Comm& comm_;
  Segment& segment_;
  const int n_, rank_;
  unsigned looks_ = 0;
};

// Buffers must still be there when the operation runs, not only when it was enqueued.
void look_at_buffers(const Comm& comm, const Operation& o) {
  if (o.send != nullptr) usable(name_of(o.function), o.send, o.sent(comm.size()));
  if (o.recv != nullptr) usable(name_of(o.function), o.recv, o.received(comm.size()));
}

}  // namespace

void run(const CommPointer& comm, const std::vector<Operation>& operations) {
  Runner runner(comm);
  std::vector<Operation> transfers;
  for (const Operation& o : operations) {
    if (comm->stopped()) return;
    look_at_buffers(*comm, o);
    if (o.function == Function::send || o.function == Function::recv) {
      transfers.push_back(o);
    } else {
      runner.collective(o);
    }
  }
  runner.transfers(transfers);
}

}  // namespace standin

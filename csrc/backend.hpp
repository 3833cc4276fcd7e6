// F2. The contract of a backend: how the ranks of one communicator move data.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "call.hpp"
#include "deadline.hpp"
#include "error.hpp"
#include "wait.hpp"

namespace meshring {

// What bounds one wait: its deadline, and what the caller's floor wants to hear.
struct WaitContext {
  Deadline deadline;
  Hooks& hooks;
};

// A posted send or receive. Its call's buffers must live until it is done.
class Transfer {
 public:
  virtual ~Transfer() = default;
  virtual bool done() const = 0;
  virtual std::optional<Error> error() const = 0;  // how it failed; when done
  virtual const Call& call() const = 0;
};

// Of how_it_left(): it waits for somebody else than this rank.
inline constexpr const char* kGaveUp = "gave up at its own deadline";

// Collectives are executed by one thread at a time, in the same order on all ranks; transfers may
// be posted and waited for by another thread meanwhile. What each kind of call means, with block(i,
// j) as call.hpp's Blocks cut it, n ranks, this one being `me`:
//   all_reduce      out = reduction of every in, in rank order      reduce          the same, on
//   root reduce_scatter  out = reduction of every rank's block me        broadcast       out =
//   root's in all_gather      out block i = in of rank i                      gather          the
//   same, on root scatter         out = block me of root's in                     barrier nothing
//   moves all_to_all      out block i = block me of rank i's in
// Buffers are C-contiguous; `in` may equal `out` where meshring's public in-place forms say so.
//
// Failures are Error: mismatch (found on every rank before any out is written; the backend stays
// usable), deadline, peer_lost, interrupted and backend (it is unusable afterwards). `ranks` names
// the culprits in the numbering of this communicator.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;

  virtual void execute(const Call& call, WaitContext& wait) = 0;

  // Starts sends and receives that may need one another's progress; order per pair is kept.
  // `beside` says that the caller goes on with other work before it waits: then they move on by
  // themselves.
  virtual std::vector<std::shared_ptr<Transfer>> post(const std::vector<Call>& calls,
                                                      bool beside) = 0;
  virtual void wait(Transfer& transfer, WaitContext& wait) = 0;

  // This rank leaves: peers that wait for it, now or later, learn why at once.
  virtual void withdraw(Trouble why, int culprit) = 0;
  virtual void close() = 0;  // the same, in peace
  virtual bool has_left(int p) const = 0;
  // Of a rank that has left: the one that it blames for that, or itself.
  virtual int first_cause(int p) const = 0;
  virtual std::string how_it_left(int p) const = 0;  // "was killed by SIGKILL (signal 9)"
};

// The contract of a backend for arrays on a GPU: calls are enqueued on a stream, and done when the
// stream has come so far. One thread at a time enqueues. What went wrong on the device shows later:
// then everything enqueued ends, and `trouble` (given at construction) is called, once.
class DeviceBackend {
 public:
  virtual ~DeviceBackend() = default;
  virtual const char* name() const = 0;

  // Enqueues one collective, or sends and receives that go together. `record` is the call's number
  // in this rank's ring.
  virtual void enqueue(const Call* calls, size_t count, uint64_t record, WaitContext& wait) = 0;
  // Done when everything enqueued so far on the call's stream is done.
  virtual std::shared_ptr<Transfer> mark(const Call& call) = 0;
  virtual void wait_for(Transfer& transfer, WaitContext& wait) = 0;
  virtual void synchronize(WaitContext& wait) = 0;  // waits for all that was enqueued

  virtual void give_up() = 0;  // ends what was enqueued; returns at once
  virtual void close(WaitContext& wait) = 0;
};

}  // namespace meshring

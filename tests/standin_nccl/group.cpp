// Groups, the collectives' entries, and how they come onto a stream.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "comm.hpp"

namespace standin {
namespace {

using meshring::nccl::Op;
using Operations = std::vector<Operation>;

struct Group {
  int depth = 0;
  Result error = Result::success;
  int polls = 0;  // of a fault that keeps a call in progress
  std::vector<std::pair<CommPointer, Operations>> comms;  // in the order of their first call
  std::vector<std::pair<CommPointer, std::function<Result()>>> joining;
};
thread_local Group group;

bool rooted_send(Function f) { return f == Function::broadcast || f == Function::scatter; }
bool rooted_recv(Function f) { return f == Function::reduce || f == Function::gather; }
bool rooted(Function f) { return rooted_send(f) || rooted_recv(f); }
bool transfers(Function f) { return f == Function::send || f == Function::recv; }
bool reduces(Function f) {
  return f == Function::all_reduce || f == Function::reduce || f == Function::reduce_scatter;
}

const char* symbol_of(Function function) {
  static const char* const kSymbols[] = {
      "ncclAllReduce", "ncclAllGather", "ncclReduceScatter", "ncclBroadcast", "ncclReduce",
      "ncclGather",    "ncclScatter",   "ncclAlltoAll",      "ncclSend",      "ncclRecv"};
  return kSymbols[static_cast<int>(function)];
}

// Where in-place is defined, the offset of the smaller buffer in the larger one.
void check_overlap(const Operation& o, const Comm& comm) {
  if (o.send == nullptr || o.recv == nullptr || o.count == 0) return;
  const auto send = reinterpret_cast<uintptr_t>(o.send);
  const auto recv = reinterpret_cast<uintptr_t>(o.recv);
  if (send + o.sent(comm.size()) <= recv || recv + o.received(comm.size()) <= send) return;
  const size_t one = o.count * size_of(o.dtype);
  const auto rank = static_cast<size_t>(comm.rank());
  bool legal = send == recv;
  switch (o.function) {
    case Function::all_gather:
    case Function::gather:
      legal = send == recv + rank * one;
      break;
    case Function::reduce_scatter:
    case Function::scatter:
      legal = recv == send + rank * one;
      break;
    case Function::all_to_all:
      legal = comm.size() == 1 && send == recv;
      break;
    case Function::all_reduce:
    case Function::broadcast:
    case Function::reduce:
    case Function::send:
    case Function::recv:
      break;
  }
  if (!legal) violation(text("%s: the buffers overlap", symbol_of(o.function)));
}

Result check(const Operation& o, const Comm& comm) {
  const char* const name = symbol_of(o.function);
  if (size_of(o.dtype) == 0) {
    return fail(Result::invalid_argument, text("%s: dtype %d", name, static_cast<int>(o.dtype)));
  }
  if ((rooted(o.function) || transfers(o.function)) && (o.peer < 0 || o.peer >= comm.size())) {
    return fail(Result::invalid_argument, text("%s: root or peer %d", name, o.peer));
  }
  const bool send_missing = o.send == nullptr && o.sent(comm.size()) != 0;
  const bool recv_missing = o.recv == nullptr && o.received(comm.size()) != 0;
  const bool root = comm.rank() == o.peer;
  if ((send_missing && (!rooted_send(o.function) || root)) ||
      (recv_missing && (!rooted_recv(o.function) || root))) {
    return fail(Result::invalid_argument, text("%s: a buffer is a null pointer", name));
  }
  if (o.send != nullptr && !usable(name, o.send, o.sent(comm.size()))) {
    return fail(Result::invalid_argument, text("%s: the send buffer", name));
  }
  if (o.recv != nullptr && !usable(name, o.recv, o.received(comm.size()))) {
    return fail(Result::invalid_argument, text("%s: the receive buffer", name));
  }
  check_overlap(o, comm);
  return Result::success;
}

// What waits for its turn: operations of a communicator run in the order of their calls, whatever
// their streams.
Task ticket(const CommPointer& comm, const Operations& operations, uint64_t number) {
  return [comm, operations, number] {
    comm->running.fetch_add(1);
    for (int turn = 0; comm->turn.load() != number && !comm->stopped(); ++turn) pause(turn);
    if (!comm->stopped()) run(comm, operations);
    comm->turn.store(number + 1);
    comm->running.fetch_sub(1);
    comm->outstanding.fetch_sub(1);
  };
}

// All streams of the operations wait for each other before and after them.
Result enqueue(const CommPointer& comm, const Operations& operations) {
  void* const first = operations.front().stream;
  std::vector<void*> others;
  for (const Operation& o : operations) {
    const bool known =
        o.stream == first || std::find(others.begin(), others.end(), o.stream) != others.end();
    if (!known) others.push_back(o.stream);
  }
  bool found = true;
  const auto put = [&found](void* stream, Task task) {
    found = submit(stream, [task = std::move(task)] { return task; }) && found;
  };
  for (void* const stream : others) {
    auto before = std::make_shared<Mark>();
    put(stream, [before] { before->set(); });
    put(first, [before] { before->wait(); });
  }
  const auto launch = [comm, operations]() -> Task {
    comm->outstanding.fetch_add(1);
    return ticket(comm, operations, comm->tickets++);
  };
  found = submit(first, launch) && found;
  for (void* const stream : others) {
    auto after = std::make_shared<Mark>();
    put(first, [after] { after->set(); });
    put(stream, [after] { after->wait(); });
  }
  return found ? Result::success : fail(Result::unhandled_cuda_error, "no such stream");
}

// A transfer from a rank to itself needs its other half in the same group.
Result check_self(const Comm& comm, const Operations& operations) {
  int balance = 0;
  for (const Operation& o : operations) {
    if (!transfers(o.function) || o.peer != comm.rank()) continue;
    balance += o.function == Function::send ? 1 : -1;
  }
  if (balance == 0) return Result::success;
  return fail(Result::invalid_usage, "a send to self without a matching recv, or the other way");
}

Result launch(const CommPointer& comm, const Operations& operations, int polls) {
  static const bool always = option("STANDIN_IN_PROGRESS");
  Result result = check_self(*comm, operations);
  if (result == Result::success && (comm->revoked.load() || comm->finalized.load())) {
    result = fail(Result::invalid_usage, "the communicator was revoked or finalized");
  }
  if (result == Result::success) result = ensure_ready(comm);
  if (result != Result::success) return result;
  // The first launch connects the ranks, and so do calls that a fault keeps in progress.
  const bool later = !comm->blocking && (always || !comm->launched || polls != 0);
  comm->launched = true;
  if (!later && polls == 0) {
    const std::lock_guard<std::mutex> lock(world());
    return enqueue(comm, operations);
  }
  if (polls == 0) polls = number("STANDIN_POLLS", 1);
  return settle(comm, [comm, operations] { return enqueue(comm, operations); }, polls);
}

// Starts what the group holds, in the order of its communicators.
Result finish(Group held, const Fault& fault) {
  if (held.error != Result::success) return held.error;
  const int polls = fault.kind == FaultKind::in_progress ? fault.value : held.polls;
  Result result = Result::success;
  const auto note = [&result](Result one) {
    if (result == Result::success || (result == Result::in_progress && one != Result::success)) {
      result = one;
    }
  };
  for (auto& [comm, step] : held.joining) {
    const std::lock_guard<std::mutex> lock(world());
    comm->pending = Pending{step, std::make_shared<int>(0)};
  }
  for (auto& [comm, step] : held.joining) {
    note(settle(comm, step, comm->blocking ? 0 : number("STANDIN_POLLS", 1)));
  }
  for (const auto& [comm, operations] : held.comms) note(launch(comm, operations, polls));
  return result;
}

void note(const Comm& comm, const Operation& o) {
  Record record(symbol_of(o.function));
  record.add("rank", comm.rank()).add("count", static_cast<int64_t>(o.count));
  record.add("dtype", name_of(o.dtype)).add("peer", o.peer).add("stream", o.stream);
  record.add("send", o.send).add("recv", o.recv).add("depth", group.depth);
  if (reduces(o.function)) record.add("op", o.scaled ? "premulsum" : name_of(o.op));
}

}  // namespace

const char* name_of(Function function) {
  static const char* const kNames[] = {"all_reduce", "all_gather", "reduce_scatter", "broadcast",
                                       "reduce",     "gather",     "scatter",        "all_to_all",
                                       "send",       "recv"};
  return kNames[static_cast<int>(function)];
}

size_t Operation::sent(int ranks) const {
  const bool many = function == Function::reduce_scatter || function == Function::all_to_all ||
                    function == Function::scatter;
  const size_t bytes = count * size_of(dtype);
  if (function == Function::recv) return 0;
  return many ? bytes * static_cast<size_t>(ranks) : bytes;
}

size_t Operation::received(int ranks) const {
  const bool many = function == Function::all_gather || function == Function::all_to_all ||
                    function == Function::gather;
  const size_t bytes = count * size_of(dtype);
  if (function == Function::send) return 0;
  return many ? bytes * static_cast<size_t>(ranks) : bytes;
}

bool join_group(const CommPointer& comm, const std::function<Result()>& step) {
  if (group.depth > 0) group.joining.emplace_back(comm, step);
  return group.depth > 0;
}

// Checks a call, and starts it unless a group is open.
Result enter(Handle handle, Operation o, Op op) {
  const char* const name = symbol_of(o.function);
  const CommPointer comm = find_comm(handle);
  if (comm == nullptr)
    return fail(Result::invalid_argument, text("%s: no such communicator", name));
  if (reduces(o.function)) {
    const int code = static_cast<int>(op);
    o.op = code >= 0 && code <= 4 ? static_cast<Operator>(code) : Operator::sum;
    if ((code < 0 || code > 4) && !find_operator(code, comm.get(), &o)) {
      return fail(Result::invalid_argument, text("%s: op %d", name, code));
    }
  }
  note(*comm, o);
  Fault fault;
  Result result = Result::success;
  if (!comm_fault(name, comm, &fault, &result)) {
    o.stall = fault.kind == FaultKind::stall;
    if (rooted_send(o.function) && comm->rank() != o.peer) o.send = nullptr;
    if (rooted_recv(o.function) && comm->rank() != o.peer) o.recv = nullptr;
    result = ensure_ready(comm);
    if (result == Result::success) result = check(o, *comm);
    if (result == Result::success) {
      const int polls = fault.kind == FaultKind::in_progress ? fault.value : 0;
      if (group.depth == 0) return launch(comm, {o}, polls);
      if (polls != 0) group.polls = polls;
      const auto known = std::find_if(group.comms.begin(), group.comms.end(),
                                      [&](const auto& entry) { return entry.first == comm; });
      if (known == group.comms.end()) {
        group.comms.emplace_back(comm, Operations{o});
      } else {
        known->second.push_back(o);
      }
    }
  }
  if (group.depth > 0 && result != Result::success) group.error = result;
  return result;
}

}  // namespace standin

using namespace standin;
STANDIN_EXPORT Result ncclGroupStart() {
  if (!null_mode()) Record("ncclGroupStart").add("depth", group.depth);
  const int code = plain_fault("ncclGroupStart", static_cast<int>(Result::internal_error));
  if (code != 0) return fail(static_cast<Result>(code), "ncclGroupStart: fault");
  ++group.depth;
  return Result::success;
}

STANDIN_EXPORT Result ncclGroupEnd() {
  if (!null_mode()) Record("ncclGroupEnd").add("depth", group.depth);
  if (group.depth == 0) return fail(Result::invalid_usage, "ncclGroupEnd without ncclGroupStart");
  if (--group.depth > 0) return Result::success;
  Group held;
  std::swap(held, group);
  Fault fault;
  Result result = Result::success;
  if (held.comms.empty()) {
    const int code = plain_fault("ncclGroupEnd", static_cast<int>(Result::internal_error));
    if (code != 0) return fail(static_cast<Result>(code), "ncclGroupEnd: fault");
  } else if (comm_fault("ncclGroupEnd", held.comms.front().first, &fault, &result)) {
    return result;
  }
  return finish(std::move(held), fault);
}

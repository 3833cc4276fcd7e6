// A communicator of the stand-in, and the operations that wait for their turn on a stream.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "arithmetic.hpp"
#include "segment.hpp"
#include "standin.hpp"

namespace standin {

using meshring::nccl::Config;
using meshring::nccl::DataType;
using meshring::nccl::Handle;
using meshring::nccl::Result;

enum class Function : int {
  all_reduce,
  all_gather,
  reduce_scatter,
  broadcast,
  reduce,
  gather,
  scatter,
  all_to_all,
  send,
  recv,
};
const char* name_of(Function function);

struct Operation {
  Function function = Function::all_reduce;
  const void* send = nullptr;
  void* recv = nullptr;
  size_t count = 0;
  DataType dtype = DataType::int8;
  Operator op = Operator::sum;
  bool scaled = false;  // premultiplied by `scalar`
  char scalar[8] = {};
  int peer = 0;  // or root
  void* stream = nullptr;
  bool stall = false;

  size_t sent(int ranks) const;  // bytes of a whole buffer
  size_t received(int ranks) const;
};

// What a nonblocking call left to be done: `step` runs when the caller has polled so often.
struct Pending {
  std::function<Result()> step;
  std::shared_ptr<int> polls;  // -1: never; a child has its parent's
};

struct Comm {
  Segment segment;
  bool blocking = true;
  std::atomic<bool> aborted{false}, revoked{false}, lost{false};
  std::atomic<bool> finalized{false};
  std::atomic<Result> async{Result::success};
  std::atomic<int> running{0}, outstanding{0};
  std::atomic<uint64_t> turn{0};
  std::atomic<uint64_t> tickets{0};
  std::optional<Pending> pending;  // below: with the lock of world()
  bool launched = false;
  int shrinks = 0;
  std::vector<std::pair<void*, void*>> registered, windows;

  int rank() const { return segment.rank(); }
  int size() const { return segment.size(); }
  bool stopped() const { return aborted.load() || revoked.load(); }
};
using CommPointer = std::shared_ptr<Comm>;

// ---- nccl.cpp ----
std::mutex& world();  // of communicators, their pending calls and operators
CommPointer find_comm(Handle handle);
Result fail(Result result, const std::string& what);  // for ncclGetLastError
Result ensure_ready(const CommPointer& comm);
// `step` runs now, or later if the communicator is nonblocking; returns as NCCL does.
Result settle(const CommPointer& comm, std::function<Result()> step, int polls,
              const CommPointer& child = nullptr, std::function<Result()> child_step = nullptr);
bool find_operator(int op, const Comm* comm, Operation* operation);  // those made at run time
// The fault of a call on a communicator: true if `result` is what to return at once.
bool comm_fault(const char* function, const CommPointer& comm, Fault* fault, Result* result);

// ---- run.cpp ----
// On the stream's thread: collectives one after another, then all sends and receives together.
void run(const CommPointer& comm, const std::vector<Operation>& operations);

// With STANDIN_NULL collectives return at once, unlooked at: for what a binding costs.
inline bool null_mode() {
  static const bool set = option("STANDIN_NULL");
  return set;
}

// ---- group.cpp ----
Result enter(Handle comm, Operation operation, meshring::nccl::Op op);
// Within a group, leaves an initialisation to ncclGroupEnd.
bool join_group(const CommPointer& comm, const std::function<Result()>& step);

}  // namespace standin

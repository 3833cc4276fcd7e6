// NCCL's functions that move data, and those of memory and its registration.
#include <algorithm>
#include <cstring>
#include <map>

#include "comm.hpp"

namespace standin {
namespace {

// Reduction operators made at run time, with the lock of world().
struct Operators {
  std::map<int, std::pair<const Comm*, Operation>> made;
  int next = 5;
};

Operators& operators() {
  static Operators& o = *new Operators;
  return o;
}

}  // namespace

bool find_operator(int op, const Comm* comm, Operation* operation) {
  const std::lock_guard<std::mutex> lock(world());
  const auto found = operators().made.find(op);
  if (found == operators().made.end() || found->second.first != comm ||
      found->second.second.dtype != operation->dtype) {
    return false;
  }
  operation->scaled = true;
  std::memcpy(operation->scalar, found->second.second.scalar, sizeof(operation->scalar));
  return true;
}

}  // namespace standin

using namespace standin;
using meshring::nccl::Op;
using meshring::nccl::Residence;
using meshring::nccl::Stream;
using meshring::nccl::Window;

namespace {

Result start(Handle comm, Function function, const void* send, void* recv, size_t count,
             DataType dtype, int peer, Stream stream, Op op) {
  if (null_mode()) return Result::success;
  Operation o;
  o.function = function;
  o.send = send;
  o.recv = recv;
  o.count = count;
  o.dtype = dtype;
  o.peer = peer;
  o.stream = stream;
  return enter(comm, o, op);
}

}  // namespace

STANDIN_EXPORT Result ncclAllReduce(const void* send, void* recv, size_t count, DataType dtype,
                                    Op op, Handle comm, Stream stream) {
  return start(comm, Function::all_reduce, send, recv, count, dtype, 0, stream, op);
}

STANDIN_EXPORT Result ncclReduce(const void* send, void* recv, size_t count, DataType dtype, Op op,
                                 int root, Handle comm, Stream stream) {
  return start(comm, Function::reduce, send, recv, count, dtype, root, stream, op);
}

STANDIN_EXPORT Result ncclReduceScatter(const void* send, void* recv, size_t count, DataType dtype,
                                        Op op, Handle comm, Stream stream) {
  return start(comm, Function::reduce_scatter, send, recv, count, dtype, 0, stream, op);
}

STANDIN_EXPORT Result ncclBroadcast(const void* send, void* recv, size_t count, DataType dtype,
                                    int root, Handle comm, Stream stream) {
  return start(comm, Function::broadcast, send, recv, count, dtype, root, stream, Op::sum);
}

STANDIN_EXPORT Result ncclAllGather(const void* send, void* recv, size_t count, DataType dtype,
                                    Handle comm, Stream stream) {
  return start(comm, Function::all_gather, send, recv, count, dtype, 0, stream, Op::sum);
}

STANDIN_EXPORT Result ncclSend(const void* send, size_t count, DataType dtype, int peer,
                               Handle comm, Stream stream) {
  return start(comm, Function::send, send, nullptr, count, dtype, peer, stream, Op::sum);
}

STANDIN_EXPORT Result ncclRecv(void* recv, size_t count, DataType dtype, int peer, Handle comm,
                               Stream stream) {
  return start(comm, Function::recv, nullptr, recv, count, dtype, peer, stream, Op::sum);
}

#if STANDIN_VERSION >= 22803
STANDIN_EXPORT Result ncclAlltoAll(const void* send, void* recv, size_t count, DataType dtype,
                                   Handle comm, Stream stream) {
  return start(comm, Function::all_to_all, send, recv, count, dtype, 0, stream, Op::sum);
}

STANDIN_EXPORT Result ncclGather(const void* send, void* recv, size_t count, DataType dtype,
                                 int root, Handle comm, Stream stream) {
  return start(comm, Function::gather, send, recv, count, dtype, root, stream, Op::sum);
}

STANDIN_EXPORT Result ncclScatter(const void* send, void* recv, size_t count, DataType dtype,
                                  int root, Handle comm, Stream stream) {
  return start(comm, Function::scatter, send, recv, count, dtype, root, stream, Op::sum);
}
#endif

STANDIN_EXPORT Result ncclRedOpCreatePreMulSum(Op* op, void* scalar, DataType dtype,
                                               Residence residence, Handle handle) {
  const CommPointer comm = find_comm(handle);
  if (comm == nullptr) return fail(Result::invalid_argument, "no such communicator");
  Record("ncclRedOpCreatePreMulSum").add("rank", comm->rank()).add("dtype", name_of(dtype));
  Fault fault;
  Result result = Result::success;
  if (comm_fault("ncclRedOpCreatePreMulSum", comm, &fault, &result)) return result;
  result = ensure_ready(comm);
  if (result != Result::success) return result;
  if (size_of(dtype) == 0 || residence != Residence::host) {
    return fail(Result::invalid_argument,
                "ncclRedOpCreatePreMulSum: dtype, or a scalar not on the host");
  }
  const std::lock_guard<std::mutex> lock(world());
  Operation made;
  made.dtype = dtype;
  std::memcpy(made.scalar, scalar, size_of(dtype));
  const int number = operators().next++;
  operators().made[number] = {comm.get(), made};
  *op = static_cast<Op>(number);
  return Result::success;
}

STANDIN_EXPORT Result ncclRedOpDestroy(Op op, Handle handle) {
  const CommPointer comm = find_comm(handle);
  if (comm == nullptr) return fail(Result::invalid_argument, "no such communicator");
  Record("ncclRedOpDestroy").add("rank", comm->rank());
  Fault fault;
  Result result = Result::success;
  if (comm_fault("ncclRedOpDestroy", comm, &fault, &result)) return result;
  const std::lock_guard<std::mutex> lock(world());
  const auto found = operators().made.find(static_cast<int>(op));
  if (found == operators().made.end() || found->second.first != comm.get()) {
    return fail(Result::invalid_argument, "ncclRedOpDestroy: no such operator");
  }
  operators().made.erase(found);
  return Result::success;
}

#if STANDIN_VERSION >= 21901
namespace {

Result memory_fault(const char* function) {
  const int code = plain_fault(function, static_cast<int>(Result::internal_error));
  if (code != 0) fail(static_cast<Result>(code), std::string(function) + ": fault");
  return static_cast<Result>(code);
}

// What both kinds of registration do, with one list each.
Result enlist(const char* function, Handle handle, void* buffer, size_t bytes, bool window,
              void** made) {
  const CommPointer comm = find_comm(handle);
  if (comm == nullptr) return fail(Result::invalid_argument, "no such communicator");
  Record(function)
      .add("rank", comm->rank())
      .add("buffer", buffer)
      .add("bytes", static_cast<int64_t>(bytes));
  Fault fault;
  Result result = Result::success;
  if (comm_fault(function, comm, &fault, &result)) return result;
  result = ensure_ready(comm);
  if (result != Result::success) return result;
  bool by_nccl = false;
  const bool ours = memory_of(buffer, bytes, &by_nccl, nullptr) == Memory::live && by_nccl;
  if (buffer == nullptr || bytes == 0 || (window && !ours)) {
    return fail(Result::invalid_argument, text("%s: the buffer", function));
  }
  const bool aligned = reinterpret_cast<uintptr_t>(buffer) % meshring::nccl::kWindowAlignment == 0;
  if (window && !aligned) return fail(Result::invalid_argument, "a window's alignment");
  const std::lock_guard<std::mutex> lock(world());
  auto& list = window ? comm->windows : comm->registered;
  *made = new char;
  list.emplace_back(*made, buffer);
  return Result::success;
}

Result strike(const char* function, Handle handle, void* made, bool window) {
  const CommPointer comm = find_comm(handle);
  if (comm == nullptr) return fail(Result::invalid_argument, "no such communicator");
  Record(function).add("rank", comm->rank());
  Fault fault;
  Result result = Result::success;
  if (comm_fault(function, comm, &fault, &result)) return result;
  const std::lock_guard<std::mutex> lock(world());
  auto& list = window ? comm->windows : comm->registered;
  const auto found =
      std::find_if(list.begin(), list.end(), [made](const auto& e) { return e.first == made; });
  if (found == list.end()) return fail(Result::invalid_argument, "no such registration");
  delete static_cast<char*>(made);
  list.erase(found);
  return Result::success;
}

}  // namespace

STANDIN_EXPORT Result ncclMemAlloc(void** made, size_t bytes) {
  Record("ncclMemAlloc").add("bytes", static_cast<int64_t>(bytes));
  const Result fault = memory_fault("ncclMemAlloc");
  if (fault != Result::success) return fault;
  *made = allocate(bytes, current_device(), nullptr, true);
  return *made != nullptr ? Result::success : fail(Result::unhandled_cuda_error, "out of memory");
}

STANDIN_EXPORT Result ncclMemFree(void* pointer) {
  Record("ncclMemFree").add("pointer", pointer);
  const Result fault = memory_fault("ncclMemFree");
  if (fault != Result::success) return fault;
  bool by_nccl = false;
  if (pointer == nullptr) return Result::success;
  const bool known = memory_of(pointer, 0, &by_nccl, nullptr) == Memory::live && by_nccl;
  if (known && release(pointer, nullptr, false)) return Result::success;
  return fail(Result::invalid_argument, "ncclMemFree: no memory of ncclMemAlloc");
}

STANDIN_EXPORT Result ncclCommRegister(Handle comm, void* buffer, size_t bytes, void** made) {
  return enlist("ncclCommRegister", comm, buffer, bytes, false, made);
}

STANDIN_EXPORT Result ncclCommDeregister(Handle comm, void* made) {
  return strike("ncclCommDeregister", comm, made, false);
}

#if STANDIN_VERSION >= 22703
STANDIN_EXPORT Result ncclCommWindowRegister(Handle comm, void* buffer, size_t bytes, Window* made,
                                             int flags) {
  if ((flags & ~meshring::nccl::kWindowSymmetric) != 0) {
    return fail(Result::invalid_argument, text("ncclCommWindowRegister: flags %d", flags));
  }
  return enlist("ncclCommWindowRegister", comm, buffer, bytes, true, made);
}

STANDIN_EXPORT Result ncclCommWindowDeregister(Handle comm, Window made) {
  return strike("ncclCommWindowDeregister", comm, made, true);
}
#endif
#endif

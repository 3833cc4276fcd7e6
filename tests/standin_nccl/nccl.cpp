// Communicators: their making, state and end; and everything of NCCL that moves no data.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "comm.hpp"

namespace standin {
namespace {

using meshring::nccl::UniqueId;

constexpr char kPrefix[] = "standin-";

struct World {
  std::mutex mutex;
  std::map<Comm*, CommPointer> comms;
  std::mutex error_mutex;
  std::string last_error;
};

World& all() {
  static World& w = *new World;  // never destroyed: streams outlive static objects
  return w;
}

CommPointer add(CommPointer comm) {
  const std::lock_guard<std::mutex> lock(world());
  all().comms[comm.get()] = comm;
  return comm;
}

void forget(const CommPointer& comm) {
  const std::lock_guard<std::mutex> lock(world());
  all().comms.erase(comm.get());
}

// Does what is due for every communicator of the process; with the lock held.
void progress() {
  for (auto& [key, comm] : all().comms) {
    if (!comm->pending || *comm->pending->polls != 0) continue;
    const Result result = comm->pending->step();
    if (result == Result::in_progress) continue;
    comm->pending.reset();
    if (result != Result::success) comm->async.store(result);
  }
}

bool settled(const CommPointer& comm) {
  const std::lock_guard<std::mutex> lock(world());
  progress();
  return !comm->pending;
}

Result state_of(const Comm& comm) {
  if (comm.async.load() == Result::success && comm.segment.poisoned()) return Result::remote_error;
  return comm.async.load();
}

std::string check_config(const Config* config) {
  if (config == nullptr) return "";
  if (config->magic != meshring::nccl::kMagic) return "the configuration was not initialised";
  constexpr int kUndefined = meshring::nccl::kUndefined;
  const auto odd = [](int value, int least, int most) {
    return value != kUndefined && (value < least || value > most);
  };
  if (odd(config->blocking, 0, 1)) return text("blocking is %d", config->blocking);
  if (odd(config->cga_cluster_size, 0, 8))
    return text("cgaClusterSize is %d", config->cga_cluster_size);
  if (odd(config->min_ctas, 1, 64)) return text("minCTAs is %d", config->min_ctas);
  if (odd(config->max_ctas, 1, 64)) return text("maxCTAs is %d", config->max_ctas);
  if (odd(config->split_share, 0, 1)) return text("splitShare is %d", config->split_share);
  const bool both = config->min_ctas != kUndefined && config->max_ctas != kUndefined;
  return both && config->min_ctas > config->max_ctas ? "minCTAs is above maxCTAs" : "";
}

void record_config(Record& record, const Config* config) {
  if (config == nullptr) return;
  record.add("blocking", config->blocking)
      .add("config_version", config->version)
      .add("min_ctas", config->min_ctas)
      .add("max_ctas", config->max_ctas);
  if (config->net_name != nullptr) record.add("net_name", std::string(config->net_name));
  if (config->comm_name != nullptr) record.add("comm_name", std::string(config->comm_name));
}

bool blocks(const Config* config, bool otherwise) {
  const bool given = config != nullptr && config->blocking != meshring::nccl::kUndefined;
  return given ? config->blocking != 0 : otherwise;
}

// Joins the segment of that name and waits, as a step, for the other ranks.
std::function<Result()> joining(const CommPointer& comm, const std::string& name, int rank,
                                int size) {
  const std::string wrong = comm->segment.join(name, rank, size);
  const Result result =
      wrong.empty() ? Result::success : fail(Result::invalid_usage, name + ": " + wrong);
  return [comm, result] {
    if (result != Result::success) return result;
    if (comm->lost.load()) return Result::remote_error;
    return comm->segment.complete() ? Result::success : Result::in_progress;
  };
}

int polls_of(const Fault& fault) {
  return fault.kind == FaultKind::in_progress ? fault.value : number("STANDIN_POLLS", 1);
}

// A child is settled when its parent's call is. As in NCCL, a nonblocking call says "success" while
// it goes on, and the child's handle is written at its end.
Result settle_both(const CommPointer& parent, const CommPointer& child, Handle* made,
                   std::function<Result()> step, const Fault& fault) {
  const auto state = std::make_shared<Result>(Result::in_progress);
  *made = nullptr;
  const auto whole = [state, made, child, step = std::move(step)] {
    *state = step();
    if (*state == Result::success) *made = child.get();
    return *state;
  };
  const Result result = settle(parent, whole, polls_of(fault), child, [state] { return *state; });
  const bool given = result == Result::success || result == Result::in_progress;
  if (child != nullptr && !given) forget(child);
  if (given && parent->blocking) settled(parent);
  return given ? Result::success : result;
}

// The ranks of that color in the order of their keys; empty until all have said theirs.
std::vector<int> same_color(const Segment& segment, uint64_t talk) {
  std::vector<int> members;
  const auto slot = talk % 2;
  for (int r = 0; r < segment.size(); ++r) {
    if (segment.seat(r).talks.load() < talk) return {};
  }
  for (int r = 0; r < segment.size(); ++r) {
    if (segment.seat(r).color[slot] == segment.own().color[slot]) members.push_back(r);
  }
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) {
    return segment.seat(a).key[slot] < segment.seat(b).key[slot];
  });
  return members;
}

int index_of(const std::vector<int>& members, int rank) {
  const auto found = std::find(members.begin(), members.end(), rank);
  return static_cast<int>(found - members.begin());
}

// Ends what runs on the communicator, which the caller has marked as aborted or revoked.
void wait_quiet(const CommPointer& comm) {
  for (int turn = 0; comm->running.load() != 0; ++turn) pause(turn);
}

#define STANDIN_COMM(function, handle)        \
  const CommPointer comm = find_comm(handle); \
  if (comm == nullptr) return fail(Result::invalid_argument, #function ": no such communicator")

#define STANDIN_COMM_FAULT(function)     \
  Fault fault;                           \
  Result fault_result = Result::success; \
  if (comm_fault(#function, comm, &fault, &fault_result)) return fault_result

#define STANDIN_READY()                    \
  const Result ready = ensure_ready(comm); \
  if (ready != Result::success) return ready

Result plain(const char* function) {
  const int code = plain_fault(function, static_cast<int>(Result::internal_error));
  if (code != 0) fail(static_cast<Result>(code), std::string(function) + ": fault");
  return static_cast<Result>(code);
}

}  // namespace

std::mutex& world() { return all().mutex; }

CommPointer find_comm(Handle handle) {
  const std::lock_guard<std::mutex> lock(world());
  const auto found = all().comms.find(static_cast<Comm*>(handle));
  if (found != all().comms.end()) return found->second;
  return nullptr;
}

Result fail(Result result, const std::string& what) {
  const std::lock_guard<std::mutex> lock(all().error_mutex);
  all().last_error = "stand-in: " + what;
  return result;
}

Result ensure_ready(const CommPointer& comm) {
  if (comm->aborted.load()) return fail(Result::invalid_argument, "the communicator was aborted");
  const std::lock_guard<std::mutex> lock(world());
  if (comm->pending) {
    return fail(Result::invalid_argument,
                "attempt to use a communicator before the previous operation returned ncclSuccess");
  }
  const Result state = state_of(*comm);
  return state == Result::success ? state : fail(state, "the communicator has an error");
}

Result settle(const CommPointer& comm, std::function<Result()> step, int polls,
              const CommPointer& child, std::function<Result()> child_step) {
  {
    const std::lock_guard<std::mutex> lock(world());
    const auto left = std::make_shared<int>(comm->blocking && polls > 0 ? 0 : polls);
    comm->pending = Pending{std::move(step), left};
    if (child != nullptr) child->pending = Pending{std::move(child_step), left};
  }
  if (!comm->blocking) return Result::in_progress;
  for (int turn = 0; !settled(comm); ++turn) {
    if (comm->aborted.load()) return fail(Result::internal_error, "aborted");
    pause(turn);
  }
  return state_of(*comm);
}

bool comm_fault(const char* function, const CommPointer& comm, Fault* fault, Result* result) {
  *fault = next_fault(function, comm->rank());
  switch (fault->kind) {
    case FaultKind::result:
      *result = static_cast<Result>(fault->value);
      fail(*result, std::string(function) + ": fault");
      return true;
    case FaultKind::hang:
      hang([&comm] { return comm->aborted.load(); });
      *result = Result::internal_error;
      return comm->aborted.load();
    case FaultKind::async:
      if (comm->async.load() != Result::success) return false;
      comm->async.store(static_cast<Result>(fault->value));
      fail(comm->async.load(), std::string(function) + ": asynchronous fault");
      *result = Result::success;
      return true;
    case FaultKind::lose:
      comm->lost.store(true);  // what runs from now on finds out
      fail(Result::remote_error, text("%s: rank %d has gone", function, fault->value));
      *result = Result::success;
      return false;
    case FaultKind::none:
    case FaultKind::in_progress:
    case FaultKind::stall:
      return false;
  }
  return false;
}

}  // namespace standin

using namespace standin;

STANDIN_EXPORT Result ncclGetVersion(int* version) {
  const Result fault = plain("ncclGetVersion");
  if (fault != Result::success) return fault;
  *version = number("STANDIN_NCCL_VERSION", STANDIN_VERSION);
  return Result::success;
}

STANDIN_EXPORT Result ncclGetUniqueId(UniqueId* id) {
  const Result fault = plain("ncclGetUniqueId");
  if (fault != Result::success) return fault;
  unsigned char random[16];
  const int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
  const bool read_all = fd >= 0 && read(fd, random, sizeof(random)) == sizeof(random);
  if (fd >= 0) close(fd);
  if (!read_all) return fail(Result::system_error, "no random numbers");
  std::string name = kPrefix;
  for (const unsigned char c : random) name += text("%02x", c);
  std::memset(id->bytes, 0, sizeof(id->bytes));
  std::memcpy(id->bytes, name.c_str(), name.size());
  return Result::success;
}

STANDIN_EXPORT Result ncclCommInitRankConfig(Handle* made, int size, UniqueId id, int rank,
                                             Config* config) {
  {
    Record record("ncclCommInitRankConfig");
    record.add("size", size).add("rank", rank);
    record_config(record, config);
  }
  const std::string wrong = check_config(config);
  if (!wrong.empty()) return fail(Result::invalid_argument, wrong);
  id.bytes[sizeof(id.bytes) - 1] = 0;
  const std::string name = id.bytes;
  const bool known = name.compare(0, sizeof(kPrefix) - 1, kPrefix) == 0 && name.size() > 16 &&
                     name.find('/') == std::string::npos;
  if (!known) return fail(Result::invalid_argument, "the unique id is not one of ncclGetUniqueId");
  if (size < 1 || rank < 0 || rank >= size) {
    return fail(Result::invalid_argument, text("rank %d of %d", rank, size));
  }
  auto fresh = std::make_shared<Comm>();
  fresh->blocking = blocks(config, true);
  auto step = joining(fresh, name, rank, size);
  const CommPointer comm = add(std::move(fresh));
  *made = comm.get();
  Fault fault;
  Result result = Result::success;
  if (comm_fault("ncclCommInitRankConfig", comm, &fault, &result) && result != Result::success) {
    forget(comm);
    *made = nullptr;
    return result;
  }
  if (join_group(comm, step)) return Result::success;
  result = settle(comm, step, polls_of(fault));
  if (result != Result::success && result != Result::in_progress) forget(comm);
  return result;
}

STANDIN_EXPORT Result ncclCommSplit(Handle handle, int color, int key, Handle* made,
                                    Config* config) {
  STANDIN_COMM(ncclCommSplit, handle);
  {
    Record record("ncclCommSplit");
    record.add("rank", comm->rank()).add("color", color).add("key", key);
    record_config(record, config);
  }
  STANDIN_COMM_FAULT(ncclCommSplit);
  STANDIN_READY();
  const std::string wrong = check_config(config);
  if (!wrong.empty()) return fail(Result::invalid_argument, wrong);
  if (color < 0 && color != meshring::nccl::kNoColor) {
    return fail(Result::invalid_argument, text("color %d", color));
  }
  Seat& own = comm->segment.own();
  const uint64_t talk = own.talks.load() + 1;
  own.color[talk % 2] = color;
  own.key[talk % 2] = key;
  own.talks.store(talk);
  CommPointer child;
  if (color >= 0) {
    child = std::make_shared<Comm>();
    child->blocking = blocks(config, comm->blocking);
    add(child);
  }
  auto join = std::make_shared<std::function<Result()>>();
  const auto step = [comm, child, talk, color, join] {
    if (!*join) {
      const std::vector<int> members = same_color(comm->segment, talk);
      if (members.empty()) return Result::in_progress;
      if (child == nullptr) return Result::success;
      const std::string name =
          text("%s-s%zu-%d", comm->segment.name().c_str(), static_cast<size_t>(talk), color);
      *join =
          joining(child, name, index_of(members, comm->rank()), static_cast<int>(members.size()));
    }
    return (*join)();
  };
  return settle_both(comm, child, made, step, fault);
}

#if STANDIN_VERSION >= 22703
STANDIN_EXPORT Result ncclCommShrink(Handle handle, int* excluded, int count, Handle* made,
                                     Config* config, int flags) {
  STANDIN_COMM(ncclCommShrink, handle);
  const std::set<int> out(excluded, excluded + std::max(count, 0));
  {
    Record record("ncclCommShrink");
    record.add("rank", comm->rank()).add("excluded", count).add("flags", flags);
    record_config(record, config);
  }
  STANDIN_COMM_FAULT(ncclCommShrink);
  if (count <= 0 || out.count(comm->rank()) != 0 || *out.begin() < 0 ||
      *out.rbegin() >= comm->size()) {
    return fail(Result::invalid_argument, "ncclCommShrink: the excluded ranks");
  }
  if (flags == meshring::nccl::kShrinkAbort) {
    comm->revoked.store(true);
    wait_quiet(comm);
    comm->async.store(Result::success);
    const std::lock_guard<std::mutex> lock(world());
    comm->pending.reset();
  } else {
    STANDIN_READY();
  }
  const std::string wrong = check_config(config);
  if (!wrong.empty()) return fail(Result::invalid_argument, wrong);
  std::vector<int> members;
  std::string name = comm->segment.name() + text("-k%d", ++comm->shrinks);
  for (int r = 0; r < comm->size(); ++r) {
    if (out.count(r) == 0) {
      members.push_back(r);
      name += text("-%d", r);
    }
  }
  auto child = std::make_shared<Comm>();
  child->blocking = blocks(config, comm->blocking);
  add(child);
  const auto step =
      joining(child, name, index_of(members, comm->rank()), static_cast<int>(members.size()));
  return settle_both(comm, child, made, step, fault);
}
#endif

STANDIN_EXPORT Result ncclCommGetAsyncError(Handle handle, Result* result) {
  STANDIN_COMM(ncclCommGetAsyncError, handle);
  STANDIN_COMM_FAULT(ncclCommGetAsyncError);
  const std::lock_guard<std::mutex> lock(world());
  if (comm->pending && *comm->pending->polls != 0) {
    if (*comm->pending->polls > 0) --*comm->pending->polls;
    *result = Result::in_progress;
    return Result::success;
  }
  progress();
  const Result state = state_of(*comm);
  *result = state == Result::success && comm->pending ? Result::in_progress : state;
  return Result::success;
}

STANDIN_EXPORT Result ncclCommFinalize(Handle handle) {
  STANDIN_COMM(ncclCommFinalize, handle);
  Record("ncclCommFinalize").add("rank", comm->rank());
  STANDIN_COMM_FAULT(ncclCommFinalize);
  STANDIN_READY();
  if (comm->revoked.load() || comm->finalized.exchange(true)) {
    return fail(Result::invalid_usage, "ncclCommFinalize: after revoke, or a second time");
  }
  return settle(
      comm,
      [comm] { return comm->outstanding.load() == 0 ? Result::success : Result::in_progress; },
      polls_of(fault));
}

STANDIN_EXPORT Result ncclCommDestroy(Handle handle) {
  STANDIN_COMM(ncclCommDestroy, handle);
  Record("ncclCommDestroy").add("rank", comm->rank());
  STANDIN_COMM_FAULT(ncclCommDestroy);
  {
    const std::lock_guard<std::mutex> lock(world());
    if (comm->pending) return fail(Result::invalid_argument, "ncclCommDestroy: still in progress");
  }
  const auto over = [&comm] {
    return comm->aborted.load() || comm->revoked.load() || comm->outstanding.load() == 0;
  };
  for (int turn = 0; !over(); ++turn) pause(turn);
  wait_quiet(comm);
  forget(comm);
  comm->segment.leave();
  return Result::success;
}

STANDIN_EXPORT Result ncclCommAbort(Handle handle) {
  STANDIN_COMM(ncclCommAbort, handle);
  Record("ncclCommAbort").add("rank", comm->rank());
  STANDIN_COMM_FAULT(ncclCommAbort);
  comm->aborted.store(true);
  forget(comm);
  wait_quiet(comm);
  comm->segment.leave();
  return Result::success;
}

#if STANDIN_VERSION >= 22807
STANDIN_EXPORT Result ncclCommRevoke(Handle handle, int flags) {
  STANDIN_COMM(ncclCommRevoke, handle);
  Record("ncclCommRevoke").add("rank", comm->rank());
  STANDIN_COMM_FAULT(ncclCommRevoke);
  if (flags != 0) return fail(Result::invalid_argument, text("ncclCommRevoke: flags %d", flags));
  comm->revoked.store(true);
  const Result result = settle(
      comm, [comm] { return comm->running.load() == 0 ? Result::success : Result::in_progress; },
      polls_of(fault));
  return result;
}
#endif

STANDIN_EXPORT const char* ncclGetErrorString(Result result) {
  switch (result) {
    case Result::success:
      return "no error";
    case Result::unhandled_cuda_error:
      return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case Result::system_error:
      return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case Result::internal_error:
      return "internal error - please report this issue to the NCCL developers";
    case Result::invalid_argument:
      return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case Result::invalid_usage:
      return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case Result::remote_error:
      return "remote process exited or there was a network error";
    case Result::in_progress:
      return "NCCL operation in progress";
    case Result::timeout:
      return "timeout";
  }
  return "unknown result code";
}

STANDIN_EXPORT const char* ncclGetLastError(Handle) {
  thread_local std::string answer;
  const std::lock_guard<std::mutex> lock(all().error_mutex);
  answer = all().last_error;
  return answer.c_str();
}

// F1. The status board: what every rank is doing, in shared memory, readable by all at any time.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "call.hpp"

namespace meshring {

enum class CallState : uint8_t { empty, running, done, failed, enqueued };
enum class Life : uint32_t { absent, running, exited, raised };

// A word of the board: written by one rank, read by any, never waited on.
template <class T>
struct Word {
  std::atomic<T> value;
  Word& operator=(T v) {
    value.store(v, std::memory_order_relaxed);
    return *this;
  }
  operator T() const { return value.load(std::memory_order_relaxed); }
};

inline constexpr int kTextLength = 256;
inline constexpr int kSites = 128;   // call sites remembered per rank
inline constexpr int kRecords = 32;  // calls remembered per rank and communicator

// Text that others may read while it is written: a torn read shows old and new letters, no more.
struct Text {
  Word<char> chars[kTextLength];
  void set(const std::string& s);
  std::string get() const;
};

// One call of one rank on one communicator: a pair of cache lines.
struct alignas(128) Record {
  Word<uint64_t> seq;
  Word<int64_t> when_ns;  // CLOCK_MONOTONIC_COARSE
  Word<int64_t> count;
  Word<int64_t> ended_ns;
  Word<uint64_t> signature;  // of the call: equal where the ranks agree
  Word<int32_t> root;
  Word<uint32_t> site;
  Word<CallKind> kind;
  Word<DType> dtype;
  Word<RedOp> op;
  Word<CallState> state;
  Word<int8_t> axis;
  Word<uint8_t> ndim;
  Word<uint8_t> uneven;
  Word<uint8_t> prelude;  // an exchange of lengths before the operation
  Word<int64_t> dims[kMaxDims];
};
static_assert(sizeof(Record) == 128);

// A copy of a record that no longer changes, with what is printed of it.
struct RecordCopy {
  uint64_t seq = 0;
  uint64_t signature = 0;
  int64_t when_ns = 0, ended_ns = 0, count = 0;
  int32_t root = -1;
  uint32_t site = 0;
  CallKind kind = CallKind::none;
  DType dtype = DType::float32;
  RedOp op = RedOp::sum;
  CallState state = CallState::empty;
  int8_t axis = -1;
  uint8_t ndim = 0;
  bool uneven = false;
  bool prelude = false;
  int64_t dims[kMaxDims] = {};

  std::string call() const;   // all_reduce(float32 (8,), op=sum)
  std::string shape() const;  // (8,)
};

// What a job knows of one rank, whatever its communicators do.
struct alignas(128) RankEntry {
  std::atomic<int32_t> pid;  // 0 until known
  std::atomic<Life> life;
  std::atomic<int32_t> wait_status;  // of waitpid; valid when has_wait_status
  std::atomic<uint32_t> has_wait_status;
  std::atomic<uint32_t> excluded;  // by an agreed shrink
  std::atomic<uint64_t> probe;     // address of a known word in this rank's memory
  std::atomic<uint32_t> can_read;  // 0 not tried, 1 reads its peers' memory, 2 does not
  std::atomic<uint32_t> sites;     // how many were ever added
  std::atomic<uint64_t> now_comm;  // communicator and number of the call it is in, or was in last
  std::atomic<uint64_t> now_seq;
  std::atomic<CallKind> now_kind;
  std::atomic<CallState> now_state;
  Word<uint32_t> now_site;
  Word<int64_t> now_ns;
  Text ended;  // the exception's text when life is raised
};

struct Site {
  std::atomic<uint32_t> id;
  Text text;
};

int64_t coarse_now_ns();
void write(Record& record, const Call& call, uint64_t seq);
RecordCopy copy_of(const Record& record);

// The last calls of one rank on one communicator.
struct alignas(128) RecordRing {
  std::atomic<uint64_t> written;
  // The region that this rank has made for the survivors of a shrink(), and of which one.
  std::atomic<uint64_t> offer;
  std::atomic<int64_t> offered_region;
  Record records[kRecords];
  Record& at(uint64_t i) { return records[i % kRecords]; }
  const Record& at(uint64_t i) const { return records[i % kRecords]; }
};

}  // namespace meshring

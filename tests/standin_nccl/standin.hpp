// What the files of the stand-in share: records, faults, streams and memory.
// When compiling, STANDIN_VERSION is the version of NCCL that is stood in for; newer symbols are
// not exported. When running, the environment says:
//   STANDIN_DIR             a folder for the files that ranks share until all have joined
//   STANDIN_STRICT=1        buffers must lie in device memory that lives until they are used
//   STANDIN_FAULTS          as for standin_fault()
//   STANDIN_POLLS           how often a nonblocking call is polled before it settles; 1
//   STANDIN_IN_PROGRESS=1   all nonblocking collectives are at first, not only the first
//   STANDIN_GPUS            how many GPUs there are; 1
//   STANDIN_DRIVER_VERSION  what cuDriverGetVersion says; 12040
//   STANDIN_NCCL_VERSION    what ncclGetVersion says instead of the version compiled in
//   STANDIN_NULL=1          collectives return at once and do nothing
// What is weaker than NCCL: registering is local to a rank, finalize waits for the own operations
// only, and a launch does not wait for memory of peers. What is stricter: a send waits until it is
// received, and every collective until all ranks take part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "device/driver_api.hpp"
#include "nccl/api.hpp"

#ifndef STANDIN_VERSION
#define STANDIN_VERSION 23203
#endif

#define STANDIN_EXPORT extern "C" __attribute__((visibility("default")))

namespace standin {

// ---- control.cpp ----

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool option(const char* variable);  // an environment variable that is set, and not to 0
int number(const char* variable, int otherwise);

// One call as a JSON object; it joins the list of the process when it goes out of scope.
class Record {
 public:
  explicit Record(const char* function);
  ~Record();
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;
  Record& add(const char* key, const std::string& value);
  Record& add(const char* key, int64_t value);
  Record& add(const char* key, const void* value);

 private:
  std::string json_;
};

// What was used as its documentation forbids: kept, and printed at once.
void violation(const std::string& what);

enum class FaultKind { none, result, in_progress, hang, async, lose, stall };
struct Fault {
  FaultKind kind = FaultKind::none;
  int value = 0;  // a result, a number of polls (-1: for ever), a rank
};
Fault next_fault(const char* function, int rank);    // counts the call
void hang(const std::function<bool()>& stop);        // until stop() or standin_release()
void pause(int turn);                                // between two looks at what others write
int plain_fault(const char* function, int on_hang);  // of a function without communicator

// ---- cuda.cpp: a stream runs its tasks in order, on a thread of its own ----

using Task = std::function<void()>;
// Makes a task whenever it is put on a queue: once, or at each replay of a captured graph.
using Launch = std::function<Task()>;

bool submit(void* stream, Launch launch);  // false: no such stream

class Mark {
 public:
  void set();
  void wait() const;
  bool done() const;
  double seconds() const { return seconds_; }

 private:
  bool done_ = false;
  double seconds_ = 0;
};

enum class Memory { unknown, live, freed };
void* allocate(size_t bytes, int device, void* stream, bool by_nccl);
bool release(void* pointer, void* stream, bool in_order);
Memory memory_of(const void* pointer, size_t bytes, bool* by_nccl, int* device);
// Whether a buffer may be used now; a violation is recorded if not. Always true but in strict mode.
bool usable(const char* function, const void* pointer, size_t bytes);
int current_device();

// ---- kernels.cpp ----

struct Grid {
  unsigned x, y, z;
};
const std::string* find_kernel(const std::string& name);
// A launch on the CPU: copies the parameters, as cuLaunchKernel does.
Task bind_kernel(const std::string& kernel, Grid grid, Grid block, void** parameters);

}  // namespace standin

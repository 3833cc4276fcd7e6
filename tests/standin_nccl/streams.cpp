// Streams, marks and memory of the stand-in GPU. Every stream is as one made non-blocking: the
// legacy stream does not wait for the others, so a dependency that nobody stated goes wrong.
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "standin.hpp"

namespace standin {
namespace {

class Queue {
 public:
  void submit(Launch launch) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (capture_ != 0) {
      graph_.push_back(std::move(launch));
    } else {
      push(launch());
    }
  }

  bool idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return done_ == submitted_;
  }

  void synchronize() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t target = submitted_;
    finished_.wait(lock, [&] { return done_ >= target; });
  }

  int capture() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return capture_;
  }

  void set_capture(int status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (capture_ == 0 && status != 0) graph_.clear();
    capture_ = status;
  }

  void replay() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Launch& launch : graph_) push(launch());
  }

  void stop() {
    synchronize();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    arrived_.notify_all();
    if (worker_.joinable()) worker_.join();
  }

 private:
  void push(Task task) {
    tasks_.push_back(std::move(task));
    ++submitted_;
    if (!worker_.joinable()) worker_ = std::thread([this] { work(); });
    arrived_.notify_one();
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      arrived_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const Task task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
      ++done_;
      finished_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable arrived_, finished_;
  std::deque<Task> tasks_;
  std::vector<Launch> graph_;
  uint64_t submitted_ = 0, done_ = 0;
  int capture_ = 0;
  bool stopping_ = false;
  std::thread worker_;
};

struct Block {
  size_t bytes = 0;
  int device = 0;
  void* stream = nullptr;
  bool by_nccl = false;
  bool freed = false;
};

constexpr size_t kQuarantine = size_t{64} << 20;

struct Device {
  std::mutex mutex;
  Queue legacy;
  std::map<void*, std::shared_ptr<Queue>> streams;
  std::map<uintptr_t, Block> blocks;
  std::deque<uintptr_t> quarantine;
  size_t quarantined = 0;
};

Device& device() {
  static Device& d = *new Device;  // never destroyed: its threads outlive static objects
  return d;
}

std::shared_ptr<Queue> shared(Queue* queue) {
  return {queue, [](Queue*) {}};
}

std::shared_ptr<Queue> find(void* stream) {
  Device& d = device();
  const auto number = reinterpret_cast<uintptr_t>(stream);
  if (number <= 1) return shared(&d.legacy);
  if (number == 2) {
    thread_local Queue* const own = new Queue;
    return shared(own);
  }
  const std::lock_guard<std::mutex> lock(d.mutex);
  const auto found = d.streams.find(stream);
  return found == d.streams.end() ? nullptr : found->second;
}

std::mutex marks_mutex;
std::condition_variable& marks_changed() {
  static std::condition_variable& c = *new std::condition_variable;
  return c;
}

// The block that holds this address, with the lock held.
std::map<uintptr_t, Block>::iterator block_at(Device& d, const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = d.blocks.upper_bound(address);
  if (after == d.blocks.begin()) return d.blocks.end();
  --after;
  return address < after->first + after->second.bytes ? after : d.blocks.end();
}

// What was freed stays mapped for a while, filled with a pattern: late readers are found out.
void bury(uintptr_t address) {
  Device& d = device();
  const std::lock_guard<std::mutex> lock(d.mutex);
  Block& block = d.blocks.at(address);
  std::memset(reinterpret_cast<void*>(address), 0xdd, block.bytes);
  block.freed = true;
  d.quarantine.push_back(address);
  d.quarantined += block.bytes;
  while (d.quarantined > kQuarantine) {
    const auto oldest = d.blocks.find(d.quarantine.front());
    d.quarantine.pop_front();
    d.quarantined -= oldest->second.bytes;
    std::free(reinterpret_cast<void*>(oldest->first));
    d.blocks.erase(oldest);
  }
}

}  // namespace

bool submit(void* stream, Launch launch) {
  const auto queue = find(stream);
  if (queue != nullptr) queue->submit(std::move(launch));
  return queue != nullptr;
}

void Mark::set() {
  const std::lock_guard<std::mutex> lock(marks_mutex);
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  seconds_ = std::chrono::duration<double>(now).count();
  done_ = true;
  marks_changed().notify_all();
}

void Mark::wait() const {
  std::unique_lock<std::mutex> lock(marks_mutex);
  marks_changed().wait(lock, [this] { return done_; });
}

bool Mark::done() const {
  const std::lock_guard<std::mutex> lock(marks_mutex);
  return done_;
}

void* allocate(size_t bytes, int on_device, void* stream, bool by_nccl) {
  constexpr size_t kPage = meshring::nccl::kWindowAlignment;
  const size_t rounded = (bytes / kPage + 1) * kPage;
  void* const pointer = std::aligned_alloc(kPage, rounded);
  if (pointer == nullptr) return nullptr;
  std::memset(pointer, 0xa5, bytes);  // what was never written shows
  Device& d = device();
  const std::lock_guard<std::mutex> lock(d.mutex);
  d.blocks[reinterpret_cast<uintptr_t>(pointer)] = {bytes + 1, on_device, stream, by_nccl, false};
  return pointer;
}

bool release(void* pointer, void* stream, bool in_order) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Device& d = device();
  {
    const std::lock_guard<std::mutex> lock(d.mutex);
    const auto found = d.blocks.find(address);
    if (found == d.blocks.end() || found->second.freed) return false;
  }
  if (!in_order || !submit(stream, [address] { return [address] { bury(address); }; })) {
    bury(address);
  }
  return true;
}

Memory memory_of(const void* pointer, size_t bytes, bool* by_nccl, int* on_device) {
  Device& d = device();
  const std::lock_guard<std::mutex> lock(d.mutex);
  const auto found = block_at(d, pointer);
  if (found == d.blocks.end()) return Memory::unknown;
  const size_t offset = reinterpret_cast<uintptr_t>(pointer) - found->first;
  if (offset + bytes > found->second.bytes - 1) return Memory::unknown;
  if (by_nccl != nullptr) *by_nccl = found->second.by_nccl;
  if (on_device != nullptr) *on_device = found->second.device;
  return found->second.freed ? Memory::freed : Memory::live;
}

bool usable(const char* function, const void* pointer, size_t bytes) {
  static const bool strict = option("STANDIN_STRICT");
  if (!strict || bytes == 0) return true;
  const Memory memory = memory_of(pointer, bytes, nullptr, nullptr);
  if (memory == Memory::live) return true;
  violation(text("%s: %zu bytes at %p %s", function, bytes, pointer,
                 memory == Memory::freed ? "were freed before they were used"
                                         : "are not inside one block of device memory"));
  return false;
}

}  // namespace standin

STANDIN_EXPORT void* standin_stream_create() {
  auto& d = standin::device();
  const std::lock_guard<std::mutex> lock(d.mutex);
  auto made = std::make_shared<standin::Queue>();
  void* const key = made.get();
  d.streams[key] = std::move(made);
  return key;
}

// Waits for what is on the stream. 0, or 400 for what is no stream of standin_stream_create().
STANDIN_EXPORT int standin_stream_destroy(void* stream) {
  auto& d = standin::device();
  std::shared_ptr<standin::Queue> queue;
  {
    const std::lock_guard<std::mutex> lock(d.mutex);
    const auto found = d.streams.find(stream);
    if (found == d.streams.end()) return 400;
    queue = std::move(found->second);
    d.streams.erase(found);
  }
  queue->stop();
  return 0;
}

STANDIN_EXPORT int standin_stream_synchronize(void* stream) {
  const auto queue = standin::find(stream);
  if (queue != nullptr) queue->synchronize();
  return queue != nullptr ? 0 : 400;
}

// CUstreamCaptureStatus: from 1 on, what is enqueued goes into the stream's graph; 0 ends it.
STANDIN_EXPORT int standin_capture(void* stream, int status) {
  const auto queue = standin::find(stream);
  if (queue != nullptr) queue->set_capture(status);
  return queue != nullptr ? 0 : 400;
}

// Enqueues the graph that was captured last on that stream.
STANDIN_EXPORT int standin_replay(void* stream) {
  const auto queue = standin::find(stream);
  if (queue != nullptr) queue->replay();
  return queue != nullptr ? 0 : 400;
}

STANDIN_EXPORT int standin_capture_status(void* stream) {
  const auto queue = standin::find(stream);
  return queue != nullptr ? queue->capture() : -1;
}

STANDIN_EXPORT int standin_stream_idle(void* stream) {
  const auto queue = standin::find(stream);
  return queue != nullptr ? static_cast<int>(queue->idle()) : -1;
}

STANDIN_EXPORT void* standin_allocate(size_t bytes, int device, void* stream) {
  return standin::allocate(bytes, device, stream, false);
}

// In the order of the stream that the memory was allocated for, as CuPy's pool does.
STANDIN_EXPORT int standin_free(void* pointer, void* stream) {
  return standin::release(pointer, stream, true) ? 0 : 1;
}

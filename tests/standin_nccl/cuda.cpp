// The CUDA driver's functions that meshring loads, on host memory.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "standin.hpp"

namespace device = meshring::device;
using device::Result;

extern "C" {
int standin_capture_status(void* stream);
int standin_stream_idle(void* stream);
}

namespace standin {
namespace {

constexpr Result kInvalidValue = 1;
constexpr Result kOutOfMemory = 2;
constexpr Result kNotInitialized = 3;
constexpr Result kInvalidDevice = 101;
constexpr Result kInvalidContext = 201;
constexpr Result kInvalidHandle = 400;
constexpr Result kNotFound = 500;
constexpr Result kLaunchTimeout = 702;
constexpr Result kUnsupportedInCapture = 900;

struct Event {
  std::shared_ptr<Mark> mark;  // none: never recorded, hence complete
  bool timing = true;
};

// What the driver hands out pointers to. Never destroyed, as streams outlive static objects.
struct Driver {
  std::mutex mutex;
  bool initialized = false;
  std::set<void*> modules;
  std::map<void*, std::unique_ptr<Event>> events;
  std::map<void*, int> pools;
  char contexts[64] = {};
};

Driver& driver() {
  static Driver& d = *new Driver;
  return d;
}

int gpus() { return number("STANDIN_GPUS", 1); }
bool is_device(int d) { return d >= 0 && d < gpus(); }

thread_local void* context = nullptr;
thread_local int capture_mode = 0;  // CU_STREAM_CAPTURE_MODE_GLOBAL

Event* event_of(void* handle) {
  Driver& d = driver();
  const std::lock_guard<std::mutex> lock(d.mutex);
  const auto found = d.events.find(handle);
  return found == d.events.end() ? nullptr : found->second.get();
}

std::shared_ptr<Mark> mark_of(void* handle, Result* result) {
  const Event* const event = event_of(handle);
  *result = event == nullptr ? kInvalidHandle : 0;
  const std::lock_guard<std::mutex> lock(driver().mutex);
  return event == nullptr ? nullptr : event->mark;
}

void* bytes_at(device::Pointer pointer) { return reinterpret_cast<void*>(pointer); }

Result enqueue(void* stream, Task task) {
  return submit(stream, [task = std::move(task)] { return task; }) ? 0 : kInvalidHandle;
}

Result copy_rows(const device::Copy2D& copy, void* stream) {
  const char* const source = static_cast<const char*>(bytes_at(copy.src_device)) +
                             copy.src_y * copy.src_pitch + copy.src_x;
  char* const target =
      static_cast<char*>(bytes_at(copy.dst_device)) + copy.dst_y * copy.dst_pitch + copy.dst_x;
  const size_t rows = copy.height;
  const size_t width = copy.width;
  const size_t from = copy.src_pitch;
  const size_t to = copy.dst_pitch;
  if (rows == 0 || width == 0) return 0;
  const auto span = [&](size_t pitch) { return (rows - 1) * pitch + width; };
  if (!usable("cuMemcpy2DAsync_v2", source, span(from)) ||
      !usable("cuMemcpy2DAsync_v2", target, span(to))) {
    return kInvalidValue;
  }
  return enqueue(stream, [=] {
    usable("cuMemcpy2DAsync_v2", source, (rows - 1) * from + width);
    for (size_t row = 0; row < rows; ++row) {
      std::memcpy(target + row * to, source + row * from, width);
    }
  });
}

struct Named {
  Result code;
  const char* name;
  const char* text;
};
constexpr Named kNamed[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {device::kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kLaunchTimeout, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {kUnsupportedInCapture, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

Result describe(Result code, const char** answer, const char* Named::* field) {
  for (const Named& n : kNamed) {
    if (n.code == code) {
      *answer = n.*field;
      return 0;
    }
  }
  *answer = nullptr;
  return kInvalidValue;
}

}  // namespace

int current_device() {
  const char* const first = driver().contexts;
  const auto* const at = static_cast<const char*>(context);
  return context == nullptr ? 0 : static_cast<int>(at - first);
}

}  // namespace standin

using namespace standin;

// A fault that a test set comes first, then what the function does.
#define STANDIN_FAULT(function)                                  \
  do {                                                           \
    const Result fault = plain_fault(#function, kLaunchTimeout); \
    if (fault != 0) return fault;                                \
  } while (false)

STANDIN_EXPORT Result cuInit(unsigned flags) {
  STANDIN_FAULT(cuInit);
  if (flags != 0) return kInvalidValue;
  if (gpus() == 0) return 100;
  driver().initialized = true;
  return 0;
}

STANDIN_EXPORT Result cuDriverGetVersion(int* version) {
  STANDIN_FAULT(cuDriverGetVersion);
  *version = number("STANDIN_DRIVER_VERSION", 12040);
  return 0;
}

STANDIN_EXPORT Result cuDeviceGetCount(int* count) {
  STANDIN_FAULT(cuDeviceGetCount);
  if (!driver().initialized) return kNotInitialized;
  *count = gpus();
  return 0;
}

STANDIN_EXPORT Result cuDeviceGet(device::Device* found, int ordinal) {
  STANDIN_FAULT(cuDeviceGet);
  if (!is_device(ordinal)) return kInvalidDevice;
  *found = ordinal;
  return 0;
}

STANDIN_EXPORT Result cuDeviceGetName(char* name, int length, device::Device d) {
  STANDIN_FAULT(cuDeviceGetName);
  if (!is_device(d)) return kInvalidDevice;
  std::snprintf(name, static_cast<size_t>(length), "stand-in GPU %d", d);
  return 0;
}

STANDIN_EXPORT Result cuDeviceGetUuid(void* uuid, device::Device d) {
  STANDIN_FAULT(cuDeviceGetUuid);
  if (!is_device(d)) return kInvalidDevice;
  char bytes[17];
  std::snprintf(bytes, sizeof(bytes), "stand-in GPU %03d", d);
  std::memcpy(uuid, bytes, 16);
  return 0;
}

STANDIN_EXPORT Result cuDeviceGetAttribute(int* value, int attribute, device::Device d) {
  STANDIN_FAULT(cuDeviceGetAttribute);
  if (!is_device(d)) return kInvalidDevice;
  // Threads per block, warp size, multiprocessors, threads per multiprocessor, compute capability,
  // memory pools.
  static const std::map<int, int> kAttributes = {{1, 1024}, {10, 32}, {16, 4}, {39, 2048},
                                                 {75, 9},   {76, 0},  {115, 1}};
  const auto found = kAttributes.find(attribute);
  if (found == kAttributes.end()) return kInvalidValue;
  *value = found->second;
  return 0;
}

STANDIN_EXPORT Result cuDevicePrimaryCtxRetain(device::Context* made, device::Device d) {
  STANDIN_FAULT(cuDevicePrimaryCtxRetain);
  if (!is_device(d)) return kInvalidDevice;
  *made = driver().contexts + d;
  return 0;
}

STANDIN_EXPORT Result cuCtxGetCurrent(device::Context* current) {
  STANDIN_FAULT(cuCtxGetCurrent);
  *current = context;
  return 0;
}

STANDIN_EXPORT Result cuCtxSetCurrent(device::Context chosen) {
  STANDIN_FAULT(cuCtxSetCurrent);
  const char* const first = driver().contexts;
  const auto* const at = static_cast<const char*>(chosen);
  if (chosen != nullptr && (at < first || at >= first + gpus())) return kInvalidContext;
  context = chosen;
  return 0;
}

STANDIN_EXPORT Result cuModuleLoadData(device::Module* loaded, const void* image) {
  STANDIN_FAULT(cuModuleLoadData);
  if (image == nullptr) return kInvalidValue;
  if (context == nullptr) return kInvalidContext;
  auto* const module = new char;
  const std::lock_guard<std::mutex> lock(driver().mutex);
  driver().modules.insert(module);
  *loaded = module;
  return 0;
}

STANDIN_EXPORT Result cuModuleGetFunction(device::Function* function, device::Module module,
                                          const char* name) {
  STANDIN_FAULT(cuModuleGetFunction);
  {
    const std::lock_guard<std::mutex> lock(driver().mutex);
    if (driver().modules.count(module) == 0) return kInvalidHandle;
  }
  const std::string* const kernel = find_kernel(name);
  if (kernel == nullptr) return kNotFound;
  *function = const_cast<std::string*>(kernel);
  return 0;
}

STANDIN_EXPORT Result cuLaunchKernel(device::Function function, unsigned grid_x, unsigned grid_y,
                                     unsigned grid_z, unsigned block_x, unsigned block_y,
                                     unsigned block_z, unsigned shared, device::Stream stream,
                                     void** parameters, void** extra) {
  STANDIN_FAULT(cuLaunchKernel);
  static_cast<void>(shared);
  const auto* const kernel = static_cast<const std::string*>(function);
  if (kernel == nullptr || extra != nullptr || uint64_t{grid_x} * grid_y * grid_z == 0 ||
      uint64_t{block_x} * block_y * block_z - 1 >= 1024) {
    return kInvalidValue;
  }
  Record("cuLaunchKernel").add("kernel", *kernel).add("stream", stream);
  return enqueue(stream, bind_kernel(*kernel, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z},
                                     parameters));
}

STANDIN_EXPORT Result cuMemcpyDtoDAsync_v2(device::Pointer target, device::Pointer source,
                                           size_t bytes, device::Stream stream) {
  STANDIN_FAULT(cuMemcpyDtoDAsync_v2);
  Record("cuMemcpyDtoDAsync_v2").add("bytes", static_cast<int64_t>(bytes)).add("stream", stream);
  device::Copy2D copy;
  copy.src_device = source;
  copy.dst_device = target;
  copy.src_pitch = copy.dst_pitch = copy.width = bytes;
  copy.height = 1;
  return copy_rows(copy, stream);
}

STANDIN_EXPORT Result cuMemcpy2DAsync_v2(const device::Copy2D* copy, device::Stream stream) {
  STANDIN_FAULT(cuMemcpy2DAsync_v2);
  Record("cuMemcpy2DAsync_v2")
      .add("width", static_cast<int64_t>(copy->width))
      .add("height", static_cast<int64_t>(copy->height))
      .add("stream", stream);
  const bool pitches =
      copy->height <= 1 || (copy->src_pitch >= copy->width && copy->dst_pitch >= copy->width);
  if (copy->src_type != device::kMemoryDevice || copy->dst_type != device::kMemoryDevice ||
      !pitches) {
    return kInvalidValue;
  }
  return copy_rows(*copy, stream);
}

STANDIN_EXPORT Result cuMemPoolCreate(device::Pool* pool, const void* properties) {
  STANDIN_FAULT(cuMemPoolCreate);
  if (properties == nullptr) return kInvalidValue;
  // CUmemPoolProps: allocation type, handle types, then the location's type and ordinal.
  int fields[4];
  std::memcpy(fields, properties, sizeof(fields));
  if (fields[0] != 1 || fields[2] != 1 || !is_device(fields[3])) return kInvalidValue;
  auto* const made = new char;
  const std::lock_guard<std::mutex> lock(driver().mutex);
  driver().pools[made] = fields[3];
  *pool = made;
  return 0;
}

STANDIN_EXPORT Result cuMemPoolSetAttribute(device::Pool pool, int attribute, void* value) {
  STANDIN_FAULT(cuMemPoolSetAttribute);
  const std::lock_guard<std::mutex> lock(driver().mutex);
  if (driver().pools.count(pool) == 0) return kInvalidHandle;
  return attribute >= 1 && attribute <= 8 && value != nullptr ? 0 : kInvalidValue;
}

STANDIN_EXPORT Result cuDeviceGetDefaultMemPool(device::Pool* pool, device::Device d) {
  STANDIN_FAULT(cuDeviceGetDefaultMemPool);
  if (!is_device(d)) return kInvalidDevice;
  const std::lock_guard<std::mutex> lock(driver().mutex);
  *pool = driver().contexts + d;
  driver().pools[*pool] = d;
  return 0;
}

STANDIN_EXPORT Result cuMemAllocFromPoolAsync(device::Pointer* made, size_t bytes,
                                              device::Pool pool, device::Stream stream) {
  STANDIN_FAULT(cuMemAllocFromPoolAsync);
  Record("cuMemAllocFromPoolAsync").add("bytes", static_cast<int64_t>(bytes)).add("stream", stream);
  int on = 0;
  {
    const std::lock_guard<std::mutex> lock(driver().mutex);
    const auto found = driver().pools.find(pool);
    if (found == driver().pools.end()) return kInvalidHandle;
    on = found->second;
  }
  if (bytes == 0) return kInvalidValue;
  void* const pointer = allocate(bytes, on, stream, false);
  *made = reinterpret_cast<device::Pointer>(pointer);
  return pointer == nullptr ? kOutOfMemory : 0;
}

STANDIN_EXPORT Result cuMemFreeAsync(device::Pointer pointer, device::Stream stream) {
  STANDIN_FAULT(cuMemFreeAsync);
  Record("cuMemFreeAsync").add("pointer", bytes_at(pointer)).add("stream", stream);
  return release(bytes_at(pointer), stream, true) ? 0 : kInvalidValue;
}

STANDIN_EXPORT Result cuEventCreate(device::Event* made, unsigned flags) {
  STANDIN_FAULT(cuEventCreate);
  auto event = std::make_unique<Event>();
  event->timing = (flags & device::kEventNoTiming) == 0;
  const std::lock_guard<std::mutex> lock(driver().mutex);
  *made = event.get();
  driver().events[*made] = std::move(event);
  return 0;
}

STANDIN_EXPORT Result cuEventRecord(device::Event handle, device::Stream stream) {
  STANDIN_FAULT(cuEventRecord);
  Event* const event = event_of(handle);
  if (event == nullptr) return kInvalidHandle;
  auto mark = std::make_shared<Mark>();
  const Result result = enqueue(stream, [mark] { mark->set(); });
  const std::lock_guard<std::mutex> lock(driver().mutex);
  if (result == 0) event->mark = std::move(mark);
  return result;
}

STANDIN_EXPORT Result cuEventQuery(device::Event handle) {
  STANDIN_FAULT(cuEventQuery);
  Result result = 0;
  const auto mark = mark_of(handle, &result);
  if (result != 0) return result;
  return mark == nullptr || mark->done() ? 0 : device::kNotReady;
}

STANDIN_EXPORT Result cuEventDestroy_v2(device::Event handle) {
  STANDIN_FAULT(cuEventDestroy_v2);
  const std::lock_guard<std::mutex> lock(driver().mutex);
  return driver().events.erase(handle) == 1 ? 0 : kInvalidHandle;
}

STANDIN_EXPORT Result cuEventElapsedTime(float* milliseconds, device::Event start,
                                         device::Event end) {
  STANDIN_FAULT(cuEventElapsedTime);
  const Event* const events[] = {event_of(start), event_of(end)};
  for (const Event* e : events) {
    if (e == nullptr || !e->timing || e->mark == nullptr) return kInvalidHandle;
    if (!e->mark->done()) return device::kNotReady;
  }
  *milliseconds =
      static_cast<float>((events[1]->mark->seconds() - events[0]->mark->seconds()) * 1e3);
  return 0;
}

STANDIN_EXPORT Result cuStreamWaitEvent(device::Stream stream, device::Event handle,
                                        unsigned flags) {
  STANDIN_FAULT(cuStreamWaitEvent);
  Result result = flags > 1 ? kInvalidValue : 0;
  const auto mark = result == 0 ? mark_of(handle, &result) : nullptr;
  if (result != 0 || mark == nullptr) return result;
  return enqueue(stream, [mark] { mark->wait(); });
}

STANDIN_EXPORT Result cuStreamQuery(device::Stream stream) {
  STANDIN_FAULT(cuStreamQuery);
  const int idle = standin_stream_idle(stream);
  if (idle < 0) return kInvalidHandle;
  if (standin_capture_status(stream) != 0) return kUnsupportedInCapture;
  return idle == 1 ? 0 : device::kNotReady;
}

STANDIN_EXPORT Result cuStreamIsCapturing(device::Stream stream, int* status) {
  STANDIN_FAULT(cuStreamIsCapturing);
  const int capture = standin_capture_status(stream);
  if (capture < 0) return kInvalidHandle;
  *status = capture;
  return 0;
}

STANDIN_EXPORT Result cuThreadExchangeStreamCaptureMode(int* mode) {
  STANDIN_FAULT(cuThreadExchangeStreamCaptureMode);
  if (*mode < 0 || *mode > device::kCaptureRelaxed) return kInvalidValue;
  std::swap(*mode, capture_mode);
  return 0;
}

STANDIN_EXPORT Result cuPointerGetAttribute(void* data, int attribute, device::Pointer pointer) {
  STANDIN_FAULT(cuPointerGetAttribute);
  int on = 0;
  if (attribute != device::kPointerDevice ||
      memory_of(bytes_at(pointer), 0, nullptr, &on) != Memory::live) {
    return kInvalidValue;
  }
  std::memcpy(data, &on, sizeof(on));
  return 0;
}

STANDIN_EXPORT Result cuGetErrorName(Result code, const char** name) {
  return describe(code, name, &Named::name);
}

STANDIN_EXPORT Result cuGetErrorString(Result code, const char** message) {
  return describe(code, message, &Named::text);
}

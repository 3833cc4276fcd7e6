#include "driver.hpp"

#include <array>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "../library.hpp"

namespace meshring::device {

namespace {

constexpr int kMaxDevices = 64;

// CUmemPoolProps: pinned memory of one device, no sharing between processes.
struct PoolProperties {
  int allocation_type = 1;  // CU_MEM_ALLOCATION_TYPE_PINNED
  int handle_types = 0;
  int location_type = 1;  // CU_MEM_LOCATION_TYPE_DEVICE
  int location_id = 0;
  void* security = nullptr;
  size_t max_size = 0;
  unsigned short usage = 0;
  unsigned char reserved[54] = {};
};

}  // namespace

const Driver& Driver::get() {
  static const Driver driver;
  return driver;
}

Driver::Driver() {
  const char* given = std::getenv("MESHRING_CUDA_LIBRARY");
  named_ = given && *given;
  const Library library(named_ ? given : "libcuda.so.1");
  if (!library.open())
    usage("there is no CUDA driver here (" + library.why() +
          "); install NVIDIA's driver, or in a container start it with the GPUs, for example "
          "docker run --gpus all");
  path_ = library.path();
#define MESHRING_FIND(member, symbol, type, parameters) \
  library.find(#symbol, member);                        \
  if (!member)                                          \
    usage("the CUDA driver " + path_ + " has no " #symbol "; version 12.0 or newer is needed");
  MESHRING_CUDA_DRIVER(MESHRING_FIND)
#undef MESHRING_FIND
  const Result result = init(0);
  if (result != kSuccess)
    usage("the CUDA driver " + path_ + " finds no usable GPU: " + text_of(result));
  check(driver_version(&version_), "cuDriverGetVersion");
  check(device_count(&devices_), "cuDeviceGetCount");
  if (devices_ == 0) usage("no GPU is visible to this process; look at CUDA_VISIBLE_DEVICES");
}

std::string Driver::text_of(Result result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  error_name(result, &name);
  error_string(result, &text);
  return std::string(name ? name : "CUDA error") + " (" + std::to_string(result) + ")" +
         (text ? std::string(", ") + text : std::string());
}

void Driver::fail(Result result, const char* what) const {
  throw Error(Trouble::backend, std::string(what) + ": " + text_of(result));
}

std::string Driver::name_of(int device) const {
  Device d = 0;
  char name[128] = {};
  check(device_get(&d, device), "cuDeviceGet");
  check(device_name(name, sizeof(name) - 1, d), "cuDeviceGetName");
  return name;
}

std::string Driver::uuid_of(int device) const {
  Device d = 0;
  unsigned char bytes[16] = {};
  check(device_get(&d, device), "cuDeviceGet");
  check(device_uuid(bytes, d), "cuDeviceGetUuid");
  std::string s;
  for (unsigned char b : bytes) {
    s += "0123456789abcdef"[b >> 4];
    s += "0123456789abcdef"[b & 15];
  }
  return s;
}

Context Driver::primary(int device) const {
  static std::mutex lock;
  static std::array<Context, kMaxDevices> contexts{};
  if (device < 0 || device >= kMaxDevices) usage("GPU " + std::to_string(device) + " is none");
  std::lock_guard<std::mutex> guard(lock);
  Context& context = contexts[static_cast<size_t>(device)];
  if (!context) {
    Device d = 0;
    check(device_get(&d, device), "cuDeviceGet");
    check(primary_retain(&context, d), "cuDevicePrimaryCtxRetain");
  }
  return context;
}

bool Driver::is_current(int device) const {
  Context now = nullptr;
  return context_get(&now) == kSuccess && now == primary(device);
}

Pool Driver::pool(int device) const {
  static std::mutex lock;
  static std::array<Pool, kMaxDevices> pools{};
  std::lock_guard<std::mutex> guard(lock);
  Pool& pool = pools[static_cast<size_t>(device)];
  if (!pool) {
    PoolProperties properties;
    properties.location_id = device;
    check(pool_create(&pool, &properties), "cuMemPoolCreate");
    uint64_t keep = UINT64_MAX;  // else every synchronisation gives the memory back
    check(pool_set(pool, kPoolReleaseThreshold, &keep), "cuMemPoolSetAttribute");
  }
  return pool;
}

OnDevice::OnDevice(int device) {
  const Driver& driver = Driver::get();
  const Context wanted = driver.primary(device);
  driver.check(driver.context_get(&before_), "cuCtxGetCurrent");
  changed_ = before_ != wanted;
  if (changed_) driver.check(driver.context_set(wanted), "cuCtxSetCurrent");
}

OnDevice::~OnDevice() {
  if (changed_) Driver::get().context_set(before_);
}

void order(int device, Stream before, Stream after) {
  const OnDevice here(device);
  const Driver& driver = Driver::get();
  Marker marker;
  marker.record(before);
  driver.check(driver.stream_wait(after, marker.get(), 0), "cuStreamWaitEvent");
}

Marker::~Marker() {
  if (event_) Driver::get().event_destroy(event_);
}

void Marker::record(Stream stream) {
  const Driver& driver = Driver::get();
  if (!event_) driver.check(driver.event_create(&event_, kEventNoTiming), "cuEventCreate");
  driver.check(driver.event_record(event_, stream), "cuEventRecord");
}

bool Marker::reached() const {
  if (!event_) return true;
  const Driver& driver = Driver::get();
  const Result result = driver.event_query(event_);
  if (result != kSuccess && result != kNotReady && result != kCapturedEvent)
    driver.fail(result, "cuEventQuery, after GPU work that failed");
  return result != kNotReady;
}

Scratch::Scratch(int device, Stream stream, size_t bytes) : stream_(stream) {
  const Driver& driver = Driver::get();
  if (bytes == 0) return;
  const Result result = driver.allocate(&pointer_, bytes, driver.pool(device), stream);
  if (result != kSuccess)
    throw Error(Trouble::backend,
                "no memory on the GPU for " + std::to_string(bytes) +
                    " bytes of packed blocks (cuMemAllocFromPoolAsync: " + driver.text_of(result) +
                    "); free some, for example with "
                    "cupy.get_default_memory_pool().free_all_blocks()");
}

Scratch::~Scratch() {
  if (pointer_) Driver::get().release(pointer_, stream_);
}

Scratch& Scratch::operator=(Scratch&& other) noexcept {
  std::swap(pointer_, other.pointer_);
  std::swap(stream_, other.stream_);
  return *this;
}

}  // namespace meshring::device

// F1. The CUDA driver, opened at run time: importing meshring needs no GPU.
#pragma once

#include <string>
#include <utility>

#include "driver_api.hpp"
#include "error.hpp"

namespace meshring::device {

class Driver {
 public:
  // Opens libcuda.so.1 (or MESHRING_CUDA_LIBRARY) and calls cuInit, once. Throws Error(usage) that
  // says what is missing.
  static const Driver& get();

#define MESHRING_MEMBER(member, symbol, type, parameters) type(*member) parameters = nullptr;
  MESHRING_CUDA_DRIVER(MESHRING_MEMBER)
#undef MESHRING_MEMBER

  // Throws Error(backend): "cuEventRecord: CUDA_ERROR_ILLEGAL_ADDRESS (700), an illegal ...".
  void check(Result result, const char* what) const {
    if (result != kSuccess) fail(result, what);
  }
  [[noreturn]] void fail(Result result, const char* what) const;
  std::string text_of(Result result) const;

  int devices() const { return devices_; }
  int version() const { return version_; }  // 12040 is CUDA 12.4
  bool named() const { return named_; }     // by MESHRING_CUDA_LIBRARY
  const std::string& path() const { return path_; }
  std::string name_of(int device) const;
  std::string uuid_of(int device) const;  // 32 hexadecimal digits
  Context primary(int device) const;      // retained for good, as CuPy and NCCL do
  bool is_current(int device) const;      // its primary context, in this thread
  Pool pool(int device) const;            // of stream-ordered memory, ours; keeps what it has

 private:
  Driver();
  std::string path_;
  int devices_ = 0;
  int version_ = 0;
  bool named_ = false;
};

// What is enqueued on `after` from now on waits for what `before` has now.
void order(int device, Stream before, Stream after);

// Makes the device's primary context current in this thread while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  Context before_ = nullptr;
  bool changed_ = false;
};

// While it lives, what this thread asks of the driver does not break a capture of another thread.
class RelaxedCapture {
 public:
  RelaxedCapture() { Driver::get().exchange_capture_mode(&mode_); }
  ~RelaxedCapture() { Driver::get().exchange_capture_mode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = kCaptureRelaxed;
};

// An event without timing; made on first use and used again and again.
class Marker {
 public:
  Marker() = default;
  ~Marker();
  Marker(Marker&& other) noexcept : event_(other.event_) { other.event_ = nullptr; }
  Marker& operator=(Marker&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  void record(Stream stream);  // the device must be current
  // True too when it cannot be told (a captured stream). Throws Error(backend): the GPU failed.
  bool reached() const;
  Event get() const { return event_; }

 private:
  Event event_ = nullptr;
};

// Memory of a stream: usable by what is enqueued on it after this, until this goes.
class Scratch {
 public:
  Scratch() = default;
  Scratch(int device, Stream stream, size_t bytes);
  ~Scratch();
  Scratch(Scratch&& other) noexcept { *this = static_cast<Scratch&&>(other); }
  Scratch& operator=(Scratch&& other) noexcept;
  char* data() const { return reinterpret_cast<char*>(pointer_); }

 private:
  Pointer pointer_ = 0;
  Stream stream_ = nullptr;
};

}  // namespace meshring::device

#include "kernels.hpp"

#include <cstdio>
#include <map>
#include <memory>
#include <mutex>

namespace meshring::device {

namespace {

constexpr int kAttributeMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr u32 kBlocksPerMultiprocessor = 8;    // x kThreads: all the threads that one holds

constexpr int64_t kMaxPitch = 0x7fffffff;  // of a 2-D copy, on every device

Pointer pointer(const char* p) { return static_cast<Pointer>(reinterpret_cast<uintptr_t>(p)); }

std::string text_of_version(int version) {  // 12040 is CUDA 12.4
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void say_once(const std::string& why_not) {
  static std::once_flag once;
  std::call_once(once, [&why_not] {
    std::fprintf(stderr,
                 "meshring: blocks of GPU arrays are packed by the driver's 2-D copies, one a "
                 "block, not by meshring's kernels: %s\n",
                 why_not.c_str());
  });
}

}  // namespace

Kernels::Kernels(const Driver& driver, int device, const Ptx& ptx) : driver_(driver) {
  Device handle = 0;
  int multiprocessors = 0;
  driver.check(driver.device_get(&handle, device), "cuDeviceGet");
  driver.check(driver.device_attribute(&multiprocessors, kAttributeMultiprocessors, handle),
               "cuDeviceGetAttribute");
  most_blocks_ = static_cast<u32>(std::max(1, multiprocessors)) * kBlocksPerMultiprocessor;
  why_not_ = load(ptx);
  if (!compiled()) say_once(why_not_);
}

const Kernels& Kernels::of(int device) {
  static std::mutex lock;
  static auto* made = new std::map<int, std::unique_ptr<const Kernels>>;  // as long as the driver
  std::lock_guard<std::mutex> guard(lock);
  auto& kernels = (*made)[device];
  if (!kernels) {
    const OnDevice here(device);
    kernels = std::make_unique<const Kernels>(Driver::get(), device);
  }
  return *kernels;
}

// Loads every function at once, since a driver that loads lazily may not do so during a capture.
std::string Kernels::load(const Ptx& ptx) {
  if (!ptx.text) return std::string("this build of meshring has none: ") + ptx.compiler;
  Module module = nullptr;
  Result result = driver_.module_load(&module, ptx.text);
  for (int k = 0; k < kKernelCount && result == kSuccess; ++k)
    result = driver_.module_function(&functions_[k], module, kKernelNames[k]);
  if (result == kSuccess) return "";
  return "the driver (CUDA " + text_of_version(driver_.version()) + ") refuses them (PTX ISA " +
         ptx.isa + " for " + ptx.target + " and newer, made by " + ptx.compiler +
         "): " + driver_.text_of(result) +
         "; a newer driver takes them, or a build with the nvidia-cuda-nvrtc-cu12 wheel 12.0";
}

void Kernels::pack(const Layout& layout, const void* array, void* packed, Stream stream) const {
  run(layout, const_cast<void*>(array), packed, true, stream);
}

void Kernels::unpack(const Layout& layout, const void* packed, void* array, Stream stream) const {
  run(layout, array, const_cast<void*>(packed), false, stream);
}

void Kernels::run(const Layout& layout, void* array, void* packed, bool pack, Stream stream) const {
  if (!compiled()) {
    copy(layout, static_cast<char*>(array), static_cast<char*>(packed), pack, stream);
    return;
  }
  plan(layout, array, packed, pack, [&](const Launch& launch) {
    driver_.check(
        driver_.launch(functions_[launch.kernel], launch.grid(most_blocks_), 1, 1, kThreads, 1, 1,
                       0, stream, const_cast<void**>(launch.params), nullptr),
        "cuLaunchKernel");
  });
}

void Kernels::copy(const Layout& layout, char* array, char* packed, bool pack,
                   Stream stream) const {
  for (int k = 0; k < layout.count; ++k) {
    const int64_t width = layout.width_of(k);
    const Pointer strided = pointer(array);
    const Pointer block = pointer(packed + layout.offset_of(k));
    array += width;
    if (k == layout.skip || width == 0 || layout.rows == 0) continue;
    if (pack)
      copy_rows(block, width, strided, layout.pitch, width, layout.rows, stream);
    else
      copy_rows(strided, layout.pitch, block, width, width, layout.rows, stream);
  }
}

void Kernels::copy_rows(Pointer to, int64_t to_pitch, Pointer from, int64_t from_pitch,
                        int64_t width, int64_t rows, Stream stream) const {
  const auto bytes = static_cast<size_t>(width);
  if (rows == 1 || (to_pitch == width && from_pitch == width)) {
    driver_.check(driver_.copy(to, from, bytes * static_cast<size_t>(rows), stream),
                  "cuMemcpyDtoDAsync");
    return;
  }
  if (std::max(to_pitch, from_pitch) > kMaxPitch) {
    for (int64_t r = 0; r < rows; ++r)
      driver_.check(driver_.copy(to + static_cast<Pointer>(r * to_pitch),
                                 from + static_cast<Pointer>(r * from_pitch), bytes, stream),
                    "cuMemcpyDtoDAsync");
    return;
  }
  Copy2D what;
  what.src_device = from;
  what.src_pitch = static_cast<size_t>(from_pitch);
  what.dst_device = to;
  what.dst_pitch = static_cast<size_t>(to_pitch);
  what.width = bytes;
  what.height = static_cast<size_t>(rows);
  driver_.check(driver_.copy_2d(&what, stream), "cuMemcpy2DAsync");
}

}  // namespace meshring::device

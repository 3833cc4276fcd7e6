// F3. Packs and unpacks arrays on one device: our kernels where they load, else the driver's
// copies.
#pragma once

#include <string>

#include "driver.hpp"
#include "plan.hpp"
#include "ptx.hpp"

namespace meshring::device {

// Holds no state after its construction, so any thread may call it. The device's context is current
// in every call. Nothing is allocated on the device, so both calls may be captured in a graph.
class Kernels {
 public:
  Kernels(const Driver& driver, Device device, const Ptx& ptx = kPtx);

  // The kernels of a device, loaded into the current context at the first call.
  static const Kernels& of(const Driver& driver, Device device);

  // Enqueue: blocks of the array to their places in the packed buffer, and back. The two do not
  // overlap.
  void pack(const Layout& layout, const void* array, void* packed, Stream stream) const;
  void unpack(const Layout& layout, const void* packed, void* array, Stream stream) const;

  bool compiled() const { return why_not_.empty(); }  // false: the driver's copies are used
  const std::string& why_not() const { return why_not_; }

 private:
  std::string load(Device device, const Ptx& ptx);
  void run(const Layout& layout, void* array, void* packed, bool pack, Stream stream) const;
  void copy(const Layout& layout, char* array, char* packed, bool pack, Stream stream) const;

  const Driver& driver_;
  Function functions_[kKernelCount] = {};
  u32 most_blocks_ = 0;  // of a launch: enough to fill the device
  std::string why_not_;
};

}  // namespace meshring::device

// F3. Packs and unpacks arrays on one device: our kernels where they load, else the driver's
// copies.
#pragma once

#include <string>

#include "driver.hpp"
#include "plan.hpp"
#include "ptx.hpp"

namespace meshring::device {

// Holds no state that changes, so any thread may call it. The device's primary context is current
// in every call. Nothing is allocated on the device: pack and unpack may be captured in a graph.
class Kernels {
 public:
  // Loads the kernels; not while the thread captures a stream. A driver that does not take them is
  // no error: see why_not().
  Kernels(const Driver& driver, int device, const Ptx& ptx = kPtx);

  // Those of a device, made at the first call.
  static const Kernels& of(int device);

  // Enqueue: blocks of the array to their places in the packed buffer, and back. The array and the
  // buffer do not overlap. Throw Error(backend).
  void pack(const Layout& layout, const void* array, void* packed, Stream stream) const;
  void unpack(const Layout& layout, const void* packed, void* array, Stream stream) const;

  // The same by the driver's copies, one a block, whatever compiled() says.
  void copy(const Layout& layout, char* array, char* packed, bool pack, Stream stream) const;

  bool compiled() const { return why_not_.empty(); }  // false: the driver's copies are used
  const std::string& why_not() const { return why_not_; }

 private:
  std::string load(const Ptx& ptx);
  void run(const Layout& layout, void* array, void* packed, bool pack, Stream stream) const;
  void copy_rows(Pointer to, int64_t to_pitch, Pointer from, int64_t from_pitch, int64_t width,
                 int64_t rows, Stream stream) const;

  const Driver& driver_;
  Function functions_[kKernelCount] = {};
  u32 most_blocks_ = 0;  // of a launch: as many as the device runs at once
  std::string why_not_;
};

}  // namespace meshring::device

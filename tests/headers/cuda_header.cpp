// Compiles only if csrc/device/driver_api.hpp says what NVIDIA's cuda.h says. Old declarations are
// asked for, so that each symbol is compared and not the one that a macro puts in its place.
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

#include <cstddef>

#include "alike.hpp"
#include "device/driver_api.hpp"

namespace ours = meshring::device;

#define SAME(left, right) \
  static_assert(static_cast<long long>(left) == static_cast<long long>(right), #left)

SAME(ours::kSuccess, CUDA_SUCCESS);
SAME(ours::kNotReady, CUDA_ERROR_NOT_READY);
SAME(ours::kEventNoTiming, CU_EVENT_DISABLE_TIMING);
SAME(ours::kCaptureRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
SAME(ours::kPoolReleaseThreshold, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD);
SAME(ours::kPointerDevice, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
SAME(ours::kMemoryDevice, CU_MEMORYTYPE_DEVICE);
SAME(sizeof(CUuuid), 16);

// What cuMemPoolCreate reads, which driver.cpp and the stand-in fill in and read by hand.
SAME(offsetof(CUmemPoolProps, allocType), 0);
SAME(offsetof(CUmemPoolProps, handleTypes), 4);
SAME(offsetof(CUmemPoolProps, location) + offsetof(CUmemLocation, type), 8);
SAME(offsetof(CUmemPoolProps, location) + offsetof(CUmemLocation, id), 12);
SAME(sizeof(CUmemPoolProps), 88);
SAME(CU_MEM_ALLOCATION_TYPE_PINNED, 1);
SAME(CU_MEM_LOCATION_TYPE_DEVICE, 1);

#define FIELD(name, theirs)                                                                   \
  SAME(offsetof(ours::Copy2D, name), offsetof(CUDA_MEMCPY2D, theirs));                        \
  static_assert(alike_value<decltype(ours::Copy2D::name), decltype(CUDA_MEMCPY2D::theirs)>(), \
                #theirs)
FIELD(src_x, srcXInBytes);
FIELD(src_y, srcY);
FIELD(src_type, srcMemoryType);
FIELD(src_host, srcHost);
FIELD(src_device, srcDevice);
FIELD(src_array, srcArray);
FIELD(src_pitch, srcPitch);
FIELD(dst_x, dstXInBytes);
FIELD(dst_y, dstY);
FIELD(dst_type, dstMemoryType);
FIELD(dst_host, dstHost);
FIELD(dst_device, dstDevice);
FIELD(dst_array, dstArray);
FIELD(dst_pitch, dstPitch);
FIELD(width, WidthInBytes);
FIELD(height, Height);
SAME(sizeof(ours::Copy2D), sizeof(CUDA_MEMCPY2D));

#define FUNCTION(member, symbol, type, parameters) \
  static_assert(Alike<type parameters, decltype(symbol)>::value, #symbol);
namespace {
using namespace meshring::device;
MESHRING_CUDA_DRIVER(FUNCTION)
}  // namespace

// F1. The CUDA driver's C interface as we use it, declared by ourselves: building needs no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace meshring::device {

using Result = int;  // CUresult; 0 is success
using Device = int;
using Context = void*;
using Module = void*;
using Function = void*;
using Stream = void*;
using Event = void*;
using Pool = void*;
using Pointer = unsigned long long;  // CUdeviceptr

inline constexpr Result kSuccess = 0;
inline constexpr Result kCaptureImplicit = 906;  // CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
inline constexpr Result kCapturedEvent = 907;    // CUDA_ERROR_CAPTURED_EVENT
inline constexpr Result kNotReady = 600;         // CUDA_ERROR_NOT_READY
inline constexpr unsigned kEventNoTiming = 2;    // CU_EVENT_DISABLE_TIMING
inline constexpr int kCaptureRelaxed = 2;        // CU_STREAM_CAPTURE_MODE_RELAXED
inline constexpr int kPoolReleaseThreshold = 4;  // CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
inline constexpr int kPointerDevice = 9;         // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
inline constexpr int kMemoryDevice = 2;          // CU_MEMORYTYPE_DEVICE

// CUDA_MEMCPY2D
struct Copy2D {
  size_t src_x = 0, src_y = 0;
  int src_type = kMemoryDevice;
  const void* src_host = nullptr;
  Pointer src_device = 0;
  void* src_array = nullptr;
  size_t src_pitch = 0;
  size_t dst_x = 0, dst_y = 0;
  int dst_type = kMemoryDevice;
  void* dst_host = nullptr;
  Pointer dst_device = 0;
  void* dst_array = nullptr;
  size_t dst_pitch = 0;
  size_t width = 0, height = 0;
};

// X(member, symbol, return type, parameters)
#define MESHRING_CUDA_DRIVER(X)                                                              \
  X(init, cuInit, Result, (unsigned))                                                        \
  X(driver_version, cuDriverGetVersion, Result, (int*))                                      \
  X(device_count, cuDeviceGetCount, Result, (int*))                                          \
  X(device_get, cuDeviceGet, Result, (Device*, int))                                         \
  X(device_name, cuDeviceGetName, Result, (char*, int, Device))                              \
  X(device_uuid, cuDeviceGetUuid, Result, (void*, Device))                                   \
  X(device_attribute, cuDeviceGetAttribute, Result, (int*, int, Device))                     \
  X(primary_retain, cuDevicePrimaryCtxRetain, Result, (Context*, Device))                    \
  X(context_get, cuCtxGetCurrent, Result, (Context*))                                        \
  X(context_set, cuCtxSetCurrent, Result, (Context))                                         \
  X(module_load, cuModuleLoadData, Result, (Module*, const void*))                           \
  X(module_function, cuModuleGetFunction, Result, (Function*, Module, const char*))          \
  X(launch, cuLaunchKernel, Result,                                                          \
    (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, \
     void**, void**))                                                                        \
  X(copy, cuMemcpyDtoDAsync_v2, Result, (Pointer, Pointer, size_t, Stream))                  \
  X(copy_2d, cuMemcpy2DAsync_v2, Result, (const Copy2D*, Stream))                            \
  X(pool_create, cuMemPoolCreate, Result, (Pool*, const void*))                              \
  X(pool_set, cuMemPoolSetAttribute, Result, (Pool, int, void*))                             \
  X(default_pool, cuDeviceGetDefaultMemPool, Result, (Pool*, Device))                        \
  X(allocate, cuMemAllocFromPoolAsync, Result, (Pointer*, size_t, Pool, Stream))             \
  X(release, cuMemFreeAsync, Result, (Pointer, Stream))                                      \
  X(event_create, cuEventCreate, Result, (Event*, unsigned))                                 \
  X(event_record, cuEventRecord, Result, (Event, Stream))                                    \
  X(event_query, cuEventQuery, Result, (Event))                                              \
  X(event_destroy, cuEventDestroy_v2, Result, (Event))                                       \
  X(event_elapsed, cuEventElapsedTime, Result, (float*, Event, Event))                       \
  X(stream_wait, cuStreamWaitEvent, Result, (Stream, Event, unsigned))                       \
  X(stream_query, cuStreamQuery, Result, (Stream))                                           \
  X(stream_capturing, cuStreamIsCapturing, Result, (Stream, int*))                           \
  X(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, Result, (int*))                \
  X(pointer_attribute, cuPointerGetAttribute, Result, (void*, int, Pointer))                 \
  X(error_name, cuGetErrorName, Result, (Result, const char**))                              \
  X(error_string, cuGetErrorString, Result, (Result, const char**))

}  // namespace meshring::device

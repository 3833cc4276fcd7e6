// F1. NCCL's C interface as we use it, declared by ourselves: building needs neither NCCL nor CUDA.
// tests/test_nccl_header.py compiles these lines against the nccl.h of NVIDIA's wheel.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

namespace meshring::nccl {

using Stream = void*;  // cudaStream_t, CUstream
using Handle = void*;  // ncclComm_t
using Window = void*;  // ncclWindow_t

struct UniqueId {
  char bytes[128];
};

enum class Result : int {
  success = 0,
  unhandled_cuda_error = 1,
  system_error = 2,
  internal_error = 3,
  invalid_argument = 4,
  invalid_usage = 5,
  remote_error = 6,
  in_progress = 7,
  timeout = 8,
};

enum class DataType : int {
  int8 = 0,
  uint8 = 1,
  int32 = 2,
  uint32 = 3,
  int64 = 4,
  uint64 = 5,
  float16 = 6,
  float32 = 7,
  float64 = 8,
  bfloat16 = 9,
  float8_e4m3 = 10,
  float8_e5m2 = 11,
};

enum class Op : int { sum = 0, prod = 1, max = 2, min = 3, avg = 4 };  // and those made at run time

enum class Residence : int { device = 0, host = 1 };

inline constexpr int kUndefined = INT_MIN;  // NCCL_CONFIG_UNDEF_INT
inline constexpr int kNoColor = -1;         // NCCL_SPLIT_NOCOLOR
inline constexpr unsigned kMagic = 0xcafebeef;
inline constexpr int kWindowSymmetric = 1;  // NCCL_WIN_COLL_SYMMETRIC
inline constexpr size_t kWindowAlignment = 4096;
inline constexpr int kShrinkDefault = 0;
inline constexpr int kShrinkAbort = 1;

constexpr int version_code(int major, int minor, int patch) {
  return major * 10000 + minor * 100 + patch;
}

// The fields up to and with those of 2.27; a later library fills in what lies behind `size`.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = kMagic;
  unsigned version = version_code(2, 18, 1);
  int blocking = kUndefined;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
  int traffic_class = kUndefined;   // 2.24
  const char* comm_name = nullptr;  // 2.27
  int collnet_enable = kUndefined;  // 2.27
  int cta_policy = kUndefined;      // 2.27
  int shrink_share = kUndefined;    // 2.27
  int nvls_ctas = kUndefined;       // 2.27
};

// X(member, symbol, first version, return type, parameters)
#define MESHRING_NCCL_REQUIRED(X)                                                             \
  X(get_version, ncclGetVersion, 21800, Result, (int*))                                       \
  X(get_unique_id, ncclGetUniqueId, 21800, Result, (UniqueId*))                               \
  X(init_rank, ncclCommInitRankConfig, 21800, Result, (Handle*, int, UniqueId, int, Config*)) \
  X(finalize, ncclCommFinalize, 21800, Result, (Handle))                                      \
  X(destroy, ncclCommDestroy, 21800, Result, (Handle))                                        \
  X(abort, ncclCommAbort, 21800, Result, (Handle))                                            \
  X(error_string, ncclGetErrorString, 21800, const char*, (Result))                           \
  X(last_error, ncclGetLastError, 21800, const char*, (Handle))                               \
  X(async_error, ncclCommGetAsyncError, 21800, Result, (Handle, Result*))                     \
  X(split, ncclCommSplit, 21801, Result, (Handle, int, int, Handle*, Config*))                \
  X(create_premul_sum, ncclRedOpCreatePreMulSum, 21800, Result,                               \
    (Op*, void*, DataType, Residence, Handle))                                                \
  X(destroy_op, ncclRedOpDestroy, 21800, Result, (Op, Handle))                                \
  X(reduce, ncclReduce, 21800, Result,                                                        \
    (const void*, void*, size_t, DataType, Op, int, Handle, Stream))                          \
  X(broadcast, ncclBroadcast, 21800, Result,                                                  \
    (const void*, void*, size_t, DataType, int, Handle, Stream))                              \
  X(all_reduce, ncclAllReduce, 21800, Result,                                                 \
    (const void*, void*, size_t, DataType, Op, Handle, Stream))                               \
  X(reduce_scatter, ncclReduceScatter, 21800, Result,                                         \
    (const void*, void*, size_t, DataType, Op, Handle, Stream))                               \
  X(all_gather, ncclAllGather, 21800, Result,                                                 \
    (const void*, void*, size_t, DataType, Handle, Stream))                                   \
  X(send, ncclSend, 21800, Result, (const void*, size_t, DataType, int, Handle, Stream))      \
  X(recv, ncclRecv, 21800, Result, (void*, size_t, DataType, int, Handle, Stream))            \
  X(group_start, ncclGroupStart, 21800, Result, ())                                           \
  X(group_end, ncclGroupEnd, 21800, Result, ())

#define MESHRING_NCCL_OPTIONAL(X)                                                                  \
  X(mem_alloc, ncclMemAlloc, 21901, Result, (void**, size_t))                                      \
  X(mem_free, ncclMemFree, 21901, Result, (void*))                                                 \
  X(register_buffer, ncclCommRegister, 21901, Result, (Handle, void*, size_t, void**))             \
  X(deregister_buffer, ncclCommDeregister, 21901, Result, (Handle, void*))                         \
  X(shrink, ncclCommShrink, 22703, Result, (Handle, int*, int, Handle*, Config*, int))             \
  X(register_window, ncclCommWindowRegister, 22703, Result, (Handle, void*, size_t, Window*, int)) \
  X(deregister_window, ncclCommWindowDeregister, 22703, Result, (Handle, Window))                  \
  X(all_to_all, ncclAlltoAll, 22803, Result,                                                       \
    (const void*, void*, size_t, DataType, Handle, Stream))                                        \
  X(gather, ncclGather, 22803, Result,                                                             \
    (const void*, void*, size_t, DataType, int, Handle, Stream))                                   \
  X(scatter, ncclScatter, 22803, Result,                                                           \
    (const void*, void*, size_t, DataType, int, Handle, Stream))

}  // namespace meshring::nccl

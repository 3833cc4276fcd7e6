// Compiles only if csrc/nccl/api.hpp says what NVIDIA's nccl.h says.
#include <nccl.h>

#include <cstddef>

#include "alike.hpp"
#include "nccl/api.hpp"

namespace ours = meshring::nccl;

#define SAME(left, right) \
  static_assert(static_cast<long long>(left) == static_cast<long long>(right), #left)

SAME(ours::Result::success, ncclSuccess);
SAME(ours::Result::unhandled_cuda_error, ncclUnhandledCudaError);
SAME(ours::Result::system_error, ncclSystemError);
SAME(ours::Result::internal_error, ncclInternalError);
SAME(ours::Result::invalid_argument, ncclInvalidArgument);
SAME(ours::Result::invalid_usage, ncclInvalidUsage);
SAME(ours::Result::remote_error, ncclRemoteError);
SAME(ours::Result::in_progress, ncclInProgress);
#if NCCL_VERSION_CODE >= 23003
SAME(ours::Result::timeout, ncclTimeout);
SAME(static_cast<int>(ours::Result::timeout) + 1, ncclNumResults);
#endif

SAME(ours::DataType::int8, ncclInt8);
SAME(ours::DataType::uint8, ncclUint8);
SAME(ours::DataType::int32, ncclInt32);
SAME(ours::DataType::uint32, ncclUint32);
SAME(ours::DataType::int64, ncclInt64);
SAME(ours::DataType::uint64, ncclUint64);
SAME(ours::DataType::float16, ncclFloat16);
SAME(ours::DataType::float32, ncclFloat32);
SAME(ours::DataType::float64, ncclFloat64);
SAME(ours::DataType::bfloat16, ncclBfloat16);
SAME(ours::DataType::float8_e4m3, ncclFloat8e4m3);
SAME(ours::DataType::float8_e5m2, ncclFloat8e5m2);
SAME(static_cast<int>(ours::DataType::float8_e5m2) + 1, ncclNumTypes);

SAME(ours::Op::sum, ncclSum);
SAME(ours::Op::prod, ncclProd);
SAME(ours::Op::max, ncclMax);
SAME(ours::Op::min, ncclMin);
SAME(ours::Op::avg, ncclAvg);
SAME(static_cast<int>(ours::Op::avg) + 1, ncclNumOps);

SAME(ours::Residence::device, ncclScalarDevice);
SAME(ours::Residence::host, ncclScalarHostImmediate);

SAME(ours::kUndefined, NCCL_CONFIG_UNDEF_INT);
SAME(ours::kNoColor, NCCL_SPLIT_NOCOLOR);
SAME(ours::kMagic, NCCL_API_MAGIC);
SAME(ours::kWindowSymmetric, NCCL_WIN_COLL_SYMMETRIC);
SAME(ours::kWindowAlignment, NCCL_WIN_REQUIRED_ALIGNMENT);
SAME(ours::kShrinkDefault, NCCL_SHRINK_DEFAULT);
SAME(ours::kShrinkAbort, NCCL_SHRINK_ABORT);
SAME(ours::version_code(2, 18, 1), NCCL_VERSION(2, 18, 1));
SAME(ours::version_code(NCCL_MAJOR, NCCL_MINOR, NCCL_PATCH), NCCL_VERSION_CODE);
static_assert(NCCL_CONFIG_UNDEF_PTR == nullptr, "an undefined pointer");

SAME(sizeof(ours::UniqueId), sizeof(ncclUniqueId));
SAME(sizeof(ours::UniqueId::bytes), NCCL_UNIQUE_ID_BYTES);
SAME(alignof(ours::UniqueId), alignof(ncclUniqueId));

#define FIELD(name, theirs)                                                                  \
  SAME(offsetof(ours::Config, name), offsetof(ncclConfig_t, theirs));                        \
  static_assert(alike_value<decltype(ours::Config::name), decltype(ncclConfig_t::theirs)>(), \
                #theirs)
FIELD(size, size);
FIELD(magic, magic);
FIELD(version, version);
FIELD(blocking, blocking);
FIELD(cga_cluster_size, cgaClusterSize);
FIELD(min_ctas, minCTAs);
FIELD(max_ctas, maxCTAs);
FIELD(net_name, netName);
FIELD(split_share, splitShare);
FIELD(traffic_class, trafficClass);
FIELD(comm_name, commName);
FIELD(collnet_enable, collnetEnable);
FIELD(cta_policy, CTAPolicy);
FIELD(shrink_share, shrinkShare);
FIELD(nvls_ctas, nvlsCTAs);
SAME(sizeof(ours::Config), offsetof(ncclConfig_t, nvlsCTAs) + sizeof(int));
SAME(sizeof(ours::Config), offsetof(ncclConfig_t, nChannelsPerNetPeer));

#define FUNCTION(member, symbol, version, type, parameters)                \
  static_assert(Alike<type parameters, decltype(symbol)>::value, #symbol); \
  static_assert((version) <= NCCL_VERSION_CODE, #symbol " is newer than nccl.h");
namespace {
using namespace meshring::nccl;
MESHRING_NCCL_REQUIRED(FUNCTION)
MESHRING_NCCL_OPTIONAL(FUNCTION)
}  // namespace

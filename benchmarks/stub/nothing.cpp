// Every function of NCCL and of the CUDA driver that is called here does nothing and returns at
// once, so that what is left of a call is its binding. Answers are in answers.cpp.
#include "device/driver_api.hpp"
#include "nccl/api.hpp"

#define STUB extern "C" __attribute__((weak, visibility("default")))
#define MESHRING_NOTHING(member, symbol, ...) \
  STUB int symbol() { return 0; }
MESHRING_NCCL_REQUIRED(MESHRING_NOTHING)
MESHRING_NCCL_OPTIONAL(MESHRING_NOTHING)
MESHRING_CUDA_DRIVER(MESHRING_NOTHING)

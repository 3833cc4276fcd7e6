// The kernels: one for each width of a vector, kind of blocks and type of an index.
#include "layout.hpp"

using namespace meshring::device;

#define MESHRING_KERNEL(width, Blocks, Index)                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads) meshring_copy_##width##_##Blocks##_##Index( \
      const Copy<Index> copy, const Blocks<Index> blocks) {                                      \
    copy_thread<width>(copy, blocks, blockIdx.x, threadIdx.x, gridDim.x, blockDim.x);            \
  }
MESHRING_KERNELS(MESHRING_KERNEL)

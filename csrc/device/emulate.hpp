// F1. The kernels on the CPU, thread after thread: for tests, and for stand-ins of the driver.
#pragma once

#include <cstring>

#include "layout.hpp"

namespace meshring::device {

struct Dim3 {
  u32 x = 1, y = 1, z = 1;
};

template <int width, class Index, class Blocks>
void emulate_copy(Dim3 grid, Dim3 block, void** params) {
  const auto& copy = *static_cast<const Copy<Index>*>(params[0]);
  const auto& blocks = *static_cast<const Blocks*>(params[1]);
  for (u32 b = 0; b < grid.x; ++b)
    for (u32 t = 0; t < block.x; ++t) copy_thread<width>(copy, blocks, b, t, grid.x, block.x);
}

// Runs the kernel of that name as cuLaunchKernel would; false where there is none.
inline bool emulate(const char* kernel, Dim3 grid, Dim3 block, void** params) {
#define MESHRING_EMULATE(width, Blocks, Index)                                    \
  if (std::strcmp(kernel, "meshring_copy_" #width "_" #Blocks "_" #Index) == 0) { \
    emulate_copy<width, Index, Blocks<Index>>(grid, block, params);               \
    return true;                                                                  \
  }
  MESHRING_KERNELS(MESHRING_EMULATE)
#undef MESHRING_EMULATE
  return false;
}

}  // namespace meshring::device

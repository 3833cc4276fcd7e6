// F1. The kernels on the CPU, thread after thread: for tests, and for stand-ins of the driver.
#pragma once

#include <cstring>
#include <functional>

#include "layout.hpp"

namespace meshring::device {

struct Dim3 {
  u32 x = 1, y = 1, z = 1;
};

// The work of one launch, with its own copy of the parameters; empty: there is no such kernel.
using Work = std::function<void()>;

template <int width, class Index, class Blocks>
Work bind_copy(Dim3 grid, Dim3 block, void** params) {
  const auto copy = *static_cast<const Copy<Index>*>(params[0]);
  const auto blocks = *static_cast<const Blocks*>(params[1]);
  return [=] {
    for (u32 b = 0; b < grid.x; ++b)
      for (u32 t = 0; t < block.x; ++t) copy_thread<width>(copy, blocks, b, t, grid.x, block.x);
  };
}

// Takes a kernel's name and parameters as cuLaunchKernel does.
inline Work bind(const char* kernel, Dim3 grid, Dim3 block, void** params) {
#define MESHRING_BIND(width, Blocks, Index)                                     \
  if (std::strcmp(kernel, "meshring_copy_" #width "_" #Blocks "_" #Index) == 0) \
    return bind_copy<width, Index, Blocks<Index>>(grid, block, params);
  MESHRING_KERNELS(MESHRING_BIND)
#undef MESHRING_BIND
  return {};
}

// Runs the kernel of that name to its end; false where there is none.
inline bool emulate(const char* kernel, Dim3 grid, Dim3 block, void** params) {
  const Work work = bind(kernel, grid, block, params);
  if (work) work();
  return static_cast<bool>(work);
}

}  // namespace meshring::device

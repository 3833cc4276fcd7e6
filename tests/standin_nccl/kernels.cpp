// The kernels that the stand-in driver knows, by name: those of csrc/device, run on the CPU.
#if __has_include("device/emulate.hpp")
#include "device/emulate.hpp"
#endif

#include <iterator>
#include <set>

#include "standin.hpp"

namespace standin {

#ifdef MESHRING_KERNELS

const std::string* find_kernel(const std::string& name) {
  static std::set<std::string>& known = *new std::set<std::string>(
      std::begin(meshring::device::kKernelNames), std::end(meshring::device::kKernelNames));
  const auto found = known.find(name);
  return found == known.end() ? nullptr : &*found;
}

Task bind_kernel(const std::string& kernel, Grid grid, Grid block, void** parameters) {
  return meshring::device::bind(kernel.c_str(), {grid.x, grid.y, grid.z},
                                {block.x, block.y, block.z}, parameters);
}

#else

const std::string* find_kernel(const std::string&) { return nullptr; }

Task bind_kernel(const std::string&, Grid, Grid, void**) { return {}; }

#endif

}  // namespace standin

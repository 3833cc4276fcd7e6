// The kernels that the stand-in driver knows, by name.
#include "standin.hpp"

namespace standin {

const Kernel* find_kernel(const std::string& name) {
  static_cast<void>(name);
  return nullptr;
}

}  // namespace standin

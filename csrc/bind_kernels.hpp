// F5. The device kernels as tests, benchmarks and `meshring doctor` reach them.
#pragma once

#include <pybind11/pybind11.h>

namespace meshring {

void bind_kernels(pybind11::module_& m);

}  // namespace meshring

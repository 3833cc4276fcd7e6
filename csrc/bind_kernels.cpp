#include "bind_kernels.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device/kernels.hpp"

namespace meshring {

namespace py = pybind11;

namespace {

using device::Kernels;
using device::Layout;

py::dict kernels_info() {
  py::dict d;
  d["built"] = device::kPtx.text != nullptr;
  d["isa"] = device::kPtx.isa;
  d["target"] = device::kPtx.target;
  d["compiler"] = device::kPtx.compiler;
  return d;
}

// Device memory by address: a hook for tests and benchmarks, never for users.
void copy_blocks(uintptr_t array, uintptr_t packed, int64_t rows,
                 const std::vector<int64_t>& widths, bool pack, int64_t spacing, int skip,
                 uintptr_t stream, int device, bool compiled) {
  Call call;
  call.outer = rows;
  Layout layout = device::layout_of(call, static_cast<int>(widths.size()), spacing,
                                    [&](int k) { return widths[static_cast<size_t>(k)]; });
  layout.skip = skip;
  const Kernels& kernels = Kernels::of(device);
  const device::OnDevice here(device);
  auto* a = reinterpret_cast<char*>(array);
  auto* p = reinterpret_cast<char*>(packed);
  auto* s = reinterpret_cast<device::Stream>(stream);
  if (!compiled)
    kernels.copy(layout, a, p, pack, s);
  else if (pack)
    kernels.pack(layout, a, p, s);
  else
    kernels.unpack(layout, p, a, s);
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.def("kernels_info", &kernels_info);
  m.def(
      "kernels_refused", [](int device) { return Kernels::of(device).why_not(); },
      py::arg("device") = 0);
  m.def("_copy_blocks", &copy_blocks, py::arg("array"), py::arg("packed"), py::arg("rows"),
        py::arg("widths"), py::arg("pack"), py::arg("spacing") = 0, py::arg("skip") = -1,
        py::arg("stream") = 0, py::arg("device") = 0, py::arg("compiled") = true);
}

}  // namespace meshring

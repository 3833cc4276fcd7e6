// F5. The extension module meshring._core.
#include <pybind11/pybind11.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "bind_device.hpp"
#include "bind_kernels.hpp"
#include "reduce.hpp"

namespace meshring {

namespace {

Isa isa_named(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (isa <= best_isa() && name == name_of(isa)) return isa;
  usage("isa '" + name + "' is unknown or not available on this CPU");
}

py::object reduce_arrays(const std::string& op_name, const py::sequence& inputs, py::object isa,
                         py::object out) {
  RedOp op = RedOp::sum;
  bool known = false;
  for (int i = 0; i < kRedOpCount; ++i)
    if (op_name == kRedOps[i]) {
      op = static_cast<RedOp>(i);
      known = true;
    }
  if (!known || inputs.size() == 0) usage("reduce_arrays: give an operator and arrays");
  std::vector<Array> arrays;
  std::vector<const void*> sources;
  for (const auto item : inputs) {
    arrays.push_back(read_input(item.ptr(), "arrays"));
    sources.push_back(arrays.back().data);
    if (arrays.back().dtype != arrays[0].dtype || arrays.back().count != arrays[0].count)
      usage("reduce_arrays: the arrays must have one dtype and size");
  }
  if (!supports(arrays[0].dtype, op)) usage("reduce_arrays: no such reduction of this dtype");
  const py::object made =
      out.is_none() ? new_array(arrays[0].ndim, arrays[0].shape(), arrays[0].dtype, -1) : out;
  const Array result = read_output(made.ptr(), "out");
  if (result.dtype != arrays[0].dtype || result.count != arrays[0].count)
    usage("reduce_arrays: out must be like the arrays");
  const Isa before = current_isa();
  if (!isa.is_none()) set_isa(isa_named(isa.cast<std::string>()));
  reduce(arrays[0].dtype, op, result.data, sources.data(), static_cast<int>(sources.size()),
         result.count);
  set_isa(before);
  return made;
}

py::dict build_info() {
  py::dict d;
  d["compiler"] = std::string("g++ ") + __VERSION__;
  d["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." +
                  std::to_string(PYBIND11_VERSION_MINOR) + "." +
                  PYBIND11_TOSTRING(PYBIND11_VERSION_MICRO);
#if defined(__SANITIZE_ADDRESS__)
  d["sanitizer"] = "address";
#elif defined(__SANITIZE_THREAD__)
  d["sanitizer"] = "thread";
#else
  d["sanitizer"] = "";
#endif
  return d;
}

// Called in a child between fork and exec, and so by one thread only.
void die_with_parent(int parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
}

void bind_segment(py::module_& m) {
  py::class_<Segment, std::shared_ptr<Segment>>(m, "Segment")
      .def_static("create", &Communicator::new_job, py::arg("size"))
      .def_static("attach", &Segment::attach, py::arg("fd"))
      .def("fileno", &Segment::fd)
      .def("close", &Segment::close)
      .def_property_readonly("size", &Segment::size)
      .def_property_readonly("nbytes", &Segment::bytes)
      .def_property_readonly("nbytes_touched", &Segment::bytes_touched)
      .def("set_pid", [](Segment& s, int rank, int pid) { s.rank(rank).pid.store(pid); })
      .def("set_wait_status",
           [](Segment& s, int rank, int status) {
             s.rank(rank).wait_status.store(status);
             s.rank(rank).has_wait_status.store(1);
           })
      .def("set_ended",
           [](Segment& s, int rank, bool raised, const std::string& text) {
             s.set_ended(rank, raised ? Life::raised : Life::exited, text);
           })
      .def("excluded", [](Segment& s, int rank) { return s.rank(rank).excluded.load() != 0; });
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& error) {
      set_python_error(error);
    }
  });
  init_python();
  init_arrays();
  m.def("build_info", &build_info);
  m.def("usable_cores", &usable_cores);
  m.def("isas", [] {
    py::tuple names(static_cast<size_t>(best_isa()) + 1);
    for (size_t i = 0; i < names.size(); ++i) names[i] = name_of(static_cast<Isa>(i));
    return names;
  });
  m.def("set_isa", [](const std::string& name) { set_isa(isa_named(name)); }, py::arg("name"));
  m.def("reduce_arrays", &reduce_arrays, py::arg("op"), py::arg("arrays"),
        py::arg("isa") = py::none(), py::arg("out") = py::none());
  m.def("die_with_parent", &die_with_parent, py::arg("parent_pid"));
  bind_segment(m);
  bind_communicator(m);
  bind_nccl(m);
  bind_kernels(m);
}

}  // namespace meshring

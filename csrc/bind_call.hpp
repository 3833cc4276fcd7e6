// F5. The frame of the hot methods of _core.Communicator: METH_FASTCALL, arguments read by hand.
#pragma once

#include "bind_communicator.hpp"

namespace meshring {

inline constexpr int64_t kKeepGilBelow = 64 << 10;  // bytes; larger copies let other threads run

// One thread at a time is inside a communicator. Needs the GIL on both ends.
class Inside {
 public:
  explicit Inside(PyCommunicator& comm);
  ~Inside() { comm_.busy = false; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  PyCommunicator& comm_;
};

std::string door_of(const PyCommunicator& comm, const char* operation);
uint32_t site_of(World& world);  // of the Python code that called
PyCommunicator& unwrap(PyObject* self);

// Runs body(comm) and turns what it throws into Python's exception.
template <class Body>
PyObject* at_the_door(PyObject* self, const char* operation, Body&& body) {
  PyCommunicator* comm = nullptr;
  try {
    comm = &unwrap(self);
    return body(*comm).release().ptr();
  } catch (const Error& error) {
    if (error.trouble == Trouble::usage)
      set_python_error(error, door_of(*comm, operation));
    else
      set_python_error(error);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

py::object make_work(PyObject* self, std::shared_ptr<Pending> pending, py::object result,
                     const Array* in, const Array* out);
// A peer may still read the arrays of a call that failed in the middle.
void keep_arrays(PyCommunicator& comm, const Array* in, const Array* out);

void end_group(PyCommunicator& comm, py::object timeout, bool cancelled);
void add_collectives(py::class_<PyCommunicator>& type);
void add_block_collectives(py::class_<PyCommunicator>& type);
void add_transfers(py::class_<PyCommunicator>& type);

// pybind11's own call costs twice as much as reading the arguments here.
template <size_t N>
void add_methods(py::class_<PyCommunicator>& type, PyMethodDef (&methods)[N]) {
  for (PyMethodDef& method : methods) {
    PyObject* descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &method);
    if (!descriptor) throw py::error_already_set();
    type.attr(method.ml_name) = py::reinterpret_steal<py::object>(descriptor);
  }
}

}  // namespace meshring

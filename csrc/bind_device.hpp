// F5. CuPy: its arrays read through their cached getters, its streams, new arrays. CuPy is found in
// sys.modules, never imported for the user.
#pragma once

#include "bind_arguments.hpp"
#include "bind_communicator.hpp"

namespace meshring {

bool is_cupy(PyObject* object);  // a cupy.ndarray
// Fills in all but `original`. Returns whether it is C-contiguous.
bool read_cupy(PyObject* object, const char* argument, Array& a);
py::object new_cupy(const py::tuple& shape, DType dtype, int device);

// The stream of one call: `stream` where given, else CuPy's current one.
struct StreamChoice {
  void* handle = nullptr;
  void* current = nullptr;  // CuPy's
};
// Keeps the stream object alive as long as the communicator may look at its handle.
StreamChoice choose_stream(PyCommunicator& comm, PyObject* stream, int device);

// Enqueues the calls; keeps arrays that live on another stream than CuPy's current one until the
// GPU is done with them. `made`: some were made or packed for this call. `marks`: the caller wants
// a Work, which a CUDA graph cannot have.
void enqueue(PyCommunicator& comm, Call* calls, size_t count, PyObject* stream, double seconds,
             const Array* const* arrays, size_t array_count, bool made, bool marks = false);
// Throws Error(usage) for stream= with an array on the host.
void refuse_stream(PyObject* stream);

void add_device(py::class_<PyCommunicator>& type);
void bind_nccl(py::module_& m);

}  // namespace meshring

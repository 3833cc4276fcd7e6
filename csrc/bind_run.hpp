// F5. What the collectives of _core.Communicator have in common.
#pragma once

#include "bind_call.hpp"

namespace meshring {

// The keywords that every collective has, as they were given.
struct Options {
  PyObject* timeout;
  PyObject* async_op;
  PyObject* stream = nullptr;
};

// The argument 'scale': on a GPU NCCL multiplies, on the host a scaled copy takes the place of x.
void apply_scale(Call& call, Array& in, PyObject* scale);

// Runs a call, or starts it with async_op=True, on the host or on the GPU of its arrays.
py::object run(PyObject* self, PyCommunicator& comm, Call& call, const Array* in, const Array* out,
               py::object result, const Options& options);

// clang-format off
#define MESHRING_METHOD(name, text) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&name)), \
   METH_FASTCALL | METH_KEYWORDS, text}
#define MESHRING_COMMON \
  "Arrays on a GPU: enqueued on CuPy's current stream, or on stream.\n" \
  "Units: timeout in seconds. async_op=True returns a Work at once.\n" \
  "Errors: UsageError (no effect), MismatchError (the ranks disagree), DeadlineError,\n" \
  "PeerLostError.\n"

// clang-format on

}  // namespace meshring

// send, recv and their kin of _core.Communicator.
#include "bind_call.hpp"
#include "bind_device.hpp"

namespace meshring {

namespace {

Call transfer(CallKind kind, int peer, const Array& a, World& world) {
  Call call;
  call.kind = kind;
  call.root = peer;
  whole(call, a);  // the device too
  if (kind == CallKind::send)
    call.in = a.data;
  else
    call.out = a.data;
  call.site = site_of(world);
  return call;
}

// An array to receive into: the caller's own, or a new one of a shape and dtype, on the GPU when
// the communicator was started for it.
Array destination(const PyCommunicator& comm, PyObject* x, PyObject* dtype) {
  const bool is_shape = PyTuple_Check(x) || PyLong_Check(x) || PyList_Check(x);
  if (!is_shape) {
    const Array a = read_output(x, "x");
    if (given(dtype) && dtype_of(dtype, "dtype") != a.dtype)
      usage(std::string("argument 'dtype' differs from that of x, which is ") + name_of(a.dtype) +
            "; leave dtype out");
    return a;
  }
  if (!given(dtype))
    usage("argument 'x' is a shape, so dtype= is needed, for example dtype='float32'");
  std::vector<Py_ssize_t> shape;
  if (PyLong_Check(x)) {
    shape.push_back(read_int(x, "x"));
  } else {
    const Py_ssize_t n = PySequence_Size(x);
    for (Py_ssize_t i = 0; i < n; ++i) {
      const py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(x, i));
      shape.push_back(read_int(item.ptr(), "x"));
    }
  }
  for (Py_ssize_t s : shape)
    if (s < 0) usage("argument 'x' is a shape with a negative length");
  constexpr size_t kMostDims = 32;  // of every NumPy
  if (shape.size() > kMostDims)
    usage("argument 'x' is a shape of " + std::to_string(shape.size()) +
          " dimensions; up to 32 are possible");
  const py::object made =
      new_array(static_cast<int>(shape.size()), shape.data(), dtype_of(dtype, "dtype"),
                comm.c->choice().first ? comm.c->choice().device : -1);
  Array a = read_output(made.ptr(), "x");
  a.made = true;
  return a;
}

// Posts the calls and waits for all, or leaves them to the open group.
void exchange(PyObject* self, PyCommunicator& comm, std::vector<Call> calls,
              const std::vector<const Array*>& arrays, PyObject* timeout, PyObject* stream) {
  const double seconds = read_seconds(timeout, comm.c->timeout());
  Inside inside(comm);
  if (calls[0].device >= 0) {
    bool made = false;
    for (const Array* a : arrays) made = made || a->made || a->packed;
    if (comm.group_depth == 0) {
      enqueue(comm, calls.data(), calls.size(), stream, seconds, arrays.data(), arrays.size(),
              made);
      return;
    }
    if (given(stream))
      usage("argument 'stream' in a group; the group goes to CuPy's current stream at its end");
    comm.c->check_device(calls[0].device);
    comm.device_group.insert(comm.device_group.end(), calls.begin(), calls.end());
    for (const Array* a : arrays) comm.device_arrays.push_back(a->object);
    return;
  }
  refuse_stream(stream);
  int64_t bytes = 0;
  for (const Call& call : calls) bytes += call.length * call.unit;
  if (comm.group_depth > 0) {
    std::vector<std::shared_ptr<Pending>> pending;
    {
      GilHooks hooks;
      if (comm.c->world().threads() || bytes > kKeepGilBelow) hooks.release();
      pending = comm.c->post(calls, false);
    }
    for (size_t i = 0; i < pending.size(); ++i)
      comm.group.push_back(make_work(self, pending[i], py::none(), arrays[i], nullptr));
    return;
  }
  GilHooks hooks;
  if (comm.c->world().threads() || bytes > kKeepGilBelow) hooks.release();
  try {
    const auto pending = comm.c->post(calls, false);
    std::optional<Error> first;
    for (const auto& p : pending) {
      try {
        comm.c->wait(*p, seconds, hooks);
      } catch (const Error& error) {
        if (error.trouble != Trouble::mismatch) throw;
        if (!first) first = error;  // the other half of the exchange may still be well
      }
    }
    if (first) throw *first;
  } catch (const Error& error) {
    hooks.restore();
    if (error.trouble != Trouble::usage && error.trouble != Trouble::mismatch)
      for (const Array* a : arrays) keep_arrays(comm, a, nullptr);
    throw;
  }
}

Parameters send_parameters{"send", 2, 2, {"x", "dest", "timeout", "stream"}};

PyObject* send(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "send", [&](PyCommunicator& comm) -> py::object {
    PyObject* v[kMaxArgs] = {};
    parse(send_parameters, args, nargs, kwnames, v);
    const int peer = read_rank(v[1], "dest", comm.c->size());
    const Array a = read_input(v[0], "x");
    comm.packed_bytes += a.packed;
    exchange(self, comm, {transfer(CallKind::send, peer, a, comm.c->world())}, {&a}, v[2], v[3]);
    return py::none();
  });
}

Parameters recv_parameters{"recv", 3, 2, {"x", "source", "dtype", "timeout", "stream"}};

PyObject* recv(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "recv", [&](PyCommunicator& comm) -> py::object {
    PyObject* v[kMaxArgs] = {};
    parse(recv_parameters, args, nargs, kwnames, v);
    const int peer = read_rank(v[1], "source", comm.c->size());
    const Array a = destination(comm, v[0], v[2]);
    exchange(self, comm, {transfer(CallKind::recv, peer, a, comm.c->world())}, {&a}, v[3], v[4]);
    return a.original;
  });
}

Parameters sendrecv_parameters{
    "sendrecv", 4, 3, {"x", "dest", "source", "out", "timeout", "stream"}};

PyObject* sendrecv(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "sendrecv", [&](PyCommunicator& comm) -> py::object {
    PyObject* v[kMaxArgs] = {};
    parse(sendrecv_parameters, args, nargs, kwnames, v);
    const int dest = read_rank(v[1], "dest", comm.c->size());
    const int source = read_rank(v[2], "source", comm.c->size());
    const Array in = read_input(v[0], "x");
    comm.packed_bytes += in.packed;
    Array out;
    if (given(v[3])) {
      out = read_output(v[3], "out");
      if (out.device != in.device)
        usage(
            "arguments 'x' and 'out' are not in one place; give both on the host, or both on "
            "the GPU");
      if (in.bytes() > 0 && in.data < out.data + out.bytes() && out.data < in.data + in.bytes())
        usage("argument 'out' overlaps 'x' in memory; give an out that does not");
    } else {
      out = read_output(new_array(in.ndim, in.shape(), in.dtype, in.device).ptr(), "out");
      out.made = true;
    }
    World& world = comm.c->world();
    exchange(
        self, comm,
        {transfer(CallKind::send, dest, in, world), transfer(CallKind::recv, source, out, world)},
        {&in, &out}, v[4], v[5]);
    return out.original;
  });
}

py::object posted(PyObject* self, PyCommunicator& comm, Call call, const Array& a,
                  py::object result, PyObject* stream) {
  Inside inside(comm);
  if (call.device >= 0) {
    const Array* arrays[] = {&a};
    enqueue(comm, &call, 1, stream, comm.c->timeout(), arrays, 1, a.made || a.packed, true);
    return make_work(self, comm.c->mark(call), std::move(result), &a, nullptr);
  }
  refuse_stream(stream);
  std::vector<std::shared_ptr<Pending>> pending;
  {
    GilHooks hooks;
    if (comm.c->world().threads() || a.bytes() > kKeepGilBelow) hooks.release();
    pending = comm.c->post({call}, true);
  }
  return make_work(self, pending[0], std::move(result), &a, nullptr);
}

Parameters isend_parameters{"isend", 2, 2, {"x", "dest", "stream"}};

PyObject* isend(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "isend", [&](PyCommunicator& comm) -> py::object {
    PyObject* v[kMaxArgs] = {};
    parse(isend_parameters, args, nargs, kwnames, v);
    const int peer = read_rank(v[1], "dest", comm.c->size());
    const Array a = read_input(v[0], "x");
    comm.packed_bytes += a.packed;
    return posted(self, comm, transfer(CallKind::send, peer, a, comm.c->world()), a, py::none(),
                  v[2]);
  });
}

Parameters irecv_parameters{"irecv", 3, 2, {"x", "source", "dtype", "stream"}};

PyObject* irecv(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "irecv", [&](PyCommunicator& comm) -> py::object {
    PyObject* v[kMaxArgs] = {};
    parse(irecv_parameters, args, nargs, kwnames, v);
    const int peer = read_rank(v[1], "source", comm.c->size());
    const Array a = destination(comm, v[0], v[2]);
    return posted(self, comm, transfer(CallKind::recv, peer, a, comm.c->world()), a, a.original,
                  v[3]);
  });
}

// clang-format off
#define MESHRING_METHOD(name, text) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&name)), \
   METH_FASTCALL | METH_KEYWORDS, text}
#define MESHRING_COMMON \
  "Arrays on a GPU: enqueued on CuPy's current stream, or on stream; inside group(), at its end.\n" \
  "Units: timeout in seconds. Errors: UsageError, MismatchError (the sides disagree),\n" \
  "DeadlineError, PeerLostError.\n"

PyMethodDef methods[] = {
    MESHRING_METHOD(send,
        "send($self, x, dest, *, timeout=None, stream=None)\n--\n\n"
        "Send x to rank dest; messages between two ranks keep their order.\n\n"
        "Returns when x may be changed: at once up to 32 KiB (four such messages are buffered per\n"
        "pair), else when it was received. Shapes: any.\n" MESHRING_COMMON
        "Source: MPI_Send, ncclSend."),
    MESHRING_METHOD(recv,
        "recv($self, x, source, dtype=None, *, timeout=None, stream=None)\n--\n\n"
        "Receive the next message of rank source into the array x, or, when x is a shape, into a new\n"
        "array of that shape and dtype; return it.\n\n"
        "Shapes: as sent.\n" MESHRING_COMMON
        "Source: MPI_Recv, ncclRecv."),
    MESHRING_METHOD(sendrecv,
        "sendrecv($self, x, dest, source, out=None, *, timeout=None, stream=None)\n--\n\n"
        "Send x to dest while receiving from source, into out or a new array like x; return it.\n\n"
        "Shapes: any; out as sent to this rank.\n" MESHRING_COMMON
        "Source: MPI_Sendrecv, ncclGroupStart."),
    MESHRING_METHOD(isend,
        "isend($self, x, dest, *, stream=None)\n--\n\n"
        "Start sending x to rank dest and return a Work; leave x alone until it is done.\n\n"
        "Shapes: any. Units: none. Errors: UsageError at once, the others by Work.wait().\n"
        "Source: MPI_Isend."),
    MESHRING_METHOD(irecv,
        "irecv($self, x, source, dtype=None, *, stream=None)\n--\n\n"
        "Start receiving from rank source into x (an array, or a shape with dtype); return a Work.\n\n"
        "Shapes: as sent. Units: none. Errors: UsageError at once, the others by Work.wait().\n"
        "Source: MPI_Irecv."),
};
// clang-format on

}  // namespace

// Sends and receives on the GPU go together, and even after an exception: peers wait for them.
static void end_device_group(PyCommunicator& comm, const py::object& timeout) {
  std::vector<Call> calls;
  calls.swap(comm.device_group);
  std::vector<py::object> arrays;
  arrays.swap(comm.device_arrays);
  if (calls.empty()) return;
  const double seconds = read_seconds(timeout.ptr(), comm.c->timeout());
  const Inside inside(comm);
  enqueue(comm, calls.data(), calls.size(), nullptr, seconds, nullptr, 0, false);
}

void end_group(PyCommunicator& comm, py::object timeout, bool cancelled) {
  if (comm.group_depth == 0 || --comm.group_depth > 0) return;
  std::vector<py::object> works;
  works.swap(comm.group);
  end_device_group(comm, timeout);
  if (cancelled) return;  // what was posted goes on; PyWork keeps the arrays
  std::optional<py::error_already_set> first;
  for (py::object& work : works) {
    try {
      work.attr("wait")(timeout);
    } catch (py::error_already_set& error) {
      if (!first) first = error;
    }
  }
  if (first) throw *first;
}

void add_transfers(py::class_<PyCommunicator>& type) { add_methods(type, methods); }

}  // namespace meshring

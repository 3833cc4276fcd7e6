// The collectives of _core.Communicator.
#include <cstring>

#include "bind_device.hpp"
#include "bind_run.hpp"

namespace meshring {

py::object run(PyObject* self, PyCommunicator& comm, Call& call, const Array* in, const Array* out,
               py::object result, const Options& options) {
  const double seconds = read_seconds(options.timeout, comm.c->timeout());
  const int async = options.async_op ? PyObject_IsTrue(options.async_op) : 0;
  if (async < 0) throw py::error_already_set();
  Inside inside(comm);
  call.site = site_of(comm.c->world());
  if (in) comm.packed_bytes += in->packed;
  if (call.device >= 0) {
    const Array* arrays[] = {in, out};
    const bool made = (in && in->packed) || (out && out->made);
    enqueue(comm, &call, 1, options.stream, seconds, arrays, 2, made, async != 0);
    if (async) return make_work(self, comm.c->mark(call), std::move(result), in, out);
    return result;
  }
  refuse_stream(options.stream);
  if (async) return make_work(self, comm.c->start(call, seconds), std::move(result), in, out);
  GilHooks hooks;
  const int64_t bytes = call.outer * call.length * call.unit;
  if (comm.c->world().threads() || bytes > kKeepGilBelow || !call.sizes.empty()) hooks.release();
  try {
    comm.c->run(call, seconds, hooks);
  } catch (const Error& error) {
    hooks.restore();
    if (error.trouble != Trouble::usage && error.trouble != Trouble::mismatch)
      keep_arrays(comm, in, out);
    throw;
  }
  return result;
}

namespace {}  // namespace

void apply_scale(Call& call, Array& in, PyObject* scale) {
  const double factor = read_scale(scale, in.dtype, call.op);
  if (factor == 1) return;
  if (in.device < 0) {
    in = scaled(in, factor);
    return;
  }
  const DType real = in.dtype == DType::complex64    ? DType::float32
                     : in.dtype == DType::complex128 ? DType::float64
                                                     : in.dtype;
  const py::object number =
      py::module_::import("numpy").attr("array")(factor, py::handle(descriptor_of(real)));
  const auto bytes = number.attr("tobytes")().cast<std::string>();
  call.scaled = true;
  std::memcpy(&call.scale, bytes.data(), bytes.size());
}

namespace {

// ---- all_reduce, reduce, broadcast, barrier -------------------------------------------------

Parameters all_reduce_parameters{
    "all_reduce", 3, 1, {"x", "op", "out", "timeout", "async_op", "stream", "scale"}};

PyObject* all_reduce(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "all_reduce", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(all_reduce_parameters, args, nargs, kwnames, v);
    Call call;
    call.kind = CallKind::all_reduce;
    call.op = read_op(v[1]);
    if (given(v[2])) {
      Array in = read_input(v[0], "x");
      const Array out = read_output(v[2], "out");
      check_op(in.dtype, call.op);
      apply_scale(call, in, v[6]);
      whole(call, in);
      check_out(out, call, in);
      check_overlap(in, out.data, out.bytes(), out.data);
      call.in = in.data;
      call.out = out.data;
      return run(self, comm, call, &in, &out, out.original, {v[3], v[4], v[5]});
    }
    const Array x = read_output(v[0], "x");
    check_op(x.dtype, call.op);
    whole(call, x);
    call.in = call.out = x.data;
    if (given(v[6])) {
      Array in = x;
      apply_scale(call, in, v[6]);
      call.in = in.data;
      return run(self, comm, call, &in, &x, x.original, {v[3], v[4], v[5]});
    }
    return run(self, comm, call, &x, nullptr, x.original, {v[3], v[4], v[5]});
  });
}

Parameters broadcast_parameters{
    "broadcast", 3, 1, {"x", "root", "out", "timeout", "async_op", "stream"}};

PyObject* broadcast(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "broadcast", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(broadcast_parameters, args, nargs, kwnames, v);
    Call call;
    call.kind = CallKind::broadcast;
    call.root = v[1] ? read_rank(v[1], "root", comm.c->size()) : 0;
    const bool i_am_root = call.root == comm.c->rank();
    // The root's array is only read, and a rank with out= reads nothing of its x but the shape.
    const bool only_read = i_am_root || given(v[2]);
    const Array x = only_read ? read_input(v[0], "x") : read_output(v[0], "x");
    whole(call, x);
    call.in = call.out = x.data;
    if (!given(v[2])) return run(self, comm, call, &x, nullptr, x.original, {v[3], v[4], v[5]});
    const Array out = read_output(v[2], "out");
    check_out(out, call, x);
    check_overlap(x, out.data, out.bytes(), out.data);
    call.out = out.data;
    return run(self, comm, call, &x, &out, out.original, {v[3], v[4], v[5]});
  });
}

Parameters reduce_parameters{
    "reduce", 4, 1, {"x", "op", "root", "out", "timeout", "async_op", "stream", "scale"}};

PyObject* reduce(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "reduce", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(reduce_parameters, args, nargs, kwnames, v);
    Call call;
    call.kind = CallKind::reduce;
    call.op = read_op(v[1]);
    call.root = v[2] ? read_rank(v[2], "root", comm.c->size()) : 0;
    Array in = read_input(v[0], "x");
    check_op(in.dtype, call.op);
    apply_scale(call, in, v[7]);
    whole(call, in);
    call.in = in.data;
    if (call.root != comm.c->rank())
      return run(self, comm, call, &in, nullptr, py::none(), {v[4], v[5], v[6]});
    const Array out = output_for(call, v[3], {in.shape(), in.shape() + in.ndim});
    check_overlap(in, out.data, out.bytes(), out.data);
    return run(self, comm, call, &in, &out, out.original, {v[4], v[5], v[6]});
  });
}

Parameters barrier_parameters{"barrier", 0, 0, {"timeout", "async_op"}};

PyObject* barrier(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "barrier", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(barrier_parameters, args, nargs, kwnames, v);
    Call call;
    call.kind = CallKind::barrier;
    return run(self, comm, call, nullptr, nullptr, py::none(), {v[0], v[1]});
  });
}

// clang-format off
PyMethodDef methods[] = {
    MESHRING_METHOD(all_reduce,
        "all_reduce($self, x, op='sum', out=None, *, timeout=None, async_op=False, stream=None, "
        "scale=None)\n--\n\n"
        "Reduce x element by element over all ranks, in rank order, to every rank.\n\n"
        "op: sum, prod, min, max or mean. Without out, x itself is overwritten and returned.\n"
        "scale: of a sum, a number that every x is multiplied by first (NCCL's premultiplied sum).\n"
        "Shapes: any, the same on all ranks; out like x.\n" MESHRING_COMMON
        "Source: MPI_Allreduce, ncclAllReduce."),
    MESHRING_METHOD(broadcast,
        "broadcast($self, x, root=0, out=None, *, timeout=None, async_op=False, stream=None)\n--\n\n"
        "Copy x of rank root to every rank, into x itself or into out.\n\n"
        "Shapes: any, the same on all ranks.\n" MESHRING_COMMON
        "Source: MPI_Bcast, ncclBroadcast."),
    MESHRING_METHOD(reduce,
        "reduce($self, x, op='sum', root=0, out=None, *, timeout=None, async_op=False, stream=None, "
        "scale=None)\n--\n\n"
        "Reduce x over all ranks to rank root; the others get None.\n\n"
        "Shapes: any, the same on all ranks; out (read on root only) like x.\n" MESHRING_COMMON
        "Source: MPI_Reduce, ncclReduce."),
    MESHRING_METHOD(barrier,
        "barrier($self, *, timeout=None, async_op=False)\n--\n\n"
        "Wait until every rank has called it.\n\n"
        "Shapes: none.\n" MESHRING_COMMON
        "Source: MPI_Barrier."),
};
// clang-format on

}  // namespace

void add_collectives(py::class_<PyCommunicator>& type) { add_methods(type, methods); }

}  // namespace meshring

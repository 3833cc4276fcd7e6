// The collectives of _core.Communicator.
#include <algorithm>
#include <cstring>

#include "bind_call.hpp"

namespace meshring {

namespace {

py::object run(PyObject* self, PyCommunicator& comm, Call& call, const Array* in, const Array* out,
               py::object result, PyObject* timeout, PyObject* async_op) {
  const double seconds = read_seconds(timeout, comm.c->timeout());
  const bool async = async_op && PyObject_IsTrue(async_op) == 1;
  Inside inside(comm);
  call.site = site_of(comm.c->world());
  if (in) comm.packed_bytes += in->packed;
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

// ---- shapes ---------------------------------------------------------------------------------

void describe(Call& call, const Array& a) {
  call.dtype = a.dtype;
  call.count = a.count;
  call.ndim = static_cast<uint8_t>(a.ndim);
  for (int i = 0; i < a.ndim && i < kMaxDims; ++i) call.dims[i] = a.shape[i];
}

void whole(Call& call, const Array& a) {
  describe(call, a);
  call.unit = static_cast<int64_t>(size_of(a.dtype));
  call.length = a.count;
}

// A shape seen along one axis; a 0-d array counts as one of length 1.
struct Along {
  int axis = 0;
  int64_t length = 1;
  std::vector<Py_ssize_t> shape;

  std::vector<Py_ssize_t> with(int64_t other) const {
    std::vector<Py_ssize_t> s = shape;
    s[static_cast<size_t>(axis)] = static_cast<Py_ssize_t>(other);
    return s;
  }
};

Along along(Call& call, DType dtype, const Py_ssize_t* shape, int ndim, int64_t axis) {
  Along a;
  a.shape.assign(shape, shape + ndim);
  if (ndim == 0) a.shape.push_back(1);
  const int dims = static_cast<int>(a.shape.size());
  if (axis < -dims || axis >= dims)
    usage("argument 'axis' is " + std::to_string(axis) + ", and x has shape " +
          shape_text(ndim, shape) + "; give " + std::to_string(-dims) + " to " +
          std::to_string(dims - 1));
  a.axis = static_cast<int>(axis < 0 ? axis + dims : axis);
  a.length = a.shape[static_cast<size_t>(a.axis)];
  call.axis = static_cast<int8_t>(a.axis);
  call.outer = 1;
  call.unit = static_cast<int64_t>(size_of(dtype));
  for (int i = 0; i < a.axis; ++i) call.outer *= a.shape[static_cast<size_t>(i)];
  for (int i = a.axis + 1; i < dims; ++i) call.unit *= a.shape[static_cast<size_t>(i)];
  return a;
}

// Equal lengths are one number, so that sizes=[2, 2] and sizes=None are the same call.
void set_sizes(Call& call, std::vector<int64_t> sizes) {
  bool equal = true;
  for (int64_t s : sizes) equal = equal && s == sizes[0];
  call.length = equal ? sizes[0] : 0;
  if (!equal) call.sizes = std::move(sizes);
}

void check_out(const Array& out, DType dtype, const std::vector<Py_ssize_t>& shape) {
  const int ndim = static_cast<int>(shape.size());
  if (out.dtype == dtype && out.ndim == ndim && std::equal(shape.begin(), shape.end(), out.shape))
    return;
  usage("argument 'out' is " + std::string(name_of(out.dtype)) + " " +
        shape_text(out.ndim, out.shape) + "; " + name_of(dtype) + " " +
        shape_text(ndim, shape.data()) + " is needed");
}

// out may be x's own place in it (offset bytes in), and otherwise must not overlap x.
void check_overlap(const Array& in, const char* out, int64_t out_bytes, const char* in_place) {
  if (in.bytes() == 0 || out_bytes == 0 || in.data == in_place) return;
  if (in.data < out + out_bytes && out < in.data + in.bytes())
    usage("argument 'out' overlaps 'x' in memory; give an out that does not");
}

// The output for a call: `out` when given, else a new array. Sets call.out.
Array output_for(Call& call, PyObject* out, DType dtype, const std::vector<Py_ssize_t>& shape) {
  Array a;
  if (given(out)) {
    a = read_output(out, "out");
    check_out(a, dtype, shape);
  } else {
    const py::object made = new_array(static_cast<int>(shape.size()), shape.data(), dtype);
    a = read_output(made.ptr(), "out");
  }
  call.out = a.data;
  return a;
}

// ---- all_reduce, reduce, broadcast, barrier -------------------------------------------------

Parameters all_reduce_parameters{"all_reduce", 3, 1, {"x", "op", "out", "timeout", "async_op"}};

PyObject* all_reduce(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "all_reduce", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(all_reduce_parameters, args, nargs, kwnames, v);
    Call call;
    call.kind = CallKind::all_reduce;
    call.op = read_op(v[1]);
    if (given(v[2])) {
      const Array in = read_input(v[0], "x");
      const Array out = read_output(v[2], "out");
      check_op(in.dtype, call.op);
      check_out(out, in.dtype, {in.shape, in.shape + in.ndim});
      check_overlap(in, out.data, out.bytes(), out.data);
      whole(call, in);
      call.in = in.data;
      call.out = out.data;
      return run(self, comm, call, &in, &out, out.original, v[3], v[4]);
    }
    const Array x = read_output(v[0], "x");
    check_op(x.dtype, call.op);
    whole(call, x);
    call.in = call.out = x.data;
    return run(self, comm, call, &x, nullptr, x.original, v[3], v[4]);
  });
}

Parameters broadcast_parameters{"broadcast", 3, 1, {"x", "root", "out", "timeout", "async_op"}};

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
    if (!given(v[2])) return run(self, comm, call, &x, nullptr, x.original, v[3], v[4]);
    const Array out = read_output(v[2], "out");
    check_out(out, x.dtype, {x.shape, x.shape + x.ndim});
    check_overlap(x, out.data, out.bytes(), out.data);
    call.out = out.data;
    return run(self, comm, call, &x, &out, out.original, v[3], v[4]);
  });
}

Parameters reduce_parameters{"reduce", 4, 1, {"x", "op", "root", "out", "timeout", "async_op"}};

PyObject* reduce(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "reduce", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(reduce_parameters, args, nargs, kwnames, v);
    Call call;
    call.kind = CallKind::reduce;
    call.op = read_op(v[1]);
    call.root = v[2] ? read_rank(v[2], "root", comm.c->size()) : 0;
    const Array in = read_input(v[0], "x");
    check_op(in.dtype, call.op);
    whole(call, in);
    call.in = in.data;
    if (call.root != comm.c->rank())
      return run(self, comm, call, &in, nullptr, py::none(), v[4], v[5]);
    const Array out = output_for(call, v[3], in.dtype, {in.shape, in.shape + in.ndim});
    check_overlap(in, out.data, out.bytes(), out.data);
    return run(self, comm, call, &in, &out, out.original, v[4], v[5]);
  });
}

Parameters barrier_parameters{"barrier", 0, 0, {"timeout", "async_op"}};

PyObject* barrier(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "barrier", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(barrier_parameters, args, nargs, kwnames, v);
    Call call;
    call.kind = CallKind::barrier;
    return run(self, comm, call, nullptr, nullptr, py::none(), v[0], v[1]);
  });
}

// ---- all_gather, gather ---------------------------------------------------------------------

py::object join(PyObject* self, PyCommunicator& comm, CallKind kind, PyObject* x, int root,
                PyObject* axis, PyObject* sizes, PyObject* out, PyObject* timeout,
                PyObject* async_op) {
  const int n = comm.c->size();
  const int me = comm.c->rank();
  const double seconds = read_seconds(timeout, comm.c->timeout());
  Call call;
  call.kind = kind;
  call.root = root;
  const Array in = read_input(x, "x");
  describe(call, in);
  const Along a = along(call, in.dtype, in.shape, in.ndim, axis ? read_int(axis, "axis") : 0);
  call.length = a.length;
  int64_t total = a.length * n;
  if (given(sizes)) {
    std::vector<int64_t> lengths;
    if (is_auto(sizes)) {
      Inside inside(comm);
      call.site = site_of(comm.c->world());
      GilHooks hooks;
      if (comm.c->world().threads()) hooks.release();
      lengths = comm.c->exchange({a.length}, call, seconds, hooks);
    } else {
      lengths = read_sizes(sizes, n);
      if (lengths[static_cast<size_t>(me)] != a.length)
        usage("argument 'sizes' says " + std::to_string(lengths[static_cast<size_t>(me)]) +
              " for this rank, and axis " + std::to_string(a.axis) + " of x has length " +
              std::to_string(a.length));
    }
    total = 0;
    for (int64_t s : lengths) total += s;
    set_sizes(call, std::move(lengths));
  }
  call.in = in.data;
  if (kind == CallKind::gather && me != root)
    return run(self, comm, call, &in, nullptr, py::none(), timeout, async_op);
  const Array result = output_for(call, out, in.dtype, a.with(total));
  const View own = Blocks(call, n).output(me, me, call.out);
  check_overlap(in, result.data, result.bytes(), own.contiguous() ? own.data : nullptr);
  return run(self, comm, call, &in, &result, result.original, timeout, async_op);
}

Parameters all_gather_parameters{
    "all_gather", 4, 1, {"x", "axis", "sizes", "out", "timeout", "async_op"}};

PyObject* all_gather(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "all_gather", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(all_gather_parameters, args, nargs, kwnames, v);
    return join(self, comm, CallKind::all_gather, v[0], -1, v[1], v[2], v[3], v[4], v[5]);
  });
}

Parameters gather_parameters{
    "gather", 5, 1, {"x", "root", "axis", "sizes", "out", "timeout", "async_op"}};

PyObject* gather(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "gather", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(gather_parameters, args, nargs, kwnames, v);
    const int root = v[1] ? read_rank(v[1], "root", comm.c->size()) : 0;
    return join(self, comm, CallKind::gather, v[0], root, v[2], v[3], v[4], v[5], v[6]);
  });
}

// ---- reduce_scatter, scatter, all_to_all ----------------------------------------------------

Parameters reduce_scatter_parameters{
    "reduce_scatter", 5, 1, {"x", "op", "axis", "sizes", "out", "timeout", "async_op"}};

PyObject* reduce_scatter(PyObject* self, PyObject* const* args, Py_ssize_t nargs,
                         PyObject* kwnames) {
  return at_the_door(self, "reduce_scatter", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(reduce_scatter_parameters, args, nargs, kwnames, v);
    const int n = comm.c->size();
    const int me = comm.c->rank();
    Call call;
    call.kind = CallKind::reduce_scatter;
    call.op = read_op(v[1]);
    const Array in = read_input(v[0], "x");
    check_op(in.dtype, call.op);
    describe(call, in);
    const Along a = along(call, in.dtype, in.shape, in.ndim, v[2] ? read_int(v[2], "axis") : 0);
    std::vector<int64_t> sizes = cut_sizes(v[3], a.length, n);
    const int64_t mine = sizes[static_cast<size_t>(me)];
    set_sizes(call, std::move(sizes));
    call.in = in.data;
    const Array out = output_for(call, v[4], in.dtype, a.with(mine));
    const View own = Blocks(call, n).input(me, me, call.in);
    if (!own.contiguous() || own.data != out.data)
      check_overlap(in, out.data, out.bytes(), nullptr);
    return run(self, comm, call, &in, &out, out.original, v[5], v[6]);
  });
}

// What the root of a scatter tells the others: is it well, dtype, ndim, axis, shape, lengths.
constexpr size_t kScatterHead = 4 + kMaxDims;

Parameters scatter_parameters{
    "scatter", 5, 1, {"x", "root", "axis", "sizes", "out", "timeout", "async_op"}};

PyObject* scatter(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "scatter", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(scatter_parameters, args, nargs, kwnames, v);
    const double seconds = read_seconds(v[5], comm.c->timeout());
    const int n = comm.c->size();
    const int me = comm.c->rank();
    Call call;
    call.kind = CallKind::scatter;
    call.root = v[1] ? read_rank(v[1], "root", n) : 0;
    const size_t words = kScatterHead + static_cast<size_t>(n);
    std::vector<int64_t> head(words);
    std::vector<int64_t> heads;
    Array in;
    std::optional<Error> refused;  // told to the others before it is raised here
    if (me == call.root) {
      try {
        in = read_input(v[0], "x");
        if (in.ndim > kMaxDims) usage("argument 'x' has more than 8 dimensions; reshape it");
        Call scratch;
        const Along a =
            along(scratch, in.dtype, in.shape, in.ndim, v[2] ? read_int(v[2], "axis") : 0);
        const std::vector<int64_t> sizes = cut_sizes(v[3], a.length, n);
        head[0] = 1;
        head[1] = static_cast<int64_t>(in.dtype);
        head[2] = static_cast<int64_t>(a.shape.size());
        head[3] = a.axis;
        for (size_t i = 0; i < a.shape.size(); ++i) head[4 + i] = a.shape[i];
        std::copy(sizes.begin(), sizes.end(), head.begin() + kScatterHead);
      } catch (const Error& error) {
        refused = error;
      }
      for (int i = 0; i < n; ++i) heads.insert(heads.end(), head.begin(), head.end());
    }
    {
      Call first;
      first.kind = first.part_of = CallKind::scatter;
      first.dtype = DType::int64;
      first.root = call.root;
      first.unit = sizeof(int64_t);
      first.length = static_cast<int64_t>(words);
      first.in = heads.data();
      first.out = head.data();
      Inside inside(comm);
      first.site = site_of(comm.c->world());
      GilHooks hooks;
      if (comm.c->world().threads()) hooks.release();
      comm.c->run(first, seconds, hooks);
    }
    if (refused) throw *refused;
    if (head[0] != 1)
      usage("root rank " + std::to_string(call.root) +
            " refused its own arguments, see its error; nothing was sent");
    call.dtype = static_cast<DType>(head[1]);
    std::vector<Py_ssize_t> shape(static_cast<size_t>(head[2]));
    for (size_t i = 0; i < shape.size(); ++i) shape[i] = static_cast<Py_ssize_t>(head[4 + i]);
    const Along a = along(call, call.dtype, shape.data(), static_cast<int>(shape.size()), head[3]);
    call.ndim = static_cast<uint8_t>(shape.size());
    call.count = 1;
    for (size_t i = 0; i < shape.size(); ++i) call.count *= call.dims[i] = shape[i];
    std::vector<int64_t> sizes(head.begin() + kScatterHead, head.end());
    const int64_t mine = sizes[static_cast<size_t>(me)];
    set_sizes(call, std::move(sizes));
    call.in = in.data;
    const Array out = output_for(call, v[4], call.dtype, a.with(mine));
    if (me == call.root) {
      const View own = Blocks(call, n).input(me, me, call.in);
      if (!own.contiguous() || own.data != out.data)
        check_overlap(in, out.data, out.bytes(), nullptr);
    }
    return run(self, comm, call, in.data ? &in : nullptr, &out, out.original, v[5], v[6]);
  });
}

Parameters all_to_all_parameters{
    "all_to_all", 4, 1, {"x", "axis", "sizes", "out", "timeout", "async_op"}};

PyObject* all_to_all(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "all_to_all", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(all_to_all_parameters, args, nargs, kwnames, v);
    const double seconds = read_seconds(v[4], comm.c->timeout());
    const int n = comm.c->size();
    const int me = comm.c->rank();
    Call call;
    call.kind = CallKind::all_to_all;
    const Array in = read_input(v[0], "x");
    describe(call, in);
    const Along a = along(call, in.dtype, in.shape, in.ndim, v[1] ? read_int(v[1], "axis") : 0);
    const std::vector<int64_t> sizes = cut_sizes(v[2], a.length, n);
    int64_t total = a.length;
    if (given(v[2])) {
      // What each rank sends to each: rank i's row, of which this rank receives column `me`.
      Inside inside(comm);
      call.site = site_of(comm.c->world());
      GilHooks hooks;
      if (comm.c->world().threads()) hooks.release();
      std::vector<int64_t> matrix = comm.c->exchange(sizes, call, seconds, hooks);
      total = 0;
      for (int i = 0; i < n; ++i) total += matrix[static_cast<size_t>(i * n + me)];
      set_sizes(call, std::move(matrix));
    } else {
      call.length = sizes[0];
    }
    call.in = in.data;
    const Array out = output_for(call, v[3], in.dtype, a.with(total));
    check_overlap(in, out.data, out.bytes(), n == 1 ? out.data : nullptr);
    return run(self, comm, call, &in, &out, out.original, v[4], v[5]);
  });
}

// clang-format off
#define MESHRING_METHOD(name, text) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&name)), \
   METH_FASTCALL | METH_KEYWORDS, text}
#define MESHRING_COMMON \
  "Units: timeout in seconds. async_op=True returns a Work at once.\n" \
  "Errors: UsageError (no effect), MismatchError (the ranks disagree), DeadlineError,\n" \
  "PeerLostError.\n"

PyMethodDef methods[] = {
    MESHRING_METHOD(all_reduce,
        "all_reduce($self, x, op='sum', out=None, *, timeout=None, async_op=False)\n--\n\n"
        "Reduce x element by element over all ranks, in rank order, to every rank.\n\n"
        "op: sum, prod, min, max or mean. Without out, x itself is overwritten and returned.\n"
        "Shapes: any, the same on all ranks; out like x.\n" MESHRING_COMMON
        "Source: MPI_Allreduce, ncclAllReduce."),
    MESHRING_METHOD(broadcast,
        "broadcast($self, x, root=0, out=None, *, timeout=None, async_op=False)\n--\n\n"
        "Copy x of rank root to every rank, into x itself or into out.\n\n"
        "Shapes: any, the same on all ranks.\n" MESHRING_COMMON
        "Source: MPI_Bcast, ncclBroadcast."),
    MESHRING_METHOD(reduce,
        "reduce($self, x, op='sum', root=0, out=None, *, timeout=None, async_op=False)\n--\n\n"
        "Reduce x over all ranks to rank root; the others get None.\n\n"
        "Shapes: any, the same on all ranks; out (read on root only) like x.\n" MESHRING_COMMON
        "Source: MPI_Reduce, ncclReduce."),
    MESHRING_METHOD(barrier,
        "barrier($self, *, timeout=None, async_op=False)\n--\n\n"
        "Wait until every rank has called it.\n\n"
        "Shapes: none.\n" MESHRING_COMMON
        "Source: MPI_Barrier."),
    MESHRING_METHOD(all_gather,
        "all_gather($self, x, axis=0, sizes=None, out=None, *, timeout=None, async_op=False)\n--\n\n"
        "Concatenate the x of all ranks along axis, in rank order, on every rank.\n\n"
        "Shapes: (..., L, ...) to (..., sum of L, ...). L is the same on all ranks unless sizes gives\n"
        "one length per rank, or \"auto\" to exchange them first.\n" MESHRING_COMMON
        "Source: MPI_Allgatherv, ncclAllGather."),
    MESHRING_METHOD(gather,
        "gather($self, x, root=0, axis=0, sizes=None, out=None, *, timeout=None, async_op=False)\n--\n\n"
        "Concatenate the x of all ranks along axis on rank root; the others get None.\n\n"
        "Shapes: as all_gather.\n" MESHRING_COMMON
        "Source: MPI_Gatherv, ncclGather."),
    MESHRING_METHOD(reduce_scatter,
        "reduce_scatter($self, x, op='sum', axis=0, sizes=None, out=None, *, timeout=None, "
        "async_op=False)\n--\n\n"
        "Reduce x over all ranks and give each rank its part along axis.\n\n"
        "Shapes: (..., L, ...) to (..., L / size, ...); a length that does not divide needs sizes,\n"
        "one per rank, or \"auto\" for numpy.array_split's.\n" MESHRING_COMMON
        "Source: MPI_Reduce_scatter, ncclReduceScatter."),
    MESHRING_METHOD(scatter,
        "scatter($self, x, root=0, axis=0, sizes=None, out=None, *, timeout=None, async_op=False)\n--\n\n"
        "Give each rank its part of root's x along axis.\n\n"
        "x, axis and sizes are read on root only (give None elsewhere); the others learn dtype and\n"
        "shape from it. Shapes: as reduce_scatter.\n" MESHRING_COMMON
        "Source: MPI_Scatterv, ncclScatter."),
    MESHRING_METHOD(all_to_all,
        "all_to_all($self, x, axis=0, sizes=None, out=None, *, timeout=None, async_op=False)\n--\n\n"
        "Cut x along axis, send part j to rank j, and join what comes in rank order.\n\n"
        "Shapes: (..., L, ...) to the same; with sizes (what this rank sends to each, or \"auto\")\n"
        "the result is as long as what the others sent.\n" MESHRING_COMMON
        "Source: MPI_Alltoallv, ncclAlltoAll."),
};
// clang-format on

}  // namespace

void add_collectives(py::class_<PyCommunicator>& type) { add_methods(type, methods); }

}  // namespace meshring

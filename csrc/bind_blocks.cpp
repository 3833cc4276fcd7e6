// The collectives of _core.Communicator that cut or join arrays along an axis.
#include <algorithm>

#include "bind_run.hpp"

namespace meshring {

namespace {

// ---- all_gather, gather ---------------------------------------------------------------------

// With sizes="auto" the lengths are exchanged first, and with them the length that out= has on each
// rank (or none). So a wrong out is refused on all ranks together, and none goes on alone.
constexpr int64_t kNoOut = INT64_MIN;

int64_t out_length(PyObject* out, const Along& a, const Call& call) {
  if (!given(out)) return kNoOut;
  const Array array = read_output(out, "out");
  const int64_t length =
      array.ndim == static_cast<int>(a.shape.size()) ? array.shape()[a.axis] : a.length;
  check_out(array, call, a.with(length));
  return length;
}

// Refuses on all ranks what one of them has wrong; this rank's own trouble first.
void check_all(const std::vector<int64_t>& have, const std::vector<int64_t>& needed, int me,
               const char* what) {
  const int n = static_cast<int>(have.size());
  for (int k = 0; k < n; ++k) {
    const int p = (me + k) % n;
    const size_t i = static_cast<size_t>(p);
    if (have[i] == kNoOut || have[i] == needed[i]) continue;
    usage(
        (p == me ? std::string("argument 'out'") : "argument 'out' of rank " + std::to_string(p)) +
        what + std::to_string(have[i]) + "; " + std::to_string(needed[i]) +
        " is needed; nothing was sent");
  }
}

// One row of int64 per rank, before the operation itself.
std::vector<int64_t> exchange(PyCommunicator& comm, const std::vector<int64_t>& mine, Call& call,
                              double seconds) {
  Inside inside(comm);
  call.site = site_of(comm.c->world());
  GilHooks hooks;
  if (comm.c->world().threads()) hooks.release();
  return comm.c->exchange(mine, call, seconds, hooks);
}

py::object join(PyObject* self, PyCommunicator& comm, CallKind kind, PyObject* x, int root,
                PyObject* axis, PyObject* sizes, PyObject* out, const Options& options) {
  const double seconds = read_seconds(options.timeout, comm.c->timeout());
  const int n = comm.c->size();
  const int me = comm.c->rank();
  const bool receives = kind == CallKind::all_gather || me == root;
  Call call;
  call.kind = kind;
  call.root = root;
  const Array in = read_input(x, "x");
  describe(call, in);
  const Along a = along(call, in.dtype, in.shape(), in.ndim, axis ? read_int(axis, "axis") : 0);
  call.length = a.length;
  int64_t total = a.length * n;
  if (is_auto(sizes)) {
    const int64_t have = receives ? out_length(out, a, call) : kNoOut;
    int64_t place = kNoOut;  // of x in out, where they overlap
    if (have != kNoOut) {
      const Array result = read_output(out, "out");
      const bool apart = in.bytes() == 0 || result.bytes() == 0 ||
                         in.data + in.bytes() <= result.data ||
                         result.data + result.bytes() <= in.data;
      if (!apart && call.outer > 1) check_overlap(in, result.data, result.bytes(), nullptr);
      if (!apart) place = in.data - result.data;
    }
    const std::vector<int64_t> all = exchange(comm, {a.length, have, place}, call, seconds);
    std::vector<int64_t> lengths;
    std::vector<int64_t> outs;
    std::vector<int64_t> places;
    std::vector<int64_t> own_places;
    total = 0;
    for (size_t i = 0; i < all.size(); i += 3) {
      own_places.push_back(total * call.unit);
      lengths.push_back(all[i]);
      outs.push_back(all[i + 1]);
      places.push_back(all[i + 2]);
      total += all[i];
    }
    check_all(outs, std::vector<int64_t>(outs.size(), total), me,
              " has the wrong length along axis: ");
    check_all(places, own_places, me, " overlaps 'x', which lies in it at byte ");
    set_sizes(call, std::move(lengths));
  } else if (given(sizes)) {
    std::vector<int64_t> lengths = read_sizes(sizes, n);
    if (lengths[static_cast<size_t>(me)] != a.length)
      usage("argument 'sizes' says " + std::to_string(lengths[static_cast<size_t>(me)]) +
            " for this rank, and axis " + std::to_string(a.axis) + " of x has length " +
            std::to_string(a.length));
    total = 0;
    for (int64_t s : lengths) total += s;
    set_sizes(call, std::move(lengths));
  }
  call.in = in.data;
  if (!receives) return run(self, comm, call, &in, nullptr, py::none(), options);
  const Array result = output_for(call, out, a.with(total));
  const View own = Blocks(call, n).output(me, me, call.out);
  check_overlap(in, result.data, result.bytes(), own.contiguous() ? own.data : nullptr);
  return run(self, comm, call, &in, &result, result.original, options);
}

Parameters all_gather_parameters{
    "all_gather", 4, 1, {"x", "axis", "sizes", "out", "timeout", "async_op", "stream"}};

PyObject* all_gather(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "all_gather", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(all_gather_parameters, args, nargs, kwnames, v);
    return join(self, comm, CallKind::all_gather, v[0], -1, v[1], v[2], v[3], {v[4], v[5], v[6]});
  });
}

Parameters gather_parameters{
    "gather", 5, 1, {"x", "root", "axis", "sizes", "out", "timeout", "async_op", "stream"}};

PyObject* gather(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "gather", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(gather_parameters, args, nargs, kwnames, v);
    const int root = v[1] ? read_rank(v[1], "root", comm.c->size()) : 0;
    return join(self, comm, CallKind::gather, v[0], root, v[2], v[3], v[4], {v[5], v[6], v[7]});
  });
}

// ---- reduce_scatter, scatter, all_to_all ----------------------------------------------------

Parameters reduce_scatter_parameters{
    "reduce_scatter",
    5,
    1,
    {"x", "op", "axis", "sizes", "out", "timeout", "async_op", "stream", "scale"}};

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
    Array in = read_input(v[0], "x");
    check_op(in.dtype, call.op);
    apply_scale(call, in, v[8]);
    describe(call, in);
    const Along a = along(call, in.dtype, in.shape(), in.ndim, v[2] ? read_int(v[2], "axis") : 0);
    std::vector<int64_t> sizes = cut_sizes(v[3], a.length, n);
    const int64_t mine = sizes[static_cast<size_t>(me)];
    set_sizes(call, std::move(sizes));
    call.in = in.data;
    const Array out = output_for(call, v[4], a.with(mine));
    const View own = Blocks(call, n).input(me, me, call.in);
    if (!own.contiguous() || own.data != out.data)
      check_overlap(in, out.data, out.bytes(), nullptr);
    return run(self, comm, call, &in, &out, out.original, {v[5], v[6], v[7]});
  });
}

// What a rank says before a scatter. Root: what it scatters. The others: what out= they have.
struct ScatterHead {
  enum State : int64_t { refused, stated, no_out };
  static constexpr size_t kWords = 5 + kMaxDims;
  static size_t words(int n) { return kWords + static_cast<size_t>(n); }

  static std::vector<int64_t> of(const Array& a, const std::vector<Py_ssize_t>& shape, int axis,
                                 const std::vector<int64_t>& sizes) {
    if (shape.size() > kMaxDims) usage("an array of more than 8 dimensions; reshape it");
    std::vector<int64_t> head(kWords);
    head[0] = stated;
    head[1] = static_cast<int64_t>(a.dtype);
    head[2] = static_cast<int64_t>(shape.size());
    head[3] = axis;
    head[4] = a.device >= 0 ? 1 : 0;
    std::copy(shape.begin(), shape.end(), head.begin() + 5);
    head.insert(head.end(), sizes.begin(), sizes.end());
    return head;
  }
  static std::vector<Py_ssize_t> shape(const int64_t* head) {
    return {head + 5, head + 5 + head[2]};
  }
};

Parameters scatter_parameters{
    "scatter", 5, 1, {"x", "root", "axis", "sizes", "out", "timeout", "async_op", "stream"}};

PyObject* scatter(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return at_the_door(self, "scatter", [&](PyCommunicator& comm) {
    PyObject* v[kMaxArgs] = {};
    parse(scatter_parameters, args, nargs, kwnames, v);
    const double seconds = read_seconds(v[5], comm.c->timeout());
    const int n = comm.c->size();
    const int me = comm.c->rank();
    const size_t words = ScatterHead::words(n);
    Call call;
    call.kind = CallKind::scatter;
    call.root = v[1] ? read_rank(v[1], "root", n) : 0;
    std::vector<int64_t> head{ScatterHead::no_out};
    Array in;
    std::optional<Error> refusal;  // told to the others before it is raised here
    std::optional<py::error_already_set> raised;
    try {
      if (me == call.root) {
        in = read_input(v[0], "x");
        describe(call, in);
        const Along a =
            along(call, in.dtype, in.shape(), in.ndim, v[2] ? read_int(v[2], "axis") : 0);
        const std::vector<int64_t> sizes = cut_sizes(v[3], a.length, n);
        if (in.device >= 0) comm.c->check_device(in.device);
        head = ScatterHead::of(in, a.shape, a.axis, sizes);
        if (given(v[4]))
          check_out(read_output(v[4], "out"), call, a.with(sizes[static_cast<size_t>(me)]));
      } else if (given(v[4])) {
        const Array out = read_output(v[4], "out");
        if (out.device >= 0) comm.c->check_device(out.device);
        head = ScatterHead::of(out, {out.shape(), out.shape() + out.ndim}, 0, {});
      }
    } catch (const Error& error) {
      refusal = error;
    } catch (const py::error_already_set& error) {
      raised = error;
    }
    if (refusal || raised) head = {ScatterHead::refused};
    head.resize(words);
    const std::vector<int64_t> heads = exchange(comm, head, call, seconds);
    if (refusal) throw *refusal;
    if (raised) throw *raised;
    for (int p = 0; p < n; ++p)
      if (heads[static_cast<size_t>(p) * words] == ScatterHead::refused)
        usage("rank " + std::to_string(p) +
              " refused its own arguments, see its error; nothing was sent");
    const int64_t* said = heads.data() + static_cast<size_t>(call.root) * words;
    const std::vector<Py_ssize_t> shape = ScatterHead::shape(said);
    call.dtype = static_cast<DType>(said[1]);
    call.device = static_cast<int16_t>(said[4] ? comm.c->choice().device : -1);
    const Along a = along(call, call.dtype, shape.data(), static_cast<int>(shape.size()), said[3]);
    const std::vector<int64_t> sizes(said + ScatterHead::kWords, said + words);
    for (int k = 0; k < n; ++k) {
      const int p = (me + k) % n;  // this rank's own trouble first
      const int64_t* theirs = heads.data() + static_cast<size_t>(p) * words;
      if (p == call.root || theirs[0] != ScatterHead::stated) continue;
      const std::vector<Py_ssize_t> has = ScatterHead::shape(theirs);
      const std::vector<Py_ssize_t> needed = a.with(sizes[static_cast<size_t>(p)]);
      if (theirs[4] != said[4])
        usage((p == me ? std::string("argument 'out'")
                       : "argument 'out' of rank " + std::to_string(p)) +
              (said[4] ? " is on the host, and root's x is on a GPU"
                       : " is on a GPU, and root's x is on the host") +
              "; give both in one place; nothing was sent");
      if (has == needed && theirs[1] == said[1]) continue;
      usage((p == me ? std::string("argument 'out'")
                     : "argument 'out' of rank " + std::to_string(p)) +
            " is " + name_of(static_cast<DType>(theirs[1])) + " " +
            shape_text(static_cast<int>(has.size()), has.data()) + "; " + name_of(call.dtype) +
            " " + shape_text(static_cast<int>(needed.size()), needed.data()) +
            " is needed; nothing was sent");
    }
    call.ndim = static_cast<uint8_t>(shape.size());
    call.count = 1;
    for (size_t i = 0; i < shape.size(); ++i) call.count *= call.dims[i] = shape[i];
    set_sizes(call, sizes);
    call.in = in.data;
    const Array out = output_for(call, v[4], a.with(sizes[static_cast<size_t>(me)]));
    if (me == call.root) {
      const View own = Blocks(call, n).input(me, me, call.in);
      if (!own.contiguous() || own.data != out.data)
        check_overlap(in, out.data, out.bytes(), nullptr);
    }
    return run(self, comm, call, me == call.root ? &in : nullptr, &out, out.original,
               {v[5], v[6], v[7]});
  });
}

Parameters all_to_all_parameters{
    "all_to_all", 4, 1, {"x", "axis", "sizes", "out", "timeout", "async_op", "stream"}};

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
    const Along a = along(call, in.dtype, in.shape(), in.ndim, v[1] ? read_int(v[1], "axis") : 0);
    const std::vector<int64_t> sizes = cut_sizes(v[2], a.length, n);
    int64_t total = a.length;
    if (given(v[2])) {
      // What each rank sends to each: rank i's row, of which this rank receives column `me`.
      std::vector<int64_t> row = sizes;
      row.push_back(out_length(v[3], a, call));
      const std::vector<int64_t> rows = exchange(comm, row, call, seconds);
      std::vector<int64_t> matrix;
      std::vector<int64_t> outs;
      std::vector<int64_t> totals(static_cast<size_t>(n));
      for (size_t i = 0; i < rows.size(); i += row.size()) {
        for (size_t j = 0; j < totals.size(); ++j) {
          matrix.push_back(rows[i + j]);
          totals[j] += rows[i + j];
        }
        outs.push_back(rows[i + totals.size()]);
      }
      check_all(outs, totals, me, " has the wrong length along axis: ");
      total = totals[static_cast<size_t>(me)];
      set_sizes(call, std::move(matrix));
    } else {
      call.length = sizes[0];
    }
    call.in = in.data;
    const Array out = output_for(call, v[3], a.with(total));
    check_overlap(in, out.data, out.bytes(), n == 1 ? out.data : nullptr);
    return run(self, comm, call, &in, &out, out.original, {v[4], v[5], v[6]});
  });
}

// clang-format off
PyMethodDef methods[] = {
    MESHRING_METHOD(all_gather,
        "all_gather($self, x, axis=0, sizes=None, out=None, *, timeout=None, async_op=False, stream=None)\n--\n\n"
        "Concatenate the x of all ranks along axis, in rank order, on every rank.\n\n"
        "Shapes: (..., L, ...) to (..., sum of L, ...). L is the same on all ranks unless sizes gives\n"
        "one length per rank, or \"auto\" to exchange them first.\n" MESHRING_COMMON
        "Source: MPI_Allgatherv, ncclAllGather."),
    MESHRING_METHOD(gather,
        "gather($self, x, root=0, axis=0, sizes=None, out=None, *, timeout=None, async_op=False, stream=None)\n--\n\n"
        "Concatenate the x of all ranks along axis on rank root; the others get None.\n\n"
        "Shapes: as all_gather.\n" MESHRING_COMMON
        "Source: MPI_Gatherv, ncclGather."),
    MESHRING_METHOD(reduce_scatter,
        "reduce_scatter($self, x, op='sum', axis=0, sizes=None, out=None, *, timeout=None, "
        "async_op=False, stream=None, scale=None)\n--\n\n"
        "Reduce x over all ranks and give each rank its part along axis.\n\n"
        "Shapes: (..., L, ...) to (..., L / size, ...); a length that does not divide needs sizes,\n"
        "one per rank, or \"auto\" for numpy.array_split's.\n" MESHRING_COMMON
        "Source: MPI_Reduce_scatter, ncclReduceScatter."),
    MESHRING_METHOD(scatter,
        "scatter($self, x, root=0, axis=0, sizes=None, out=None, *, timeout=None, async_op=False, stream=None)\n--\n\n"
        "Give each rank its part of root's x along axis.\n\n"
        "x, axis and sizes are read on root only (give None elsewhere); the others learn dtype and\n"
        "shape from it. Shapes: as reduce_scatter.\n" MESHRING_COMMON
        "Source: MPI_Scatterv, ncclScatter."),
    MESHRING_METHOD(all_to_all,
        "all_to_all($self, x, axis=0, sizes=None, out=None, *, timeout=None, async_op=False, stream=None)\n--\n\n"
        "Cut x along axis, send part j to rank j, and join what comes in rank order.\n\n"
        "Shapes: (..., L, ...) to the same; with sizes (what this rank sends to each, or \"auto\")\n"
        "the result is as long as what the others sent.\n" MESHRING_COMMON
        "Source: MPI_Alltoallv, ncclAlltoAll."),
};
// clang-format on

}  // namespace

void add_block_collectives(py::class_<PyCommunicator>& type) { add_methods(type, methods); }

}  // namespace meshring

#include "bind_communicator.hpp"

#include "bind_call.hpp"
#include "bind_device.hpp"

namespace meshring {

// ---- errors ---------------------------------------------------------------------------------

void set_python_error(const Error& error, const std::string& where) {
  Error whole = error;
  whole.text = where + error.text;
  set_python_error(whole);
}

void set_python_error(const Error& error) {
  if (PyErr_Occurred()) return;  // the signal handler's exception says more
  const char* name = "MeshringError";
  switch (error.trouble) {
    case Trouble::usage:
      name = "UsageError";
      break;
    case Trouble::mismatch:
      name = "MismatchError";
      break;
    case Trouble::deadline:
      name = "DeadlineError";
      break;
    case Trouble::peer_lost:
      name = "PeerLostError";
      break;
    case Trouble::backend:
    case Trouble::interrupted:
      name = "BackendError";
      break;
  }
  try {
    const py::object type = py::module_::import("meshring.errors").attr(name);
    const py::object exception = type(error.text);
    py::tuple ranks(error.ranks.size());
    for (size_t i = 0; i < error.ranks.size(); ++i) ranks[i] = error.ranks[i];
    exception.attr("ranks") = ranks;
    PyErr_SetObject(type.ptr(), exception.ptr());
  } catch (py::error_already_set& e) {
    e.restore();
  }
}

// ---- the frame of every call ----------------------------------------------------------------

Inside::Inside(PyCommunicator& comm) : comm_(comm) {
  if (comm.busy)
    usage(
        "another thread is inside this communicator; one thread at a time can use it (give each "
        "thread its own, with split())");
  comm.busy = true;
}

std::string door_of(const PyCommunicator& comm, const char* operation) {
  return std::string(operation) + " (rank " + std::to_string(comm.c->rank()) + "/" +
         std::to_string(comm.c->size()) + "): ";
}

uint32_t site_of(World& world) {
  return caller_site(&world, [&world](const std::string& text) {
    return world.segment().add_site(world.rank(), text);
  });
}

PyCommunicator& unwrap(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  void* value = instance->simple_layout ? instance->simple_value_holder[0] : nullptr;
  if (!value) {
    PyErr_SetString(PyExc_TypeError, "Communicator.__init__ has not been called");
    throw py::error_already_set();
  }
  auto& comm = *static_cast<PyCommunicator*>(value);
  if (!comm.c) {
    PyErr_SetString(PyExc_TypeError, "this object gave its communicator away");
    throw py::error_already_set();
  }
  return comm;
}

py::object make_work(PyObject* self, std::shared_ptr<Pending> pending, py::object result,
                     const Array* in, const Array* out) {
  auto work = std::make_unique<PyWork>();
  work->pending = std::move(pending);
  work->communicator = py::reinterpret_borrow<py::object>(self);
  work->result = std::move(result);
  work->arrays = py::make_tuple(in ? in->object : py::none(), out ? out->object : py::none());
  return py::cast(std::move(work));
}

// A peer may still read the arrays of a call that failed in the middle.
void keep_arrays(PyCommunicator& comm, const Array* in, const Array* out) {
  if (in) comm.kept.push_back(in->object);
  if (out) comm.kept.push_back(out->object);
}

// ---- World ----------------------------------------------------------------------------------

PyWorld::PyWorld(std::shared_ptr<Segment> segment, int rank, bool threads, double timeout) {
  GilHooks hooks;
  if (threads) hooks.release();
  try {
    world = std::make_shared<World>(std::move(segment), rank, threads, timeout, hooks);
  } catch (const Error&) {
    hooks.restore();
    throw;
  }
}

PyWorld::~PyWorld() { forget_sites(world.get()); }

PyCommunicator::PyCommunicator(const PyWorld& world, double timeout)
    : c(std::make_unique<Communicator>(world.world, timeout)) {}

PyCommunicator::~PyCommunicator() {
  if (!c) return;
  py::gil_scoped_release release;  // its threads end meanwhile
  c->abandon();
}

Communicator& PyCommunicator::live() const {
  if (!c) usage("this object gave its communicator away; use the one that split() returned");
  return *c;
}

// ---- Work -----------------------------------------------------------------------------------

PyWork::~PyWork() {
  if (!pending || harvested || !communicator || is_finalizing()) return;
  auto& comm = communicator.cast<PyCommunicator&>();
  if (comm.c->forked()) return;
  if (!comm.c->test(*pending)) {  // dropped while it runs: the communicator keeps the arrays
    if (comm.c->closed()) return;
    comm.kept.push_back(arrays);
    ++comm.dropped;
  } else if (const std::optional<Error> error = comm.c->error_of(*pending)) {
    py::error_scope keep;
    set_python_error(*error);
    PyErr_WriteUnraisable(nullptr);
  }
}

bool PyWork::done() { return communicator.cast<PyCommunicator&>().c->test(*pending); }

py::object PyWork::result_now() {
  if (!done()) return py::none();
  return wait(py::none());
}

py::object PyWork::wait(py::object timeout) {
  auto& comm = communicator.cast<PyCommunicator&>();
  struct Waiting {
    explicit Waiting(int& count) : count(count) { ++count; }
    ~Waiting() { --count; }
    int& count;
  };
  try {
    const double seconds = read_seconds(timeout.ptr(), comm.c->timeout());
    const Waiting waiting(comm.waiting);
    GilHooks hooks;
    if (comm.c->world().threads()) hooks.release();
    comm.c->wait(*pending, seconds, hooks);
    hooks.restore();
    harvested = true;
  } catch (const Error& error) {
    harvested = done();
    set_python_error(error, error.trouble == Trouble::usage
                                ? door_of(comm, name_of(pending->call.kind))
                                : std::string());
    throw py::error_already_set();
  }
  return result;
}

// ---- the module's part ----------------------------------------------------------------------

namespace {

py::dict trace_row(const Communicator::TraceRow& row) {
  const RecordCopy& r = row.record;
  py::dict d;
  d["rank"] = row.rank;
  d["number"] = r.seq;
  d["operation"] = name_of(r.kind);
  d["call"] = r.call();
  d["dtype"] = name_of(r.dtype);
  d["count"] = r.count;
  constexpr const char* kStates[] = {"empty", "running", "done", "failed", "enqueued"};
  d["state"] = kStates[static_cast<size_t>(r.state)];
  d["site"] = row.site;
  d["seconds_ago"] = row.seconds_ago;
  d["duration_s"] = row.duration;
  return d;
}

// The door of what pybind11 calls: completes a usage error.
template <class Body>
auto with_door(PyCommunicator& comm, const char* operation, Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    if (error.trouble != Trouble::usage) throw;
    throw Error(Trouble::usage, door_of(comm, operation) + error.text);
  }
}

py::object split(PyCommunicator& comm, py::object color, py::object key, py::object timeout) {
  return with_door(comm, "split", [&]() -> py::object {
    int64_t wish = -1;
    if (!color.is_none() && (wish = read_int(color.ptr(), "color")) < 0)
      usage("argument 'color' is " + std::to_string(wish) +
            "; give an integer >= 0, or None on a rank that joins no group");
    const int64_t order = read_int(key.ptr(), "key");
    const double seconds = read_seconds(timeout.ptr(), comm.c->timeout());
    Inside inside(comm);
    std::unique_ptr<Communicator> part;
    {
      World& world = comm.c->world();
      const uint32_t site = site_of(world);
      GilHooks hooks;
      if (world.threads()) hooks.release();
      part = comm.c->split(wish, order, site, seconds, hooks);
    }
    if (!part) return py::none();
    return py::cast(std::make_unique<PyCommunicator>(std::move(part)));
  });
}

py::object shrink(PyCommunicator& comm, const py::object& exclude, const py::object& timeout) {
  return with_door(comm, "shrink", [&]() -> py::object {
    std::vector<int> excluded;
    if (!PySequence_Check(exclude.ptr()) || PyUnicode_Check(exclude.ptr()))
      usage("argument 'exclude' is " + repr_of(exclude.ptr()) + "; give a list of ranks");
    for (const auto item : exclude)
      excluded.push_back(read_rank(item.ptr(), "exclude", comm.c->size()));
    const double seconds = read_seconds(timeout.ptr(), comm.c->timeout());
    const Inside inside(comm);
    const uint32_t site = site_of(comm.c->world());
    std::unique_ptr<Communicator> part;
    {
      GilHooks hooks;
      hooks.release();
      part = comm.c->shrink(std::move(excluded), site, seconds, hooks);
    }
    return py::cast(std::make_unique<PyCommunicator>(std::move(part)));
  });
}

void close(PyCommunicator& comm) {
  if (comm.busy || comm.waiting > 0)
    usage(door_of(comm, "close") +
          "another thread is inside this communicator; end its call first");
  if (comm.group_depth > 0)
    usage(door_of(comm, "close") + "inside group(); close it after the `with` block");
  {
    GilHooks hooks;
    hooks.release();
    comm.c->close(hooks);
  }
  comm.group.clear();
  comm.kept.clear();
  if (PyErr_Occurred()) throw py::error_already_set();  // Ctrl-C while operations ended
}

}  // namespace

void bind_communicator(py::module_& m) {
  py::class_<PyWorld>(m, "World")
      .def(py::init<std::shared_ptr<Segment>, int, bool, double>(), py::arg("segment"),
           py::arg("rank"), py::kw_only(), py::arg("threads"), py::arg("timeout"))
      .def_property_readonly("rank", [](const PyWorld& w) { return w.world->rank(); })
      .def_property_readonly("size", [](const PyWorld& w) { return w.world->size(); })
      .def_property_readonly("transport",
                             [](const PyWorld& w) { return name_of(w.world->transport()); });

  py::class_<PyWork>(
      m, "Work",
      "An operation that runs beside the program; made by async_op=True, isend and irecv.\n\n"
      "It keeps the arrays alive; leave them alone until wait() has returned or done() says so.")
      .def("wait", &PyWork::wait, py::arg("timeout") = py::none(),
           "Block until the operation is done and return its result.\n\n"
           "Units: seconds. Errors: those of the operation; DeadlineError when the time is over.\n"
           "Source: MPI_Wait.")
      .def("done", &PyWork::done,
           "Say without blocking whether the operation is done.\n\nSource: MPI_Test.")
      .def_property_readonly("result", &PyWork::result_now);

  py::class_<PyCommunicator> type(m, "Communicator");
  type.def(py::init<const PyWorld&, double>(), py::arg("world"), py::kw_only(), py::arg("timeout"))
      // Takes over what _split() made; the other object is empty afterwards.
      .def(py::init([](PyCommunicator& part) {
             if (!part.c) usage("this part of a split was taken already");
             return std::make_unique<PyCommunicator>(std::move(part.c));
           }),
           py::arg("part"))
      .def_property_readonly("rank", [](const PyCommunicator& c) { return c.live().rank(); })
      .def_property_readonly("size", [](const PyCommunicator& c) { return c.live().size(); })
      .def_property_readonly("timeout", [](const PyCommunicator& c) { return c.live().timeout(); })
      .def_property_readonly("backend",
                             [](const PyCommunicator& c) -> std::string {
                               return c.live().closed() ? "closed" : c.live().backend();
                             })
      .def_property_readonly(
          "transport",
          [](const PyCommunicator& c) { return name_of(c.live().world().transport()); })
      .def_property_readonly("closed", [](const PyCommunicator& c) { return c.live().closed(); })
      .def_property_readonly("poisoned",
                             [](const PyCommunicator& c) -> py::object {
                               const std::string why = c.live().poisoned();
                               return why.empty() ? py::none() : py::object(py::str(why));
                             })
      .def_property_readonly("world_ranks",
                             [](const PyCommunicator& c) {
                               py::tuple t(c.live().world_ranks().size());
                               for (size_t i = 0; i < t.size(); ++i)
                                 t[i] = c.live().world_ranks()[i];
                               return t;
                             })
      .def_property_readonly("packed_bytes", [](const PyCommunicator& c) { return c.packed_bytes; })
      .def_property_readonly("unfinished", [](const PyCommunicator& c) { return c.dropped; })
      .def("_split", &split, py::arg("color"), py::arg("key"), py::arg("timeout"))
      .def("_shrink", &shrink, py::arg("exclude"), py::arg("timeout"))
      .def("_begin_group",
           [](PyCommunicator& c) {
             with_door(c, "group", [&c] {
               c.live().check_usable();
               return ++c.group_depth;
             });
           })
      .def("_end_group", &end_group, py::arg("timeout"), py::arg("cancelled"))
      .def("_trace",
           [](PyCommunicator& c, py::object rank) {
             return with_door(c, "trace", [&] {
               py::list rows;
               const int of = read_rank(rank.ptr(), "rank", c.live().size());
               for (const auto& row : c.live().trace(of)) rows.append(trace_row(row));
               return rows;
             });
           })
      .def("_abort", [](PyCommunicator& c) { with_door(c, "abort", [&c] { c.live().give_up(); }); })
      .def("_close", &close);
  add_collectives(type);
  add_block_collectives(type);
  add_device(type);
  add_transfers(type);
}

}  // namespace meshring

// NCCL and the CUDA driver as Python sees them: libraries, devices, settings, registered memory.
#include <map>

#include "bind_call.hpp"
#include "bind_device.hpp"
#include "device/driver.hpp"
#include "library.hpp"
#include "nccl/nccl_backend.hpp"

namespace meshring {

namespace {

// A field of ncclConfig_t and the first version that reads it: older ones ignore it silently.
struct Field {
  const char* name;
  int nccl::Config::* member;
  int since;
};
constexpr Field kFields[] = {
    {"cga_cluster_size", &nccl::Config::cga_cluster_size, 21800},
    {"min_ctas", &nccl::Config::min_ctas, 21800},
    {"max_ctas", &nccl::Config::max_ctas, 21800},
    {"split_share", &nccl::Config::split_share, 21800},
    {"traffic_class", &nccl::Config::traffic_class, 22600},
    {"collnet_enable", &nccl::Config::collnet_enable, 22700},
    {"cta_policy", &nccl::Config::cta_policy, 22700},
    {"shrink_share", &nccl::Config::shrink_share, 22700},
    {"nvls_ctas", &nccl::Config::nvls_ctas, 22703},
};
constexpr int kNamesSince = 22703;

// The library's own Config ends where its version did.
size_t config_size(int version) {
  if (version >= kNamesSince) return sizeof(nccl::Config);
  if (version >= 22600) return offsetof(nccl::Config, comm_name);
  return offsetof(nccl::Config, traffic_class);
}

void read_config(DeviceChoice& choice, const py::dict& config) {
  const int version = nccl::Nccl::get().version();
  choice.config.size = config_size(version);
  choice.config.version = static_cast<unsigned>(version);
  for (const auto& item : config) {
    const auto name = item.first.cast<std::string>();
    const auto too_old = [&](int since) {
      if (version < since)
        usage("the setting '" + name + "' needs NCCL " + nccl::version_text(since) +
              " or newer; this is " + nccl::Nccl::get().identity());
    };
    if (name == "net_name") {
      choice.net_name = item.second.cast<std::string>();
      continue;
    }
    if (name == "comm_name") {
      too_old(kNamesSince);
      choice.comm_name = item.second.cast<std::string>();
      continue;
    }
    const Field* found = nullptr;
    for (const Field& f : kFields)
      if (name == f.name) found = &f;
    if (!found) usage("NCCL has no setting '" + name + "'");
    too_old(found->since);
    choice.config.*(found->member) = static_cast<int>(read_int(item.second.ptr(), name.c_str()));
  }
}

py::list devices() {
  const device::Driver& driver = device::Driver::get();
  py::list rows;
  for (int i = 0; i < driver.devices(); ++i) {
    py::dict d;
    d["index"] = i;
    d["name"] = driver.name_of(i);
    d["uuid"] = driver.uuid_of(i);
    rows.append(d);
  }
  return rows;
}

py::dict driver_info() {
  const device::Driver& driver = device::Driver::get();
  py::dict d;
  d["path"] = driver.path();
  d["version"] = driver.version();
  d["devices"] = driver.devices();
  return d;
}

py::dict open_nccl(const std::string& path) {
  const nccl::Nccl& nccl = nccl::Nccl::open(path);
  py::dict d;
  d["path"] = nccl.path();
  d["version"] = nccl::version_text(nccl.version());
  d["code"] = nccl.version();
  return d;
}

// Runs body with the time limit and the GIL's hooks of one call.
template <class Body>
auto timed(PyCommunicator& comm, const char* operation, const py::object& timeout, Body&& body) {
  try {
    const double seconds = read_seconds(timeout.ptr(), comm.live().timeout());
    const Inside inside(comm);
    GilHooks hooks;
    return body(seconds, hooks);
  } catch (const Error& error) {
    if (error.trouble == Trouble::usage || error.trouble == Trouble::backend)
      set_python_error(error, error.complete ? "" : door_of(comm, operation));
    else
      set_python_error(error);
    throw py::error_already_set();
  }
}

// Memory of ncclMemAlloc, by where it begins. Under the GIL.
std::map<uintptr_t, size_t>& allocated() {
  static auto* const blocks = new std::map<uintptr_t, size_t>();
  return *blocks;
}

bool is_allocated(const Array& a) {
  const auto begin = reinterpret_cast<uintptr_t>(a.data);
  auto it = allocated().upper_bound(begin);
  if (it == allocated().begin()) return false;
  --it;
  return begin + static_cast<size_t>(a.bytes()) <= it->first + it->second;
}

// A window of other memory fails on one rank and leaves the others inside NCCL: all tell first.
void check_windows(PyCommunicator& comm, const Array& a, double seconds, Hooks& hooks) {
  Call call;
  call.kind = CallKind::init;
  call.site = site_of(comm.c->world());
  const bool mine = is_allocated(a);
  const std::vector<int64_t> all = comm.c->exchange({mine, a.bytes()}, call, seconds, hooks);
  static_cast<GilHooks&>(hooks).restore();
  for (size_t i = 0; i < all.size(); i += 2) {
    const std::string who =
        static_cast<int>(i / 2) == comm.c->rank() ? "" : " of rank " + std::to_string(i / 2);
    if (!all[i])
      usage("argument 'x'" + who +
            " is not in memory of meshring.nccl.allocator(), which a window "
            "needs; make it inside cupy.cuda.using_allocator(meshring.nccl.allocator())");
    if (all[i + 1] != a.bytes())
      usage("argument 'x'" + who + " has " + std::to_string(all[i + 1]) +
            " bytes, and this rank's " + std::to_string(a.bytes()) +
            "; a window has the same size on all ranks");
  }
}

py::int_ register_buffer(PyCommunicator& comm, const py::object& x, bool window,
                         const py::object& timeout) {
  return timed(comm, "register", timeout, [&](double seconds, Hooks& hooks) {
    const Array a = read_output(x.ptr(), "x");  // a copy would be registered otherwise
    if (a.device < 0) usage("argument 'x' is on the host; memory on a GPU is registered");
    comm.c->check_device(a.device);
    if (window) check_windows(comm, a, seconds, hooks);
    WaitContext wait{Deadline(seconds), hooks};
    void* handle =
        comm.c->device().register_buffer(a.data, static_cast<size_t>(a.bytes()), window, wait);
    static_cast<GilHooks&>(hooks).restore();
    return py::int_(reinterpret_cast<uintptr_t>(handle));
  });
}

void* allocate(size_t bytes) {
  const nccl::Nccl& nccl = nccl::Nccl::get();
  if (!nccl.mem_alloc) usage("ncclMemAlloc needs NCCL 2.19.1 or newer; this is " + nccl.identity());
  void* out = nullptr;
  const nccl::Result result = nccl.mem_alloc(&out, bytes);
  if (result != nccl::Result::success) throw nccl.error(result, "ncclMemAlloc", nullptr);
  return out;
}

}  // namespace

void add_device(py::class_<PyCommunicator>& type) {
  type.def("_choose_device",
           [](PyCommunicator& c, int device, const std::string& why_off, bool first, bool check,
              const py::dict& config) {
             DeviceChoice choice;
             choice.device = device;
             choice.why_off = why_off;
             choice.first = first;
             choice.check = check;
             if (device >= 0) read_config(choice, config);
             c.live().choose_device(std::move(choice));
           })
      .def("_open_device",
           [](PyCommunicator& c, const py::object& timeout) {
             timed(c, "init", timeout, [&](double seconds, Hooks& hooks) {
               Call call;
               call.kind = CallKind::init;
               c.c->open_device(call, seconds, hooks);
             });
           })
      .def("_forget_calls", [](PyCommunicator& c) { c.live().forget_calls(); })
      .def("_synchronize",
           [](PyCommunicator& c, const py::object& timeout) {
             timed(c, "synchronize", timeout,
                   [&](double seconds, Hooks& hooks) { c.c->synchronize(seconds, hooks); });
             c.harvest();
           })
      .def("_register", &register_buffer)
      .def("_deregister",
           [](PyCommunicator& c, uintptr_t handle, bool window) {
             timed(c, "deregister", py::none(), [&](double seconds, Hooks& hooks) {
               if (c.c->closed() || !c.c->device_open()) return;
               WaitContext wait{Deadline(seconds), hooks};
               c.c->device().deregister_buffer(reinterpret_cast<void*>(handle), window, wait);
             });
           })
      .def_property_readonly("_device",
                             [](const PyCommunicator& c) { return c.live().choice().device; })
      .def_property_readonly("_device_open",
                             [](const PyCommunicator& c) { return c.live().device_open(); })
      .def_property_readonly("_why_off",
                             [](const PyCommunicator& c) { return c.live().choice().why_off; });
}

void bind_nccl(py::module_& m) {
  m.def("nccl_open", &open_nccl, py::arg("path"));
  m.def("nccl_is_open", &nccl::Nccl::is_open);
  m.def("nccl_identity", [] { return nccl::Nccl::get().identity(); });
  m.def(
      "nccl_allocate",
      [](size_t bytes, int device) {
        const device::OnDevice here(device);
        const auto pointer = reinterpret_cast<uintptr_t>(allocate(bytes));
        allocated()[pointer] = bytes;
        return pointer;
      },
      py::arg("nbytes"), py::arg("device"));
  m.def(
      "nccl_free",
      [](uintptr_t pointer) {
        allocated().erase(pointer);
        if (nccl::Nccl::get().mem_free)
          nccl::Nccl::get().mem_free(reinterpret_cast<void*>(pointer));
      },
      py::arg("pointer"));
  m.def("cuda_driver", &driver_info);
  m.def("cuda_devices", &devices);
}

}  // namespace meshring

#include "bind_device.hpp"

#include "bind_call.hpp"
#include "device/driver.hpp"

namespace meshring {

namespace {

// What is read of a cupy.ndarray and its MemoryPointer; found once CuPy is imported.
struct CuPy {
  PyTypeObject* array = nullptr;
  PyTypeObject* pointer = nullptr;
  PyGetSetDescrObject* data = nullptr;
  PyGetSetDescrObject* dtype = nullptr;
  PyGetSetDescrObject* size = nullptr;
  PyGetSetDescrObject* contiguous = nullptr;
  PyGetSetDescrObject* ndim = nullptr;
  PyGetSetDescrObject* shape = nullptr;
  PyGetSetDescrObject* ptr = nullptr;
  PyGetSetDescrObject* device_id = nullptr;
  intptr_t (*current_stream)() = nullptr;  // cupy.cuda.stream.get_current_stream_ptr
  bool without_driver = false;             // tests: then every call is on the default stream
  PyObject* helpers = nullptr;             // meshring._arrays
};
CuPy cupy;
PyObject* attribute_ptr = nullptr;  // interned "ptr"

// The getter of an attribute along the type's bases, or null: then GetAttr does.
PyGetSetDescrObject* getter(PyTypeObject* type, const char* name) {
  PyObject* found = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name);
  if (!found) {
    PyErr_Clear();
    return nullptr;
  }
  if (Py_TYPE(found) == &PyGetSetDescr_Type) return reinterpret_cast<PyGetSetDescrObject*>(found);
  Py_DECREF(found);
  return nullptr;
}

bool learn_cupy() {
  PyObject* module = PyDict_GetItemString(PyImport_GetModuleDict(), "cupy");  // borrowed
  if (!module || !PyObject_HasAttrString(module, "ndarray")) return false;
  const py::handle m(module);
  const py::object array = m.attr("ndarray");
  const py::object cuda = m.attr("cuda");
  cupy.array = reinterpret_cast<PyTypeObject*>(array.inc_ref().ptr());
  cupy.pointer =
      reinterpret_cast<PyTypeObject*>(py::object(cuda.attr("MemoryPointer")).release().ptr());
  cupy.data = getter(cupy.array, "data");
  cupy.dtype = getter(cupy.array, "dtype");
  cupy.size = getter(cupy.array, "size");
  cupy.contiguous = getter(cupy.array, "_c_contiguous");
  cupy.ndim = getter(cupy.array, "ndim");
  cupy.shape = getter(cupy.array, "shape");
  cupy.ptr = getter(cupy.pointer, "ptr");
  cupy.device_id = getter(cupy.pointer, "device_id");
  cupy.helpers = py::module_::import("meshring._arrays").release().ptr();
  attribute_ptr = PyUnicode_InternFromString("ptr");
  const py::object api = py::getattr(cuda.attr("stream"), "__pyx_capi__", py::none());
  if (py::isinstance<py::dict>(api) && api.contains("get_current_stream_ptr")) {
    const py::object capsule = api["get_current_stream_ptr"];
    const char* signature = PyCapsule_GetName(capsule.ptr());
    if (signature && std::string(signature) == "intptr_t (void)")
      cupy.current_stream =
          reinterpret_cast<intptr_t (*)()>(PyCapsule_GetPointer(capsule.ptr(), signature));
    PyErr_Clear();
  }
  return true;
}

py::object get(PyGetSetDescrObject* via, PyObject* object, const char* name) {
  PyObject* value = via ? via->d_getset->get(object, via->d_getset->closure)
                        : PyObject_GetAttrString(object, name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

int64_t integer(const py::object& object) {
  const long long value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

}  // namespace

bool is_cupy(PyObject* object) {
  if (!cupy.array && !learn_cupy()) return false;
  return Py_TYPE(object) == cupy.array || PyType_IsSubtype(Py_TYPE(object), cupy.array);
}

bool read_cupy(PyObject* object, const char* argument, Array& a) {
  const py::object dtype = get(cupy.dtype, object, "dtype");
  const std::optional<DType> known = find_dtype(dtype.ptr());
  if (!known) refuse_dtype(dtype.ptr(), argument);
  const py::object data = get(cupy.data, object, "data");
  const bool plain = Py_TYPE(data.ptr()) == cupy.pointer;
  a.object = py::reinterpret_borrow<py::object>(object);
  a.dtype = *known;
  a.data = static_cast<char*>(
      PyLong_AsVoidPtr(get(plain ? cupy.ptr : nullptr, data.ptr(), "ptr").ptr()));
  a.device =
      static_cast<int>(integer(get(plain ? cupy.device_id : nullptr, data.ptr(), "device_id")));
  a.numpy_shape = nullptr;
  a.count = integer(get(cupy.size, object, "size"));
  a.ndim = static_cast<int>(integer(get(cupy.ndim, object, "ndim")));
  a.cupy_shape[0] = static_cast<Py_ssize_t>(a.count);
  if (a.ndim > 1) {  // CuPy makes the tuple anew each time, which takes as long as all the rest
    const py::object shape = get(cupy.shape, object, "shape");
    for (int i = 0; i < a.ndim; ++i)
      a.cupy_shape[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape.ptr(), i));
  }
  return get(cupy.contiguous, object, "_c_contiguous").ptr() == Py_True;
}

py::object new_cupy(const py::tuple& shape, DType dtype, int device) {
  if (!cupy.array && !learn_cupy()) usage("import cupy first: the result is an array on the GPU");
  PyObject* args[2] = {shape.ptr(), descriptor_of(dtype)};
  PyObject* made = PyObject_Vectorcall(reinterpret_cast<PyObject*>(cupy.array), args, 2, nullptr);
  if (!made) throw py::error_already_set();
  py::object array = py::reinterpret_steal<py::object>(made);
  const py::object data = get(cupy.data, made, "data");
  if (integer(get(nullptr, data.ptr(), "device_id")) == device) return array;
  // CuPy's current device is another one.
  return py::handle(cupy.helpers)
      .attr("device_empty")(shape, py::handle(descriptor_of(dtype)), device);
}

// ---- streams --------------------------------------------------------------------------------

namespace {

py::object current_stream_object(int device) {
  return py::handle(cupy.helpers).attr("current_stream")(device);
}

constexpr uintptr_t kPerThread = 2;  // cudaStreamPerThread; 0 and 1 are CUDA's own too

void* pointer_of(const py::object& stream) {
  void* handle = PyLong_AsVoidPtr(py::object(stream.attr("ptr")).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return handle;
}

void* current_stream(int device) {
  if (cupy.without_driver) return nullptr;
  if (cupy.current_stream && device::Driver::get().is_current(device)) {
    const intptr_t handle = cupy.current_stream();
    if (handle != -1 || !PyErr_Occurred()) return reinterpret_cast<void*>(handle);
    throw py::error_already_set();
  }
  if (device::Driver::get().named()) {  // a stand-in, of which CuPy knows nothing
    cupy.without_driver = true;
    return nullptr;
  }
  return pointer_of(current_stream_object(device));
}

}  // namespace

StreamChoice choose_stream(PyCommunicator& comm, PyObject* stream, int device) {
  StreamChoice choice;
  choice.current = current_stream(device);
  if (!given(stream)) {
    choice.handle = choice.current;
    if (choice.handle != comm.last_stream) comm.keep_stream(choice.handle, py::none());
  } else {
    if (PyLong_Check(stream)) {
      choice.handle = PyLong_AsVoidPtr(stream);
    } else if (PyObject* found = PyObject_GetAttr(stream, attribute_ptr)) {
      choice.handle = PyLong_AsVoidPtr(found);
      Py_DECREF(found);
    } else {
      PyErr_Clear();
      const py::object number = py::handle(cupy.helpers).attr("stream_pointer")(py::handle(stream));
      if (number.is_none())
        usage("argument 'stream' is " + repr_of(stream) +
              "; give a cupy.cuda.Stream, anything with __cuda_stream__, or a cudaStream_t");
      choice.handle = PyLong_AsVoidPtr(number.ptr());
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (choice.handle != comm.last_stream)
      comm.keep_stream(choice.handle, py::reinterpret_borrow<py::object>(stream));
  }
  if (reinterpret_cast<uintptr_t>(choice.handle) == kPerThread)
    usage(
        "the per-thread default stream means another stream in NCCL's own threads; use a "
        "cupy.cuda.Stream or the default stream (and leave CUPY_CUDA_PER_THREAD_DEFAULT_STREAM "
        "unset)");
  comm.last_stream = choice.handle;
  return choice;
}

void refuse_stream(PyObject* stream) {
  if (given(stream))
    usage("argument 'stream' is for arrays on a GPU, and x is on the host; leave it out");
}

void PyCommunicator::keep_stream(void* handle, py::object stream) {
  if (reinterpret_cast<uintptr_t>(handle) <= kPerThread) return;
  for (auto& kept : streams)
    if (kept.first == handle) return;
  if (stream.is_none()) stream = current_stream_object(c->choice().device);
  constexpr size_t kMost = 64;
  if (streams.size() >= kMost) {
    // Whoever makes streams all the time waits here now and then; else they would pile up.
    GilHooks hooks;
    c->synchronize(c->timeout(), hooks);
    streams.clear();
  }
  streams.emplace_back(handle, std::move(stream));
}

void PyCommunicator::harvest() {
  if (!c->poisoned().empty()) return;  // what was aborted may not have ended yet
  while (!lent.empty() && c->test(*lent.front().first)) lent.pop_front();
}

void enqueue(PyCommunicator& comm, Call* calls, size_t count, PyObject* stream, double seconds,
             const Array* const* arrays, size_t array_count, bool made, bool marks) {
  const int device = calls[0].device;
  comm.c->check_device(device);
  const StreamChoice choice = choose_stream(comm, stream, device);
  for (size_t i = 0; i < count; ++i) calls[i].stream = choice.handle;
  const bool elsewhere = choice.handle != choice.current;
  const bool captured = (elsewhere || marks) && comm.c->capturing(choice.handle);
  if (marks && captured)
    usage("a Work inside the capture of a CUDA graph; call without async_op, isend or irecv");
  if (elsewhere && made) device::order(device, choice.current, choice.handle);
  comm.harvest();
  const auto all = [&] {
    py::tuple objects(array_count);
    for (size_t i = 0; i < array_count; ++i)
      objects[i] = arrays[i] ? arrays[i]->object : py::none();
    return objects;
  };
  try {
    GilHooks hooks;
    comm.c->enqueue(calls, count, seconds, hooks);
  } catch (const Error& error) {
    if (error.trouble != Trouble::usage && error.trouble != Trouble::mismatch)
      comm.kept.push_back(all());
    throw;
  }
  // CuPy gives freed memory to the stream that it was made on, which knows nothing of another one.
  if (elsewhere && !captured) comm.lent.emplace_back(comm.c->mark(calls[0]), all());
}

}  // namespace meshring

#include "bind_arguments.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>

#include "bind_device.hpp"

namespace meshring {

namespace {

using Proxy = py::detail::PyArray_Proxy;
constexpr int kContiguous = 0x0001;
constexpr int kWriteable = 0x0400;

PyObject* ndarray_type = nullptr;
PyObject* numpy_empty = nullptr;
PyObject* numpy_dtype = nullptr;
PyObject* as_array = nullptr;             // meshring._arrays.as_array
PyObject* descriptors[kDTypeCount] = {};  // dtype singletons; ml_dtypes' on demand

bool is_ml_dtype(int i) {
  const auto t = static_cast<DType>(i);
  return t == DType::bfloat16 || t == DType::float8_e4m3fn || t == DType::float8_e5m2;
}

// ml_dtypes is never imported for the user, but its types are known once somebody did.
void learn_ml_dtypes(bool import) {
  PyObject* modules = PyImport_GetModuleDict();
  PyObject* module = PyDict_GetItemString(modules, "ml_dtypes");
  if (!module && !import) return;
  const py::object ml = py::module_::import("ml_dtypes");
  for (int i = 0; i < kDTypeCount; ++i)
    if (is_ml_dtype(i) && !descriptors[i])
      descriptors[i] =
          py::reinterpret_borrow<py::object>(numpy_dtype)(ml.attr(name_of(static_cast<DType>(i))))
              .release()
              .ptr();
}

}  // namespace

std::optional<DType> find_dtype(PyObject* descriptor) {
  for (int i = 0; i < kDTypeCount; ++i)
    if (descriptors[i] == descriptor) return static_cast<DType>(i);
  learn_ml_dtypes(false);
  for (int i = 0; i < kDTypeCount; ++i) {
    if (!descriptors[i]) continue;
    const int equal = PyObject_RichCompareBool(descriptors[i], descriptor, Py_EQ);
    if (equal < 0) PyErr_Clear();
    if (equal > 0) return static_cast<DType>(i);
  }
  return std::nullopt;
}

namespace {

std::string str_of(PyObject* object) { return py::cast<std::string>(py::str(py::handle(object))); }

}  // namespace

void refuse_dtype(PyObject* descriptor, const char* argument) {
  std::string fix = "convert it with .astype()";
  if (py::hasattr(descriptor, "byteorder") &&
      py::cast<std::string>(py::handle(descriptor).attr("byteorder")) == ">")
    fix = "convert it to native byte order, x.astype(x.dtype.newbyteorder('='))";
  usage(std::string("argument '") + argument + "' has dtype " + str_of(descriptor) +
        "; bool, int8 to int64, uint8 to uint64, float16/32/64, complex64/128, bfloat16, "
        "float8_e4m3fn and float8_e5m2 can be sent: " +
        fix);
}

namespace {

void read_numpy(PyObject* object, const char* argument, Array& a, int* flags) {
  const auto* proxy = reinterpret_cast<const Proxy*>(object);
  a.object = py::reinterpret_borrow<py::object>(object);
  a.data = proxy->data;
  a.ndim = proxy->nd;
  a.device = -1;
  a.numpy_shape = proxy->dimensions;
  const std::optional<DType> dtype = find_dtype(proxy->descr);
  if (!dtype) refuse_dtype(proxy->descr, argument);
  a.dtype = *dtype;
  a.count = 1;
  for (int i = 0; i < a.ndim; ++i) a.count *= a.shape()[i];
  *flags = proxy->flags;
}

// Anything that is not exactly an ndarray goes through Python once.
py::object coerced(PyObject* object, const char* argument) {
  py::object result =
      py::reinterpret_steal<py::object>(PyObject_CallFunction(as_array, "Os", object, argument));
  if (!result) throw py::error_already_set();
  if (py::isinstance<py::str>(result)) usage(py::cast<std::string>(result));
  return result;
}

Array read_any(PyObject* object, const char* argument, int* flags) {
  Array a;
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == ndarray_type) {
    read_numpy(object, argument, a, flags);
  } else if (is_cupy(object)) {
    *flags = kWriteable | (read_cupy(object, argument, a) ? kContiguous : 0);
  } else {
    const py::object array = coerced(object, argument);
    if (is_cupy(array.ptr()))
      *flags = kWriteable | (read_cupy(array.ptr(), argument, a) ? kContiguous : 0);
    else
      read_numpy(array.ptr(), argument, a, flags);
  }
  a.original = py::reinterpret_borrow<py::object>(object);
  return a;
}

}  // namespace

void init_arrays() {
  const py::module_ numpy = py::module_::import("numpy");
  ndarray_type = py::object(numpy.attr("ndarray")).release().ptr();
  numpy_empty = py::object(numpy.attr("empty")).release().ptr();
  numpy_dtype = py::object(numpy.attr("dtype")).release().ptr();
  as_array = py::object(py::module_::import("meshring._arrays").attr("as_array")).release().ptr();
  for (int i = 0; i < kDTypeCount; ++i)
    if (!is_ml_dtype(i))
      descriptors[i] =
          py::object(numpy.attr("dtype")(name_of(static_cast<DType>(i)))).release().ptr();
}

Array read_input(PyObject* object, const char* argument) {
  int flags = 0;
  Array a = read_any(object, argument, &flags);
  if (!(flags & kContiguous)) {
    const py::object packed = a.object.attr("copy")("C");
    const py::object original = a.original;
    if (a.device >= 0)
      read_cupy(packed.ptr(), argument, a);
    else
      read_numpy(packed.ptr(), argument, a, &flags);
    a.original = original;
    a.packed = a.bytes();
  }
  return a;
}

Array read_output(PyObject* object, const char* argument) {
  int flags = 0;
  Array a = read_any(object, argument, &flags);
  constexpr int kNeeded = kWriteable | kContiguous;
  if ((flags & kNeeded) == kNeeded) return a;
  const std::string name = std::string("argument '") + argument + "'";
  if (!(flags & kWriteable))
    usage(name + " is read-only and would be written; give a copy, x.copy()");
  usage(name + " is not C-contiguous (shape " + shape_text(a.ndim, a.shape()) +
        ") and would be written; give a contiguous array, " + (a.device < 0 ? "numpy" : "cupy") +
        ".ascontiguousarray(x), or, where the operation has "
        "one, a contiguous out=");
}

PyObject* descriptor_of(DType dtype) {
  PyObject*& descriptor = descriptors[static_cast<size_t>(dtype)];
  if (!descriptor) learn_ml_dtypes(true);
  return descriptor;
}

py::object new_array(int ndim, const Py_ssize_t* shape, DType dtype, int device) {
  py::tuple dims(ndim);
  for (int i = 0; i < ndim; ++i) dims[static_cast<size_t>(i)] = shape[i];
  if (device >= 0) return new_cupy(dims, dtype, device);
  PyObject* args[2] = {dims.ptr(), descriptor_of(dtype)};
  PyObject* array = PyObject_Vectorcall(numpy_empty, args, 2, nullptr);
  if (!array) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(array);
}

DType dtype_of(PyObject* anything, const char* argument) {
  if (PyUnicode_Check(anything)) {
    const std::string name = py::cast<std::string>(py::handle(anything));
    for (int i = 0; i < kDTypeCount; ++i)
      if (is_ml_dtype(i) && name == name_of(static_cast<DType>(i))) {
        learn_ml_dtypes(true);
        return static_cast<DType>(i);
      }
  }
  PyObject* descriptor = PyObject_CallOneArg(numpy_dtype, anything);
  if (!descriptor) {
    PyErr_Clear();
    usage(std::string("argument '") + argument + "' is " + repr_of(anything) +
          ", which numpy.dtype() does not understand; give a dtype, for example 'float32'");
  }
  const py::object owner = py::reinterpret_steal<py::object>(descriptor);
  const std::optional<DType> found = find_dtype(descriptor);
  if (!found) refuse_dtype(descriptor, argument);
  return *found;
}

std::string repr_of(PyObject* object) {
  return py::cast<std::string>(py::repr(py::handle(object)));
}

std::string shape_text(int ndim, const Py_ssize_t* shape) {
  std::string s = "(";
  for (int i = 0; i < ndim; ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (ndim == 1 ? ",)" : ")");
}

// ---- reading arguments ----------------------------------------------------------------------

void parse(Parameters& p, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames,
           PyObject** values) {
  if (nargs > p.positional) {
    PyErr_Format(PyExc_TypeError, "%s() takes at most %d positional arguments (%zd given)",
                 p.method, p.positional, nargs);
    throw py::error_already_set();
  }
  for (Py_ssize_t i = 0; i < nargs; ++i) values[i] = args[i];
  const Py_ssize_t named = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
  for (Py_ssize_t k = 0; k < named; ++k) {
    PyObject* name = PyTuple_GET_ITEM(kwnames, k);
    int at = -1;
    for (int i = 0; i < kMaxArgs && p.names[i] && at < 0; ++i) {
      if (!p.interned[i]) p.interned[i] = PyUnicode_InternFromString(p.names[i]);
      if (name == p.interned[i]) at = i;
    }
    for (int i = 0; i < kMaxArgs && p.names[i] && at < 0; ++i)
      if (PyUnicode_CompareWithASCIIString(name, p.names[i]) == 0) at = i;
    if (at < 0 || values[at]) {
      PyErr_Format(PyExc_TypeError,
                   at < 0 ? "%s() got an unexpected keyword argument '%U'"
                          : "%s() got multiple values for argument '%U'",
                   p.method, name);
      throw py::error_already_set();
    }
    values[at] = args[nargs + k];
  }
  for (int i = 0; i < p.required; ++i) {
    if (values[i]) continue;
    PyErr_Format(PyExc_TypeError, "%s() missing required argument '%s'", p.method, p.names[i]);
    throw py::error_already_set();
  }
}

RedOp read_op(PyObject* object) {
  if (!object) return RedOp::sum;
  static PyObject* names[kRedOpCount] = {};
  for (int i = 0; i < kRedOpCount; ++i) {
    if (!names[i]) names[i] = PyUnicode_InternFromString(kRedOps[i]);
    if (names[i] == object) return static_cast<RedOp>(i);
  }
  if (PyUnicode_Check(object))
    for (int i = 0; i < kRedOpCount; ++i)
      if (PyUnicode_CompareWithASCIIString(object, kRedOps[i]) == 0) return static_cast<RedOp>(i);
  usage("argument 'op' is " + repr_of(object) + "; give 'sum', 'prod', 'min', 'max' or 'mean'");
}

int64_t read_int(PyObject* object, const char* argument) {
  if (!PyIndex_Check(object))
    usage(std::string("argument '") + argument + "' is " + repr_of(object) + "; give an integer");
  const py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(object));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow)
    usage(std::string("argument '") + argument + "' is " + repr_of(object) + ", too large");
  return value;
}

int read_rank(PyObject* object, const char* argument, int n) {
  const int64_t rank = read_int(object, argument);
  if (rank < 0 || rank >= n)
    usage(std::string("argument '") + argument + "' is " + std::to_string(rank) +
          "; the ranks of this communicator are 0 to " + std::to_string(n - 1));
  return static_cast<int>(rank);
}

void check_op(DType dtype, RedOp op) {
  if (supports(dtype, op)) return;
  const std::string what = std::string("op='") + name_of(op) + "' of " + name_of(dtype);
  if (op == RedOp::mean)
    usage(what + " is not exact; reduce x.astype('float64'), or use op='sum' and divide");
  usage(what + " has no meaning, complex numbers have no order; reduce abs(x), x.real or x.imag");
}

double read_seconds(PyObject* object, double otherwise) {
  if (!given(object)) return otherwise;
  const double s = PyFloat_AsDouble(object);
  if (s == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    usage("argument 'timeout' is " + repr_of(object) + "; give seconds, or None for the default");
  }
  if (std::isnan(s) || s < 0)
    usage("argument 'timeout' is " + repr_of(object) +
          "; give seconds >= 0, or float('inf') to wait for ever");
  return s;
}

double read_scale(PyObject* object, DType dtype, RedOp op) {
  if (!given(object)) return 1;
  const double scale = PyFloat_AsDouble(object);
  if (scale == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    usage("argument 'scale' is " + repr_of(object) + "; give a number");
  }
  if (op != RedOp::sum)
    usage(std::string("argument 'scale' goes with op='sum', and op is '") + name_of(op) +
          "'; leave it out, or multiply x first");
  if (info(dtype).cls != DTypeClass::real && info(dtype).cls != DTypeClass::complex)
    usage(std::string("argument 'scale' is for floating-point and complex arrays, and x is ") +
          name_of(dtype) + "; convert it with .astype('float64')");
  return scale;
}

Array scaled(const Array& x, double factor) {
  const py::object product = new_array(x.ndim, x.shape(), x.dtype, -1);
  py::module_::import("numpy").attr("multiply")(x.object, factor, py::arg("out") = product);
  Array a = read_input(product.ptr(), "x");
  a.original = x.original;
  return a;
}

bool is_auto(PyObject* sizes) {
  return sizes && PyUnicode_Check(sizes) && PyUnicode_CompareWithASCIIString(sizes, "auto") == 0;
}

static std::string list_text(const std::vector<int64_t>& v) {
  std::string s = "[";
  for (size_t i = 0; i < v.size(); ++i) s += (i ? ", " : "") + std::to_string(v[i]);
  return s + "]";
}

// numpy.array_split's lengths.
static std::vector<int64_t> balanced(int64_t length, int n) {
  std::vector<int64_t> v(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) v[static_cast<size_t>(i)] = length / n + (i < length % n ? 1 : 0);
  return v;
}

std::vector<int64_t> read_sizes(PyObject* object, int n) {
  const char* need = "; give one length per rank, None for equal shards, or \"auto\"";
  if (PyUnicode_Check(object) || !PySequence_Check(object))
    usage("argument 'sizes' is " + repr_of(object) + need);
  const py::object list = py::reinterpret_steal<py::object>(PySequence_List(object));
  if (!list) throw py::error_already_set();
  if (PyList_GET_SIZE(list.ptr()) != n)
    usage("argument 'sizes' has " + std::to_string(PyList_GET_SIZE(list.ptr())) + " entries for " +
          std::to_string(n) + " ranks" + need);
  std::vector<int64_t> v;
  for (int i = 0; i < n; ++i) {
    v.push_back(read_int(PyList_GET_ITEM(list.ptr(), i), "sizes"));
    if (v.back() < 0)
      usage("argument 'sizes' is " + repr_of(object) + ", and no length is negative");
  }
  return v;
}

// The lengths that the axis of length `total` is cut into.
std::vector<int64_t> cut_sizes(PyObject* sizes, int64_t total, int n) {
  if (is_auto(sizes)) return balanced(total, n);
  if (given(sizes)) {
    std::vector<int64_t> v = read_sizes(sizes, n);
    int64_t sum = 0;
    for (int64_t s : v) sum += s;
    if (sum != total)
      usage("argument 'sizes' is " + list_text(v) + ", which add up to " + std::to_string(sum) +
            "; the axis has length " + std::to_string(total));
    return v;
  }
  if (total % n != 0)
    usage("the axis has length " + std::to_string(total) + ", which " + std::to_string(n) +
          " ranks cannot share equally; give sizes=, for example sizes=" +
          list_text(balanced(total, n)) + " (which sizes=\"auto\" gives)");
  return std::vector<int64_t>(static_cast<size_t>(n), total / n);
}

// ---- shapes ---------------------------------------------------------------------------------

void describe(Call& call, const Array& a) {
  call.device = static_cast<int16_t>(a.device);
  call.dtype = a.dtype;
  call.count = a.count;
  call.ndim = static_cast<uint8_t>(a.ndim);
  for (int i = 0; i < a.ndim && i < kMaxDims; ++i) call.dims[i] = a.shape()[i];
}

void whole(Call& call, const Array& a) {
  describe(call, a);
  call.unit = static_cast<int64_t>(size_of(a.dtype));
  call.length = a.count;
}

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

void set_sizes(Call& call, std::vector<int64_t> sizes) {
  bool equal = true;
  for (int64_t s : sizes) equal = equal && s == sizes[0];
  call.length = equal ? sizes[0] : 0;
  if (!equal) call.sizes = std::move(sizes);
}

static std::string place_text(int device) {
  return device < 0 ? "on the host" : "on GPU " + std::to_string(device);
}

void check_out(const Array& out, const Call& call, const std::vector<Py_ssize_t>& shape) {
  const int ndim = static_cast<int>(shape.size());
  const DType dtype = call.dtype;
  if (out.device != call.device)
    usage("argument 'out' is " + place_text(out.device) + ", and x is " + place_text(call.device) +
          "; give both in one place");
  if (out.dtype == dtype && out.ndim == ndim && std::equal(shape.begin(), shape.end(), out.shape()))
    return;
  usage("argument 'out' is " + std::string(name_of(out.dtype)) + " " +
        shape_text(out.ndim, out.shape()) + "; " + name_of(dtype) + " " +
        shape_text(ndim, shape.data()) + " is needed");
}

void check_out(const Array& out, const Call& call, const Array& like) {
  const bool same = out.ndim == like.ndim && out.dtype == call.dtype && out.device == call.device &&
                    std::equal(like.shape(), like.shape() + like.ndim, out.shape());
  if (!same) check_out(out, call, std::vector(like.shape(), like.shape() + like.ndim));
}

void check_overlap(const Array& in, const char* out, int64_t out_bytes, const char* in_place) {
  if (in.bytes() == 0 || out_bytes == 0 || in.data == in_place) return;
  if (in.data < out + out_bytes && out < in.data + in.bytes())
    usage("argument 'out' overlaps 'x' in memory; give an out that does not");
}

Array output_for(Call& call, PyObject* out, const std::vector<Py_ssize_t>& shape) {
  Array a;
  if (given(out)) {
    a = read_output(out, "out");
    check_out(a, call, shape);
  } else {
    const py::object made =
        new_array(static_cast<int>(shape.size()), shape.data(), call.dtype, call.device);
    a = read_output(made.ptr(), "out");
    a.made = true;
  }
  call.out = a.data;
  return a;
}

}  // namespace meshring

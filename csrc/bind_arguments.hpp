// F5. Arguments in: NumPy and CuPy arrays read by their fields, everything else made into one;
// keywords, operators, ranks and seconds. All throw Error(usage) that names the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "call.hpp"
#include "dtype.hpp"
#include "error.hpp"

namespace meshring {

namespace py = pybind11;

// A NumPy or CuPy array of a dtype that meshring knows; C-contiguous. Holds a reference.
struct Array {
  py::object object;    // the array that is read or written
  py::object original;  // what the caller gave
  char* data = nullptr;
  int device = -1;  // the GPU; -1 is the host
  int ndim = 0;
  const Py_ssize_t* numpy_shape = nullptr;
  Py_ssize_t cupy_shape[32];
  DType dtype = DType::float32;
  int64_t count = 0;
  bool made = false;   // by us, for this call
  int64_t packed = 0;  // bytes copied because the caller's array was not contiguous

  const Py_ssize_t* shape() const { return numpy_shape ? numpy_shape : cupy_shape; }
  int64_t bytes() const { return count * static_cast<int64_t>(size_of(dtype)); }
};

void init_arrays();  // caches numpy's objects; once, at import

// An input; a non-contiguous one is packed. Throws Error(usage) naming the argument.
Array read_input(PyObject* object, const char* argument);
// x times a factor, in a new array of the same dtype on the host.
Array scaled(const Array& x, double factor);
// An output: contiguous and writable, or refused.
Array read_output(PyObject* object, const char* argument);

py::object new_array(int ndim, const Py_ssize_t* shape, DType dtype, int device);
// The dtype object of NumPy or ml_dtypes.
PyObject* descriptor_of(DType dtype);
std::optional<DType> find_dtype(PyObject* descriptor);
[[noreturn]] void refuse_dtype(PyObject* descriptor, const char* argument);
DType dtype_of(PyObject* anything, const char* argument);  // what numpy.dtype() understands
std::string repr_of(PyObject* object);
std::string shape_text(int ndim, const Py_ssize_t* shape);

inline constexpr int kMaxArgs = 9;

// The parameters of one method: the first `positional` may be given without a name.
struct Parameters {
  const char* method;
  int positional;
  int required;
  const char* names[kMaxArgs];
  PyObject* interned[kMaxArgs] = {};
};

// Fills values[i] with what names[i] was given, or leaves null. Throws Python's TypeError.
void parse(Parameters& p, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames,
           PyObject** values);
inline bool given(PyObject* object) { return object && object != Py_None; }
RedOp read_op(PyObject* object);
int64_t read_int(PyObject* object, const char* argument);
int read_rank(PyObject* object, const char* argument, int n);
double read_seconds(PyObject* object, double otherwise);  // None or null: otherwise
void check_op(DType dtype, RedOp op);
// The factor of a premultiplied sum; 1 when not given. Refuses it for other operators and integers.
double read_scale(PyObject* object, DType dtype, RedOp op);
bool is_auto(PyObject* sizes);  // sizes="auto"
std::vector<int64_t> read_sizes(PyObject* object, int n);
// The lengths that an axis of length `total` is cut into, by the argument 'sizes' or equally.
std::vector<int64_t> cut_sizes(PyObject* sizes, int64_t total, int n);

// Fills in what a call says of its array.
void describe(Call& call, const Array& a);
void whole(Call& call, const Array& a);  // the same, as one block without an axis

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

Along along(Call& call, DType dtype, const Py_ssize_t* shape, int ndim, int64_t axis);
// Equal lengths are one number, so that sizes=[2, 2] and sizes=None are the same call.
void set_sizes(Call& call, std::vector<int64_t> sizes);
void check_out(const Array& out, const Call& call, const std::vector<Py_ssize_t>& shape);
void check_out(const Array& out, const Call& call, const Array& like);  // of the shape of x
// out may be x's own place in it (`in_place`), and otherwise must not overlap x.
void check_overlap(const Array& in, const char* out, int64_t out_bytes, const char* in_place);
// `out` when given, else a new array. Sets call.out.
Array output_for(Call& call, PyObject* out, const std::vector<Py_ssize_t>& shape);

}  // namespace meshring

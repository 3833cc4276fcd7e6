// The device kernels on the CPU for tests: csrc/device/kernels.cpp on a driver that runs them by
// csrc/device/emulate.hpp, and their index arithmetic alone. Reached through ctypes.
#include <cstring>
#include <string>

#include "device/emulate.hpp"
#include "device/kernels.hpp"

namespace meshring::device {

const Ptx kPtx = {"any text", "8.0", "sm_70", "a test"};

namespace {

struct Seen {
  int launches = 0, copies = 0;
  std::string kernel;
  u32 grid = 0;
};
Seen seen;
int multiprocessors = 2;
Result load_result = kSuccess;

Result module_load(Module* module, const void*) {
  *module = &seen;
  return load_result;
}

Result module_function(Function* function, Module, const char* name) {
  for (const char* known : kKernelNames)
    if (std::strcmp(known, name) == 0) {
      *function = const_cast<char*>(known);
      return kSuccess;
    }
  return 500;  // CUDA_ERROR_NOT_FOUND
}

Result launch(Function function, unsigned gx, unsigned, unsigned, unsigned bx, unsigned, unsigned,
              unsigned, Stream, void** params, void**) {
  ++seen.launches;
  seen.kernel = static_cast<const char*>(function);
  seen.grid = gx;
  return emulate(seen.kernel.c_str(), {gx}, {bx}, params) ? kSuccess : 500;
}

void* address(Pointer p) { return reinterpret_cast<void*>(static_cast<uintptr_t>(p)); }

Result copy(Pointer to, Pointer from, size_t bytes, Stream) {
  ++seen.copies;
  std::memcpy(address(to), address(from), bytes);
  return kSuccess;
}

Result copy_2d(const Copy2D* c, Stream) {
  ++seen.copies;
  for (size_t r = 0; r < c->height; ++r)
    std::memcpy(address(c->dst_device + r * c->dst_pitch),
                address(c->src_device + r * c->src_pitch), c->width);
  return kSuccess;
}

Result device_get(Device* device, int ordinal) {
  *device = ordinal;
  return kSuccess;
}

Result device_attribute(int* value, int, Device) {
  *value = multiprocessors;
  return kSuccess;
}

Layout layout_from(const int64_t* widths, int n, int64_t rows, int64_t spacing, int skip) {
  Call call;
  call.outer = rows;
  Layout layout = layout_of(call, n, spacing, [&](int k) { return widths[k]; });
  layout.skip = skip;
  return layout;
}

template <class Blocks, class Index>
void place(const Launch& launch, const Index* items, int count, u64* array, u64* packed) {
  const auto& copy = *static_cast<const Copy<Index>*>(launch.params[0]);
  const auto& blocks = *static_cast<const Blocks*>(launch.params[1]);
  u32 hint = 0;
  for (int i = 0; i < count; ++i) {
    const Place<Index> at = place_of(copy, blocks, items[i], hint);
    array[i] = reinterpret_cast<uintptr_t>(copy.from) + u64{at.strided} * launch.vector;
    packed[i] = reinterpret_cast<uintptr_t>(copy.to) + u64{at.packed} * launch.vector;
  }
}

}  // namespace

Driver::Driver() {
  version_ = 12000;
  this->module_load = device::module_load;
  this->module_function = device::module_function;
  this->launch = device::launch;
  this->copy = device::copy;
  this->copy_2d = device::copy_2d;
  this->device_get = device::device_get;
  this->device_attribute = device::device_attribute;
}
const Driver& Driver::get() {
  static const Driver driver;
  return driver;
}
std::string Driver::text_of(Result result) const { return "error " + std::to_string(result); }
void Driver::fail(Result result, const char* what) const {
  throw Error(Trouble::backend, what + (": " + text_of(result)));
}
OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() = default;

extern "C" {

// Blocks of `rows` rows; packed `spacing` bytes apart or, with 0, one behind the other.
int copy_blocks(const int64_t* widths, int n, int64_t rows, int64_t spacing, int skip, char* array,
                char* packed, int pack, int compiled, int processors) {
  multiprocessors = processors;
  const Kernels kernels(Driver::get(), 0);
  const Layout layout = layout_from(widths, n, rows, spacing, skip);
  seen = {};
  if (!compiled)
    kernels.copy(layout, array, packed, pack != 0, nullptr);
  else if (pack)
    kernels.pack(layout, array, packed, nullptr);
  else
    kernels.unpack(layout, packed, array, nullptr);
  return seen.launches + seen.copies;
}

const char* last_kernel() { return seen.kernel.c_str(); }
unsigned last_grid() { return seen.grid; }

// Where launch `which` of a pack reads and writes its work items `items`; memory is not touched.
// Returns the vectors that it moves, 0 where there is no such launch.
u64 places(const int64_t* widths, int n, int64_t rows, int64_t spacing, int skip, u64 array,
           u64 packed, int which, const u64* items, int count, u64* from, u64* to) {
  u64 work = 0;
  int number = 0;
  const Layout layout = layout_from(widths, n, rows, spacing, skip);
  plan(layout, address(array), address(packed), true, [&](const Launch& launch) {
    if (number++ != which) return;
    work = launch.work;
    seen.kernel = kKernelNames[launch.kernel];
    const std::vector<u32> narrow(items, items + count);
    if (launch.wide)
      layout.equal() ? place<Equal<u64>>(launch, items, count, from, to)
                     : place<Uneven<u64>>(launch, items, count, from, to);
    else
      layout.equal() ? place<Equal<u32>>(launch, narrow.data(), count, from, to)
                     : place<Uneven<u32>>(launch, narrow.data(), count, from, to);
  });
  return work;
}

u64 quotient(u64 x, u64 divisor, int wide) {
  if (wide) return divide(x, detail::division_by<u64>(divisor));
  return divide(static_cast<u32>(x), detail::division_by<u32>(static_cast<u32>(divisor)));
}

// How a driver that answers `result` to cuModuleLoadData is spoken of; "" when all is well.
const char* why_not(int result, int built) {
  static std::string text;
  load_result = result;
  const Ptx none = {nullptr, "", "", "the build found no compiler"};
  text = Kernels(Driver::get(), 0, built ? kPtx : none).why_not();
  load_result = kSuccess;
  return text.c_str();
}

// A launch that fails is an error, not a reason to copy.
const char* failed_launch() {
  static std::string text;
  Driver driver = Driver::get();
  driver.launch = [](Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                     Stream, void**, void**) { return Result{700}; };
  const int64_t width = 1;
  char byte = 0;
  try {
    Kernels(driver, 0).pack(layout_from(&width, 1, 1, 0, -1), &byte, &byte, nullptr);
    text = "no error";
  } catch (const Error& error) {
    text = error.text;
  }
  return text.c_str();
}

// The Layout of a call, in one row: rows, pitch, count, then width and offset of each block.
int layout_of_call(int kind, int64_t outer, int64_t unit, int64_t length, const int64_t* sizes,
                   int size_count, int me, int n, int64_t spacing, int joins, int64_t* out) {
  Call call;
  call.kind = static_cast<CallKind>(kind);
  call.outer = outer;
  call.unit = unit;
  call.length = length;
  call.sizes.assign(sizes, sizes + size_count);
  const Layout layout =
      joins ? output_layout(call, me, n, spacing) : input_layout(call, me, n, spacing);
  *out++ = layout.rows;
  *out++ = layout.pitch;
  *out++ = layout.packed_bytes();
  for (int k = 0; k < layout.count; ++k) {
    *out++ = layout.width_of(k);
    *out++ = layout.offset_of(k);
  }
  return layout.equal() ? 1 : 0;
}
}

}  // namespace meshring::device

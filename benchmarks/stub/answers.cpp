// What must be answered for a communicator of one rank to be made.
#include <dlfcn.h>

#define STUB extern "C" __attribute__((visibility("default")))

namespace {
int something = 0;
}

STUB int ncclGetVersion(int* version) {
  *version = 23203;
  return 0;
}
STUB int ncclCommInitRank(void** comm, int, void*, int) {
  *comm = &something;
  return 0;
}
STUB int ncclBcast() { return 0; }  // these two because CuPy links to them
STUB int ncclCommInitAll() { return 0; }
STUB int ncclCommInitRankConfig(void** comm) {
  *comm = &something;
  return 0;
}
STUB int ncclCommGetAsyncError(void*, int* state) {
  *state = 0;
  return 0;
}
STUB int ncclCommCount(void*, int* count) {
  *count = 1;
  return 0;
}
STUB int ncclCommUserRank(void*, int* rank) {
  *rank = 0;
  return 0;
}
STUB int ncclCommCuDevice(void*, int* device) {
  *device = 0;
  return 0;
}
STUB const char* ncclGetErrorString(int) { return "an error"; }
STUB const char* ncclGetLastError(void*) { return ""; }
STUB int cuDriverGetVersion(int* version) {
  *version = 12040;
  return 0;
}
STUB int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
STUB int cuDevicePrimaryCtxRetain(void** context) {
  *context = &something;
  return 0;
}
STUB int cuModuleLoadData(void** module) {
  *module = &something;
  return 0;
}
STUB int cuModuleGetFunction(void** function) {
  *function = &something;
  return 0;
}
STUB int cuMemPoolCreate(void** pool) {
  *pool = &something;
  return 0;
}
STUB int cuEventCreate(void** event) {
  *event = &something;
  return 0;
}
STUB int cuDeviceGetAttribute(int* value) {
  *value = 1;
  return 0;
}
STUB int nothing() { return 0; }
// How cuda-bindings, which nccl4py imports, looks up the driver.
STUB int cuGetProcAddress_v2(const char* symbol, void** function, int, unsigned long long, int*) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (!*function) *function = reinterpret_cast<void*>(&nothing);
  return 0;
}

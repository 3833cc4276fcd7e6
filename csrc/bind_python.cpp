#include "bind_python.hpp"

#include <frameobject.h>
#include <unistd.h>

#include <unordered_map>

namespace meshring {

namespace {

// Found at import: a static initialiser that may let the GIL go deadlocks with a second thread.
unsigned long main_thread = 0;
std::string package;  // meshring's directory, with a slash

}  // namespace

void init_python() {
  PyObject* threading = PyImport_ImportModule("threading");
  PyObject* thread = threading ? PyObject_CallMethod(threading, "main_thread", nullptr) : nullptr;
  PyObject* ident = thread ? PyObject_GetAttrString(thread, "ident") : nullptr;
  if (ident) main_thread = PyLong_AsUnsignedLong(ident);
  PyObject* module = PyDict_GetItemString(PyImport_GetModuleDict(), "meshring");  // borrowed
  PyObject* file = module ? PyObject_GetAttrString(module, "__file__") : nullptr;
  if (const char* text = file ? PyUnicode_AsUTF8(file) : nullptr) package = text;
  package = package.substr(0, package.rfind('/') + 1);
  for (PyObject* object : {file, ident, thread, threading}) Py_XDECREF(object);
  PyErr_Clear();
}

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

void GilHooks::restore() {
  if (!saved_) return;
  // The interpreter would end this thread by unwinding it, through destructors that must not throw.
  while (is_finalizing()) pause();
  PyEval_RestoreThread(saved_);
  saved_ = nullptr;
}

bool GilHooks::interrupted() {
  if (PyThread_get_thread_ident() != main_thread) return false;
  const bool was_released = saved_ != nullptr;
  restore();
  const bool raised = PyErr_CheckSignals() != 0;
  if (was_released && !raised) release();
  return raised;
}

namespace {

struct Key {
  const void* owner;
  PyObject* code;
  int instruction;
  bool operator==(const Key& o) const {
    return owner == o.owner && code == o.code && instruction == o.instruction;
  }
};
struct KeyHash {
  size_t operator()(const Key& k) const {
    size_t h = reinterpret_cast<size_t>(k.code) * 0x9e3779b97f4a7c15ull;
    return (h ^ reinterpret_cast<size_t>(k.owner) ^ static_cast<size_t>(k.instruction)) *
           0xff51afd7ed558ccdull;
  }
};

constexpr size_t kRemembered = 4096;

// Code objects are kept alive while they are keys, so that an address means one code object.
std::unordered_map<Key, uint32_t, KeyHash>& known_sites() {
  static auto* sites = new std::unordered_map<Key, uint32_t, KeyHash>();
  return *sites;
}
std::unordered_map<PyObject*, bool>& own_code() {
  static auto* codes = new std::unordered_map<PyObject*, bool>();
  return *codes;
}

// Is this code meshring's own, which the user did not write?
bool is_own(PyCodeObject* code) {
  auto& codes = own_code();
  const auto found = codes.find(reinterpret_cast<PyObject*>(code));
  if (found != codes.end()) return found->second;
  const char* file = PyUnicode_AsUTF8(code->co_filename);
  if (!file) PyErr_Clear();
  const bool own =
      file && !package.empty() && std::string(file).compare(0, package.size(), package) == 0;
  if (codes.size() < kRemembered) {
    Py_INCREF(code);
    codes.emplace(reinterpret_cast<PyObject*>(code), own);
  }
  return own;
}

int instruction_of(PyFrameObject* frame) {
#if PY_VERSION_HEX >= 0x030b0000
  return PyFrame_GetLasti(frame);
#else
  return frame->f_lasti;
#endif
}

}  // namespace

// Most calls come from the line that the one before came from. Under the GIL, as all here is.
static struct {
  Key key{};
  uint32_t id = 0;
} last_site;

uint32_t caller_site(const void* owner, const std::function<uint32_t(const std::string&)>& add) {
  PyFrameObject* frame = PyEval_GetFrame();
  if (!frame) return 0;
  PyCodeObject* code = PyFrame_GetCode(frame);
  const Key direct{owner, reinterpret_cast<PyObject*>(code), instruction_of(frame)};
  if (direct == last_site.key) {
    Py_DECREF(code);
    return last_site.id;
  }
  const bool users_own = !is_own(code);
  Py_INCREF(frame);
  while (is_own(code)) {
    PyFrameObject* back = PyFrame_GetBack(frame);
    if (!back) break;
    Py_DECREF(frame);
    Py_DECREF(code);
    frame = back;
    code = PyFrame_GetCode(frame);
  }
  auto& sites = known_sites();
  const Key key{owner, reinterpret_cast<PyObject*>(code), instruction_of(frame)};
  uint32_t id = 0;
  const auto found = sites.find(key);
  if (found != sites.end()) {
    id = found->second;
  } else {
    const char* file = PyUnicode_AsUTF8(code->co_filename);
    if (!file) PyErr_Clear();
    id = add(std::string(file ? file : "?") + ":" + std::to_string(PyFrame_GetLineNumber(frame)));
    if (sites.size() < kRemembered) {
      Py_INCREF(code);
      sites.emplace(key, id);
    }
  }
  // The table keeps the code object alive, so that its address cannot come to mean another one.
  if (users_own && sites.count(key)) last_site = {key, id};
  Py_DECREF(frame);
  Py_DECREF(code);
  return id;
}

void forget_sites(const void* owner) {
  if (last_site.key.owner == owner) last_site = {};
  auto& sites = known_sites();
  for (auto it = sites.begin(); it != sites.end();) {
    if (it->first.owner == owner) {
      Py_DECREF(it->first.code);
      it = sites.erase(it);
    } else {
      ++it;
    }
  }
}

}  // namespace meshring

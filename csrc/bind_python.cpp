#include "bind_python.hpp"

#include <frameobject.h>

#include <unordered_map>

namespace meshring {

bool GilHooks::interrupted() {
  static const unsigned long main_thread = [] {
    PyGILState_STATE state = PyGILState_Ensure();
    unsigned long ident = 0;
    if (PyObject* threading = PyImport_ImportModule("threading")) {
      if (PyObject* thread = PyObject_CallMethod(threading, "main_thread", nullptr)) {
        if (PyObject* number = PyObject_GetAttrString(thread, "ident")) {
          ident = PyLong_AsUnsignedLong(number);
          Py_DECREF(number);
        }
        Py_DECREF(thread);
      }
      Py_DECREF(threading);
    }
    PyErr_Clear();
    PyGILState_Release(state);
    return ident;
  }();
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
  static const std::string package = [] {
    std::string dir;
    if (PyObject* module = PyImport_ImportModule("meshring")) {
      if (PyObject* file = PyObject_GetAttrString(module, "__file__")) {
        if (const char* text = PyUnicode_AsUTF8(file)) dir = text;
        Py_DECREF(file);
      }
      Py_DECREF(module);
    }
    PyErr_Clear();
    return dir.substr(0, dir.rfind('/') + 1);
  }();
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

uint32_t caller_site(const void* owner, const std::function<uint32_t(const std::string&)>& add) {
  PyFrameObject* frame = PyEval_GetFrame();
  if (!frame) return 0;
  Py_INCREF(frame);
  PyCodeObject* code = PyFrame_GetCode(frame);
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
  Py_DECREF(frame);
  Py_DECREF(code);
  return id;
}

void forget_sites(const void* owner) {
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

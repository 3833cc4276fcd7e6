// F5. What the bindings need of Python itself: the GIL, signals, the caller's line.
#pragma once

#include <Python.h>

#include <cstdint>
#include <functional>
#include <string>

#include "wait.hpp"

namespace meshring {

// Lets the GIL go when a wait gets long, takes it back at the end, and asks for signals meanwhile.
class GilHooks final : public Hooks {
 public:
  GilHooks() = default;
  ~GilHooks() override { restore(); }
  GilHooks(const GilHooks&) = delete;
  GilHooks& operator=(const GilHooks&) = delete;

  void release() override {
    if (!saved_) saved_ = PyEval_SaveThread();
  }
  void restore();
  bool interrupted() override;  // the exception is set in this thread when true

 private:
  PyThreadState* saved_ = nullptr;
};

void init_python();  // once, at import
bool is_finalizing();

// Number of the caller's file and line, added by `add` when first seen. Frames of meshring's own
// Python code are passed over. Needs the GIL.
uint32_t caller_site(const void* owner, const std::function<uint32_t(const std::string&)>& add);
void forget_sites(const void* owner);

}  // namespace meshring

// F1. The kernels as the build made them; the definition is generated (compile_ptx.py).
#pragma once

namespace meshring::device {

struct Ptx {
  const char* text;      // null where the build had no CUDA compiler
  const char* isa;       // version of the PTX instruction set, "8.0"
  const char* target;    // the least GPU that runs it, "sm_70"
  const char* compiler;  // what made it, or why there is none
};

extern const Ptx kPtx;

}  // namespace meshring::device

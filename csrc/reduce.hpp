// F1. Element-wise reduction of n arrays in rank order, with run-time choice of the instruction
// set.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace meshring {

enum class Isa : uint8_t { portable, avx2, avx512 };

// dst[i] = ((srcs[0][i] op srcs[1][i]) op srcs[2][i]) op ... for i < count, in the accumulate type
// (float32 for float16, bfloat16 and float8; the type itself otherwise), rounded once at the end.
// mean divides the sum by n in the accumulate type. The result is bitwise the same for every Isa.
// dst may be the same pointer as any of srcs; any other overlap is not allowed. No pointer needs
// to be aligned. Requires supports(dtype, op) and n >= 1.
void reduce(DType dtype, RedOp op, void* dst, const void* const* srcs, int n, int64_t count);

Isa best_isa();         // what this CPU (and MESHRING_ISA=portable|avx2|avx512) allows
Isa current_isa();      // what reduce() uses now
void set_isa(Isa isa);  // for tests; not above best_isa()
const char* name_of(Isa isa);

}  // namespace meshring

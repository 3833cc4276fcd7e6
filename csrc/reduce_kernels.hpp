// F1. The reduction kernels, compiled once per instruction set by
// reduce_{portable,avx2,avx512}.cpp.
//
// Each of those files includes the headers, sets the target by pragma, defines MESHRING_ISA (a
// namespace) and MESHRING_VECTOR_BYTES, and includes this file. Everything is written with GCC's
// vector types, so one source gives SSE2, NEON, AVX2 and AVX-512 code with the same results.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtype.hpp"

namespace meshring {

using Kernel = void (*)(void* dst, const void* const* srcs, int n, int64_t count);

struct KernelTable {
  Kernel at[kDTypeCount][kRedOpCount];  // null where supports() is false
};

extern const KernelTable kPortableKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;

}  // namespace meshring

#ifdef MESHRING_ISA

#include "reduce_operators.hpp"

namespace meshring {
namespace MESHRING_ISA {
namespace {

// ---- Elements: how a block of `lanes` * kVecs of them becomes kVecs accumulators, and back. ----

template <class T, int unit = 1>
struct Plain {  // accumulates in its own type; unit = how many T cannot be separated
  using Acc = T;
  static constexpr int kSize = sizeof(T);
  static constexpr int kUnit = unit;
  static constexpr int kVecs = 1;
  template <int lanes>
  MESHRING_INLINE void load(const char* p, Vec<T, lanes>* acc) {
    acc[0] = load_bytes<Vec<T, lanes>>(p);
  }
  template <int lanes>
  MESHRING_INLINE void store(char* p, const Vec<T, lanes>* acc) {
    store_bytes(p, acc[0]);
  }
};

struct Boolean : Plain<uint8_t> {
  template <int lanes>
  MESHRING_INLINE void load(const char* p, Vec<uint8_t, lanes>* acc) {
    const auto v = load_bytes<Vec<uint8_t, lanes>>(p);
    const auto one = static_cast<Vec<uint8_t, lanes>>(v - v + 1);
    acc[0] = v < one ? v : one;
  }
};

// A float of 1 sign bit, exponent bits and `mantissa` bits. `fn`: no infinity, NaN is all ones.
template <class Bits, int mantissa, int bias, bool fn>
struct Small {
  static constexpr int kShift = 23 - mantissa;
  static constexpr int kSignBit = 1 << (8 * sizeof(Bits) - 1);
  static constexpr int kMagnitude = kSignBit - 1;
  static constexpr int kInf = kMagnitude & ~((1 << mantissa) - 1);
  static constexpr int kSignShift = 32 - 8 * static_cast<int>(sizeof(Bits));
  static constexpr int kRebias = (127 - bias) << 23;

  // The element in the low bits of each int, anything above it.
  template <class F, class I>
  MESHRING_INLINE F widen(I h) {
    const I sign = (h & kSignBit) << kSignShift;
    const I mag = h & kMagnitude;
    I bits = (mag << kShift) + kRebias;
    if constexpr (fn) {
      bits = mag == kMagnitude ? I{} + 0x7fc00000 : bits;
    } else {
      bits += mag >= kInf ? I{} + kRebias : I{};
    }
    F tiny;
    if constexpr (std::is_same_v<F, float>) {
      tiny = static_cast<float>(mag);
    } else {
      tiny = __builtin_convertvector(mag, F);
    }
    const float kStep = 1.0f / (1 << mantissa) / (1 << (bias - 1));
    const I subnormal = bit_cast<I>(tiny * kStep);
    bits = mag < (1 << mantissa) ? subnormal : bits;
    return bit_cast<F>(bits | sign);
  }

  // Rounds to nearest even; the sign comes from `x`.
  template <class I, class F>
  MESHRING_INLINE I narrow(F x) {
    const I all = bit_cast<I>(x);
    const I mag = all & 0x7fffffff;
    const I sign = (all >> kSignShift) & kSignBit;
    // Adding a power of two whose unit in the last place is our smallest step rounds subnormals.
    constexpr int kMagicBits = (127 - bias + 23 - mantissa + 1) << 23;
    const float kMagic = bit_cast<float>(kMagicBits);
    const I subnormal = bit_cast<I>(bit_cast<F>(mag) + kMagic) - kMagicBits;
    const I odd = (mag >> kShift) & 1;
    I code = (mag - kRebias + ((1 << (kShift - 1)) - 1) + odd) >> kShift;
    if constexpr (fn) {
      code = code < kMagnitude ? code : I{} + kMagnitude;
    } else {
      code = code < kInf ? code : I{} + kInf;
      const I quiet = I{} + (kInf | (1 << (mantissa - 1)));
      // NumPy keeps the payload in float16, ml_dtypes drops it in float8.
      const I nan = sizeof(Bits) == 2 ? (quiet | ((mag >> kShift) & kMagnitude)) : quiet;
      code = mag > 0x7f800000 ? nan : code;
    }
    code = mag < ((128 - bias) << 23) ? subnormal : code;
    return code | sign;
  }
};

// Several narrow elements share each 32-bit lane, so that no lane is ever crossed: accumulator k
// holds the elements k, k + kVecs, k + 2 * kVecs, ...
template <class Bits, class Format>
struct Packed {
  using Acc = float;
  static constexpr int kSize = sizeof(Bits);
  static constexpr int kUnit = 1;
  static constexpr int kVecs = 4 / kSize;
  template <int lanes>
  MESHRING_INLINE void load(const char* p, Vec<float, lanes>* acc) {
    const auto v = load_bytes<Vec<int32_t, lanes>>(p);
    for (int k = 0; k < kVecs; ++k) {
      acc[k] = Format::template widen<Vec<float, lanes>>(v >> (8 * kSize * k));
    }
  }
  template <int lanes>
  MESHRING_INLINE void store(char* p, const Vec<float, lanes>* acc) {
    using I = Vec<int32_t, lanes>;
    using U = Vec<uint32_t, lanes>;
    U v{};
    for (int k = 0; k < kVecs; ++k) {
      v |= bit_cast<U>(Format::template narrow<I>(acc[k])) << (8 * kSize * k);
    }
    store_bytes(p, v);
  }
  MESHRING_INLINE float load_one(const char* p) {
    return Format::template widen<float>(static_cast<int32_t>(load_bytes<Bits>(p)));
  }
  MESHRING_INLINE void store_one(char* p, float x) {
    store_bytes(p, static_cast<Bits>(Format::template narrow<int32_t>(x)));
  }
};

// bfloat16 is the upper half of a float32. Even elements in acc[0], odd ones in acc[1].
struct BFloat16 {
  using Acc = float;
  static constexpr int kSize = 2;
  static constexpr int kUnit = 1;
  static constexpr int kVecs = 2;
  template <int lanes>
  MESHRING_INLINE void load(const char* p, Vec<float, lanes>* acc) {
    using F = Vec<float, lanes>;
    const auto v = load_bytes<Vec<uint32_t, lanes>>(p);
    acc[0] = bit_cast<F>(v << 16);
    acc[1] = bit_cast<F>(v & 0xffff0000u);
  }
  template <int lanes>
  MESHRING_INLINE void store(char* p, const Vec<float, lanes>* acc) {
    using U = Vec<uint32_t, lanes>;
    using H = Vec<uint16_t, 2 * lanes>;
    const U even = bit_cast<U>(acc[0]);
    const U odd = bit_cast<U>(acc[1]);
    const U upper = (even >> 16) | (odd & 0xffff0000u);
    const U lower = (even & 0xffffu) | (odd << 16);
    store_bytes(p, round(bit_cast<H>(upper), bit_cast<H>(lower)));
  }
  MESHRING_INLINE float load_one(const char* p) {
    return bit_cast<float>(uint32_t{load_bytes<uint16_t>(p)} << 16);
  }
  MESHRING_INLINE void store_one(char* p, float x) {
    const auto bits = bit_cast<uint32_t>(x);
    store_bytes(p, round(static_cast<uint16_t>(bits >> 16), static_cast<uint16_t>(bits)));
  }

 private:
  // To nearest even, 16 bits at a time. The result of arithmetic is never a signalling NaN, so that
  // the upper half alone tells a NaN; ml_dtypes keeps its sign only.
  template <class H>
  MESHRING_INLINE H round(H upper, H lower) {
    const H sticky = lower | (upper & 1);
    const H rounded = sticky > uint16_t{0x8000} ? static_cast<H>(upper + 1) : upper;
    const H nan = (upper & 0x8000) | 0x7fc0;
    return (upper & 0x7fff) > 0x7f80 ? nan : rounded;
  }
};

using Float16Soft = Packed<uint16_t, Small<uint16_t, 10, 15, false>>;
using Float8E4M3FN = Packed<uint8_t, Small<uint8_t, 3, 7, true>>;
using Float8E5M2 = Packed<uint8_t, Small<uint8_t, 2, 15, false>>;

#ifdef MESHRING_F16C
struct Float16 : Float16Soft {
  template <int lanes>
  MESHRING_INLINE void load(const char* p, Vec<float, lanes>* acc) {
    for (int k = 0; k < kVecs; ++k) half_load(p + k * lanes * kSize, acc + k);
  }
  template <int lanes>
  MESHRING_INLINE void store(char* p, const Vec<float, lanes>* acc) {
    for (int k = 0; k < kVecs; ++k) half_store(p + k * lanes * kSize, acc[k]);
  }
};
#else
using Float16 = Float16Soft;
#endif

// ---- Loops. ----

template <class E, class Op, bool two>
struct Loop {
  using Acc = typename E::Acc;

  struct Sources {
    const void* const* all;
    const char* first;  // copies, since a store through char* might change `all`
    const char* second;
    int n;
    MESHRING_INLINE const char* at(const Sources& s, int r) {
      return static_cast<const char*>(s.all[r]);
    }
  };

  // Reduces `blocks` blocks at element i into registers.
  template <int lanes, int blocks>
  MESHRING_INLINE void gather(const Sources& s, int64_t i, Vec<Acc, lanes>* acc) {
    constexpr int kVecs = E::kVecs;
    constexpr int kStride = lanes * kVecs * E::kSize;
    const int64_t offset = i * E::kSize;
    for (int u = 0; u < blocks; ++u) {
      E::template load<lanes>(s.first + offset + u * kStride, acc + u * kVecs);
    }
    const int n = two ? 2 : s.n;
    for (int r = 1; r < n; ++r) {
      const char* p = (two ? s.second : Sources::at(s, r)) + offset;
      for (int u = 0; u < blocks; ++u) {
        Vec<Acc, lanes> next[kVecs];
        E::template load<lanes>(p + u * kStride, next);
        for (int k = 0; k < kVecs; ++k) {
          acc[u * kVecs + k] = Op::apply(acc[u * kVecs + k], next[k]);
        }
      }
    }
    for (int k = 0; k < blocks * kVecs; ++k) acc[k] = Op::finish(acc[k], static_cast<Acc>(s.n));
  }

  template <int lanes, int blocks>
  MESHRING_INLINE void scatter(char* dst, int64_t i, const Vec<Acc, lanes>* acc) {
    constexpr int kStride = lanes * E::kVecs * E::kSize;
    for (int u = 0; u < blocks; ++u) {
      E::template store<lanes>(dst + i * E::kSize + u * kStride, acc + u * E::kVecs);
    }
  }

  // Elements before dst is aligned to a block; 0 where it never is.
  template <int lanes>
  MESHRING_INLINE int64_t until_aligned(const char* dst) {
    constexpr uintptr_t kBytes = lanes * E::kVecs * E::kSize;
    constexpr uintptr_t kUnitBytes = E::kUnit * E::kSize;
    const uintptr_t missing = -reinterpret_cast<uintptr_t>(dst) & (kBytes - 1);
    return missing % kUnitBytes == 0 ? static_cast<int64_t>(missing / E::kSize) : 0;
  }

  // Needs count >= one block. The first and the last block overlap their neighbours, so they are
  // reduced before anything is stored (dst may be a source) and stored at the end. In between, dst
  // is aligned: NumPy's large arrays are not, and split cache lines cost up to 40 %.
  template <int lanes, int blocks>
  MESHRING_INLINE void span(char* dst, const Sources& s, int64_t count) {
    constexpr int64_t kBlock = lanes * E::kVecs;
    Vec<Acc, lanes> first[E::kVecs];
    Vec<Acc, lanes> last[E::kVecs];
    Vec<Acc, lanes> acc[blocks * E::kVecs];
    gather<lanes, 1>(s, 0, first);
    gather<lanes, 1>(s, count - kBlock, last);
    int64_t i = until_aligned<lanes>(dst);
    for (; i + blocks * kBlock <= count; i += blocks * kBlock) {
      gather<lanes, blocks>(s, i, acc);
      scatter<lanes, blocks>(dst, i, acc);
    }
    for (; i + kBlock <= count; i += kBlock) {
      gather<lanes, 1>(s, i, acc);
      scatter<lanes, 1>(dst, i, acc);
    }
    scatter<lanes, 1>(dst, 0, first);
    scatter<lanes, 1>(dst, count - kBlock, last);
  }

  MESHRING_INLINE void single(char* dst, const Sources& s, int64_t count) {
    for (int64_t i = 0; i < count; i += E::kUnit) {
      asm volatile("");  // a few elements: keeps GCC from building a vector loop
      if constexpr (E::kVecs == 1) {
        Vec<Acc, E::kUnit> acc[1];
        gather<E::kUnit, 1>(s, i, acc);
        scatter<E::kUnit, 1>(dst, i, acc);
      } else {
        const int64_t offset = i * E::kSize;
        Acc acc = E::load_one(s.first + offset);
        const int n = two ? 2 : s.n;
        for (int r = 1; r < n; ++r) {
          acc = Op::apply(acc, E::load_one((two ? s.second : Sources::at(s, r)) + offset));
        }
        E::store_one(dst + offset, Op::finish(acc, static_cast<Acc>(s.n)));
      }
    }
  }

  static void run(char* dst, const void* const* srcs, int n, int64_t count) {
    constexpr int kWide = MESHRING_VECTOR_BYTES / sizeof(Acc);
    constexpr int kNarrow = 16 / sizeof(Acc);
    constexpr int kBlocks = 4 / E::kVecs;
    const Sources s{srcs, static_cast<const char*>(srcs[0]),
                    static_cast<const char*>(srcs[two ? 1 : 0]), n};
    if (count >= kWide * E::kVecs) {
      span<kWide, kBlocks>(dst, s, count);
    } else if (kNarrow < kWide && kNarrow > E::kUnit && count >= kNarrow * E::kVecs) {
      span<kNarrow, 1>(dst, s, count);
    } else {
      single(dst, s, count);
    }
  }
};

template <class E, class Op, int parts = 1>
void kernel(void* dst, const void* const* srcs, int n, int64_t count) {
  char* out = static_cast<char*>(dst);
  if (n == 2) {
    Loop<E, Op, true>::run(out, srcs, n, count * parts);
  } else {
    Loop<E, Op, false>::run(out, srcs, n, count * parts);
  }
}

template <class E, int parts = 1>
void mean_kernel(void* dst, const void* const* srcs, int n, int64_t count) {
  if ((n & (n - 1)) == 0) {
    kernel<E, MeanScale, parts>(dst, srcs, n, count);
  } else {
    kernel<E, MeanDivide, parts>(dst, srcs, n, count);
  }
}

// ---- The table. ----

constexpr void put(KernelTable& t, DType dtype, RedOp op, Kernel k) {
  t.at[static_cast<int>(dtype)][static_cast<int>(op)] = k;
}

template <class E, class Ordered, class SumOp, class ProdOp, class MinOp, class MaxOp>
constexpr void put_row(KernelTable& t, DType dtype) {
  put(t, dtype, RedOp::sum, kernel<E, SumOp>);
  put(t, dtype, RedOp::prod, kernel<E, ProdOp>);
  put(t, dtype, RedOp::min, kernel<Ordered, MinOp>);
  put(t, dtype, RedOp::max, kernel<Ordered, MaxOp>);
}

// Unsigned arithmetic wraps like NumPy's without undefined behaviour.
template <class T>
constexpr void put_integer(KernelTable& t, DType dtype) {
  put_row<Plain<std::make_unsigned_t<T>>, Plain<T>, Sum, Prod, Min, Max>(t, dtype);
}

template <class T>
constexpr void put_real(KernelTable& t, DType dtype) {
  put_row<Plain<T>, Plain<T>, Sum, Prod, Min, Max>(t, dtype);
  put(t, dtype, RedOp::mean, mean_kernel<Plain<T>>);
}

template <class E, class Bits, int top>
constexpr void put_narrow(KernelTable& t, DType dtype) {
  put_row<E, Plain<Bits>, Sum, Prod, NarrowMin<top>, NarrowMax<top>>(t, dtype);
  put(t, dtype, RedOp::mean, mean_kernel<E>);
}

template <class T>
constexpr void put_complex(KernelTable& t, DType dtype) {
  put(t, dtype, RedOp::sum, kernel<Plain<T>, Sum, 2>);
  put(t, dtype, RedOp::prod, kernel<Plain<T, 2>, ComplexProd<T>, 2>);
  put(t, dtype, RedOp::mean, mean_kernel<Plain<T>, 2>);
}

constexpr KernelTable make_table() {
  KernelTable t{};
  put_row<Boolean, Boolean, Or, And, And, Or>(t, DType::boolean);
  put_integer<int8_t>(t, DType::int8);
  put_integer<int16_t>(t, DType::int16);
  put_integer<int32_t>(t, DType::int32);
  put_integer<int64_t>(t, DType::int64);
  put_integer<uint8_t>(t, DType::uint8);
  put_integer<uint16_t>(t, DType::uint16);
  put_integer<uint32_t>(t, DType::uint32);
  put_integer<uint64_t>(t, DType::uint64);
  put_narrow<Float16, int16_t, 0x7c00>(t, DType::float16);
  put_narrow<BFloat16, int16_t, 0x7f80>(t, DType::bfloat16);
  put_real<float>(t, DType::float32);
  put_real<double>(t, DType::float64);
  put_complex<float>(t, DType::complex64);
  put_complex<double>(t, DType::complex128);
  put_narrow<Float8E4M3FN, int8_t, 0x7e>(t, DType::float8_e4m3fn);
  put_narrow<Float8E5M2, int8_t, 0x7c>(t, DType::float8_e5m2);
  return t;
}

}  // namespace
}  // namespace MESHRING_ISA
}  // namespace meshring

#endif  // MESHRING_ISA

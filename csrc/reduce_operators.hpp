// F1. Vectors of one instruction set and the operators on them; a part of reduce_kernels.hpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define MESHRING_INLINE __attribute__((always_inline)) static inline

namespace meshring {
namespace MESHRING_ISA {
namespace {

template <class T, int lanes>
struct VecOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <class T>
struct VecOf<T, 1> {
  using type = T;
};
template <class T, int lanes>
using Vec = typename VecOf<T, lanes>::type;

template <class To, class From>
MESHRING_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast changes the type only");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
MESHRING_INLINE V load_bytes(const char* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class V>
MESHRING_INLINE void store_bytes(char* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// ---- Operators. apply() works on scalars and vectors alike; finish() runs once at the end. ----

struct NoFinish {
  template <class V, class S>
  MESHRING_INLINE V finish(V v, S) {
    return v;
  }
};

template <class V, bool scalar = std::is_arithmetic_v<V>>
struct ElementOf {
  using type = V;
};
template <class V>
struct ElementOf<V, false> {
  using type = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
};

// Of two NaNs the first operand's must survive, but a compiler may swap what commutes: then the
// bits would depend on the instruction set and the length. Assembly fixes the order at no cost.
#ifdef __x86_64__
#if MESHRING_VECTOR_BYTES > 16
#define MESHRING_ORDERED(name) asm("v" name " %2, %1, %0" : "=v"(a) : "v"(a), "v"(b))
#else
#define MESHRING_ORDERED(name) asm(name " %1, %0" : "+x"(a) : "x"(b))
#endif
#define MESHRING_COMMUTATIVE(function, op, name)      \
  template <class V>                                  \
  MESHRING_INLINE V function(V a, V b) {              \
    using T = typename ElementOf<V>::type;            \
    if constexpr (std::is_same_v<V, float>) {         \
      MESHRING_ORDERED(name "ss");                    \
    } else if constexpr (std::is_same_v<V, double>) { \
      MESHRING_ORDERED(name "sd");                    \
    } else if constexpr (std::is_same_v<T, float>) {  \
      MESHRING_ORDERED(name "ps");                    \
    } else if constexpr (std::is_same_v<T, double>) { \
      MESHRING_ORDERED(name "pd");                    \
    } else {                                          \
      a = static_cast<V>(a op b);                     \
    }                                                 \
    return a;                                         \
  }
#else
#define MESHRING_COMMUTATIVE(function, op, name)    \
  template <class V>                                \
  MESHRING_INLINE V function(V a, V b) {            \
    return static_cast<V>(a != a ? a + a : a op b); \
  }
#endif
MESHRING_COMMUTATIVE(add, +, "add")
MESHRING_COMMUTATIVE(multiply, *, "mul")

struct Sum : NoFinish {
  template <class V>
  MESHRING_INLINE V apply(V a, V b) {
    return add(a, b);
  }
};

struct Prod : NoFinish {
  template <class V>
  MESHRING_INLINE V apply(V a, V b) {
    // uint16 promotes to int, whose product could overflow.
    if constexpr (std::is_same_v<V, uint16_t>) {
      return static_cast<V>(uint32_t{a} * b);
    } else {
      return multiply(a, b);
    }
  }
};

struct Or : NoFinish {
  template <class V>
  MESHRING_INLINE V apply(V a, V b) {
    return static_cast<V>(a | b);
  }
};

struct And : NoFinish {
  template <class V>
  MESHRING_INLINE V apply(V a, V b) {
    return static_cast<V>(a & b);
  }
};

struct Min : NoFinish {
  template <class V>
  MESHRING_INLINE V apply(V a, V b) {
    return ((a < b) | (a != a)) ? a : b;  // a NaN in either place wins; folds away for integers
  }
};

struct Max : NoFinish {
  template <class V>
  MESHRING_INLINE V apply(V a, V b) {
    return ((a > b) | (a != a)) ? a : b;
  }
};

// Narrow floats are ordered as the integers they are stored in: sign and magnitude, NaN above
// `top`. The same rule as Min and Max above, without widening anything.
template <int top>
struct SignMagnitude : NoFinish {
  template <class V>
  MESHRING_INLINE V magnitude(V v) {
    constexpr int kBits = top > 0x7f ? 0x7fff : 0x7f;
    return static_cast<V>(v & kBits);
  }
  template <class V>
  MESHRING_INLINE V key(V v) {  // both zeros have the key 0
    const V mag = magnitude(v);
    return v < 0 ? static_cast<V>(-mag) : mag;
  }
};

template <int top>
struct NarrowMin : SignMagnitude<top> {
  template <class V>
  MESHRING_INLINE V apply(V a, V b) {
    using S = SignMagnitude<top>;
    const auto less = (S::key(a) < S::key(b)) & (S::magnitude(b) <= top);
    return (less | (S::magnitude(a) > top)) ? a : b;
  }
};

template <int top>
struct NarrowMax : SignMagnitude<top> {
  template <class V>
  MESHRING_INLINE V apply(V a, V b) {
    using S = SignMagnitude<top>;
    const auto more = (S::key(a) > S::key(b)) & (S::magnitude(b) <= top);
    return (more | (S::magnitude(a) > top)) ? a : b;
  }
};

struct MeanDivide : Sum {
  template <class V, class S>
  MESHRING_INLINE V finish(V v, S n) {
    return v / n;
  }
};

// For n a power of two: multiplying by 1/n rounds the same exact quotient, and is far cheaper.
struct MeanScale : Sum {
  template <class V, class S>
  MESHRING_INLINE V finish(V v, S n) {
    return v * (S{1} / n);
  }
};

template <class V, int... i>
MESHRING_INLINE V complex_product(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int kLanes = sizeof...(i);
  const V re = __builtin_shufflevector(a, a, (i & ~1)...);
  const V im = __builtin_shufflevector(a, a, (i | 1)...);
  const V straight = multiply(re, b);
  const V crossed = multiply(im, __builtin_shufflevector(b, b, (i ^ 1)...));
  // Difference and sum rather than a sign flip, which would change the sign of a NaN.
  return __builtin_shufflevector(straight - crossed, add(straight, crossed),
                                 (i % 2 == 0 ? i : kLanes + i)...);
}

template <class T>
struct ComplexProd : NoFinish {
  template <class V>
  MESHRING_INLINE V apply(V a, V b) {
    return complex_product(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(T)>{});
  }
};

}  // namespace
}  // namespace MESHRING_ISA
}  // namespace meshring

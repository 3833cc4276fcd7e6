// F0. Element types and reduction operators: the one table that everything else reads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace meshring {

enum class DType : uint8_t {
  boolean,
  int8,
  int16,
  int32,
  int64,
  uint8,
  uint16,
  uint32,
  uint64,
  float16,
  bfloat16,
  float32,
  float64,
  complex64,
  complex128,
  float8_e4m3fn,
  float8_e5m2,
};
inline constexpr int kDTypeCount = 17;

enum class RedOp : uint8_t { sum, prod, min, max, mean };
inline constexpr int kRedOpCount = 5;

enum class DTypeClass : uint8_t { boolean, integer, real, complex };

struct DTypeInfo {
  const char* name;  // NumPy's (or ml_dtypes') name
  uint8_t size;      // bytes of one element
  DTypeClass cls;
};

inline constexpr DTypeInfo kDTypes[kDTypeCount] = {
    {"bool", 1, DTypeClass::boolean},        {"int8", 1, DTypeClass::integer},
    {"int16", 2, DTypeClass::integer},       {"int32", 4, DTypeClass::integer},
    {"int64", 8, DTypeClass::integer},       {"uint8", 1, DTypeClass::integer},
    {"uint16", 2, DTypeClass::integer},      {"uint32", 4, DTypeClass::integer},
    {"uint64", 8, DTypeClass::integer},      {"float16", 2, DTypeClass::real},
    {"bfloat16", 2, DTypeClass::real},       {"float32", 4, DTypeClass::real},
    {"float64", 8, DTypeClass::real},        {"complex64", 8, DTypeClass::complex},
    {"complex128", 16, DTypeClass::complex}, {"float8_e4m3fn", 1, DTypeClass::real},
    {"float8_e5m2", 1, DTypeClass::real},
};

inline constexpr const char* kRedOps[kRedOpCount] = {"sum", "prod", "min", "max", "mean"};

constexpr const DTypeInfo& info(DType t) { return kDTypes[static_cast<size_t>(t)]; }
constexpr size_t size_of(DType t) { return info(t).size; }
constexpr const char* name_of(DType t) { return info(t).name; }
constexpr const char* name_of(RedOp op) { return kRedOps[static_cast<size_t>(op)]; }

// NumPy has no order on complex numbers, and an integer mean would not be an integer.
constexpr bool supports(DType t, RedOp op) {
  const DTypeClass c = info(t).cls;
  switch (op) {
    case RedOp::sum:
    case RedOp::prod:
      return true;
    case RedOp::min:
    case RedOp::max:
      return c != DTypeClass::complex;
    case RedOp::mean:
      return c == DTypeClass::real || c == DTypeClass::complex;
  }
  return false;
}

}  // namespace meshring

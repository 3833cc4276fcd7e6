#include "arithmetic.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace standin {
namespace {

using meshring::nccl::DataType;

// A float of few bits: sign, exponent, mantissa; without infinities if `finite`.
template <class Bits, int exponent_bits, int mantissa_bits, bool finite>
struct Narrow {
  using Stored = Bits;
  using Value = float;
  static constexpr int kBias = (1 << (exponent_bits - 1)) - 1;
  static constexpr unsigned kSign = 1u << (exponent_bits + mantissa_bits);
  static constexpr unsigned kInfinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  static constexpr unsigned kNan = finite ? kSign - 1 : kInfinity | 1u << (mantissa_bits - 1);
  static constexpr unsigned kGreatest = finite ? kNan - 1 : kInfinity;

  static float decode_slowly(unsigned bits) {
    const unsigned magnitude = bits & (kSign - 1);
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const int mantissa = static_cast<int>(magnitude & ((1u << mantissa_bits) - 1));
    float value = std::numeric_limits<float>::quiet_NaN();
    if (exponent == 0) {
      value = std::ldexp(static_cast<float>(mantissa), 1 - kBias - mantissa_bits);
    } else if (finite ? magnitude != kNan : magnitude < kInfinity) {
      value = std::ldexp(static_cast<float>(mantissa + (1 << mantissa_bits)),
                         exponent - kBias - mantissa_bits);
    } else if (!finite && magnitude == kInfinity) {
      value = std::numeric_limits<float>::infinity();
    }
    return (bits & kSign) != 0 ? -value : value;
  }

  static float decode(Bits bits) {
    static const std::vector<float>& table = *[] {
      auto* t = new std::vector<float>(size_t{kSign} * 2);
      for (unsigned i = 0; i < kSign * 2; ++i) (*t)[i] = decode_slowly(i);
      return t;
    }();
    return table[bits];
  }

  static Bits encode(float value) {
    const unsigned sign = std::signbit(value) ? kSign : 0;
    if (std::isnan(value)) return static_cast<Bits>(sign | kNan);
    if (std::isinf(value)) return static_cast<Bits>(sign | (finite ? kNan : kInfinity));
    int exponent = 0;
    std::frexp(value, &exponent);
    exponent = value == 0 ? 1 - kBias : std::max(exponent - 1, 1 - kBias);
    const double steps =
        std::ldexp(std::fabs(static_cast<double>(value)), mantissa_bits - exponent);
    // The leading bit of `steps` carries into the exponent, as does a mantissa rounded up.
    const auto bits = (static_cast<uint64_t>(exponent + kBias - 1) << mantissa_bits) +
                      static_cast<uint64_t>(std::llrint(steps));
    return static_cast<Bits>(sign | (bits > kGreatest ? (finite ? kNan : kInfinity) : bits));
  }
};

template <class T>
struct Plain {
  using Stored = T;
  using Value = T;
  static T decode(T v) { return v; }
  static T encode(T v) { return v; }
};

// Calls function with the codec of that type.
template <class F>
void with_type(DataType type, F&& function) {
  switch (type) {
    case DataType::int8:
      return function(Plain<int8_t>{});
    case DataType::uint8:
      return function(Plain<uint8_t>{});
    case DataType::int32:
      return function(Plain<int32_t>{});
    case DataType::uint32:
      return function(Plain<uint32_t>{});
    case DataType::int64:
      return function(Plain<int64_t>{});
    case DataType::uint64:
      return function(Plain<uint64_t>{});
    case DataType::float16:
      return function(Narrow<uint16_t, 5, 10, false>{});
    case DataType::float32:
      return function(Plain<float>{});
    case DataType::float64:
      return function(Plain<double>{});
    case DataType::bfloat16:
      return function(Narrow<uint16_t, 8, 7, false>{});
    case DataType::float8_e4m3:
      return function(Narrow<uint8_t, 4, 3, true>{});
    case DataType::float8_e5m2:
      return function(Narrow<uint8_t, 5, 2, false>{});
  }
}

// Integers wrap around, as on the device.
template <class T>
T wrap_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  } else {
    return a + b;
  }
}

template <class T>
T wrap_multiply(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  } else {
    return a * b;
  }
}

template <class T>
T combine(Operator op, T a, T b) {
  switch (op) {
    case Operator::sum:
    case Operator::avg:
      return wrap_add(a, b);
    case Operator::prod:
      return wrap_multiply(a, b);
    case Operator::max:
      if constexpr (std::is_integral_v<T>) return std::max(a, b);
      return static_cast<T>(std::fmax(a, b));
    case Operator::min:
      if constexpr (std::is_integral_v<T>) return std::min(a, b);
      return static_cast<T>(std::fmin(a, b));
  }
  return a;
}

template <class Stored>
Stored load(const void* p, size_t i) {
  Stored s;
  std::memcpy(&s, static_cast<const char*>(p) + i * sizeof(s), sizeof(s));
  return s;
}

template <class Stored>
void store(void* p, size_t i, Stored s) {
  std::memcpy(static_cast<char*>(p) + i * sizeof(s), &s, sizeof(s));
}

}  // namespace

size_t size_of(DataType type) {
  size_t size = 0;
  with_type(type, [&size](auto codec) { size = sizeof(typename decltype(codec)::Stored); });
  return size;
}

const char* name_of(DataType type) {
  static const char* const kNames[] = {"int8",    "uint8",    "int32",       "uint32",
                                       "int64",   "uint64",   "float16",     "float32",
                                       "float64", "bfloat16", "float8_e4m3", "float8_e5m2"};
  return size_of(type) == 0 ? "?" : kNames[static_cast<int>(type)];
}

const char* name_of(Operator op) {
  static const char* const kNames[] = {"sum", "prod", "max", "min", "avg"};
  return kNames[static_cast<int>(op)];
}

void reduce(void* target, const char* const* in, int n, size_t count, DataType type, Operator op) {
  with_type(type, [&](auto codec) {
    using Codec = decltype(codec);
    using Stored = typename Codec::Stored;
    using Value = typename Codec::Value;
    for (size_t i = 0; i < count; ++i) {
      Value value = Codec::decode(load<Stored>(in[0], i));
      for (int k = 1; k < n; ++k) {
        value = combine<Value>(op, value, Codec::decode(load<Stored>(in[k], i)));
      }
      if (op == Operator::avg) value = static_cast<Value>(value / static_cast<Value>(n));
      store(target, i, Codec::encode(value));
    }
  });
}

void scale(void* target, const void* source, const void* scalar, size_t count, DataType type) {
  with_type(type, [&](auto codec) {
    using Codec = decltype(codec);
    using Stored = typename Codec::Stored;
    const auto factor = Codec::decode(load<Stored>(scalar, 0));
    for (size_t i = 0; i < count; ++i) {
      const auto value = Codec::decode(load<Stored>(source, i));
      store(target, i, Codec::encode(wrap_multiply(value, factor)));
    }
  });
}

}  // namespace standin

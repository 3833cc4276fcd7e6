// Whether two function types are the same to a compiled caller: names of types aside.
#pragma once

#include <type_traits>

template <class Ours, class Theirs>
struct AlikePointee;

template <class Ours, class Theirs>
constexpr bool alike_value() {
  if constexpr (std::is_void_v<Ours> || std::is_void_v<Theirs>) {
    return std::is_void_v<Ours> && std::is_void_v<Theirs>;
  } else if constexpr (std::is_pointer_v<Ours> || std::is_pointer_v<Theirs>) {
    if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
      using O = std::remove_pointer_t<Ours>;
      using T = std::remove_pointer_t<Theirs>;
      return AlikePointee<O, T>::value;
    } else {
      return false;
    }
  } else if constexpr (std::is_class_v<Ours> || std::is_class_v<Theirs>) {
    return std::is_class_v<Ours> && std::is_class_v<Theirs> && sizeof(Ours) == sizeof(Theirs) &&
           alignof(Ours) <= 8 && std::is_trivially_copyable_v<Theirs>;
  } else if constexpr (std::is_floating_point_v<Ours> || std::is_floating_point_v<Theirs>) {
    return std::is_same_v<Ours, Theirs>;
  } else if constexpr (std::is_enum_v<Ours> || std::is_enum_v<Theirs>) {
    return sizeof(Ours) == sizeof(Theirs);  // a C enumeration's sign is the compiler's choice
  } else {
    return sizeof(Ours) == sizeof(Theirs) && std::is_signed_v<Ours> == std::is_signed_v<Theirs>;
  }
}

// Behind a pointer: our `void` is any struct, as handles are; a struct of ours may be a prefix of
// theirs.
template <class Ours, class Theirs>
struct AlikePointee {
  static constexpr bool same_const = std::is_const_v<Ours> == std::is_const_v<Theirs>;
  static constexpr bool target() {
    using O = std::remove_cv_t<Ours>;
    using T = std::remove_cv_t<Theirs>;
    if constexpr (std::is_void_v<O>) {
      return std::is_void_v<T> || std::is_class_v<T>;
    } else if constexpr (std::is_class_v<O> && std::is_class_v<T>) {
      return sizeof(O) <= sizeof(T);
    } else {
      return alike_value<O, T>();
    }
  }
  static constexpr bool value = same_const && target();
};

template <class Ours, class Theirs>
struct Alike : std::false_type {};

template <class R, class... P, class S, class... Q>
struct Alike<R(P...), S(Q...)> {
  static constexpr bool parameters() {
    if constexpr (sizeof...(P) == sizeof...(Q)) {
      return (alike_value<P, Q>() && ...);
    } else {
      return false;
    }
  }
  static constexpr bool value = alike_value<R, S>() && parameters();
};

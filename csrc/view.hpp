// F0. What a backend sees of an array: rows of bytes at a pitch. And how rows are copied.
#pragma once

#include <cstdint>
#include <cstring>

namespace meshring {

// `rows` runs of `bytes` bytes, each `pitch` bytes after the one before. A block of a C-contiguous
// array along any axis has this form; its logical bytes are the runs one after another.
struct View {
  char* data = nullptr;
  int64_t rows = 0;
  int64_t bytes = 0;
  int64_t pitch = 0;

  int64_t size() const { return rows * bytes; }
  bool contiguous() const { return rows <= 1 || bytes == pitch; }
};

// Calls f(pointer, length) for the pieces of the logical bytes [lo, hi) of v, in order.
template <class F>
inline void for_each_piece(const View& v, int64_t lo, int64_t hi, F&& f) {
  if (hi <= lo) return;
  if (v.contiguous()) {
    f(v.data + lo, hi - lo);
    return;
  }
  int64_t row = lo / v.bytes;
  int64_t col = lo - row * v.bytes;
  while (lo < hi) {
    const int64_t len = v.bytes - col < hi - lo ? v.bytes - col : hi - lo;
    f(v.data + row * v.pitch + col, len);
    lo += len;
    col = 0;
    ++row;
  }
}

inline void copy_out_of(const View& from, int64_t lo, int64_t hi, char* to) {
  for_each_piece(from, lo, hi, [&to](const char* p, int64_t n) {
    std::memcpy(to, p, static_cast<size_t>(n));
    to += n;
  });
}

inline void copy_into(const View& to, int64_t lo, int64_t hi, const char* from) {
  for_each_piece(to, lo, hi, [&from](char* p, int64_t n) {
    std::memcpy(p, from, static_cast<size_t>(n));
    from += n;
  });
}

}  // namespace meshring

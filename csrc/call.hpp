// F0. One collective or point-to-point operation, as every floor above hands it on.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.hpp"
#include "view.hpp"

namespace meshring {

enum class CallKind : uint8_t {
  none,
  all_reduce,
  all_gather,
  reduce_scatter,
  broadcast,
  reduce,
  gather,
  scatter,
  all_to_all,
  barrier,
  send,
  recv,
  split,
  synchronize,
  init,
  shrink,
};

inline constexpr const char* kCallNames[] = {
    "nothing", "all_reduce",  "all_gather", "reduce_scatter", "broadcast", "reduce",
    "gather",  "scatter",     "all_to_all", "barrier",        "send",      "recv",
    "split",   "synchronize", "init",       "shrink"};
constexpr const char* name_of(CallKind k) { return kCallNames[static_cast<size_t>(k)]; }

constexpr bool has_op(CallKind k) {
  return k == CallKind::all_reduce || k == CallKind::reduce || k == CallKind::reduce_scatter;
}
constexpr bool has_root(CallKind k) {
  return k == CallKind::broadcast || k == CallKind::reduce || k == CallKind::gather ||
         k == CallKind::scatter;
}
constexpr bool is_transfer(CallKind k) { return k == CallKind::send || k == CallKind::recv; }
// One block per rank is cut out of the input (else the input is one block for everybody).
constexpr bool cuts_input(CallKind k) {
  return k == CallKind::reduce_scatter || k == CallKind::scatter || k == CallKind::all_to_all;
}

inline constexpr int kMaxDims = 8;  // dimensions kept for messages; arrays may have more

// `in` and `out` are C-contiguous. Seen along the axis an array is outer x length x unit bytes.
// Without an axis: outer = 1, unit = size_of(dtype), length = count.
struct Call {
  CallKind kind = CallKind::none;
  CallKind part_of = CallKind::none;  // an exchange of lengths before that operation
  DType dtype = DType::float32;
  RedOp op = RedOp::sum;
  int8_t axis = -1;     // for messages
  uint8_t ndim = 0;     // of the caller's array, for messages
  int16_t device = -1;  // GPU of the arrays; -1 is the host
  int32_t root = -1;    // root, or the peer of send and recv
  uint32_t site = 0;    // the caller's file and line (Board::add_site)
  int64_t count = 0;    // elements of the caller's array, for messages
  const void* in = nullptr;
  void* out = nullptr;
  void* stream = nullptr;  // of the GPU
  int64_t outer = 1;
  int64_t unit = 1;
  int64_t length = 0;  // of the axis, of each block, when all are equal
  // Uneven: the length of rank i's block (n entries); all_to_all: what i sends to j at i * n + j.
  std::vector<int64_t> sizes;
  int64_t dims[kMaxDims] = {};
  // Of a sum on a GPU: each rank's elements are multiplied by this number first, whose bytes, in
  // the dtype (of the real part), are these.
  bool scaled = false;
  uint64_t scale = 0;
};

// What must be equal on all ranks, in one number: compared before any data moves.
inline uint64_t signature(const Call& c) {
  uint64_t h = 0x9e3779b97f4a7c15ull;
  const auto mix = [&h](uint64_t v) {
    h = (h ^ v) * 0xff51afd7ed558ccdull;
    h ^= h >> 32;
  };
  mix(static_cast<uint64_t>(c.kind) | static_cast<uint64_t>(c.dtype) << 8 |
      static_cast<uint64_t>(c.part_of) << 24 |
      (has_op(c.kind) || has_op(c.part_of) ? static_cast<uint64_t>(c.op) << 16 : 0) |
      (has_root(c.kind) || has_root(c.part_of)
           ? static_cast<uint64_t>(static_cast<uint32_t>(c.root)) << 32
           : 0));
  mix(static_cast<uint64_t>(c.outer));
  mix(static_cast<uint64_t>(c.unit));
  mix(static_cast<uint64_t>(c.length));
  for (int64_t s : c.sizes) mix(static_cast<uint64_t>(s));
  if (c.scaled) mix(c.scale);
  return h;
}

// The block structure of a call in a group of n ranks.
class Blocks {
 public:
  Blocks(const Call& call, int n) : c_(call), n_(n) {}

  // Length along the axis of what rank i gives to rank j (all_to_all) or of block j or i.
  int64_t length(int from, int to) const {
    if (c_.sizes.empty()) return c_.length;
    if (c_.kind == CallKind::all_to_all) return c_.sizes[static_cast<size_t>(from * n_ + to)];
    return c_.sizes[static_cast<size_t>(cuts_input(c_.kind) ? to : from)];
  }
  int64_t bytes(int from, int to) const { return c_.outer * length(from, to) * c_.unit; }

  // Block for rank `to` in the input of rank `from`, which lies at `base`.
  View input(int from, int to, const void* base) const {
    char* p = static_cast<char*>(const_cast<void*>(base));
    const int64_t row = length(from, to) * c_.unit;
    if (!cuts_input(c_.kind)) return flat(p, c_.outer * row);
    const Place at = place(to, [&](int j) { return length(from, j); });
    return {p + at.before * c_.unit, c_.outer, row, at.total * c_.unit};
  }

  // Where rank `to` puts what came from rank `from`, in its output at `base`.
  View output(int from, int to, void* base) const {
    char* p = static_cast<char*>(base);
    const int64_t row = length(from, to) * c_.unit;
    const bool joins = c_.kind == CallKind::all_gather || c_.kind == CallKind::gather ||
                       c_.kind == CallKind::all_to_all;
    if (!joins) return flat(p, c_.outer * row);
    const Place at = place(from, [&](int i) { return length(i, to); });
    return {p + at.before * c_.unit, c_.outer, row, at.total * c_.unit};
  }

  // The largest and the smallest block of the whole call, in bytes: the same on every rank.
  int64_t largest() const { return extreme(true) * c_.outer * c_.unit; }
  // Bytes of the shortest non-empty row that a strided copy would move.
  int64_t shortest_row() const { return extreme(false) * c_.unit; }

 private:
  struct Place {
    int64_t before, total;
  };
  // Of block k among n blocks of the given lengths.
  template <class Length>
  Place place(int k, Length&& length) const {
    if (c_.sizes.empty()) return {c_.length * k, c_.length * n_};
    Place at{0, 0};
    for (int i = 0; i < n_; ++i) {
      if (i == k) at.before = at.total;
      at.total += length(i);
    }
    return at;
  }
  static View flat(char* p, int64_t bytes) { return {p, 1, bytes, bytes}; }
  int64_t extreme(bool largest) const {
    if (c_.sizes.empty()) return c_.length;
    int64_t best = 0;
    for (int64_t s : c_.sizes)
      if (s > 0 && (best == 0 || (largest ? s > best : s < best))) best = s;
    return best;
  }

  const Call& c_;
  int n_;
};

}  // namespace meshring

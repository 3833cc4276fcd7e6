// F1. Which launches pack or unpack an array: from the blocks of a call to the kernels' parameters.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../call.hpp"
#include "layout.hpp"

namespace meshring::device {

// An array cut into blocks along its rows, and where each block lies in the packed buffer; bytes.
struct Layout {
  int64_t rows = 0;
  int64_t pitch = 0;  // of the array
  int count = 0;      // of blocks
  int skip = -1;      // a block that is not moved

  // Equal blocks: the width of each and the distance of their places in the packed buffer.
  int64_t width = 0;
  int64_t spacing = 0;
  // Uneven: of each block; the first begins at column 0, each other where the one before ends.
  std::vector<int64_t> widths;
  std::vector<int64_t> offsets;

  bool equal() const { return widths.empty(); }
  int64_t width_of(int k) const { return equal() ? width : widths[static_cast<size_t>(k)]; }
  int64_t offset_of(int k) const { return equal() ? spacing * k : offsets[static_cast<size_t>(k)]; }
  // The end of the last block in the packed buffer.
  int64_t packed_bytes() const {
    int64_t end = 0;
    for (int k = 0; k < count; ++k)
      if (rows > 0 && width_of(k) > 0) end = std::max(end, offset_of(k) + rows * width_of(k));
    return end;
  }
};

// n blocks of a call's array. Packed they lie one behind the other, or each `spacing` bytes after
// the one before, which leaves padding behind the shorter ones.
template <class Length>
Layout layout_of(const Call& call, int n, int64_t spacing, Length&& length) {
  Layout out;
  out.rows = call.outer;
  out.count = n;
  const int64_t first = n > 0 ? length(0) : 0;
  bool equal = true;
  for (int k = 0; k < n; ++k) {
    out.pitch += length(k) * call.unit;
    equal = equal && length(k) == first;
  }
  if (equal) {
    out.width = first * call.unit;
    out.spacing = spacing > 0 ? spacing : out.rows * out.width;
    return out;
  }
  int64_t end = 0;
  for (int k = 0; k < n; ++k) {
    out.widths.push_back(length(k) * call.unit);
    out.offsets.push_back(spacing > 0 ? spacing * k : end);
    end += out.rows * out.widths.back();
  }
  return out;
}

// The blocks that rank `me` of n cuts out of its input: reduce_scatter, scatter, all_to_all.
inline Layout input_layout(const Call& call, int me, int n, int64_t spacing = 0) {
  const Blocks blocks(call, n);
  return layout_of(call, n, spacing, [&](int k) { return blocks.length(me, k); });
}

// The blocks that rank `me` of n joins in its output: all_gather, gather, all_to_all.
inline Layout output_layout(const Call& call, int me, int n, int64_t spacing = 0) {
  const Blocks blocks(call, n);
  return layout_of(call, n, spacing, [&](int k) { return blocks.length(k, me); });
}

struct Launch {
  int kernel = 0;  // in kKernelNames
  int vector = 1;  // bytes
  bool wide = false;
  u64 work = 0;  // vectors
  void* params[2] = {};

  // Enough thread blocks to fill the device, none without work.
  u32 grid(u32 most) const {
    const u64 tile = static_cast<u64>(kThreads) * batch_of(static_cast<u32>(vector), wide);
    return static_cast<u32>(std::min<u64>(most, (work + tile - 1) / tile));
  }
};

namespace detail {

// In the order of MESHRING_KERNELS.
constexpr int kernel_of(int vector, bool equal, bool wide) {
  int row = 0;
  while (1 << row < vector) ++row;
  return row * 4 + (equal ? 0 : 2) + (wide ? 1 : 0);
}

template <class Index>
Division<Index> division_by(Index divisor) {
  __extension__ using Wide = unsigned __int128;
  constexpr int kBits = static_cast<int>(sizeof(Index)) * 8 - 1;
  u32 log = 0;
  while ((static_cast<u64>(1) << log) < divisor) ++log;
  const Wide magic =
      ((static_cast<Wide>(1) << (kBits + static_cast<int>(log))) + divisor - 1) / divisor;
  // divide() of u32 shifts the whole product, that of u64 its upper half.
  return {static_cast<Index>(magic), sizeof(Index) == 4 ? kBits + log : log};
}

// Some of a layout's blocks, one behind the other in the array, which one launch moves.
struct Part {
  int first, last;  // blocks [first, last)
  int64_t column;   // of block `first`
  int64_t columns;  // bytes of a row in these blocks, moved or not
  int64_t skip_at;  // column, seen from `column`, of the block that is left out
  int64_t skipped;  // its width

  int64_t moved() const { return columns - skipped; }
};

inline Part part_of(const Layout& layout, int first, int last, int64_t column) {
  Part part{first, last, column, 0, 0, 0};
  for (int k = first; k < last; ++k) {
    if (k == layout.skip) {
      part.skip_at = part.columns;
      part.skipped = layout.width_of(k);
    }
    part.columns += layout.width_of(k);
  }
  return part;
}

// The widest vector that all addresses, pitches and lengths are multiples of.
inline int vector_of(const Layout& layout, const void* strided, const void* packed) {
  uint64_t all = reinterpret_cast<uintptr_t>(strided) | reinterpret_cast<uintptr_t>(packed);
  if (layout.rows > 1) all |= static_cast<uint64_t>(layout.pitch);
  if (layout.equal()) {
    all |= static_cast<uint64_t>(layout.width);
    if (layout.count > 1) all |= static_cast<uint64_t>(layout.spacing);
  } else {
    for (int k = 0; k < layout.count; ++k) {
      all |= static_cast<uint64_t>(layout.width_of(k));
      if (k != layout.skip && layout.width_of(k) > 0)
        all |= static_cast<uint64_t>(layout.offset_of(k));
    }
  }
  int vector = 16;
  while (all % static_cast<uint64_t>(vector) != 0) vector /= 2;
  return vector;
}

inline bool is_wide(const Layout& layout, int vector) {
  const int64_t most = std::max(layout.rows * layout.pitch, layout.packed_bytes());
  return static_cast<u64>(most / vector) > kNarrowLimit;
}

template <class Index>
void fill(Equal<Index>& out, const Layout& layout, const Part&, int64_t vector) {
  out.width = static_cast<Index>(layout.width / vector);
  out.spacing = static_cast<Index>(layout.spacing / vector);
  out.by_width = division_by(out.width);
}

template <class Index>
void fill(Uneven<Index>& out, const Layout& layout, const Part& part, int64_t vector) {
  out.count = static_cast<u32>(part.last - part.first);
  int64_t column = 0;
  for (u32 k = 0; k < out.count; ++k) {
    const int block = part.first + static_cast<int>(k);
    out.column[k] = static_cast<Index>(column / vector);
    out.offset[k] = static_cast<Index>(layout.offset_of(block) / vector);
    column += layout.width_of(block);
  }
  out.column[out.count] = static_cast<Index>(column / vector);
}

template <template <class> class Kind, class Index, class F>
void launch_part(const Layout& layout, const Part& part, int vector, void* strided, void* packed,
                 bool pack, F&& launch) {
  Copy<Index> copy{};
  char* const array = static_cast<char*>(strided) + part.column;
  copy.from = pack ? array : packed;
  copy.to = pack ? packed : array;
  copy.unpack = pack ? 0 : ~Index{0};
  copy.columns = static_cast<Index>(part.moved() / vector);
  copy.work = static_cast<Index>(layout.rows) * copy.columns;
  copy.pitch = layout.rows > 1 ? static_cast<Index>(layout.pitch / vector) : 0;
  copy.skip_from = static_cast<Index>(part.skip_at / vector);
  copy.skip = static_cast<Index>(part.skipped / vector);
  copy.by_columns = division_by(copy.columns);
  Kind<Index> blocks;
  fill(blocks, layout, part, vector);
  const bool wide = sizeof(Index) == 8;
  const int kernel = kernel_of(vector, layout.equal(), wide);
  launch(Launch{kernel, vector, wide, copy.work, {&copy, &blocks}});
}

// All launches of one kind of blocks and index; at most `capacity` blocks each.
template <template <class> class Kind, class Index, class F>
void launch_parts(const Layout& layout, int capacity, int vector, void* strided, void* packed,
                  bool pack, F&& launch) {
  int64_t column = 0;
  for (int first = 0; first < layout.count; first += capacity) {
    const int last = std::min(layout.count, first + capacity);
    const Part part = part_of(layout, first, last, column);
    if (part.moved() > 0)
      launch_part<Kind, Index>(layout, part, vector, strided, packed, pack, launch);
    column += part.columns;
  }
}

}  // namespace detail

// Calls launch(const Launch&) for what packs (or unpacks) an array: once for equal blocks; for
// uneven ones once for every Uneven::kCapacity of them, as their table travels as a parameter.
template <class F>
void plan(const Layout& layout, void* strided, void* packed, bool pack, F&& launch) {
  if (layout.rows == 0) return;
  const int vector = detail::vector_of(layout, strided, packed);
  const bool wide = detail::is_wide(layout, vector);
  const auto run = [&](auto parts, u32 capacity) {
    parts(layout, static_cast<int>(capacity), vector, strided, packed, pack, launch);
  };
  if (layout.equal()) {
    const auto all = static_cast<u32>(layout.count);
    wide ? run(detail::launch_parts<Equal, u64, F&>, all)
         : run(detail::launch_parts<Equal, u32, F&>, all);
  } else {
    wide ? run(detail::launch_parts<Uneven, u64, F&>, Uneven<u64>::kCapacity)
         : run(detail::launch_parts<Uneven, u32, F&>, Uneven<u32>::kCapacity);
  }
}

}  // namespace meshring::device

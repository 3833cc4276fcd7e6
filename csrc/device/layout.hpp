// F1. Copies between an array and its packed blocks: the index arithmetic of the kernels, the same
// lines for the GPU and for the CPU. Includes nothing, so that NVRTC compiles it without headers.
//
// The array is `rows` rows at a pitch; a row is cut into blocks along its columns. Packed, a block
// is contiguous: its rows one after another, from the block's offset on. All lengths count vectors
// of the kernel's width. Work item i is one vector: row by row, column by column of the array, so
// neighbouring threads touch neighbouring bytes on both sides.
#pragma once

#ifdef __CUDACC__
#define MESHRING_BOTH __host__ __device__ __forceinline__
#define MESHRING_UNROLL _Pragma("unroll")
#else
#define MESHRING_BOTH inline
#define MESHRING_UNROLL
#endif

namespace meshring::device {

using u32 = unsigned;
using u64 = unsigned long long;

inline constexpr u32 kThreads = 256;             // of one thread block
inline constexpr u32 kParameterBytes = 4096;     // of one launch, up to PTX ISA 8.0
inline constexpr u64 kNarrowLimit = 0x7fffffff;  // the largest index of the 32-bit kernels

// ---- vectors --------------------------------------------------------------------------------

template <int width>
struct Vector;
template <>
struct Vector<1> {
  unsigned char a;
};
template <>
struct alignas(2) Vector<2> {
  unsigned short a;
};
template <>
struct alignas(4) Vector<4> {
  u32 a;
};
template <>
struct alignas(8) Vector<8> {
  u32 a, b;
};
template <>
struct alignas(16) Vector<16> {
  u32 a, b, c, d;
};

// Vectors that a thread loads before it stores the first: enough bytes in flight to hide latency.
MESHRING_BOTH constexpr u32 batch_of(u32 width, bool wide) { return wide ? 2 : width >= 8 ? 4 : 8; }

// ---- division by a number that the launch knows ------------------------------------------------

// Exact for dividends below 2^31 and 2^63 (Granlund and Montgomery 1994).
template <class Index>
struct Division {
  Index magic;
  u32 shift;
};

MESHRING_BOTH u32 divide(u32 x, Division<u32> by) {
  return static_cast<u32>((static_cast<u64>(x) * by.magic) >> by.shift);
}

MESHRING_BOTH u64 divide(u64 x, Division<u64> by) {
#ifdef __CUDA_ARCH__
  const u64 high = __umul64hi(x, by.magic);
#else
  __extension__ using Wide = unsigned __int128;
  const u64 high = static_cast<u64>((static_cast<Wide>(x) * by.magic) >> 64);
#endif
  return by.shift == 0 ? x : high >> (by.shift - 1);
}

// ---- what one launch moves -------------------------------------------------------------------

template <class Index>
struct Copy {
  const void* from;
  void* to;
  Index work;                  // vectors to move
  Index columns;               // of a row that are moved
  Index pitch;                 // from one row to the next
  Index skip_from, skip;       // columns from skip_from on lie `skip` further: a block left out
  Division<Index> by_columns;  // of a work item
  Index unpack;                // all bits set: from packed to strided; 0: the other way
};

template <class Index>
struct Block {
  Index column, width, offset;
};

// Equal blocks at equal distances.
template <class Index>
struct Equal {
  Index width, spacing;
  Division<Index> by_width;

  MESHRING_BOTH Block<Index> at(Index column, u32&) const {
    const Index k = divide(column, by_width);
    return {k * width, width, k * spacing};
  }
};

// Any blocks, one behind the other in the array and anywhere in the packed buffer.
template <class Index>
struct Uneven {
  static constexpr u32 kCapacity =
      (kParameterBytes - sizeof(Copy<Index>) - 4 * sizeof(Index)) / (2 * sizeof(Index));
  u32 count;
  Index column[kCapacity + 1];  // the last entry is the end of the last block
  Index offset[kCapacity];

  // `hint` is the block of the thread's last vector, which most often is this one's too.
  MESHRING_BOTH Block<Index> at(Index c, u32& hint) const {
    u32 low = hint;
    if (c < column[low] || c >= column[low + 1]) {
      low = 0;
      u32 high = count;
      while (high - low > 1) {  // of empty blocks at the same column the last one wins: it has c
        const u32 middle = (low + high) / 2;
        (column[middle] <= c ? low : high) = middle;
      }
      hint = low;
    }
    return {column[low], column[low + 1] - column[low], offset[low]};
  }
};

// ---- the thread ------------------------------------------------------------------------------

template <class Index>
struct Place {
  Index strided, packed;
};

template <class Index, class Blocks>
MESHRING_BOTH Place<Index> place_of(const Copy<Index>& copy, const Blocks& blocks, Index i,
                                    u32& hint) {
  const Index row = divide(i, copy.by_columns);
  Index column = i - row * copy.columns;
  if (column >= copy.skip_from) column += copy.skip;
  const Block<Index> block = blocks.at(column, hint);
  return {row * copy.pitch + column, block.offset + row * block.width + (column - block.column)};
}

// What thread `thread` of block `block` does in a launch of `grid` blocks of `threads` threads.
template <int width, class Index, class Blocks>
MESHRING_BOTH void copy_thread(const Copy<Index>& copy, const Blocks& blocks, u32 block, u32 thread,
                               u32 grid, u32 threads) {
  constexpr u32 kBatch = batch_of(width, sizeof(Index) == 8);
  const auto* from = static_cast<const Vector<width>*>(copy.from);
  auto* to = static_cast<Vector<width>*>(copy.to);
  const Index tile = static_cast<Index>(threads) * kBatch;
  u32 hint = 0;
  for (Index first = block * tile; first < copy.work; first += grid * tile) {
    Vector<width> held[kBatch] = {};
    Index target[kBatch] = {};
    MESHRING_UNROLL
    for (u32 u = 0; u < kBatch; ++u) {
      const Index i = first + u * threads + thread;
      if (i < copy.work) {
        const Place<Index> place = place_of(copy, blocks, i, hint);
        // By a mask: a branch on the direction would double the code of the loop.
        const Index swap = (place.strided ^ place.packed) & copy.unpack;
        held[u] = from[place.strided ^ swap];
        target[u] = place.packed ^ swap;
      }
    }
    MESHRING_UNROLL
    for (u32 u = 0; u < kBatch; ++u) {
      if (first + u * threads + thread < copy.work) to[target[u]] = held[u];
    }
  }
}

// ---- the kernels -----------------------------------------------------------------------------

// X(width, kind of blocks, index type).
#define MESHRING_KERNELS_OF(X, width) \
  X(width, Equal, u32) X(width, Equal, u64) X(width, Uneven, u32) X(width, Uneven, u64)
#define MESHRING_KERNELS(X) \
  MESHRING_KERNELS_OF(X, 1) \
  MESHRING_KERNELS_OF(X, 2) \
  MESHRING_KERNELS_OF(X, 4) MESHRING_KERNELS_OF(X, 8) MESHRING_KERNELS_OF(X, 16)

inline constexpr const char* kKernelNames[] = {
#define MESHRING_NAME(width, Blocks, Index) "meshring_copy_" #width "_" #Blocks "_" #Index,
    MESHRING_KERNELS(MESHRING_NAME)
#undef MESHRING_NAME
};
static_assert(sizeof(Copy<u32>) + sizeof(Uneven<u32>) <= kParameterBytes);
static_assert(sizeof(Copy<u64>) + sizeof(Uneven<u64>) <= kParameterBytes);
inline constexpr int kKernelCount = sizeof(kKernelNames) / sizeof(kKernelNames[0]);

}  // namespace meshring::device

// F1. The reduction kernels for x86-64 with AVX2 and F16C.
#ifdef __x86_64__

// Every header before the pragma: none of their inline functions may be compiled for AVX2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtype.hpp"

#pragma GCC target("avx2,f16c")

namespace meshring {
namespace avx2 {
namespace {

inline void half_load(const char* p, __m256* x) {
  *x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void half_load(const char* p, __m128* x) {
  *x = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void half_store(char* p, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void half_store(char* p, __m128 x) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace avx2
}  // namespace meshring

#define MESHRING_ISA avx2
#define MESHRING_VECTOR_BYTES 32
#define MESHRING_F16C
#include "reduce_kernels.hpp"

namespace meshring {

const KernelTable kAvx2Kernels = avx2::make_table();

}  // namespace meshring

#endif  // __x86_64__

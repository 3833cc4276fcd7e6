// F1. The reduction kernels for x86-64 with the AVX-512 of Skylake-SP.
#ifdef __x86_64__

// Every header before the pragma: none of their inline functions may be compiled for AVX-512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtype.hpp"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c,prefer-vector-width=512")

namespace meshring {
namespace avx512 {
namespace {

// The zero-masked forms: GCC 12 warns of an uninitialised value inside the plain ones (bug 105593).
inline void half_load(const char* p, __m512* x) {
  *x = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void half_load(const char* p, __m128* x) {
  *x = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void half_store(char* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT));
}
inline void half_store(char* p, __m128 x) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace avx512
}  // namespace meshring

#define MESHRING_ISA avx512
#define MESHRING_VECTOR_BYTES 64
#define MESHRING_F16C
#include "reduce_kernels.hpp"

namespace meshring {

const KernelTable kAvx512Kernels = avx512::make_table();

}  // namespace meshring

#endif  // __x86_64__

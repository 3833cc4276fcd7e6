// F1. The reduction kernels for any machine: 16-byte vectors are SSE2 on x86-64 and NEON on arm64.
#define MESHRING_ISA portable
#define MESHRING_VECTOR_BYTES 16
#include "reduce_kernels.hpp"

namespace meshring {

const KernelTable kPortableKernels = portable::make_table();

}  // namespace meshring

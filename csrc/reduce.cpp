// F1. Chooses the kernel table once; reduce() is then one load and one indirect call.
#include "reduce.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "reduce_kernels.hpp"

namespace meshring {
namespace {

constexpr Isa kIsas[] = {Isa::portable, Isa::avx2, Isa::avx512};

Isa cpu_isa() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("f16c")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa allowed_isa() {
  const Isa cpu = cpu_isa();
  if (const char* wish = std::getenv("MESHRING_ISA")) {
    for (const Isa isa : kIsas) {
      if (std::strcmp(wish, name_of(isa)) == 0 && isa < cpu) return isa;
    }
  }
  return cpu;
}

const KernelTable& table_of(Isa isa) {
  switch (isa) {
#ifdef __x86_64__
    case Isa::avx512:
      return kAvx512Kernels;
    case Isa::avx2:
      return kAvx2Kernels;
#else
    case Isa::avx512:
    case Isa::avx2:
#endif
    case Isa::portable:
      break;
  }
  return kPortableKernels;
}

std::atomic<const KernelTable*> current{nullptr};  // null until the first use

const KernelTable* choose() {
  const KernelTable* best = &table_of(best_isa());
  const KernelTable* none = nullptr;
  // Does nothing where set_isa() was first.
  return current.compare_exchange_strong(none, best) ? best : none;
}

const KernelTable* table() {
  const KernelTable* t = current.load(std::memory_order_relaxed);
  return __builtin_expect(t != nullptr, 1) ? t : choose();
}

}  // namespace

void reduce(DType dtype, RedOp op, void* dst, const void* const* srcs, int n, int64_t count) {
  if (n == 1 && dtype != DType::boolean) {  // mean divides by 1; only bool needs normalising
    if (dst != srcs[0] && count > 0) {
      std::memcpy(dst, srcs[0], static_cast<size_t>(count) * size_of(dtype));
    }
    return;
  }
  table()->at[static_cast<size_t>(dtype)][static_cast<size_t>(op)](dst, srcs, n, count);
}

Isa best_isa() {
  static const Isa best = allowed_isa();
  return best;
}

Isa current_isa() {
  const KernelTable* t = table();
  for (const Isa isa : kIsas) {
    if (t == &table_of(isa)) return isa;
  }
  return Isa::portable;
}

void set_isa(Isa isa) { current.store(&table_of(isa < best_isa() ? isa : best_isa())); }

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "unknown";
}

}  // namespace meshring

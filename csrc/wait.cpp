#include "wait.hpp"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace meshring {

void Event::wake() {
  epoch.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&epoch), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Event::sleep(uint32_t seen, int64_t nanoseconds) {
  timespec limit{nanoseconds / 1000000000, nanoseconds % 1000000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&epoch), FUTEX_WAIT, seen, &limit, nullptr, 0);
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  const int n = CPU_COUNT(&set);
  return n > 0 ? n : 1;
}

Patience patience_for(int ranks_here) {
  Patience p;
  if (ranks_here > usable_cores()) {
    p.spins = 20;  // the rank that we wait for needs our core
    p.more_spins = 0;
  }
  return p;
}

void wait_a_moment(int round) {
  if (round < 200) {
    sched_yield();
    return;
  }
  const timespec t{0, round < 2000 ? 50000 : 1000000};
  nanosleep(&t, nullptr);
}

namespace detail {

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void yield_once() { sched_yield(); }

}  // namespace detail
}  // namespace meshring

// F1. Waiting for another rank: spin, then yield, then sleep on a futex in shared memory.
#pragma once

#include <atomic>
#include <cstdint>

namespace meshring {

// What the floor that knows Python wants to hear about while a rank waits.
class Hooks {
 public:
  virtual ~Hooks() = default;
  virtual void release() {}                     // before the first yield: let the GIL go
  virtual bool interrupted() { return false; }  // a signal handler raised
};

// Eventcount. Whoever makes a condition true does so by a seq_cst store and then calls notify();
// sleepers announce themselves by a seq_cst increment and then read the condition by seq_cst loads
// before they sleep. So either the notifier sees the sleeper or the sleeper sees the condition: no
// wake-up is lost. (No fences: ThreadSanitizer does not understand them.)
struct alignas(128) Event {
  std::atomic<uint32_t> epoch;
  std::atomic<uint32_t> sleepers;
  std::atomic<uint32_t> troubled;  // ranks that left in trouble; in the line that all read anyway

  void notify() {
    if (sleepers.load(std::memory_order_seq_cst) != 0) wake();
  }
  void wake();                                     // wake everybody
  void sleep(uint32_t seen, int64_t nanoseconds);  // until wake() or the time has passed
};

struct Patience {
  int spins = 100;             // pauses before the GIL is let go (about 5 us)
  int more_spins = 2000;       // pauses after that, before yielding
  int64_t yield_ns = 2000000;  // yield for this long before sleeping
};
Patience patience_for(int ranks_here);  // ranks on this host against the cores we may use
int usable_cores();

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Between two looks at something that tells nobody when it changes: yields first, then sleeps.
void wait_a_moment(int round);

namespace detail {
int64_t now_ns();
void yield_once();
}  // namespace detail

// Returns when ready() holds; ready() must read what it waits for by seq_cst loads. check() is
// called every few milliseconds of a long wait and leaves by an exception when there is no hope.
template <class Ready, class Check>
void wait_for(Ready&& ready, Check&& check, Event& event, const Patience& patience, Hooks& hooks) {
  for (int i = 0; i < patience.spins; ++i) {
    if (ready()) return;
    cpu_pause();
  }
  hooks.release();
  for (int i = 0; i < patience.more_spins; ++i) {
    if (ready()) return;
    cpu_pause();
  }
  const int64_t start = detail::now_ns();
  for (int i = 1;; ++i) {
    if (ready()) return;
    detail::yield_once();
    if (i % 16 == 0 && detail::now_ns() - start > patience.yield_ns) break;
  }
  int64_t nap = 500000;
  for (;;) {
    check();
    event.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = event.epoch.load(std::memory_order_seq_cst);
    const bool done = ready();
    if (!done) event.sleep(seen, nap);
    event.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (done || ready()) return;
    if (nap < 4000000) nap *= 2;
  }
}

}  // namespace meshring

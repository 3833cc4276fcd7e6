#include "world.hpp"

#include <errno.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "deadline.hpp"
#include "error.hpp"

namespace meshring {

namespace {

uint64_t probe_word = 0x70726f6265776f72ull;

std::string list(const std::vector<int>& ranks) {
  std::string s = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) s += (i ? ", " : "") + std::to_string(ranks[i]);
  return s;
}

}  // namespace

const char* name_of(Transport t) {
  switch (t) {
    case Transport::threads:
      return "threads";
    case Transport::process_vm_readv:
      return "process_vm_readv";
    case Transport::shared_slots:
      return "shared slots";
  }
  return "?";
}

World::World(std::shared_ptr<Segment> segment, int rank, bool threads, double timeout, Hooks& hooks)
    : segment_(std::move(segment)), rank_(rank), threads_(threads) {
  if (rank < 0 || rank >= size())
    usage("rank is " + std::to_string(rank) + "; 0 to " + std::to_string(size() - 1) +
          " is possible in a job of " + std::to_string(size()));
  if (self().life.load() != Life::absent)
    usage("rank " + std::to_string(rank) + " has joined this job already (pid " +
          std::to_string(pid(rank)) + "); a process is one rank and joins once");
  pidfds_.assign(static_cast<size_t>(size()), -1);
  try {
    meet(timeout, hooks);
  } catch (...) {
    for (int fd : pidfds_)
      if (fd >= 0) close(fd);
    throw;
  }
}

World::~World() {
  for (int fd : pidfds_)
    if (fd >= 0) close(fd);
}

void World::meet(double timeout, Hooks& hooks) {
  RankEntry& me = self();
  const int known = me.pid.exchange(getpid());
  // Another number than the launcher saw means another pid namespace: pids say nothing here.
  const bool pids_hold = known == 0 || known == getpid();
  me.probe.store(reinterpret_cast<uint64_t>(&probe_word));
  if (const char* launcher = std::getenv("MESHRING_LAUNCHER_PID"))
    prctl(PR_SET_PTRACER, std::strtoul(launcher, nullptr, 10), 0, 0, 0);  // yama: siblings may read
  me.life.store(Life::running);

  Deadline deadline(timeout);
  Event event{};
  Patience patience = patience_for(size());
  const auto everyone = [&](auto&& arrived, const char* what) {
    std::vector<int> missing;
    const auto all = [&] {
      missing.clear();
      for (int r = 0; r < size(); ++r)
        if (!arrived(segment_->rank(r))) missing.push_back(r);
      return missing.empty();
    };
    const auto check = [&] {
      std::vector<int> gone;
      for (int r : missing)
        if (segment_->rank(r).has_wait_status.load() ||
            segment_->rank(r).life.load() > Life::running)
          gone.push_back(r);
      if (all()) return;
      if (!gone.empty()) {
        std::string text = list(gone) + " ended before " + what + ":";
        for (int r : gone) text += " rank " + std::to_string(r) + " " + how_it_ended(r) + ".";
        throw Error(Trouble::peer_lost, text, gone);
      }
      if (deadline.passed())
        throw Error(Trouble::deadline,
                    list(missing) + " did not come within " +
                        std::to_string(static_cast<int64_t>(timeout)) + " s",
                    missing);
      if (hooks.interrupted()) throw Error(Trouble::interrupted, "interrupted");
    };
    wait_for(all, check, event, patience, hooks);
  };
  everyone([](RankEntry& e) { return e.life.load() != Life::absent; }, "they called init");

  if (threads_) return;
  bool readable = pids_hold;
  for (int r = 0; r < size() && pids_hold; ++r) {
    if (r == rank_) continue;
    const long fd = syscall(SYS_pidfd_open, pid(r), 0);
    pidfds_[static_cast<size_t>(r)] = static_cast<int>(fd);
    if (fd < 0) readable = false;
  }
  readable = readable && can_read_peers();
  me.can_read.store(readable ? 1 : 2);
  everyone([](RankEntry& e) { return e.can_read.load() != 0; }, "init was done");
  transport_ = Transport::process_vm_readv;
  for (int r = 0; r < size(); ++r)
    if (segment_->rank(r).can_read.load() != 1) transport_ = Transport::shared_slots;
}

bool World::can_read_peers() const {
  const char* wish = std::getenv("MESHRING_CMA");
  if (wish && (std::strcmp(wish, "off") == 0 || std::strcmp(wish, "0") == 0)) return false;
  for (int r = 0; r < size(); ++r) {
    uint64_t word = 0;
    iovec local{&word, sizeof word};
    iovec remote{reinterpret_cast<void*>(segment_->rank(r).probe.load()), sizeof word};
    if (process_vm_readv(pid(r), &local, 1, &remote, 1, 0) != sizeof word || word != probe_word)
      return false;
  }
  return true;
}

bool World::is_gone(int rank) const {
  const RankEntry& entry = segment_->rank(rank);
  if (entry.life.load(std::memory_order_seq_cst) > Life::running) return true;
  if (entry.has_wait_status.load(std::memory_order_acquire)) return true;
  const int fd = pidfds_[static_cast<size_t>(rank)];
  if (fd < 0) return false;
  pollfd p{fd, POLLIN, 0};
  return poll(&p, 1, 0) > 0;
}

std::string World::how_it_ended(int rank) const {
  const RankEntry& entry = segment_->rank(rank);
  if (!threads_ && std::getenv("MESHRING_LAUNCHER_PID")) {
    for (int i = 0; i < 200 && !entry.has_wait_status.load(std::memory_order_acquire) &&
                    entry.life.load() != Life::raised;
         ++i)
      poll(nullptr, 0, 1);
  }
  return segment_->how_it_ended(rank);
}

void World::read(int rank, const View& remote, int64_t lo, int64_t hi, const View& local) const {
  if (threads_ || rank == rank_) {
    int64_t done = 0;
    for_each_piece(remote, lo, hi, [&](const char* p, int64_t n) {
      if (!(local.contiguous() && local.data + done == p)) copy_into(local, done, done + n, p);
      done += n;
    });
    return;
  }
  constexpr int kVectors = 256;  // pieces given to the kernel in one call
  iovec from[kVectors];
  iovec to[kVectors];
  const int64_t total = hi - lo;
  const int64_t run = std::min(remote.contiguous() ? total : remote.bytes,
                               local.contiguous() ? total : local.bytes);
  const int64_t most = run >= total ? total : run * (kVectors - 2);  // fits both lists
  int64_t done = 0;
  while (done < total) {
    const int64_t step = std::min(total - done, most);
    unsigned long nf = 0;
    unsigned long nt = 0;
    for_each_piece(remote, lo + done, lo + done + step,
                   [&](char* p, int64_t n) { from[nf++] = {p, static_cast<size_t>(n)}; });
    for_each_piece(local, done, done + step,
                   [&](char* p, int64_t n) { to[nt++] = {p, static_cast<size_t>(n)}; });
    const ssize_t got = process_vm_readv(pid(rank), to, nt, from, nf, 0);
    if (got <= 0) {
      const int code = errno;
      if (got == 0 || code == ESRCH || code == EFAULT || is_gone(rank))
        throw Error(Trouble::peer_lost, "its memory cannot be read any more", {rank});
      throw Error(Trouble::backend, std::string("process_vm_readv failed: ") + std::strerror(code));
    }
    done += got;  // the kernel copies at most 2 GiB a call
  }
}

}  // namespace meshring

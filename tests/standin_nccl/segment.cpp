#include "segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "standin.hpp"

namespace standin {

size_t Channel::put(const void* from, size_t bytes_left) {
  const uint64_t at = written.load(std::memory_order_relaxed);
  const size_t room = kBytes - static_cast<size_t>(at - read.load(std::memory_order_acquire));
  const size_t offset = at % kBytes;
  const size_t n = std::min({bytes_left, room, kBytes - offset});
  if (n == 0) return 0;
  std::memcpy(bytes + offset, from, n);
  written.store(at + n, std::memory_order_release);
  return n;
}

size_t Channel::take(void* to, size_t bytes_left) {
  const uint64_t at = read.load(std::memory_order_relaxed);
  const size_t ready = static_cast<size_t>(written.load(std::memory_order_acquire) - at);
  const size_t offset = at % kBytes;
  const size_t n = std::min({bytes_left, ready, kBytes - offset});
  if (n == 0) return 0;
  std::memcpy(to, bytes + offset, n);
  read.store(at + n, std::memory_order_release);
  return n;
}

Segment::~Segment() {
  leave();
  if (shared_ != nullptr) munmap(shared_, bytes_);
}

std::string Segment::join(const std::string& name, int rank, int size) {
  const char* const folder = std::getenv("STANDIN_DIR");
  if (folder == nullptr) return "STANDIN_DIR is not set: it names the folder of shared files";
  name_ = name;
  path_ = std::string(folder) + "/" + name;
  rank_ = rank;
  size_ = size;
  constexpr size_t kPage = 4096;
  const auto pages = [](size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; };
  const auto n = static_cast<size_t>(size);
  const size_t seats = pages(n * sizeof(Seat));
  bytes_ = kPage + seats + pages(n * n * sizeof(Channel));
  fd_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd_ < 0) return text("%s: %s", path_.c_str(), std::strerror(errno));
  if (ftruncate(fd_, static_cast<off_t>(bytes_)) != 0) return std::strerror(errno);
  void* const base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (base == MAP_FAILED) return std::strerror(errno);
  shared_ = static_cast<Shared*>(base);
  seats_ = reinterpret_cast<Seat*>(static_cast<char*>(base) + kPage);
  channels_ = reinterpret_cast<Channel*>(static_cast<char*>(base) + kPage + seats);
  int agreed = 0;
  if (!shared_->size.compare_exchange_strong(agreed, size) && agreed != size) {
    return text("another rank says that there are %d ranks, this one %d", agreed, size);
  }
  // The lock ends with the process: that is how the others know.
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  if (fcntl(fd_, F_OFD_SETLK, &lock) != 0) return text("rank %d is taken", rank);
  int absent = static_cast<int>(Presence::absent);
  if (!own().presence.compare_exchange_strong(absent, static_cast<int>(Presence::joined))) {
    return text("rank %d is taken", rank);
  }
  return "";
}

bool Segment::complete() {
  if (whole_) return true;
  for (int r = 0; r < size_; ++r) {
    if (seat(r).presence.load() == static_cast<int>(Presence::absent)) return false;
  }
  unlink(path_.c_str());
  whole_ = true;
  return true;
}

void Segment::leave() {
  if (fd_ < 0) return;
  if (seats_ != nullptr) own().presence.store(static_cast<int>(Presence::left));
  close(fd_);
  fd_ = -1;
}

bool Segment::alive(int rank) const {
  if (seat(rank).presence.load() != static_cast<int>(Presence::joined)) return false;
  if (rank == rank_ || fd_ < 0) return true;
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(fd_, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

int Segment::missing_peer() const {
  for (int r = 0; r < size_; ++r) {
    if (r != rank_ && !alive(r)) return r;
  }
  return -1;
}

bool Segment::barrier(const Stop& stop) {
  const uint64_t phase = own().phase.fetch_add(1) + 1;
  for (int r = 0; r < size_; ++r) {
    for (int turn = 0; seat(r).phase.load(std::memory_order_acquire) < phase; ++turn) {
      if (stop()) return false;
      pause(turn);
    }
  }
  return true;
}

}  // namespace standin

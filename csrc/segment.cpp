#include "segment.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "error.hpp"

namespace meshring {

namespace {

constexpr uint64_t kMagic = 0x676e697268736d31ull;
constexpr size_t kPage = 4096;

size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

[[noreturn]] void system_error(const std::string& what) {
  const int code = errno;
  throw Error(Trouble::backend, what + " failed: " + std::strerror(code));
}

}  // namespace

struct Segment::Header {
  uint64_t magic;
  uint32_t size;
  uint32_t regions;  // entries ever used
  pthread_mutex_t lock;
  uint64_t end;  // of the file
  uint64_t next_communicator;
  struct Entry {
    uint64_t offset, bytes, communicator;
    uint32_t members_left, used;
  } entries[kMaxRegions];
};

namespace {

size_t ranks_offset(size_t header) { return pages(header); }
size_t sites_offset(size_t header, int n) {
  return pages(ranks_offset(header) + sizeof(RankEntry) * static_cast<size_t>(n));
}
size_t fixed_bytes(size_t header, int n) {
  return pages(sites_offset(header, n) + sizeof(Site) * kSites * static_cast<size_t>(n));
}

class RobustLock {
 public:
  explicit RobustLock(pthread_mutex_t& m) : m_(m) {
    // A rank that died while it held the lock left at most one entry half written, which stays
    // unused.
    if (pthread_mutex_lock(&m_) == EOWNERDEAD) pthread_mutex_consistent(&m_);
  }
  ~RobustLock() { pthread_mutex_unlock(&m_); }
  RobustLock(const RobustLock&) = delete;
  RobustLock& operator=(const RobustLock&) = delete;

 private:
  pthread_mutex_t& m_;
};

}  // namespace

Mapping::Mapping(int fd, size_t offset, size_t bytes) : bytes_(bytes) {
  void* p =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (p == MAP_FAILED) system_error("mapping " + std::to_string(bytes) + " bytes of shared memory");
  data_ = static_cast<char*>(p);
}

Mapping::~Mapping() { munmap(data_, bytes_); }

Segment::Segment(int fd, int size, bool fresh) : fd_(fd), size_(size) {
  fixed_ = std::make_unique<Mapping>(fd, 0, fixed_bytes(sizeof(Header), size));
  header_ = reinterpret_cast<Header*>(fixed_->data());
  ranks_ = reinterpret_cast<RankEntry*>(fixed_->data() + ranks_offset(sizeof(Header)));
  sites_ = reinterpret_cast<Site*>(fixed_->data() + sites_offset(sizeof(Header), size));
  if (!fresh) return;
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(&header_->lock, &attributes);
  pthread_mutexattr_destroy(&attributes);
  header_->size = static_cast<uint32_t>(size);
  header_->end = fixed_bytes(sizeof(Header), size);
  header_->magic = kMagic;
}

std::shared_ptr<Segment> Segment::create(int size) {
  if (size < 1 || size > kMaxRanks)
    usage("size is " + std::to_string(size) + "; 1 to " + std::to_string(kMaxRanks) +
          " ranks fit on one host");
  const int fd = memfd_create("meshring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) system_error("memfd_create");
  if (ftruncate(fd, static_cast<off_t>(fixed_bytes(sizeof(Header), size))) != 0) {
    const int code = errno;
    ::close(fd);
    errno = code;
    system_error("sizing the shared segment");
  }
  fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK);  // nobody can pull mapped pages away
  return std::shared_ptr<Segment>(new Segment(fd, size, true));
}

std::shared_ptr<Segment> Segment::attach(int fd) {
  struct stat st;
  uint64_t magic = 0;
  uint32_t size = 0;
  const bool ours =
      fstat(fd, &st) == 0 && pread(fd, &magic, sizeof magic, 0) == sizeof magic &&
      magic == kMagic && pread(fd, &size, sizeof size, offsetof(Header, size)) == sizeof size &&
      size >= 1 && size <= kMaxRanks &&
      static_cast<size_t>(st.st_size) >= fixed_bytes(sizeof(Header), static_cast<int>(size));
  if (!ours)
    usage("descriptor " + std::to_string(fd) +
          " is not the shared segment of a job of this meshring version; is this process a rank "
          "that `meshring run` started itself?");
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (own < 0) system_error("duplicating the segment's descriptor");
  return std::shared_ptr<Segment>(new Segment(own, static_cast<int>(size), false));
}

Segment::~Segment() { close(); }

void Segment::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

size_t Segment::bytes() const {
  struct stat st;
  return fstat(fd_, &st) == 0 ? static_cast<size_t>(st.st_size) : 0;
}

size_t Segment::bytes_touched() const {
  struct stat st;
  return fstat(fd_, &st) == 0 ? static_cast<size_t>(st.st_blocks) * 512 : 0;
}

uint32_t Segment::add_site(int rank, const std::string& text) {
  const uint32_t id = ranks_[rank].sites.fetch_add(1, std::memory_order_relaxed) + 1;
  Site& site = sites_[static_cast<size_t>(rank) * kSites + id % kSites];
  site.id.store(0, std::memory_order_relaxed);
  // The end of a long path says more than its beginning.
  const size_t room = kTextLength - 4;
  site.text.set(text.size() < room ? text : "..." + text.substr(text.size() - room + 4));
  site.id.store(id, std::memory_order_release);
  return id;
}

std::string Segment::site(int rank, uint32_t id) const {
  const Site& site = sites_[static_cast<size_t>(rank) * kSites + id % kSites];
  if (id == 0 || site.id.load(std::memory_order_acquire) != id) return "";
  return site.text.get();
}

void Segment::set_ended(int rank, Life life, const std::string& text) {
  RankEntry& entry = ranks_[rank];
  if (entry.life.load() == Life::raised) return;  // the exception is the better explanation
  if (!text.empty()) entry.ended.set(text);
  entry.life.store(life, std::memory_order_seq_cst);
}

std::string Segment::how_it_ended(int rank) const {
  const RankEntry& entry = ranks_[rank];
  const Life life = entry.life.load(std::memory_order_acquire);
  if (entry.has_wait_status.load(std::memory_order_acquire)) {
    const int status = entry.wait_status.load(std::memory_order_relaxed);
    if (WIFSIGNALED(status)) {
      const int sig = WTERMSIG(status);
      const char* name = sigabbrev_np(sig);
      return "was killed by " + (name ? "SIG" + std::string(name) : std::string("a signal")) +
             " (signal " + std::to_string(sig) + ")";
    }
    if (life != Life::raised) {
      const int code = WEXITSTATUS(status);
      return "ended with exit code " + std::to_string(code);
    }
  }
  if (life == Life::raised) return "raised " + entry.ended.get();
  if (life == Life::exited) return "ended normally";
  return "ended; how is not visible from here (meshring run would know)";
}

int Segment::allocate(size_t bytes, int members, uint64_t* communicator) {
  bytes = pages(bytes);
  RobustLock guard(header_->lock);
  int chosen = -1;
  const int used = static_cast<int>(header_->regions);
  for (int i = 0; i < used && chosen < 0; ++i)
    if (!header_->entries[i].used && header_->entries[i].bytes >= bytes) chosen = i;
  if (chosen < 0) {
    if (used == kMaxRegions)
      usage("this job has " + std::to_string(kMaxRegions) +
            " communicators open, which is the most; close some");
    if (ftruncate(fd_, static_cast<off_t>(header_->end + bytes)) != 0)
      system_error("growing the shared segment by " + std::to_string(bytes) + " bytes");
    header_->entries[used].offset = header_->end;
    header_->entries[used].bytes = bytes;
    header_->end += bytes;
    header_->regions = static_cast<uint32_t>(used + 1);
    chosen = used;
  }
  Header::Entry& e = header_->entries[chosen];
  e.communicator = ++header_->next_communicator;
  e.members_left = static_cast<uint32_t>(members);
  e.used = 1;
  if (communicator) *communicator = e.communicator;
  return chosen;
}

std::shared_ptr<Mapping> Segment::map(int region) {
  std::lock_guard<std::mutex> guard(maps_lock_);
  std::shared_ptr<Mapping> found = maps_[region].lock();
  if (!found) {
    const Header::Entry& e = header_->entries[region];
    found = std::make_shared<Mapping>(fd_, e.offset, e.bytes);
    maps_[region] = found;
  }
  return found;
}

uint64_t Segment::communicator_of(int region) const {
  return header_->entries[region].communicator;
}

void Segment::release(int region) {
  RobustLock guard(header_->lock);
  Header::Entry& e = header_->entries[region];
  if (e.members_left == 0 || --e.members_left > 0) return;
  fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(e.offset),
            static_cast<off_t>(e.bytes));
  e.used = 0;
}

}  // namespace meshring

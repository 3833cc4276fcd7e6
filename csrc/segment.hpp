// F1. The memory that the ranks of one job on one host share: a memfd without a name.
//
// Fixed part: header, one RankEntry per rank, the text of call sites. After it regions, one per
// communicator, handed out under a robust lock; the file grows when they do not fit and gives the
// pages of a released region back. Nothing outlives the last process that holds the descriptor.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "board.hpp"

namespace meshring {

inline constexpr int kMaxRegions = 4096;  // communicators open at once in one job
inline constexpr int kMaxRanks = 1024;    // ranks on one host

class Mapping {  // RAII of mmap
 public:
  Mapping(int fd, size_t offset, size_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  char* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  char* data_;
  size_t bytes_;
};

class Segment {
 public:
  static std::shared_ptr<Segment> create(int size);
  static std::shared_ptr<Segment> attach(int fd);  // takes a duplicate of fd
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  void close();  // the descriptor: no region can be made or mapped any more
  int fd() const { return fd_; }
  int size() const { return size_; }
  size_t bytes() const;          // of the file
  size_t bytes_touched() const;  // of memory that it really takes

  RankEntry& rank(int r) { return ranks_[r]; }
  uint32_t add_site(int rank, const std::string& text);
  std::string site(int rank, uint32_t id) const;  // "" when forgotten
  void set_ended(int rank, Life life, const std::string& text);
  std::string how_it_ended(int rank) const;  // "was killed by SIGKILL (signal 9)"

  // A zeroed region for `members` ranks, each of which must release it once.
  int allocate(size_t bytes, int members, uint64_t* communicator);
  std::shared_ptr<Mapping> map(int region);
  uint64_t communicator_of(int region) const;
  void release(int region);

 private:
  struct Header;
  Segment(int fd, int size, bool fresh);

  int fd_;
  int size_;
  std::unique_ptr<Mapping> fixed_;
  Header* header_;
  RankEntry* ranks_;
  Site* sites_;
  std::mutex maps_lock_;
  std::map<int, std::weak_ptr<Mapping>> maps_;  // threads of one process share a mapping
};

}  // namespace meshring

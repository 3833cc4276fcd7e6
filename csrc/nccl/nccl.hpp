// F1. NCCL, opened at run time; its errors as sentences.
#pragma once

#include <string>

#include "../error.hpp"
#include "api.hpp"

namespace meshring::nccl {

class Nccl {
 public:
  // The one that open() chose. Throws Error(usage) when none was.
  static const Nccl& get();
  // Opens NCCL for this process; later calls must name the same file. Throws Error(usage): not
  // there, older than 2.18, or symbols missing.
  static const Nccl& open(const std::string& path);
  static bool is_open();

#define MESHRING_MEMBER(member, symbol, version, type, parameters) \
  type(*member) parameters = nullptr;
  MESHRING_NCCL_REQUIRED(MESHRING_MEMBER)
  MESHRING_NCCL_OPTIONAL(MESHRING_MEMBER)
#undef MESHRING_MEMBER

  int version() const { return version_; }
  const std::string& path() const { return path_; }
  std::string identity() const;  // "NCCL 2.32.3, /usr/lib/libnccl.so.2"

  // "ncclAllReduce: ncclSystemError (2), system error. NCCL says: ...", with the hint for it.
  Error error(Result result, const char* function, Handle comm) const;

 private:
  explicit Nccl(const std::string& path);
  int version_ = 0;
  std::string path_;
};

std::string version_text(int code);  // "2.27.3"

}  // namespace meshring::nccl

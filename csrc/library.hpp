// F1. Shared libraries opened at run time.
#pragma once

#include <string>

namespace meshring {

// Stays open until the process ends: NCCL and the CUDA driver have threads of their own.
class Library {
 public:
  Library() = default;
  // Opens a path or a soname. Not open() afterwards when that failed; why() says what dlopen said.
  explicit Library(const std::string& name);

  bool open() const { return handle_ != nullptr; }
  const std::string& path() const { return path_; }  // the file that was really opened
  const std::string& why() const { return why_; }
  void* find(const char* symbol) const;

  template <class Function>
  void find(const char* symbol, Function*& out) const {
    out = reinterpret_cast<Function*>(find(symbol));
  }

 private:
  void* handle_ = nullptr;
  std::string path_;
  std::string why_;
};

}  // namespace meshring

// F0. Typed failures. Raised deep and short; the communicator completes the sentence once.
#pragma once

#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace meshring {

enum class Trouble : unsigned char {
  usage,        // a bad argument; nothing happened
  mismatch,     // the ranks called different things
  deadline,     // some ranks did not come in time
  peer_lost,    // some ranks died or left
  backend,      // the operating system or a library failed
  interrupted,  // a signal handler raised in Python
};

class Error : public std::exception {
 public:
  Error(Trouble trouble, std::string text, std::vector<int> ranks = {})
      : trouble(trouble), text(std::move(text)), ranks(std::move(ranks)) {}
  const char* what() const noexcept override { return text.c_str(); }

  Trouble trouble;
  std::string text;
  std::vector<int> ranks;  // the ranks to blame, in the numbering of the communicator
  std::string table;       // who did what, one line a rank; may be empty
  bool complete = false;   // the text is the whole sentence already
};

[[noreturn]] inline void usage(std::string text) { throw Error(Trouble::usage, std::move(text)); }

}  // namespace meshring

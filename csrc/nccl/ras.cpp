#include "ras.hpp"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

namespace meshring::nccl {

namespace {

constexpr int kFirstVersion = 22400;
constexpr size_t kMost = 16 << 10;  // characters of the report that are kept
constexpr std::chrono::milliseconds kPatience(2000);

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) ::close(fd_);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

int left(std::chrono::steady_clock::time_point until) {
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(
      until - std::chrono::steady_clock::now());
  return ms.count() > 0 ? static_cast<int>(ms.count()) : 0;
}

bool ready(int fd, short what, std::chrono::steady_clock::time_point until) {
  pollfd p{fd, what, 0};
  return poll(&p, 1, left(until)) == 1;
}

std::string ask(const addrinfo& address, std::chrono::steady_clock::time_point until) {
  const Socket s(socket(address.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (s.fd() < 0) return "";
  connect(s.fd(), address.ai_addr, address.ai_addrlen);
  int error = 0;
  socklen_t size = sizeof error;
  if (!ready(s.fd(), POLLOUT, until) ||
      getsockopt(s.fd(), SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0)
    return "";
  const char question[] = "verbose status\n";
  if (send(s.fd(), question, std::strlen(question), MSG_NOSIGNAL) < 0) return "";
  std::string text;
  while (text.size() < kMost && ready(s.fd(), POLLIN, until)) {
    char part[2048];
    const ssize_t n = recv(s.fd(), part, sizeof part, 0);
    if (n <= 0) break;
    text.append(part, static_cast<size_t>(n));
  }
  return text;
}

}  // namespace

std::string ras_report(int version) {
  const char* enabled = std::getenv("NCCL_RAS_ENABLE");
  if (version < kFirstVersion || (enabled && std::strcmp(enabled, "0") == 0)) return "";
  const char* given = std::getenv("NCCL_RAS_ADDR");
  std::string host = given && *given ? given : "localhost:28028";
  const size_t colon = host.rfind(':');
  if (colon == std::string::npos) return "";
  const std::string port = host.substr(colon + 1);
  host.resize(colon);
  if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);  // IPv6
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) return "";
  const auto until = std::chrono::steady_clock::now() + kPatience;
  std::string text;
  for (const addrinfo* a = found; a && text.empty(); a = a->ai_next) text = ask(*a, until);
  freeaddrinfo(found);
  return text;
}

}  // namespace meshring::nccl

#include "nccl.hpp"

#include <atomic>
#include <mutex>

#include "../library.hpp"

namespace meshring::nccl {

namespace {

std::mutex lock;
std::atomic<const Nccl*> chosen{nullptr};  // never destroyed: its threads live to the end

constexpr int kOldest = version_code(2, 18, 1);

const char* name_of(Result r) {
  switch (r) {
    case Result::success:
      return "ncclSuccess";
    case Result::unhandled_cuda_error:
      return "ncclUnhandledCudaError";
    case Result::system_error:
      return "ncclSystemError";
    case Result::internal_error:
      return "ncclInternalError";
    case Result::invalid_argument:
      return "ncclInvalidArgument";
    case Result::invalid_usage:
      return "ncclInvalidUsage";
    case Result::remote_error:
      return "ncclRemoteError";
    case Result::in_progress:
      return "ncclInProgress";
    case Result::timeout:
      return "ncclTimeout";
  }
  return "an unknown result";
}

// The usual cause, and what to do about it.
const char* hint_of(Result r) {
  switch (r) {
    case Result::unhandled_cuda_error:
      return "A kernel of the program failed, the GPU is lost, or driver and CUDA version do not "
             "fit: run with CUDA_LAUNCH_BLOCKING=1 and look at nvidia-smi";
    case Result::system_error:
      return "The network or shared memory refused: on one host set NCCL_SOCKET_IFNAME=lo, in a "
             "container give more /dev/shm (docker run --shm-size=1g); NCCL_DEBUG=WARN says more";
    case Result::invalid_usage:
      return "Often two ranks use the same GPU, or no network interface fits: give each rank a GPU "
             "of its own and look at NCCL_SOCKET_IFNAME; NCCL_DEBUG=WARN says more";
    case Result::remote_error:
      return "Another rank ended or lost its network: look at the first error of the other ranks";
    case Result::invalid_argument:
    case Result::internal_error:
    case Result::timeout:
      return "NCCL_DEBUG=WARN says more";
    case Result::success:
    case Result::in_progress:
      break;
  }
  return "";
}

}  // namespace

std::string version_text(int code) {
  return std::to_string(code / 10000) + "." + std::to_string(code / 100 % 100) + "." +
         std::to_string(code % 100);
}

Nccl::Nccl(const std::string& path) {
  const Library library(path);
  if (!library.open()) usage("NCCL cannot be opened: " + library.why());
  path_ = library.path();
  library.find("ncclGetVersion", get_version);
  if (!get_version || get_version(&version_) != Result::success)
    usage(path_ + " is not NCCL: it has no ncclGetVersion");
  if (version_ < kOldest)
    usage(path_ + " is NCCL " + version_text(version_) + "; " + version_text(kOldest) +
          " or newer is needed: pip install -U nvidia-nccl-cu12");
#define MESHRING_FIND(member, symbol, version, type, parameters) \
  library.find(#symbol, member);                                 \
  if (!member) usage(path_ + " (NCCL " + version_text(version_) + ") has no " #symbol);
  MESHRING_NCCL_REQUIRED(MESHRING_FIND)
#undef MESHRING_FIND
#define MESHRING_FIND(member, symbol, version, type, parameters) library.find(#symbol, member);
  MESHRING_NCCL_OPTIONAL(MESHRING_FIND)
#undef MESHRING_FIND
}

const Nccl& Nccl::open(const std::string& path) {
  const std::lock_guard<std::mutex> guard(lock);
  if (!chosen) chosen = new Nccl(path);
  return *chosen;
}

bool Nccl::is_open() { return chosen != nullptr; }

const Nccl& Nccl::get() {
  const Nccl* nccl = chosen.load(std::memory_order_acquire);
  if (!nccl) usage("NCCL is not open in this process; call meshring.init() first");
  return *nccl;
}

std::string Nccl::identity() const { return "NCCL " + version_text(version_) + ", " + path_; }

Error Nccl::error(Result result, const char* function, Handle comm) const {
  std::string text = std::string(function) + ": " + nccl::name_of(result) + " (" +
                     std::to_string(static_cast<int>(result)) + "), " + error_string(result);
  const char* last = last_error(comm);
  if (last && *last) {
    std::string said = last;
    while (!said.empty() && (said.back() == '\n' || said.back() == ' ')) said.pop_back();
    text += ". NCCL says: " + said;
  }
  text += ". " + identity();
  const char* hint = hint_of(result);
  if (*hint) text += ". " + std::string(hint);
  return {Trouble::backend, text};
}

}  // namespace meshring::nccl

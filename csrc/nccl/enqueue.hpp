// F3. Which NCCL calls and which packing make up one call of ours.
#pragma once

#include "nccl_backend.hpp"

namespace meshring::nccl {

// Of one turn: everything that it enqueues goes to the stream of its call.
class Enqueue {
 public:
  Enqueue(NcclBackend& backend, WaitContext& wait)
      : b_(backend), nccl_(backend.nccl_), wait_(wait) {}

  void go(const Call* calls, size_t count);

 private:
  // Between ncclGroupStart and ncclGroupEnd; ends the group too when it is left by an exception.
  class Group;
  class Operator;

  void one(const Call& call);
  void reduction(const Call& call);
  void all_gather(const Call& call);
  void reduce_scatter(const Call& call);
  void gather(const Call& call);
  void scatter(const Call& call);
  void all_to_all(const Call& call);
  void transfer(const Call& call);

  void gather_uneven(const Call& call, char* packed);
  void reduce_scatter_uneven(const Call& call, const char* packed, Op op);
  void copy(void* to, const void* from, int64_t bytes, Stream stream);
  device::Scratch scratch(const Call& call, int64_t bytes);
  void check(Result result, const char* function);

  NcclBackend& b_;
  const Nccl& nccl_;
  WaitContext& wait_;
  bool grouped_ = false;
};

// Why NCCL cannot do a call, as a sentence; "" where it can.
std::string refusal(const Call& call, int version);

}  // namespace meshring::nccl

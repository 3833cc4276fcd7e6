// F4. A communicator of the survivors.
#include <algorithm>

#include "communicator.hpp"
#include "nccl/nccl_backend.hpp"

namespace meshring {

namespace {

uint64_t hash_of(uint64_t count, const std::vector<int>& ranks) {
  uint64_t h = 0x9e3779b97f4a7c15ull + count;
  for (int r : ranks) h = (h ^ static_cast<uint64_t>(r)) * 0xff51afd7ed558ccdull;
  return h | 1;  // 0 is no offer
}

}  // namespace

std::unique_ptr<Communicator> Communicator::shrink(std::vector<int> excluded, uint32_t site,
                                                   double timeout, Hooks& hooks) {
  check_mine();
  std::sort(excluded.begin(), excluded.end());
  const auto is_out = [&](int p) {
    return std::binary_search(excluded.begin(), excluded.end(), p);
  };
  if (is_out(rank_))
    usage("argument 'exclude' names this rank, " + std::to_string(rank_) +
          "; only the ranks that stay call shrink()");
  std::vector<int> stay;
  std::vector<int> world_ranks;
  for (int p = 0; p < size(); ++p) {
    if (is_out(p)) continue;
    stay.push_back(p);
    world_ranks.push_back(world_ranks_[static_cast<size_t>(p)]);
  }
  Call call;
  call.kind = CallKind::shrink;
  call.site = site;
  Deadline deadline(timeout);
  const int n = static_cast<int>(stay.size());
  const int64_t region =
      survivors_region(stay[0], n, hash_of(++shrinks_, excluded), call, deadline, hooks);
  const auto rank = std::lower_bound(stay.begin(), stay.end(), rank_) - stay.begin();
  std::unique_ptr<Communicator> part(new Communicator(
      world_, static_cast<int>(region), std::move(world_ranks), static_cast<int>(rank), timeout_));
  // When all are here, all have read the offer: the leader may make another one.
  part->exchange({1}, call, timeout, hooks);
  shrink_device(part.get(), excluded, call, timeout, hooks);
  part->forget_calls();
  return part;
}

int64_t Communicator::survivors_region(int leader, int n, uint64_t offer, const Call& call,
                                       Deadline& deadline, Hooks& hooks) {
  RecordRing& ring = rings_[leader];
  if (rank_ == leader) {
    ring.offered_region.store(world_->segment().allocate(region_bytes(n), n, nullptr));
    ring.offer.store(offer, std::memory_order_release);
  }
  const int world_rank = world_ranks_[static_cast<size_t>(leader)];
  hooks.release();
  for (int round = 0; ring.offer.load(std::memory_order_acquire) != offer; ++round) {
    if (deadline.passed())
      throw completed(Error(Trouble::deadline, "", {leader}), call, 0, deadline.limit());
    if (world_->is_gone(world_rank))
      throw completed(Error(Trouble::peer_lost, "", {leader}), call, 0, deadline.limit());
    if (hooks.interrupted())
      throw completed(Error(Trouble::interrupted, "interrupted"), call, 0, deadline.limit());
    wait_a_moment(round);
  }
  return ring.offered_region.load();
}

// NCCL's communicator shrinks where it still lives on all survivors, else it is made anew.
void Communicator::shrink_device(Communicator* part, const std::vector<int>& excluded,
                                 const Call& call, double timeout, Hooks& hooks) {
  part->choose_device(choice_);
  if (choice_.device < 0) return;
  const bool opened = device_health_ != nullptr;
  const bool can = device_ && device_->alive() && nccl::Nccl::get().shrink && !excluded.empty();
  const std::vector<int64_t> all = part->exchange({opened, can}, call, timeout, hooks);
  bool everyone_can = true;
  bool anyone_opened = false;
  for (size_t i = 0; i < all.size(); i += 2) {
    anyone_opened = anyone_opened || all[i];
    everyone_can = everyone_can && all[i + 1];
  }
  if (!anyone_opened) return;  // the first collective on a GPU opens it, as before
  if (!everyone_can) {
    part->open_device(call, timeout, hooks);
    return;
  }
  WaitContext wait{Deadline(timeout), hooks};
  try {
    device_->synchronize(wait);
    auto made = part->new_device();
    made->shrink_from(*device_, excluded, part->choice_.config, wait);
    part->device_ = std::move(made);
  } catch (const Error& error) {
    fail(error, call, seq_, wait.deadline);
  }
}

}  // namespace meshring

// F4. Calls on arrays of a GPU: enqueued, watched, and explained when they fail later.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "communicator.hpp"
#include "nccl/enqueue.hpp"
#include "nccl/nccl_backend.hpp"

namespace meshring {

namespace {

constexpr int kStuckExit = 70;     // EX_SOFTWARE
constexpr double kLastWords = 10;  // seconds

}  // namespace

void Communicator::choose_device(DeviceChoice choice) {
  choice_ = std::move(choice);
  choice_.config.net_name = choice_.net_name.empty() ? nullptr : choice_.net_name.c_str();
  choice_.config.comm_name = choice_.comm_name.empty() ? nullptr : choice_.comm_name.c_str();
}

void Communicator::check_device(int device) const {
  if (device == choice_.device) return;
  if (choice_.device < 0) usage("argument 'x' is on a GPU, and NCCL is off: " + choice_.why_off);
  usage("argument 'x' is on GPU " + std::to_string(device) +
        ", and this rank communicates on GPU " + std::to_string(choice_.device) +
        "; make its arrays there: with cupy.cuda.Device(" + std::to_string(choice_.device) + ")");
}

nccl::NcclBackend& Communicator::device() const {
  if (!device_)
    usage(choice_.device < 0 ? "NCCL is off: " + choice_.why_off
                             : "NCCL is not open yet; call a collective on a GPU first, or start "
                               "with meshring.init(backend='nccl')");
  return *device_;
}

std::unique_ptr<nccl::NcclBackend> Communicator::new_device() {
  auto made = std::make_unique<nccl::NcclBackend>(
      *backend_, rank_, size(), choice_.device,
      nccl::Listener{[this](const Error& e, uint64_t record) { device_failed(e, record); },
                     [this](uint64_t record) { device_finished(record); },
                     [this] { device_stuck(); }});
  device_health_ = made->health();
  return made;
}

void Communicator::open_device(const Call& on_behalf_of, double timeout, Hooks& hooks) {
  if (device_) return;
  if (choice_.device < 0) usage("NCCL is off: " + choice_.why_off);
  check_usable();
  nccl::UniqueId id{};
  std::optional<Error> trouble;
  if (rank_ == 0) {
    const nccl::Nccl& nccl = nccl::Nccl::get();
    const nccl::Result result = nccl.get_unique_id(&id);
    if (result != nccl::Result::success) trouble = nccl.error(result, "ncclGetUniqueId", nullptr);
  }
  // The id goes through the host engine; a second word tells whether there is one.
  constexpr size_t kWords = sizeof id / sizeof(int64_t);
  std::vector<int64_t> words(kWords + 1);
  std::memcpy(words.data(), &id, sizeof id);
  words[kWords] = trouble ? 0 : 1;
  const std::vector<int64_t> all = exchange(words, on_behalf_of, timeout, hooks);
  Deadline deadline(timeout);
  if (trouble) fail(*trouble, on_behalf_of, seq_, deadline);
  if (!all[kWords])
    fail(Error(Trouble::backend, "rank 0 could not start NCCL; look at its own error"),
         on_behalf_of, seq_, deadline);
  std::memcpy(&id, all.data(), sizeof id);
  WaitContext wait{deadline, hooks};
  try {
    auto made = new_device();
    made->join(id, choice_.config, wait);
    device_ = std::move(made);
  } catch (const Error& error) {
    fail(error, on_behalf_of, seq_, wait.deadline);
  }
  exchange({1}, on_behalf_of, timeout, hooks);  // nobody goes on where one rank failed
}

void Communicator::split_device(Communicator* part, int color, int key, double timeout,
                                Hooks& hooks) {
  if (part) part->choose_device(choice_);
  if (!device_) return;
  WaitContext wait{Deadline(timeout), hooks};
  Call call;
  call.kind = CallKind::split;
  try {
    device_->synchronize(wait);  // NCCL splits no communicator that has work to do
    if (!part) {
      device_->split_nothing(wait);
      return;
    }
    auto made = part->new_device();
    made->split_from(*device_, color, key, part->choice_.config, wait);
    part->device_ = std::move(made);
  } catch (const Error& error) {
    fail(error, call, seq_, wait.deadline);
  }
}

void Communicator::enqueue(const Call* calls, size_t count, double timeout, Hooks& hooks) {
  if (count == 0) return;
  check_usable();
  const Call& first = calls[0];
  const bool collective = !is_transfer(first.kind);
  if (!device_) {
    if (!collective)
      usage(std::string("NCCL is not open yet, and a ") + name_of(first.kind) +
            " is a matter of two ranks only: call a collective on a GPU first, or start with "
            "meshring.init(backend='nccl')");
    open_device(first, timeout, hooks);
  }
  if (count == 1 && !collective && first.root == rank_)
    usage(std::string("argument '") + (first.kind == CallKind::send ? "dest" : "source") +
          "' is this rank itself; on a GPU its send and its receive go into one group()");
  for (size_t i = 0; i < count; ++i) {
    if (!has_op(calls[i].kind)) continue;
    std::string why = nccl::refusal(calls[i], nccl::Nccl::get().version());
    if (!why.empty()) usage(std::move(why));
  }
  const uint64_t seq = collective ? ++seq_ : 0;
  const uint64_t record = begin(first, seq);
  for (size_t i = 1; i < count; ++i) begin(calls[i], 0);
  WaitContext wait{Deadline(timeout), hooks};
  try {
    if (choice_.check && collective) compare(first, wait);
    device_->enqueue(calls, count, record, wait);
  } catch (const Error& error) {
    for (size_t i = 0; i < count; ++i) end(record + i, CallState::failed);
    if (error.complete) told_.store(true);
    fail(error, first, seq, wait.deadline);
  }
  for (size_t i = 0; i < count; ++i) rings_[rank_].at(record + i).state = CallState::enqueued;
  entry_->now_state.store(CallState::enqueued, std::memory_order_relaxed);
}

bool Communicator::capturing(void* stream) const {
  int yes = 0;
  return device::Driver::get().stream_capturing(stream, &yes) == device::kSuccess && yes != 0;
}

// All ranks meet on the host and compare what they are about to launch.
void Communicator::compare(const Call& call, WaitContext& wait) {
  Call meeting = call;
  meeting.kind = CallKind::barrier;
  meeting.part_of = call.kind;
  meeting.device = -1;
  backend_->execute(meeting, wait);
}

std::shared_ptr<Pending> Communicator::mark(const Call& call) {
  auto pending = std::make_shared<Pending>();
  pending->call = call;
  pending->number = is_transfer(call.kind) ? 0 : seq_;
  pending->transfer = device_->mark(call);
  return pending;
}

// `pending` without a transfer stands for everything that was enqueued.
void Communicator::wait_for_device(Pending& pending, double timeout, Hooks& hooks) {
  WaitContext wait{Deadline(timeout), hooks};
  try {
    if (!pending.transfer) {
      device_->synchronize(wait);
    } else if (!pending.transfer->done()) {
      if (!device_) usage("this communicator is closed");
      device_->wait_for(*pending.transfer, wait);
    } else if (const std::optional<Error> error = pending.transfer->error()) {
      throw *error;
    }
  } catch (const Error& error) {
    if (error.complete) {
      told_.store(true);
      throw;
    }
    if (error.trouble == Trouble::usage) throw;
    if (error.trouble != Trouble::deadline && error.trouble != Trouble::interrupted)
      fail(error, pending.call, pending.number, wait.deadline);
    Error late = error;
    late.text = not_done_text(pending, timeout);
    throw late;
  }
}

// Of a communicator that is dropped and not closed: what runs may end first.
void Communicator::let_device_end() {
  if (!device_ || closed_ || is_poisoned_.load()) return;
  Hooks hooks;
  WaitContext wait{Deadline(std::min(timeout_, kLastWords)), hooks};
  try {
    device_->synchronize(wait);
  } catch (const Error&) {
    std::fprintf(
        stderr,
        "meshring: a communicator (rank %d/%d) was dropped while its calls ran on the GPU, "
        "which are ended now; keep it, and close() it\n",
        rank_, size());
  }
}

void Communicator::close_device(Hooks& hooks) {
  if (!device_) return;
  if (abort_.load() || is_poisoned_.load()) device_->give_up();
  WaitContext wait{Deadline(timeout_), hooks};
  try {
    device_->close(wait);
  } catch (const Error& error) {
    std::fprintf(stderr, "meshring: close (rank %d/%d): %s\n", rank_, size(), error.text.c_str());
  }
  if (device_health_->failed.load() && !told_.exchange(true))
    std::fprintf(stderr, "meshring: nobody has been told yet: %s\n",
                 device_health_->get()->text.c_str());
  device_.reset();
}

// ---- from the watchdog's thread -------------------------------------------------------------

void Communicator::device_finished(uint64_t record) {
  Record& r = rings_[rank_].at(record);
  if (r.state != CallState::enqueued) return;
  r.ended_ns = coarse_now_ns();
  r.state = CallState::done;
}

// The watchdog knows which of this rank's calls may be the one: `record` or a later one. Calls are
// in the same order everywhere, so it is the first that one of the ranks has not made.
RecordCopy Communicator::stuck_call(uint64_t record) const {
  const RecordCopy first = record ? copy_of(rings_[rank_].at(record)) : RecordCopy{};
  const std::optional<RecordCopy> last = latest_collective(rank_);
  if (!last || !first.seq) return first;
  for (uint64_t seq = first.seq; seq <= last->seq; ++seq)
    for (int p = 0; p < size(); ++p)
      if (!has_made(p, seq)) return record_of(rank_, seq).value_or(first);
  return first;
}

// Whether rank p has made this rank's call of that number.
bool Communicator::has_made(int p, uint64_t seq) const {
  if (p == rank_) return true;
  const std::optional<RecordCopy> mine = record_of(rank_, seq);
  if (const std::optional<RecordCopy> theirs = record_of(p, seq))
    return !mine || mine->signature == theirs->signature;
  const std::optional<RecordCopy> last = latest_collective(p);
  return last && last->seq > seq;
}

void Communicator::device_failed(const Error& error, uint64_t record) {
  const RecordCopy r = stuck_call(record);
  Call call;
  call.kind = r.kind;
  call.root = r.root;
  call.site = r.site;
  call.device = static_cast<int16_t>(choice_.device);
  Error whole =
      completed_device(error, call, r.seq, static_cast<double>(coarse_now_ns() - r.when_ns) * 1e-9);
  whole.complete = true;
  if (const std::string before = poisoned(); !before.empty()) {
    whole.text = before;  // a consequence of what somebody was told then
    told_.store(true);
  }
  device_health_->fail(whole);
  poison(whole, whole.text.substr(0, whole.text.find('\n')));
}

void Communicator::device_stuck() {
  Call call;
  if (const std::optional<RecordCopy> r = latest(rank_)) call.kind = r->kind;
  std::fprintf(stderr,
               "meshring: %s: this rank's thread is inside NCCL since its deadline passed and does "
               "not come out; the process ends.%s\n",
               door(call, seq_).c_str(), table({}).c_str());
  std::fflush(stderr);
  world_->segment().set_ended(world_->rank(), Life::raised, "stuck inside NCCL past its deadline");
  _exit(kStuckExit);
}

// ---- the sentences --------------------------------------------------------------------------

Error Communicator::completed_device(const Error& error, const Call& call, uint64_t seq,
                                     double limit) const {
  if (error.trouble != Trouble::deadline) return completed(error, call, seq, limit);
  Error out = error;
  char ago[32];
  std::snprintf(ago, sizeof ago, "%.1f s", limit);
  out.text = door(call, seq) + at_site(rank_, call.site) + ": not done on the GPU after " + ago;
  out.ranks.clear();
  for (int p = 0; seq && p < size(); ++p)
    if (!has_made(p, seq)) out.ranks.push_back(p);
  if (!seq && call.root >= 0)
    out.text += "; rank " + std::to_string(call.root) + " is the other side.";
  else if (out.ranks.empty())
    out.text +=
        "; every rank has made this call, so a GPU or the network does not answer, or a kernel "
        "before it keeps a GPU busy.";
  else
    out.text += "; " + ranks_text(out.ranks) + " did not make this call.";
  out.table = table(out.ranks);
  out.text += out.table;
  if (!error.text.empty()) out.text += "\nNCCL's RAS service says:\n" + error.text;
  out.text +=
      "\nEverything enqueued on this communicator was aborted, and it cannot be used any more. ";
  out.text += seq ? "Make every rank call the same, or give a longer timeout= if one is only slow; "
                    "init(check=True) compares the calls before each launch."
                  : "A send and a receive that need one another go into one group().";
  return out;
}

}  // namespace meshring

#include "communicator.hpp"

#include <pthread.h>

#include <algorithm>
#include <cstring>

#include "host/host_backend.hpp"
#include "nccl/nccl_backend.hpp"

namespace meshring {

namespace {

std::atomic<unsigned> forks{0};  // how often this process came out of fork() as the child

void count_forks() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  static_cast<void>(once);
}

// A region is the board of its communicator, then what its backend needs.
size_t board_bytes(int n) {
  return (sizeof(RecordRing) * static_cast<size_t>(n) + 4095) / 4096 * 4096;
}

// Of the worker: it leaves its collective when the communicator is given up or closed for good.
class AbortHooks final : public Hooks {
 public:
  explicit AbortHooks(const std::atomic<bool>& abort) : abort_(abort) {}
  bool interrupted() override { return abort_.load(); }

 private:
  const std::atomic<bool>& abort_;
};

std::vector<int> all_ranks(int n) {
  std::vector<int> v(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) v[static_cast<size_t>(i)] = i;
  return v;
}

}  // namespace

size_t Communicator::region_bytes(int n) { return board_bytes(n) + host::Region::bytes(n); }

std::shared_ptr<Segment> Communicator::new_job(int size) {
  std::shared_ptr<Segment> segment = Segment::create(size);
  segment->allocate(region_bytes(size), size, nullptr);
  return segment;
}

Communicator::Communicator(std::shared_ptr<World> world, double timeout)
    : Communicator(world, 0, all_ranks(world->size()), world->rank(), timeout) {}

Communicator::Communicator(std::shared_ptr<World> world, int region, std::vector<int> world_ranks,
                           int rank, double timeout)
    : world_(std::move(world)),
      region_(region),
      id_(world_->segment().communicator_of(region)),
      world_ranks_(std::move(world_ranks)),
      rank_(rank),
      timeout_(timeout),
      mapping_(world_->segment().map(region)),
      rings_(reinterpret_cast<RecordRing*>(mapping_->data())),
      entry_(&world_->self()) {
  count_forks();
  forks_ = forks.load();
  backend_ = std::make_unique<host::HostBackend>(world_, mapping_->data() + board_bytes(size()),
                                                 world_ranks_, rank_);
}

Communicator::~Communicator() { abandon(); }

const char* Communicator::backend() const {
  return choice_.device >= 0 ? "nccl" : backend_->name();
}

std::string Communicator::poisoned() const {
  std::lock_guard<std::mutex> guard(poison_lock_);
  return poisoned_;
}

void Communicator::close(Hooks& hooks) {
  if (closed_) return;
  if (forks_ != forks.load()) {
    // The threads and the membership are the parent's; only our mapping goes.
    closed_ = true;
    static_cast<void>(worker_.release());
    static_cast<void>(device_.release());
    static_cast<void>(backend_.release());
    return;
  }
  if (worker_ && worker_->wait_idle(Deadline(timeout_), hooks) != Worker::Outcome::done)
    abort_.store(true);
  worker_.reset();
  close_device(hooks);
  closed_ = true;
  backend_->close();
  backend_.reset();
  mapping_.reset();
  world_->segment().release(region_);
}

void Communicator::abandon() {
  if (!forked()) let_device_end();
  abort_.store(true);
  Hooks hooks;
  close(hooks);
}

void Communicator::give_up() {
  check_usable();
  poison(Error(Trouble::interrupted, ""), "abort() was called on this rank");
}

bool Communicator::forked() const { return forks_ != forks.load(std::memory_order_relaxed); }

void Communicator::check_mine() const {
  if (closed_) usage("this communicator is closed; make a new one");
  if (forked())
    usage(
        "this process is a fork of a rank, not a rank; start ranks with `meshring run`, and helper "
        "processes with multiprocessing's \"spawn\"");
}

void Communicator::check_usable() const {
  check_mine();
  if (is_poisoned_.load(std::memory_order_acquire)) {
    if (device_health_ && device_health_->failed.load() && !told_.exchange(true))
      throw *device_health_->get();
    usage("this communicator cannot be used any more, only closed, since: " + poisoned());
  }
}

// ---- the path -------------------------------------------------------------------------------

uint64_t Communicator::begin(const Call& call, uint64_t seq) {
  RecordRing& ring = rings_[rank_];
  const uint64_t record = ++written_;
  write(ring.at(record), call, seq);
  ring.written.store(record, std::memory_order_release);
  entry_->now_comm.store(id_, std::memory_order_relaxed);
  entry_->now_seq.store(seq, std::memory_order_relaxed);
  entry_->now_kind.store(call.part_of == CallKind::none ? call.kind : call.part_of,
                         std::memory_order_relaxed);
  entry_->now_site = call.site;
  entry_->now_state.store(CallState::running, std::memory_order_relaxed);
  return record;
}

void Communicator::forget_calls() {
  rings_[rank_].written.store(0, std::memory_order_release);
  for (Record& r : rings_[rank_].records) r.state = CallState::empty;
  seq_ = written_ = 0;
}

void Communicator::end(uint64_t record, CallState state) {
  Record& r = rings_[rank_].at(record);
  r.ended_ns = coarse_now_ns();
  r.state = state;
  entry_->now_state.store(state, std::memory_order_relaxed);
}

void Communicator::run(const Call& call, double timeout, Hooks& hooks) {
  check_usable();
  if (worker_) {
    // Calls keep their order. What is queued ends first; this call itself is never queued, since
    // its buffers live only as long as it does.
    Deadline deadline(timeout);
    const Worker::Outcome outcome = worker_->wait_idle(deadline, hooks);
    if (outcome != Worker::Outcome::done)
      fail(Error(outcome == Worker::Outcome::late ? Trouble::deadline : Trouble::interrupted,
                 "interrupted while it waited for operations started before with async_op=True"),
           call, 0, deadline);
    check_usable();
  }
  const uint64_t seq = ++seq_;
  const uint64_t record = begin(call, seq);
  WaitContext context{Deadline(timeout), hooks};
  try {
    backend_->execute(call, context);
  } catch (const Error& error) {
    end(record, CallState::failed);
    fail(error, call, seq, context.deadline);
  }
  end(record, CallState::done);
}

std::shared_ptr<Pending> Communicator::start(const Call& call, double timeout) {
  check_usable();
  auto pending = std::make_shared<Pending>();
  pending->call = call;
  const uint64_t seq = pending->number = ++seq_;
  const uint64_t record = begin(call, seq);
  if (!worker_) worker_ = std::make_unique<Worker>();
  worker_->add([this, pending, seq, record, timeout] {
    AbortHooks hooks(abort_);
    WaitContext context{Deadline(timeout), hooks};
    try {
      check_usable();
      backend_->execute(pending->call, context);
      end(record, CallState::done);
    } catch (const Error& error) {
      end(record, CallState::failed);
      try {
        fail(error, pending->call, seq, context.deadline);
      } catch (const Error& complete) {
        pending->error = complete;
      }
    }
    pending->finished.store(true, std::memory_order_seq_cst);
  });
  return pending;
}

std::vector<std::shared_ptr<Pending>> Communicator::post(const std::vector<Call>& calls,
                                                         bool beside) {
  std::vector<std::shared_ptr<Pending>> out;
  if (calls.empty()) return out;
  check_usable();
  for (const Call& call : calls) {
    auto pending = std::make_shared<Pending>();
    pending->call = call;
    pending->number = begin(call, 0);
    out.push_back(std::move(pending));
  }
  const auto transfers = backend_->post(calls, beside);
  for (size_t i = 0; i < out.size(); ++i) out[i]->transfer = transfers[i];
  return out;
}

bool Communicator::test(const Pending& pending) const {
  return pending.transfer ? pending.transfer->done()
                          : pending.finished.load(std::memory_order_seq_cst);
}

std::optional<Error> Communicator::error_of(const Pending& pending) const {
  if (!test(pending)) return std::nullopt;
  if (!pending.transfer) return pending.error;
  const std::optional<Error> error = pending.transfer->error();
  if (!error || error->complete) return error;
  return completed(*error, pending.call, 0, timeout_);
}

void Communicator::wait(Pending& pending, double timeout, Hooks& hooks) {
  if (!pending.transfer) {
    const auto done = [&] { return pending.finished.load(std::memory_order_seq_cst); };
    if (!done()) {
      const Worker::Outcome outcome = worker_->wait(done, Deadline(timeout), hooks);
      if (outcome != Worker::Outcome::done)
        throw Error(outcome == Worker::Outcome::late ? Trouble::deadline : Trouble::interrupted,
                    not_done_text(pending, timeout));
    }
    if (pending.error) throw *pending.error;
    return;
  }
  if (pending.call.device >= 0) {
    wait_for_device(pending, timeout, hooks);
    return;
  }
  if (!pending.transfer->done()) check_usable();
  WaitContext context{Deadline(timeout), hooks};
  const uint64_t record = pending.number;
  try {
    if (!pending.transfer->done()) backend_->wait(*pending.transfer, context);
    if (const std::optional<Error> error = pending.transfer->error()) throw *error;
    if (!closed_) end(record, CallState::done);
  } catch (const Error& error) {
    if (!closed_) end(record, CallState::failed);
    fail(error, pending.call, 0, context.deadline);
  }
}

void Communicator::synchronize(double timeout, Hooks& hooks) {
  check_usable();
  Pending all;
  all.call.kind = CallKind::synchronize;
  Deadline deadline(timeout);
  if (worker_) {
    const Worker::Outcome outcome = worker_->wait_idle(deadline, hooks);
    if (outcome != Worker::Outcome::done)
      throw Error(outcome == Worker::Outcome::late ? Trouble::deadline : Trouble::interrupted,
                  not_done_text(all, timeout));
  }
  if (device_) wait_for_device(all, timeout, hooks);
}

void Communicator::fail(const Error& error, const Call& call, uint64_t seq, Deadline& deadline) {
  if (error.complete) throw error;
  switch (error.trouble) {
    case Trouble::usage:
      throw error;
    case Trouble::mismatch:
      throw completed(error, call, seq, deadline.limit());
    case Trouble::deadline:
    case Trouble::peer_lost:
    case Trouble::backend:
    case Trouble::interrupted: {
      const Error complete = completed(error, call, seq, deadline.limit());
      poison(complete, complete.text.substr(0, complete.text.find('\n')));
      throw complete;
    }
  }
  throw error;
}

void Communicator::poison(const Error& error, const std::string& text) {
  {
    std::lock_guard<std::mutex> guard(poison_lock_);
    if (poisoned_.empty()) poisoned_ = text;
  }
  is_poisoned_.store(true, std::memory_order_release);
  abort_.store(true);
  if (device_) device_->give_up();
  if (backend_) backend_->withdraw(error.trouble, error.ranks.empty() ? -1 : error.ranks[0]);
}

// ---- composed -------------------------------------------------------------------------------

std::vector<int64_t> Communicator::exchange(const std::vector<int64_t>& mine,
                                            const Call& on_behalf_of, double timeout,
                                            Hooks& hooks) {
  std::vector<int64_t> all(mine.size() * static_cast<size_t>(size()));
  Call call;
  call.kind = CallKind::all_gather;
  call.part_of = on_behalf_of.kind;
  call.root = on_behalf_of.root;
  call.dtype = DType::int64;
  call.site = on_behalf_of.site;
  call.unit = sizeof(int64_t);
  call.count = call.length = static_cast<int64_t>(mine.size());
  call.ndim = 1;
  call.dims[0] = call.count;
  call.in = mine.data();
  call.out = all.data();
  run(call, timeout, hooks);
  return all;
}

std::unique_ptr<Communicator> Communicator::split(int64_t color, int64_t key, uint32_t site,
                                                  double timeout, Hooks& hooks) {
  Call call;
  call.kind = CallKind::split;
  call.site = site;
  check_usable();
  const std::vector<int64_t> wishes = exchange({color, key}, call, timeout, hooks);
  std::vector<int> members;
  for (int p = 0; p < size(); ++p)
    if (wishes[static_cast<size_t>(2 * p)] == color) members.push_back(p);
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) {
    return wishes[static_cast<size_t>(2 * a + 1)] < wishes[static_cast<size_t>(2 * b + 1)];
  });
  int64_t region = -1;
  std::optional<Error> trouble;
  const int n = static_cast<int>(members.size());
  if (color >= 0 && members[0] == rank_) {
    try {
      region = world_->segment().allocate(region_bytes(n), n, nullptr);
    } catch (const Error& error) {
      trouble = error;  // after the exchange, so that the others learn it too
    }
  }
  const std::vector<int64_t> regions = exchange({region}, call, timeout, hooks);
  if (trouble) throw Error(trouble->trouble, "split: " + trouble->text);
  if (color < 0) {
    split_device(nullptr, -1, 0, timeout, hooks);
    return nullptr;
  }
  region = regions[static_cast<size_t>(members[0])];
  if (region < 0)
    throw Error(Trouble::backend, "split: rank " + std::to_string(members[0]) +
                                      " could not make shared memory for the new communicator");
  std::vector<int> world_ranks;
  int rank = 0;
  for (int i = 0; i < n; ++i) {
    const int p = members[static_cast<size_t>(i)];
    world_ranks.push_back(world_ranks_[static_cast<size_t>(p)]);
    if (p == rank_) rank = i;
  }
  std::unique_ptr<Communicator> part(
      new Communicator(world_, static_cast<int>(region), std::move(world_ranks), rank, timeout_));
  split_device(part.get(), static_cast<int>(members[0]), rank, timeout, hooks);
  return part;
}

std::vector<Communicator::TraceRow> Communicator::trace(int rank) const {
  std::vector<TraceRow> rows;
  if (closed_) return rows;
  const RecordRing& ring = rings_[rank];
  const uint64_t last = ring.written.load(std::memory_order_acquire);
  const uint64_t first = last > kRecords ? last - kRecords + 1 : 1;
  const int64_t now = coarse_now_ns();
  for (uint64_t i = first; i <= last; ++i) {
    RecordCopy c = copy_of(ring.at(i));
    const bool ended = c.state == CallState::done || c.state == CallState::failed;
    const int64_t end = ended ? c.ended_ns : now;
    rows.push_back(
        {rank, c, world_->segment().site(world_ranks_[static_cast<size_t>(rank)], c.site),
         static_cast<double>(now - c.when_ns) * 1e-9, static_cast<double>(end - c.when_ns) * 1e-9});
  }
  return rows;
}

}  // namespace meshring

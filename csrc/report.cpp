// F4. The sentences: who is missing, who disagrees, who died, read off the board.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "communicator.hpp"

namespace meshring {

std::string ranks_text(const std::vector<int>& ranks) {
  std::string s = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (i) s += i + 1 == ranks.size() ? " and " : ", ";
    s += std::to_string(ranks[i]);
  }
  return s;
}

namespace {

std::string seconds(double s) {
  char text[32];
  std::snprintf(text, sizeof text, s < 10 ? "%.1f s" : "%.0f s", s);
  return text;
}

std::string limit_text(double s) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", s);
  return text;
}

// The kernel's word on a process: stopped ranks look alive to everything else.
bool is_stopped(int pid) {
  char path[32];
  std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE* f = std::fopen(path, "re");
  if (!f) return false;
  char line[512] = {};
  const size_t n = std::fread(line, 1, sizeof line - 1, f);
  std::fclose(f);
  line[n] = 0;
  const char* paren = std::strrchr(line, ')');
  return paren && (paren[2] == 'T' || paren[2] == 't');
}

struct Difference {
  const char* what;
  const char* fix;
};

// The first thing in which two calls disagree, in the order in which a reader would look.
Difference difference(const RecordCopy& a, const RecordCopy& b) {
  if (a.kind != b.kind)
    return {"operation", "All ranks must make the same calls in the same order."};
  if (a.prelude != b.prelude) return {"sizes", "Give sizes= on all ranks or on none."};
  if (a.dtype != b.dtype)
    return {"dtype", "Give every rank the same dtype, for example x.astype('float32')."};
  if (has_op(a.kind) && a.op != b.op) return {"reduction", "Give every rank the same op=."};
  if (has_root(a.kind) && a.root != b.root) return {"root", "Give every rank the same root=."};
  if (a.uneven != b.uneven) return {"sizes", "Give sizes= on all ranks or on none."};
  bool same = a.ndim == b.ndim;
  for (int i = 0; i < std::min<int>(a.ndim, kMaxDims); ++i) same = same && a.dims[i] == b.dims[i];
  if (same && a.axis == b.axis)
    return {"sizes", "Give every rank the same sizes=, one length per rank."};
  if (same) return {"axis", "Give every rank the same axis=."};
  const bool joins = a.kind == CallKind::all_gather || a.kind == CallKind::gather;
  return {"shape", joins ? "Give every rank the same shape, or say sizes=\"auto\" (or the lengths "
                           "themselves) when shards differ along the axis."
                         : "Give every rank an array of the same shape."};
}

}  // namespace

std::string Communicator::door(const Call& call, uint64_t seq) const {
  std::string s = name_of(call.part_of == CallKind::none ? call.kind : call.part_of);
  if (seq && call.kind != CallKind::init) s += " #" + std::to_string(seq);
  s += " (rank " + std::to_string(rank_) + "/" + std::to_string(size());
  if (size() != world_->size()) s += ", rank " + std::to_string(world_->rank()) + " of the job";
  return s + ")";
}

std::string Communicator::at_site(int p, uint32_t site) const {
  const std::string text = world_->segment().site(world_ranks_[static_cast<size_t>(p)], site);
  return text.empty() ? "" : " at " + text;
}

std::optional<RecordCopy> Communicator::latest(int p) const {
  if (closed_) return std::nullopt;
  const uint64_t last = rings_[p].written.load(std::memory_order_acquire);
  if (last == 0) return std::nullopt;
  return copy_of(rings_[p].at(last));
}

std::optional<RecordCopy> Communicator::latest_collective(int p) const {
  std::optional<RecordCopy> best;
  for (const Record& r : rings_[p].records) {
    const RecordCopy c = copy_of(r);
    if (c.state != CallState::empty && c.seq > (best ? best->seq : 0)) best = c;
  }
  return best;
}

std::optional<RecordCopy> Communicator::record_of(int p, uint64_t seq) const {
  for (const Record& r : rings_[p].records) {
    RecordCopy c = copy_of(r);
    if (c.seq == seq && c.state != CallState::empty) return c;
  }
  return std::nullopt;
}

std::string Communicator::mismatch_text(const Call& call, uint64_t seq,
                                        std::vector<int>* culprits) const {
  struct Group {
    std::string text;
    RecordCopy record;
    std::vector<int> ranks;
  };
  std::vector<Group> groups;
  for (int p = 0; p < size(); ++p) {
    const std::optional<RecordCopy> r = record_of(p, seq);
    const std::string text = r ? r->call() : "(its record is gone)";
    auto it = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
      return g.text == text && r && g.record.signature == r->signature;
    });
    if (it == groups.end())
      groups.push_back({text, r.value_or(RecordCopy{}), {p}});
    else
      it->ranks.push_back(p);
  }
  // The most common call is taken for what was meant; the others are named first.
  const auto most = std::max_element(
      groups.begin(), groups.end(),
      [](const Group& a, const Group& b) { return a.ranks.size() < b.ranks.size(); });
  const Group meant = *most;
  Difference d{"sizes", "Give every rank the same sizes=, one length per rank."};
  for (const Group& g : groups) {
    if (g.ranks == meant.ranks) continue;
    d = difference(g.record, meant.record);
    culprits->insert(culprits->end(), g.ranks.begin(), g.ranks.end());
  }
  std::sort(culprits->begin(), culprits->end());
  std::string s = door(call, seq) + ": the ranks disagree in " + d.what + ":";
  for (const Group& g : groups) {
    s += "\n  " + ranks_text(g.ranks) + ": " + g.text + at_site(g.ranks[0], g.record.site);
    if (std::find(g.ranks.begin(), g.ranks.end(), rank_) != g.ranks.end()) s += "   (this rank)";
  }
  return s + "\nNo data moved and the communicator stays usable. " + d.fix;
}

std::string Communicator::last_call(int p) const {
  const std::optional<RecordCopy> r = latest(p);
  if (!r) return "no call on this communicator yet";
  const double ago = static_cast<double>(coarse_now_ns() - r->when_ns) * 1e-9;
  std::string s = r->call();
  if (r->seq) s += " #" + std::to_string(r->seq);
  s += at_site(p, r->site);
  switch (r->state) {
    case CallState::running:
      return "in " + s + " since " + seconds(ago);
    case CallState::failed:
      return "failed after " + seconds(static_cast<double>(r->ended_ns - r->when_ns) * 1e-9) +
             " in " + s;
    case CallState::enqueued:
      return "enqueued " + s + " " + seconds(ago) + " ago, not done yet";
    case CallState::done:
    case CallState::empty:
      return "last call was " + s + ", " + seconds(ago) + " ago";
  }
  return s;
}

std::string Communicator::doing(int p, bool missing) const {
  const int world_rank = world_ranks_[static_cast<size_t>(p)];
  std::string s = backend_ ? backend_->how_it_left(p) : "";
  if (s == kGaveUp) return last_call(p);
  if (!s.empty()) return s + "; " + last_call(p);
  if (!world_->threads() && is_stopped(world_->pid(world_rank))) s = "is stopped (SIGSTOP); ";
  const RankEntry& e = world_->segment().rank(world_rank);
  if (missing && e.now_state.load() == CallState::running && e.now_comm.load() != id_) {
    s += std::string("is in ") + name_of(e.now_kind.load()) + " #" +
         std::to_string(e.now_seq.load()) + " of another communicator" + at_site(p, e.now_site) +
         "; here: ";
  }
  return s + last_call(p);
}

std::string Communicator::table(const std::vector<int>& missing) const {
  std::string s;
  constexpr int kRows = 64;
  int shown = 0;
  for (int p = 0; p < size() && shown < kRows; ++p) {
    const bool is_missing = std::find(missing.begin(), missing.end(), p) != missing.end();
    if (size() > kRows && !is_missing && p != rank_) continue;
    ++shown;
    s += "\n  rank " + std::to_string(p) + " (pid " +
         std::to_string(world_->pid(world_ranks_[static_cast<size_t>(p)])) + ")" +
         (is_missing ? " MISSING: " : ": ") + doing(p, is_missing) +
         (p == rank_ ? "   (this rank)" : "");
  }
  return s;
}

std::string Communicator::not_done_text(const Pending& pending, double limit) const {
  if (pending.call.kind == CallKind::synchronize)
    return door(pending.call, 0) + ": what was started before is not done after " +
           limit_text(limit) + "." + table({}) +
           "\nIt goes on, up to the deadline of each call; synchronize() again waits on.";
  return door(pending.call, pending.number) + ": its Work is not done after waiting " +
         limit_text(limit) + "." + table({}) + "\nThe operation goes on; wait() for it again.";
}

Error Communicator::completed(const Error& error, const Call& call, uint64_t seq,
                              double limit) const {
  Error out = error;
  const std::string where = door(call, seq) + ": ";
  const bool transfer = is_transfer(call.kind);
  switch (error.trouble) {
    case Trouble::usage:
      break;
    case Trouble::mismatch:
      if (transfer) {
        out.text = where + error.text +
                   ".\nThe message is dropped and the communicator stays "
                   "usable. Give both sides the same dtype and shape.";
      } else {
        out.ranks.clear();
        out.text = mismatch_text(call, seq, &out.ranks);
      }
      break;
    case Trouble::deadline: {
      out.table = table(error.ranks);
      out.text = where;
      if (error.ranks.empty() && !error.text.empty())
        out.text += error.text + " within " + limit_text(limit) + ".";
      else if (error.ranks.empty())
        out.text += "operations started before with async_op=True did not end within " +
                    limit_text(limit) + ".";
      else if (transfer)
        out.text += ranks_text(error.ranks) + " did not " +
                    (call.kind == CallKind::send ? "receive" : "send") + " within " +
                    limit_text(limit) + ".";
      else
        out.text += ranks_text(error.ranks) + " did not come within " + limit_text(limit) + ".";
      out.text += out.table + "\nThe communicator cannot be used any more.";
      if (!error.ranks.empty())
        out.text +=
            " If the missing rank is only slow, "
            "give a longer timeout=; else make it call the same operation.";
      break;
    }
    case Trouble::peer_lost: {
      out.text = where;
      for (size_t i = 0; i < error.ranks.size(); ++i) {
        const int p = error.ranks[i];
        const int world_rank = world_ranks_[static_cast<size_t>(p)];
        std::string how = backend_ ? backend_->how_it_left(p) : "";
        if (how.empty()) how = error.text.empty() ? "has left" : "is lost: " + error.text;
        out.text += (i ? "\n  " : "") + std::string("rank ") + std::to_string(p) + " (pid " +
                    std::to_string(world_->pid(world_rank)) + ") " + how + "; " + last_call(p) +
                    ".";
      }
      out.text +=
          "\nThe communicator cannot be used any more. Look at that rank's own error first.";
      break;
    }
    case Trouble::backend:
    case Trouble::interrupted:
      out.text = where + error.text;
      break;
  }
  out.complete = true;
  return out;
}

}  // namespace meshring

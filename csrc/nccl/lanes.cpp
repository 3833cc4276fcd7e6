#include "lanes.hpp"

#include <algorithm>

namespace meshring::nccl {

namespace {

enum class Capture { no, yes, elsewhere };

// `elsewhere`: another stream's capture forbids to touch this one, the legacy default stream.
Capture capture_of(Stream stream) {
  const device::Driver& driver = device::Driver::get();
  int yes = 0;
  const device::Result result = driver.stream_capturing(stream, &yes);
  if (result == device::kCaptureImplicit) return Capture::elsewhere;
  driver.check(result, "cuStreamIsCapturing");
  return yes ? Capture::yes : Capture::no;
}

}  // namespace

void Lanes::mark(Lane& lane, int64_t expires) {
  Mark& m = lane.marks[(lane.first + lane.count) % kKept];
  m.marker.record(lane.stream);
  m.upto = lane.covered = lane.enqueued;
  m.expires = expires;
  ++lane.count;
}

bool Lanes::note(Stream stream, uint64_t record, int64_t expires) {
  const Capture capture = capture_of(stream);
  if (capture == Capture::yes) return false;
  Lane* lane = nullptr;
  for (Lane& l : lanes_)
    if (l.stream == stream) lane = &l;
  if (!lane) {
    const auto free = std::find_if(lanes_.begin(), lanes_.end(), [](Lane& l) { return l.idle(); });
    lane = free != lanes_.end() ? &*free : &lanes_.emplace_back();
    lane->stream = stream;
  }
  lane->records[lane->enqueued++ % kKept] = record;
  const bool together = lane->covered + 1 == lane->enqueued;  // else a later mark takes all
  if (capture == Capture::no && together && lane->count < kKept)
    mark(*lane, expires);
  else
    lane->expires = std::min(lane->expires, expires);
  return true;
}

void Lanes::finish(Lane& lane, uint64_t upto) {
  const uint64_t kept_from = lane.enqueued > kKept ? lane.enqueued - kKept : 0;
  for (uint64_t i = std::max(lane.done, kept_from); i < upto; ++i)
    finished_(lane.records[i % kKept]);
  lane.done = upto;
}

void Lanes::advance() {
  for (Lane& lane : lanes_) {
    while (lane.count > 0 && lane.marks[lane.first].marker.reached()) {
      finish(lane, lane.marks[lane.first].upto);
      lane.first = (lane.first + 1) % kKept;
      --lane.count;
    }
    if (lane.covered == lane.enqueued || lane.count == kKept ||
        capture_of(lane.stream) != Capture::no)
      continue;
    mark(lane, lane.expires);
    lane.expires = INT64_MAX;
  }
}

bool Lanes::busy() const {
  return std::any_of(lanes_.begin(), lanes_.end(), [](const Lane& l) { return !l.idle(); });
}

bool Lanes::expired(int64_t now) const {
  for (const Lane& lane : lanes_) {
    if (lane.covered < lane.enqueued && now > lane.expires) return true;
    for (size_t i = 0; i < lane.count; ++i)
      if (now > lane.marks[(lane.first + i) % kKept].expires) return true;
  }
  return false;
}

uint64_t Lanes::oldest() const {
  uint64_t record = 0;
  for (const Lane& lane : lanes_) {
    if (lane.idle()) continue;
    const uint64_t kept_from = lane.enqueued > kKept ? lane.enqueued - kKept : 0;
    const uint64_t mine = lane.records[std::max(lane.done, kept_from) % kKept];
    if (record == 0 || mine < record) record = mine;
  }
  return record;
}

std::vector<Stream> Lanes::busy_streams() const {
  std::vector<Stream> streams;
  for (const Lane& lane : lanes_)
    if (!lane.idle()) streams.push_back(lane.stream);
  return streams;
}

}  // namespace meshring::nccl

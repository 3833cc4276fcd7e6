#include "board.hpp"

#include <time.h>

#include <algorithm>

namespace meshring {

void Text::set(const std::string& s) {
  const size_t n = std::min(s.size(), static_cast<size_t>(kTextLength - 1));
  for (size_t i = 0; i < n; ++i) chars[i] = s[i];
  chars[n] = '\0';
}

std::string Text::get() const {
  std::string s;
  for (int i = 0; i < kTextLength; ++i) {
    const char c = chars[i];
    if (c == '\0') break;
    s.push_back(c);
  }
  return s;
}

int64_t coarse_now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void write(Record& r, const Call& call, uint64_t seq) {
  r.state = CallState::empty;
  r.seq = seq;
  r.when_ns = coarse_now_ns();
  r.ended_ns = 0;
  r.count = call.count;
  r.signature = signature(call);
  r.root = call.root;
  r.site = call.site;
  r.kind = call.part_of == CallKind::none ? call.kind : call.part_of;
  r.prelude = call.part_of == CallKind::none ? 0 : 1;
  r.dtype = call.dtype;
  r.op = call.op;
  r.axis = call.axis;
  r.ndim = call.ndim;
  r.uneven = call.sizes.empty() ? 0 : 1;
  const int dims = std::min<int>(call.ndim, kMaxDims);
  for (int i = 0; i < dims; ++i) r.dims[i] = call.dims[i];
  r.state = CallState::running;
}

RecordCopy copy_of(const Record& r) {
  RecordCopy c;
  c.seq = r.seq;
  c.when_ns = r.when_ns;
  c.ended_ns = r.ended_ns;
  c.count = r.count;
  c.signature = r.signature;
  c.root = r.root;
  c.site = r.site;
  c.kind = r.kind;
  c.dtype = r.dtype;
  c.op = r.op;
  c.state = r.state;
  c.axis = r.axis;
  c.ndim = r.ndim;
  c.uneven = r.uneven != 0;
  c.prelude = r.prelude != 0;
  for (int i = 0; i < kMaxDims; ++i) c.dims[i] = r.dims[i];
  return c;
}

std::string RecordCopy::shape() const {
  std::string s = "(";
  const int shown = std::min<int>(ndim, kMaxDims);
  for (int i = 0; i < shown; ++i) {
    if (i) s += ", ";
    s += std::to_string(dims[i]);
  }
  if (ndim > kMaxDims) s += ", ...";
  if (ndim == 1) s += ",";
  return s + ")";
}

std::string RecordCopy::call() const {
  std::string s = name_of(kind);
  if (kind == CallKind::barrier || kind == CallKind::split || kind == CallKind::none ||
      kind == CallKind::init)
    return s;
  if (prelude)
    return s + (has_root(kind) ? "(root=" + std::to_string(root) + ", lengths first)"
                               : "(lengths first)");
  s += std::string("(") + name_of(dtype) + " " + shape();
  if (has_op(kind)) s += std::string(", op=") + name_of(op);
  if (axis >= 0) s += ", axis=" + std::to_string(axis);
  if (uneven) s += ", sizes=...";
  if (kind == CallKind::send) s += ", dest=" + std::to_string(root);
  if (kind == CallKind::recv) s += ", source=" + std::to_string(root);
  if (has_root(kind)) s += ", root=" + std::to_string(root);
  return s + ")";
}

}  // namespace meshring

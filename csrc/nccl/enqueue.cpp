#include "enqueue.hpp"

#include <algorithm>

namespace meshring::nccl {

namespace {

// Uneven shards, by the bytes of the whole: up to the first limit one broadcast (or reduction) per
// block in a group, up to the second sends and receives, above it equal blocks with padding, unless
// padding would more than double the bytes. Measured on 8 GPUs; docs/nccl.md has the source.
constexpr int64_t kGroupBelow = 512 << 10;
constexpr int64_t kSendBelow = 6 << 20;
constexpr int kFusesBroadcasts = version_code(2, 29, 2);

// An element of ours is `each` elements of NCCL.
struct Wire {
  DataType type;
  int64_t each;
};

Wire wire_of(DType t) {
  switch (t) {
    case DType::boolean:
    case DType::uint8:
      return {DataType::uint8, 1};
    case DType::int8:
      return {DataType::int8, 1};
    case DType::int32:
      return {DataType::int32, 1};
    case DType::int64:
      return {DataType::int64, 1};
    case DType::uint32:
      return {DataType::uint32, 1};
    case DType::uint64:
      return {DataType::uint64, 1};
    case DType::float16:
      return {DataType::float16, 1};
    case DType::bfloat16:
      return {DataType::bfloat16, 1};
    case DType::float32:
      return {DataType::float32, 1};
    case DType::float64:
      return {DataType::float64, 1};
    case DType::complex64:
      return {DataType::float32, 2};
    case DType::complex128:
      return {DataType::float64, 2};
    case DType::float8_e4m3fn:
      return {DataType::float8_e4m3, 1};
    case DType::float8_e5m2:
      return {DataType::float8_e5m2, 1};
    case DType::int16:
    case DType::uint16:
      break;  // refusal() has refused them
  }
  return {DataType::uint8, 1};
}

Op op_of(DType t, RedOp op) {
  const bool boolean = t == DType::boolean;  // sum is or, prod is and
  switch (op) {
    case RedOp::sum:
      return boolean ? Op::max : Op::sum;
    case RedOp::prod:
      return boolean ? Op::min : Op::prod;
    case RedOp::min:
      return Op::min;
    case RedOp::max:
      return Op::max;
    case RedOp::mean:
      return Op::avg;
  }
  return Op::sum;
}

// Data that only moves goes as bytes, whatever its dtype.
constexpr DataType kBytes = DataType::uint8;
size_t size(int64_t n) { return static_cast<size_t>(n); }

}  // namespace

std::string refusal(const Call& call, int version) {
  if (!has_op(call.kind)) return {};
  const DType t = call.dtype;
  const bool no_type = t == DType::int16 || t == DType::uint16;
  const bool no_product = info(t).cls == DTypeClass::complex && call.op == RedOp::prod;
  const bool too_old =
      (t == DType::float8_e4m3fn || t == DType::float8_e5m2) && version < version_code(2, 24, 3);
  if (!no_type && !no_product && !too_old) return {};
  const std::string what = std::string("op='") + name_of(call.op) + "' of " + name_of(t);
  if (no_type)
    return "NCCL has no " + std::string(name_of(t)) +
           "; reduce x.astype('int32'), which holds every sum of up to 65536 of them";
  if (no_product)
    return "NCCL cannot do " + what +
           "; all_gather x and multiply, or reduce on the host with x.get()";
  return what + " needs NCCL 2.24.3 or newer; this is " + version_text(version) +
         "; reduce x.astype('float16')";
}

class Enqueue::Group {
 public:
  explicit Group(Enqueue& e) : e_(e) {
    const Result result = e.nccl_.group_start();
    if (result != Result::success) throw e.nccl_.error(result, "ncclGroupStart", e.b_.handle_);
    e.grouped_ = true;
  }
  ~Group() {
    if (!e_.grouped_) return;
    e_.grouped_ = false;
    e_.nccl_.group_end();
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  void end() {
    e_.grouped_ = false;
    e_.check(e_.nccl_.group_end(), "ncclGroupEnd");
  }

 private:
  Enqueue& e_;
};

// An operator of NCCL, made for one call where it multiplies first.
class Enqueue::Operator {
 public:
  Operator(Enqueue& e, const Call& call)
      : e_(e), made_(call.scaled), op_(op_of(call.dtype, call.op)) {
    if (!made_) return;
    uint64_t scalar = call.scale;
    e.check(e.nccl_.create_premul_sum(&op_, &scalar, wire_of(call.dtype).type, Residence::host,
                                      e.b_.handle_),
            "ncclRedOpCreatePreMulSum");
  }
  ~Operator() {
    if (made_) e_.nccl_.destroy_op(op_, e_.b_.handle_);
  }
  Operator(const Operator&) = delete;
  Operator& operator=(const Operator&) = delete;
  operator Op() const { return op_; }

 private:
  Enqueue& e_;
  const bool made_;
  Op op_;
};

void Enqueue::check(Result result, const char* function) {
  if (grouped_ && result == Result::in_progress) return;  // ncclGroupEnd will tell
  b_.check(result, function, wait_);
}

void Enqueue::copy(void* to, const void* from, int64_t bytes, Stream stream) {
  if (to == from || bytes == 0) return;
  const device::Driver& driver = device::Driver::get();
  driver.check(driver.copy(reinterpret_cast<device::Pointer>(to),
                           reinterpret_cast<device::Pointer>(from), size(bytes), stream),
               "cuMemcpyDtoDAsync");
}

device::Scratch Enqueue::scratch(const Call& call, int64_t bytes) {
  return {b_.device_, call.stream, size(bytes)};
}

void Enqueue::go(const Call* calls, size_t count) {
  if (count == 1) {
    one(calls[0]);
    return;
  }
  Group group(*this);
  for (size_t i = 0; i < count; ++i) transfer(calls[i]);
  group.end();
}

void Enqueue::one(const Call& call) {
  switch (call.kind) {
    case CallKind::all_reduce:
    case CallKind::reduce:
      reduction(call);
      return;
    case CallKind::broadcast:
      check(nccl_.broadcast(call.in, call.out, size(call.length * call.unit), kBytes, call.root,
                            b_.handle_, call.stream),
            "ncclBroadcast");
      return;
    case CallKind::all_gather:
      all_gather(call);
      return;
    case CallKind::reduce_scatter:
      reduce_scatter(call);
      return;
    case CallKind::gather:
      gather(call);
      return;
    case CallKind::scatter:
      scatter(call);
      return;
    case CallKind::all_to_all:
      all_to_all(call);
      return;
    case CallKind::send:
    case CallKind::recv:
      transfer(call);
      return;
    case CallKind::none:
    case CallKind::barrier:
    case CallKind::split:
    case CallKind::synchronize:
    case CallKind::init:
    case CallKind::shrink:
      break;
  }
  usage(std::string(name_of(call.kind)) + " is not for arrays on a GPU");
}

void Enqueue::transfer(const Call& call) {
  const size_t bytes = size(call.length * call.unit);
  if (call.kind == CallKind::send)
    check(nccl_.send(call.in, bytes, kBytes, call.root, b_.handle_, call.stream), "ncclSend");
  else
    check(nccl_.recv(call.out, bytes, kBytes, call.root, b_.handle_, call.stream), "ncclRecv");
}

void Enqueue::reduction(const Call& call) {
  const Wire wire = wire_of(call.dtype);
  const size_t count = size(call.length * wire.each);
  const Operator op(*this, call);
  if (call.kind == CallKind::all_reduce)
    check(nccl_.all_reduce(call.in, call.out, count, wire.type, op, b_.handle_, call.stream),
          "ncclAllReduce");
  else
    check(nccl_.reduce(call.in, call.out, count, wire.type, op, call.root, b_.handle_, call.stream),
          "ncclReduce");
}

// ---- joining --------------------------------------------------------------------------------

void Enqueue::all_gather(const Call& call) {
  const Blocks blocks(call, b_.size_);
  const bool even = call.sizes.empty();
  if (call.outer == 1) {  // the blocks lie in the output one behind the other
    if (even)
      check(nccl_.all_gather(call.in, call.out, size(blocks.bytes(0, 0)), kBytes, b_.handle_,
                             call.stream),
            "ncclAllGather");
    else
      gather_uneven(call, static_cast<char*>(call.out));
    return;
  }
  const device::Layout layout = device::output_layout(call, b_.rank_, b_.size_);
  const device::Scratch packed = scratch(call, layout.packed_bytes());
  if (even)
    check(nccl_.all_gather(call.in, packed.data(), size(blocks.bytes(0, 0)), kBytes, b_.handle_,
                           call.stream),
          "ncclAllGather");
  else
    gather_uneven(call, packed.data());
  b_.kernels_->unpack(layout, packed.data(), call.out, call.stream);
}

// Blocks of any length to every rank, one behind the other at `packed`.
void Enqueue::gather_uneven(const Call& call, char* packed) {
  const Blocks blocks(call, b_.size_);
  const int n = b_.size_;
  std::vector<int64_t> at(size(n) + 1);
  for (int i = 0; i < n; ++i) at[size(i) + 1] = at[size(i)] + blocks.bytes(i, i);
  const int64_t total = at.back();
  const int64_t largest = blocks.largest();
  const int64_t mine = blocks.bytes(b_.rank_, b_.rank_);
  if (total <= kGroupBelow || (nccl_.version() >= kFusesBroadcasts && total <= kSendBelow)) {
    Group group(*this);
    for (int i = 0; i < n; ++i)
      if (blocks.bytes(i, i) > 0)
        check(nccl_.broadcast(i == b_.rank_ ? call.in : packed + at[size(i)], packed + at[size(i)],
                              size(blocks.bytes(i, i)), kBytes, i, b_.handle_, call.stream),
              "ncclBroadcast");
    group.end();
    return;
  }
  if (total <= kSendBelow || largest * n > 2 * total) {
    copy(packed + at[size(b_.rank_)], call.in, mine, call.stream);
    Group group(*this);
    for (int i = 0; i < n; ++i) {
      if (i == b_.rank_) continue;
      if (mine > 0)
        check(nccl_.send(call.in, size(mine), kBytes, i, b_.handle_, call.stream), "ncclSend");
      if (blocks.bytes(i, i) > 0)
        check(nccl_.recv(packed + at[size(i)], size(blocks.bytes(i, i)), kBytes, i, b_.handle_,
                         call.stream),
              "ncclRecv");
    }
    group.end();
    return;
  }
  const device::Scratch padded = scratch(call, largest * n);
  char* const own = padded.data() + largest * b_.rank_;
  copy(own, call.in, mine, call.stream);
  check(nccl_.all_gather(own, padded.data(), size(largest), kBytes, b_.handle_, call.stream),
        "ncclAllGather");
  for (int i = 0; i < n; ++i)
    copy(packed + at[size(i)], padded.data() + largest * i, blocks.bytes(i, i), call.stream);
}

void Enqueue::gather(const Call& call) {
  const Blocks blocks(call, b_.size_);
  const bool root = b_.rank_ == call.root;
  const bool direct = call.outer == 1;
  device::Layout layout;
  device::Scratch held;
  char* packed = static_cast<char*>(call.out);
  if (root && !direct) {
    layout = device::output_layout(call, b_.rank_, b_.size_);
    held = scratch(call, layout.packed_bytes());
    packed = held.data();
  }
  const int64_t mine = blocks.bytes(b_.rank_, call.root);
  if (call.sizes.empty() && nccl_.gather) {
    check(nccl_.gather(call.in, packed, size(mine), kBytes, call.root, b_.handle_, call.stream),
          "ncclGather");
  } else {
    Group group(*this);
    if (!root && mine > 0)
      check(nccl_.send(call.in, size(mine), kBytes, call.root, b_.handle_, call.stream),
            "ncclSend");
    int64_t at = 0;
    for (int i = 0; root && i < b_.size_; ++i) {
      const int64_t bytes = blocks.bytes(i, call.root);
      if (i == b_.rank_)
        copy(packed + at, call.in, bytes, call.stream);
      else if (bytes > 0)
        check(nccl_.recv(packed + at, size(bytes), kBytes, i, b_.handle_, call.stream), "ncclRecv");
      at += bytes;
    }
    group.end();
  }
  if (root && !direct) b_.kernels_->unpack(layout, packed, call.out, call.stream);
}

// ---- cutting --------------------------------------------------------------------------------

void Enqueue::reduce_scatter(const Call& call) {
  const Wire wire = wire_of(call.dtype);
  const Operator op(*this, call);
  const Blocks blocks(call, b_.size_);
  const int64_t element = static_cast<int64_t>(size_of(call.dtype));
  device::Scratch held;
  auto* packed = static_cast<const char*>(call.in);
  if (call.outer > 1) {
    const device::Layout layout = device::input_layout(call, b_.rank_, b_.size_);
    held = scratch(call, layout.packed_bytes());
    b_.kernels_->pack(layout, call.in, held.data(), call.stream);
    packed = held.data();
  }
  if (!call.sizes.empty()) {
    reduce_scatter_uneven(call, packed, op);
    return;
  }
  check(nccl_.reduce_scatter(packed, call.out, size(blocks.bytes(0, 0) / element * wire.each),
                             wire.type, op, b_.handle_, call.stream),
        "ncclReduceScatter");
}

void Enqueue::reduce_scatter_uneven(const Call& call, const char* packed, Op op) {
  const Wire wire = wire_of(call.dtype);
  const Blocks blocks(call, b_.size_);
  const int n = b_.size_;
  const int64_t element = static_cast<int64_t>(size_of(call.dtype));
  const auto elements = [&](int64_t bytes) { return size(bytes / element * wire.each); };
  int64_t total = 0;
  for (int i = 0; i < n; ++i) total += blocks.bytes(i, i);
  const int64_t largest = blocks.largest();
  if (total <= kSendBelow || largest * n > 2 * total) {
    Group group(*this);
    int64_t at = 0;
    for (int i = 0; i < n; ++i) {
      const int64_t bytes = blocks.bytes(i, i);
      if (bytes > 0)
        check(nccl_.reduce(packed + at, i == b_.rank_ ? call.out : nullptr, elements(bytes),
                           wire.type, op, i, b_.handle_, call.stream),
              "ncclReduce");
      at += bytes;
    }
    group.end();
    return;
  }
  // What lies in the padding is reduced too, and nobody reads it.
  const device::Scratch padded = scratch(call, largest * n);
  const device::Scratch result = scratch(call, largest);
  int64_t at = 0;
  for (int i = 0; i < n; ++i) {
    copy(padded.data() + largest * i, packed + at, blocks.bytes(i, i), call.stream);
    at += blocks.bytes(i, i);
  }
  check(nccl_.reduce_scatter(padded.data(), result.data(), elements(largest), wire.type, op,
                             b_.handle_, call.stream),
        "ncclReduceScatter");
  copy(call.out, result.data(), blocks.bytes(b_.rank_, b_.rank_), call.stream);
}

void Enqueue::scatter(const Call& call) {
  const Blocks blocks(call, b_.size_);
  const bool root = b_.rank_ == call.root;
  device::Scratch held;
  auto* packed = static_cast<const char*>(call.in);
  if (root && call.outer > 1) {
    const device::Layout layout = device::input_layout(call, b_.rank_, b_.size_);
    held = scratch(call, layout.packed_bytes());
    b_.kernels_->pack(layout, call.in, held.data(), call.stream);
    packed = held.data();
  }
  const int64_t mine = blocks.bytes(call.root, b_.rank_);
  if (call.sizes.empty() && nccl_.scatter) {
    check(nccl_.scatter(packed, call.out, size(mine), kBytes, call.root, b_.handle_, call.stream),
          "ncclScatter");
    return;
  }
  Group group(*this);
  if (!root && mine > 0)
    check(nccl_.recv(call.out, size(mine), kBytes, call.root, b_.handle_, call.stream), "ncclRecv");
  int64_t at = 0;
  for (int i = 0; root && i < b_.size_; ++i) {
    const int64_t bytes = blocks.bytes(call.root, i);
    if (i == b_.rank_)
      copy(call.out, packed + at, bytes, call.stream);
    else if (bytes > 0)
      check(nccl_.send(packed + at, size(bytes), kBytes, i, b_.handle_, call.stream), "ncclSend");
    at += bytes;
  }
  group.end();
}

void Enqueue::all_to_all(const Call& call) {
  const Blocks blocks(call, b_.size_);
  const int n = b_.size_;
  const int me = b_.rank_;
  const bool direct = call.outer == 1;
  device::Layout out;
  device::Scratch sent, got;
  auto* from = static_cast<const char*>(call.in);
  auto* to = static_cast<char*>(call.out);
  if (!direct) {
    const device::Layout in = device::input_layout(call, me, n);
    out = device::output_layout(call, me, n);
    sent = scratch(call, in.packed_bytes());
    got = scratch(call, out.packed_bytes());
    b_.kernels_->pack(in, call.in, sent.data(), call.stream);
    from = sent.data();
    to = got.data();
  }
  if (n == 1) {
    copy(to, from, blocks.bytes(0, 0), call.stream);
  } else if (call.sizes.empty() && nccl_.all_to_all) {
    check(nccl_.all_to_all(from, to, size(blocks.bytes(0, 0)), kBytes, b_.handle_, call.stream),
          "ncclAlltoAll");
  } else {
    Group group(*this);
    int64_t sent_at = 0;
    int64_t got_at = 0;
    for (int i = 0; i < n; ++i) {
      const int64_t out_bytes = blocks.bytes(me, i);
      const int64_t in_bytes = blocks.bytes(i, me);
      if (i == me) {
        copy(to + got_at, from + sent_at, out_bytes, call.stream);
      } else {
        if (out_bytes > 0)
          check(nccl_.send(from + sent_at, size(out_bytes), kBytes, i, b_.handle_, call.stream),
                "ncclSend");
        if (in_bytes > 0)
          check(nccl_.recv(to + got_at, size(in_bytes), kBytes, i, b_.handle_, call.stream),
                "ncclRecv");
      }
      sent_at += out_bytes;
      got_at += in_bytes;
    }
    group.end();
  }
  if (!direct) b_.kernels_->unpack(out, to, call.out, call.stream);
}

}  // namespace meshring::nccl

#include "lane/shm_lane.h"

#include <cstring>

#include "lane/digest.h"
#include "lane/landing.h"

namespace genie::shm {
namespace {

constexpr std::size_t kMaxPeerSegments = 4096;
constexpr std::size_t kMaxRecordsPerPoll = 256;          // others want their turn

}  // namespace

// False at the end of the socket.
bool ShmLane::read_socket() noexcept try {
  for (;;) {
    PacketBody body{};
    std::size_t size = 0;
    std::array<Fd, 2> fds;
    switch (receive_packet(socket_.get(), std::as_writable_bytes(std::span(&body, 1)), size, fds)) {
      case Packet::kNothing: return true;
      case Packet::kEnd: return false;
      case Packet::kGot: break;
    }
    if (size != sizeof body || body.magic != kMagic || body.kind != kSegment || body.number == 0 ||
        peer_segments_.contains(body.number) || peer_segments_.size() >= kMaxPeerSegments) {
      shut(End::kCorrupt, "a packet that is no segment");
      return true;
    }
    std::string error;
    // The connecting end may write to what it is given; the other never.
    auto segment = Segment::map(std::move(fds[0]), body.size_bytes, connecting_, error);
    if (segment == nullptr) {
      shut(End::kCorrupt, error);
      return true;
    }
    peer_segments_.emplace(body.number, std::move(segment));
  }
} catch (...) {
  shut(End::kLocal, "out of memory");
  return true;
}

void ShmLane::drain() noexcept try {
  for (std::size_t i = 0; i < kMaxRecordsPerPoll; ++i) {
    std::uint32_t kind = 0;
    std::span<const std::byte> body;
    switch (reader_->next(kind, body)) {
      case RingReader::Got::kNothing: return;
      case RingReader::Got::kBroken: shut(End::kCorrupt, "a ring position or record size that cannot be"); return;
      case RingReader::Got::kRecord: break;
    }
    bool good = false;
    switch (kind) {
      case kMessage: good = take_message(body); break;
      case kRelease: good = take_releases(body); break;
      case kDrop: good = take_drop(body); break;
      case kBye: shut(End::kPeerLost, "closed by the other end"); return;
      default: break;
    }
    if (closed_) return;
    if (!good) {
      shut(End::kCorrupt, "a record of kind " + std::to_string(kind) + " that cannot be");
      return;
    }
    reader_->done();
  }
} catch (...) {
  shut(End::kLocal, "out of memory");
}

bool ShmLane::take_message(std::span<const std::byte> body) {
  MessageHead head{};
  if (body.size() < sizeof head) return false;
  std::memcpy(&head, body.data(), sizeof head);
  if (head.sequence != last_arrived_ + 1 || head.num_slices > kMaxSlices) return false;   // a replay, or too many
  const std::size_t inline_at = sizeof head + head.num_slices * sizeof(SliceRef);
  if (inline_at > body.size()) return false;
  const std::span<const std::byte> inlined = body.subspan(inline_at);
  std::vector<Buffer> buffers;
  buffers.reserve(head.num_slices);
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < head.num_slices; ++i) {
    SliceRef ref{};
    std::memcpy(&ref, body.data() + sizeof head + i * sizeof ref, sizeof ref);
    if (ref.size_bytes > capabilities_.max_transfer_bytes - total) return false;
    Buffer buffer = ref.segment == 0 ? from_record(ref, inlined) : from_segment(ref, (head.flags & kCopyOut) != 0);
    if (buffer.data == nullptr) return false;
    total += ref.size_bytes;
    buffers.push_back(std::move(buffer));
  }
  if ((head.flags & kHasDigest) != 0) {
    std::uint32_t crc = crc32c(&head.epoch, sizeof head.epoch);
    for (const Buffer& buffer : buffers) crc = crc32c(buffer.data, buffer.size_bytes, crc);
    if (crc != head.digest) return false;
  }
  last_arrived_ = head.sequence;
  ++facts_.arrived;
  ++reported_;
  facts_.bytes_arrived += total;
  sink_->on_arrived(head.id, head.epoch, std::move(buffers));
  return true;
}

Buffer ShmLane::from_record(const SliceRef& ref, std::span<const std::byte> inlined) {
  if (ref.offset > inlined.size() || ref.size_bytes > inlined.size() - ref.offset) return {};
  Buffer buffer = land(ref.size_bytes);
  if (buffer.data == nullptr) return {};
  if (ref.size_bytes > 0) std::memcpy(buffer.data, inlined.data() + ref.offset, ref.size_bytes);
  facts_.bytes_copied_in += ref.size_bytes;
  return buffer;
}

Buffer ShmLane::from_segment(const SliceRef& ref, bool copy_out) {
  auto found = peer_segments_.find(ref.segment);
  if (found == peer_segments_.end()) {
    // Its packet was sent before this record; it waits in the socket.
    if (!read_socket() || closed_) return {};
    found = peer_segments_.find(ref.segment);
    if (found == peer_segments_.end()) return {};
  }
  const Segment& segment = *found->second;
  if (ref.offset > segment.size_bytes() || ref.size_bytes > segment.size_bytes() - ref.offset ||
      ref.size_bytes == 0) {
    return {};
  }
  std::byte* data = segment.data() + ref.offset;
  auto borrowed = std::make_shared<Borrowed>(found->second, releases_, ref.token);
  if (!copy_out) return {data, ref.size_bytes, !connecting_, std::move(borrowed), true};
  Buffer buffer = land(ref.size_bytes);
  if (buffer.data == nullptr) return {};
  std::memcpy(buffer.data, data, ref.size_bytes);
  facts_.bytes_copied_in += ref.size_bytes;
  return buffer;
}

bool ShmLane::take_releases(std::span<const std::byte> body) {
  if (body.size() % sizeof(std::uint64_t) != 0) return false;
  for (std::size_t at = 0; at < body.size(); at += sizeof(std::uint64_t)) {
    std::uint64_t token = 0;
    std::memcpy(&token, body.data() + at, sizeof token);
    const auto index = static_cast<std::size_t>(token & 0xFFFFFFFFU);
    if (index >= slots_.size() || !slots_[index].busy || slots_[index].generation != token >> 32) return false;
    slots_[index].busy = false;
    slots_[index].owner.reset();
    free_slots_.push_back(static_cast<std::uint32_t>(index));
  }
  return true;
}

bool ShmLane::take_drop(std::span<const std::byte> body) {
  std::uint32_t number = 0;
  if (body.size() != sizeof number) return false;
  std::memcpy(&number, body.data(), sizeof number);
  if (!peer_segments_.contains(number) && (!read_socket() || closed_)) return false;
  return peer_segments_.erase(number) == 1;
}

}  // namespace genie::shm

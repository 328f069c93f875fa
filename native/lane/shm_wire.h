// What goes between the ends of a shm lane: packets over the socket, records in the rings. Same machine, same compiler:
// native layout, but every size is asserted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lane/lane.h"
#include "lane/ring.h"

namespace genie::shm {

inline constexpr std::uint32_t kMagic = 0x4D4C4E47U;            // "GNLM"

enum PacketKind : std::uint16_t { kHello = 1, kSegment = 2 };
enum RecordKind : std::uint32_t { kMessage = 1, kRelease = 2, kDrop = 3, kBye = 4 };
enum MessageFlag : std::uint32_t { kHasDigest = 1, kCopyOut = 2 };

// Over the socket.
struct PacketBody {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint16_t kind;
  std::uint32_t number;       // of a segment
  std::uint32_t reserved;
  std::uint64_t size_bytes;   // of the segment that comes with it
};
static_assert(sizeof(PacketBody) == 24);

struct MessageHead {
  std::uint64_t id;
  std::uint64_t sequence;     // of messages in the ring, from 1; ids follow posting, whose order priorities change
  std::uint64_t epoch;
  std::uint32_t num_slices;
  std::uint32_t flags;
  std::uint32_t digest;
  std::uint32_t reserved;
};
static_assert(sizeof(MessageHead) == 40);

struct SliceRef {
  std::uint64_t size_bytes;
  std::uint64_t offset;       // in the segment, or in the record's inline bytes
  std::uint64_t token;        // to be given back; of no meaning inline
  std::uint32_t segment;      // 0: inline
  std::uint32_t reserved;
};
static_assert(sizeof(SliceRef) == 32);
static_assert(sizeof(MessageHead) + kMaxSlices * sizeof(SliceRef) <= kMaxRecordBytes);

}  // namespace genie::shm

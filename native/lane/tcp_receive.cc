#include "lane/tcp_lane.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "lane/digest.h"
#include "lane/landing.h"

namespace genie::tcp {
namespace {

constexpr std::size_t kPollBudget = std::size_t{8} << 20;       // bytes read in one poll: others want their turn

}  // namespace

void TcpLane::receive() noexcept try {
  std::size_t budget = kPollBudget;
  more_ = false;
  for (;;) {
    if (!parse()) return;                    // closed
    if (budget == 0) {
      more_ = true;
      return;
    }
    ssize_t got = 0;
    const bool direct = state_ == State::kSlices && staged_from_ == staged_to_ &&
                        slices_[slice_].size_bytes - filled_ >= kStagingBytes / 2;
    if (direct) {
      const std::size_t left = slices_[slice_].size_bytes - filled_;
      got = ::recv(socket_.get(), slices_[slice_].data + filled_, std::min(left, check_ ? kDigestStep : left),
                   MSG_DONTWAIT);
    } else {
      make_room();
      got = ::recv(socket_.get(), staging_.data() + staged_to_, staging_.size() - staged_to_, MSG_DONTWAIT);
    }
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      return shut(End::kPeerLost, error_text("receiving"));
    }
    if (got == 0) return shut(End::kPeerLost, "the other end is gone");
    const auto size = static_cast<std::size_t>(got);
    budget -= std::min(budget, size);
    if (direct) {
      landed(size);
    } else {
      staged_to_ += size;
    }
  }
} catch (...) {
  shut(End::kLocal, "out of memory");
}

void TcpLane::make_room() noexcept {
  if (staged_from_ == staged_to_) {
    staged_from_ = staged_to_ = 0;
  } else if (staged_from_ > 0) {
    std::memmove(staging_.data(), staging_.data() + staged_from_, staged_to_ - staged_from_);
    staged_to_ -= staged_from_;
    staged_from_ = 0;
  }
}

void TcpLane::landed(std::size_t size) noexcept {
  if (check_) crc_ = crc32c(slices_[slice_].data + filled_, size, crc_);
  filled_ += size;
}

// Takes what is staged apart; false when the lane has been closed.
bool TcpLane::parse() {
  for (;;) {
    const std::size_t have = staged_to_ - staged_from_;
    const std::byte* at = staging_.data() + staged_from_;
    switch (state_) {
      case State::kHeader: {
        if (have < tcp::kHeaderBytes) return true;
        if (!tcp::read_header(std::span<const std::byte, tcp::kHeaderBytes>(at, tcp::kHeaderBytes), header_)) {
          return corrupt("a header that cannot be");
        }
        staged_from_ += tcp::kHeaderBytes;
        if (!take_acked(header_.acked)) return corrupt("an acknowledgement of what was not sent");
        if (header_.kind == tcp::Kind::kBye) {
          shut(End::kPeerLost, "closed by the other end");
          return false;
        }
        if (header_.kind == tcp::Kind::kAck) break;
        if (header_.sequence != last_arrived_ + 1) return corrupt("a message out of turn");
        state_ = State::kSizes;
        break;
      }
      case State::kSizes: {
        const std::size_t size = std::size_t{header_.num_slices} * 8 + 4;
        if (have < size) return true;     // fits: kMaxSlices * 8 + 4 < kStagingBytes
        if (!open_slices(at)) return false;
        staged_from_ += size;
        state_ = State::kSlices;
        break;
      }
      case State::kSlices: {
        while (slice_ < slices_.size() && filled_ == slices_[slice_].size_bytes) {
          ++slice_;
          filled_ = 0;
        }
        if (slice_ == slices_.size()) {
          state_ = State::kDigest;
          break;
        }
        if (have == 0) return true;
        const std::size_t size = std::min(have, slices_[slice_].size_bytes - filled_);
        std::memcpy(slices_[slice_].data + filled_, at, size);
        facts_.bytes_copied_in += size;
        staged_from_ += size;
        landed(size);
        break;
      }
      case State::kDigest: {
        if (check_) {
          if (have < 4) return true;
          std::uint32_t digest = 0;
          std::memcpy(&digest, at, 4);
          staged_from_ += 4;
          if (digest != crc_) return corrupt("bytes that are not those that were sent");
        }
        arrived();
        break;
      }
    }
  }
}

bool TcpLane::corrupt(const char* what) {
  shut(End::kCorrupt, std::string("the other end sent ") + what);
  return false;
}

bool TcpLane::open_slices(const std::byte* sizes) {
  std::uint32_t crc = 0;
  std::memcpy(&crc, sizes + std::size_t{header_.num_slices} * 8, 4);
  if (crc != crc32c(sizes, std::size_t{header_.num_slices} * 8)) return corrupt("sizes that cannot be");
  std::uint64_t total = 0;
  for (std::size_t i = 0; i < header_.num_slices; ++i) {
    std::uint64_t size = 0;
    std::memcpy(&size, sizes + i * 8, 8);
    if (size > capabilities_.max_transfer_bytes - total) return corrupt("more than may be announced");
    total += size;
  }
  slices_.clear();
  for (std::size_t i = 0; i < header_.num_slices; ++i) {
    std::uint64_t size = 0;
    std::memcpy(&size, sizes + i * 8, 8);
    Buffer buffer = land(size);
    if (buffer.data == nullptr) {
      shut(End::kLocal, "no memory for " + std::to_string(size) + " bytes");
      return false;
    }
    slices_.push_back(std::move(buffer));
  }
  slice_ = filled_ = 0;
  check_ = (header_.flags & tcp::kHasDigest) != 0;
  crc_ = crc32c(&header_.epoch, sizeof header_.epoch);
  return true;
}

void TcpLane::arrived() {
  last_arrived_ = header_.sequence;
  ++facts_.arrived;
  ++reported_;
  for (const Buffer& buffer : slices_) facts_.bytes_arrived += buffer.size_bytes;
  state_ = State::kHeader;
  sink_->on_arrived(header_.id, header_.epoch, std::exchange(slices_, {}));
}

}  // namespace genie::tcp

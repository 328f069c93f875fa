// The receiving half of a session: what is offered, what of it is there, what to answer.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "protocol/bit_window.h"
#include "protocol/shared.h"

namespace genie::protocol {

class Receiver {
 public:
  explicit Receiver(Shared& shared);

  // Let an offered transfer land in `sink`, which has its ticket's size. False where it is not on offer (any more)
  // or the sizes differ.
  [[nodiscard]] bool accept(Nanoseconds now, TransferId transfer, Sink sink, Nanoseconds deadline);
  // Ends an offered or accepted transfer in kCancelled. False where there is none.
  bool cancel(TransferId transfer, ResetReason reason) noexcept;

  // Whether a transfer is over, in whichever way; true for id 0 and for those that are too old to know.
  [[nodiscard]] bool has_ended(TransferId id) const noexcept;

  void on_open(const ParsedFrame& frame) noexcept;
  void on_data(Nanoseconds now, const ParsedFrame& frame) noexcept;
  void on_cancel(const ParsedFrame& frame) noexcept;
  void on_time(Nanoseconds now) noexcept;
  void end_all(End end) noexcept;

  [[nodiscard]] bool next_frame(Nanoseconds now, OutgoingFrame& frame) noexcept;
  [[nodiscard]] Nanoseconds next_time(Nanoseconds now) const noexcept;

 private:
  enum class State : std::uint8_t { kFree, kOffered, kReceiving };

  struct Transfer {
    State state = State::kFree;
    TransferId id = 0;
    Ticket ticket{};
    Sink sink;
    std::uint32_t total = 0;
    std::uint32_t cumulative = 0;  // all below are there
    std::uint32_t end = 0;         // none is there from here on
    BitWindow there;
    Nanoseconds deadline = kNever;
    Nanoseconds idle_at = kNever;
    std::uint32_t corrupt_in_a_row = 0;
    // The SACK that is owed.
    std::uint32_t owed_chunks = 0;
    Nanoseconds owed_since = 0;
    bool owed_now = false;
    std::uint32_t trigger = 0;
    Nanoseconds trigger_at = 0;
    std::uint8_t trigger_try = 0;
    bool trigger_duplicate = false;
  };
  struct Finished {
    TransferId id = 0;
    End end = End::kOk;
    std::uint32_t total = 0;
  };
  struct Reply {  // about a transfer that is not (any more) in progress
    TransferId id;
    bool is_reset;
    ResetReason reason;
    std::uint32_t total;
  };

  [[nodiscard]] Transfer* find(TransferId id) noexcept;
  [[nodiscard]] bool is_forgotten(TransferId id) const noexcept;
  void answer_absent(TransferId id) noexcept;
  void reply(const Reply& answer) noexcept;
  void finish(Transfer& transfer, End end, ResetReason reason) noexcept;
  void land(Transfer& transfer, const ParsedFrame& frame) const noexcept;
  void owe(Transfer& transfer, Nanoseconds now, const Header& header, bool duplicate, bool at_once) noexcept;
  [[nodiscard]] bool is_due(const Transfer& transfer, Nanoseconds now) const noexcept;
  void write_owed(Transfer& transfer, Nanoseconds now, OutgoingFrame& frame) noexcept;

  static constexpr std::size_t kRemembered = 4096;  // finished transfers: younger ids are told from repeated ones
  static constexpr std::size_t kMaxReplies = 256;   // more are dropped: the sender asks again

  Shared& shared_;
  std::vector<Transfer> slots_;
  std::vector<std::uint32_t> active_;
  std::vector<Finished> finished_;  // id at id % kRemembered
  TransferId highest_ = 0;
  std::vector<Reply> replies_;      // ring
  std::size_t first_reply_ = 0, num_replies_ = 0;
};

}  // namespace genie::protocol

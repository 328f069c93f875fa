// What every lane promises (lane/lane.h), over each of them.
#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "lane/bulk.h"
#include "lane/bundle.h"
#include "tests/lanes.h"

namespace genie::test {
namespace {

template <typename Check>
void over_each(Check check) {
  for (const Kind& kind : kinds()) {
    CAPTURE(kind.name);
    auto [left, right] = kind.make();
    check(*left, *right);
  }
}

TEST_CASE("slices arrive as they were sent, in one piece and in order, of every size") {
  over_each([](Channel& left, Channel& right) {
    const std::vector<std::size_t> sizes{0, 1, 7, 4096, 16384, 16385, 65536, 65537, 1'000'003, 5'000'000};
    for (const bool digest : {false, true}) {
      std::vector<Slice> slices;
      std::vector<std::shared_ptr<std::vector<std::byte>>> sent;
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        sent.push_back(std::make_shared<std::vector<std::byte>>(pattern(sizes[i], static_cast<unsigned>(i))));
        slices.push_back(slice_of(sent.back()));
      }
      SendOptions options;
      options.digest = digest;
      options.epoch = 7;
      std::thread sender([&] { CHECK(send(left, slices, options) != 0); });
      const Message message = receive(right);
      sender.join();
      CHECK(message.epoch == 7);
      REQUIRE(message.buffers.size() == sizes.size());
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        REQUIRE(message.buffers[i].size_bytes == sizes[i]);
        CHECK((sizes[i] == 0 || std::memcmp(message.buffers[i].data, sent[i]->data(), sizes[i]) == 0));
      }
    }
  });
}

TEST_CASE("many messages in both directions, from two threads") {
  over_each([](Channel& left, Channel& right) {
    constexpr int kCount = 2000;
    const auto run = [](Channel& channel, unsigned seed) {
      int received = 0;
      for (int i = 0; i < kCount; ++i) {
        const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(static_cast<std::size_t>(i) * 13 % 70000, seed));
        if (send(channel, {slice_of(bytes)}) == 0) return received;
        Message message;
        while (channel.try_receive(message) == Channel::Got::kMessage) ++received;
      }
      while (received < kCount) {
        Message message;
        if (channel.receive(message, in(std::chrono::seconds(10)), std::chrono::microseconds(5)) !=
            Channel::Got::kMessage) {
          break;
        }
        ++received;
      }
      return received;
    };
    std::atomic<int> at_right{0};
    std::thread other([&] { at_right = run(right, 2); });
    const int at_left = run(left, 1);
    other.join();
    CHECK(at_left == kCount);
    CHECK(at_right == kCount);
  });
}

TEST_CASE("a watched transfer ends in OK once the peer has it, and the sender's memory is let go") {
  over_each([](Channel& left, Channel& right) {
    auto bytes = std::make_shared<std::vector<std::byte>>(pattern(3'000'000, 1));
    const std::weak_ptr<std::vector<std::byte>> watcher = bytes;
    SendOptions options;
    options.watch = true;
    std::uint64_t id = 0;
    {
      const std::vector<Slice> slices{slice_of(std::move(bytes))};
      id = send(left, slices, options);
    }
    REQUIRE(id != 0);
    std::thread reader([&] {
      receive(right);
      Message none;   // acknowledgements go before an end sleeps
      CHECK(right.receive(none, in(std::chrono::milliseconds(50)), std::chrono::microseconds(0)) == Channel::Got::kNothing);
    });
    CHECK(left.wait_ended(id, in(std::chrono::seconds(10))) == End::kOk);
    reader.join();
    CHECK(left.quiesce(in(std::chrono::seconds(5))));
    CHECK(watcher.expired());
  });
}

TEST_CASE("how much of a transfer has left can be asked while it is open") {
  auto [left, right] = tcp_ends();
  const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(64 << 20, 1));
  SendOptions options;
  options.watch = true;
  const std::uint64_t id = send(*left, {slice_of(bytes)}, options);
  const std::uint64_t moved = left->bytes_moved(id);
  CHECK(moved > 0);
  CHECK(moved < bytes->size());
  CHECK(left->bytes_moved(id + 1) == 0);
}

TEST_CASE("a transfer that nobody polls for ends in TIMEOUT, where nobody else takes it") {
  over_each([](Channel& left, Channel& right) {
    SendOptions options;
    options.watch = true;
    options.deadline = in(std::chrono::milliseconds(30));
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(100, 1));
    const std::uint64_t id = send(left, {slice_of(bytes)}, options);
    CHECK(left.wait_ended(id, in(std::chrono::seconds(5))) == (kinds().front().takes_unasked ? End::kOk : End::kTimeout));
    CHECK_FALSE(right.closed());
  });
}

TEST_CASE("cancel ends a transfer in CANCELLED, once") {
  over_each([](Channel& left, Channel& right) {
    SendOptions options;
    options.watch = true;
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(100, 1));
    const std::uint64_t id = send(left, {slice_of(bytes)}, options);
    CHECK(left.cancel(id));
    CHECK_FALSE(left.cancel(id));
    CHECK(left.wait_ended(id, in(std::chrono::seconds(5))) == End::kCancelled);
    CHECK_FALSE(right.closed());
  });
}

TEST_CASE("closing ends open transfers, and the peer reads what was there and then sees PEER_LOST") {
  over_each([](Channel& left, Channel& right) {
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(1000, 3));
    SendOptions options;
    options.watch = true;
    const std::uint64_t back = send(right, {slice_of(bytes)}, options);
    REQUIRE(send(left, {slice_of(bytes)}) != 0);
    receive(right);
    left.close();
    CHECK(left.close_end() == End::kCancelled);
    Message message;
    CHECK(right.receive(message, in(std::chrono::seconds(5)), std::chrono::microseconds(0)) == Channel::Got::kClosed);
    CHECK(right.close_end() == End::kPeerLost);
    const auto end = right.wait_ended(back, in(std::chrono::seconds(5)));
    CHECK((end == End::kPeerLost || end == End::kOk));
    Posted posted = Posted::kAccepted;
    const std::vector<Slice> more{slice_of(bytes)};
    CHECK(left.send(more, {}, Clock::now(), posted) == 0);
    CHECK(posted == Posted::kClosed);
  });
}

TEST_CASE("what arrived lives on after both ends are closed") {
  over_each([](Channel& left, Channel& right) {
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(200'000, 9));
    std::thread sender([&] { send(left, {slice_of(bytes)}); });
    const Message message = receive(right);
    sender.join();
    left.close();
    right.close();
    CHECK(std::memcmp(message.buffers[0].data, bytes->data(), bytes->size()) == 0);
  });
}

TEST_CASE("what is urgent waits for a window of bulk at most, and all of it arrives in order") {
  for (const auto& make : {shm_ends, tcp_ends}) {
    auto [left, right] = make();
    constexpr std::size_t kMessages = 64;
    const auto piece = std::make_shared<std::vector<std::byte>>(pattern(1 << 20, 1));
    const auto small = std::make_shared<std::vector<std::byte>>(pattern(10, 2));
    SendOptions options;
    options.priority = Priority::kBulk;
    std::vector<std::uint64_t> ids;
    for (std::size_t i = 0; i < kMessages; ++i) ids.push_back(send(*left, {slice_of(piece)}, options));
    options.priority = Priority::kNormal;
    const std::uint64_t urgent = send(*left, {slice_of(small)}, options);
    std::vector<std::uint64_t> arrived;
    std::thread mover([&, channel = left] { CHECK(channel->quiesce(in(kPatience))); });
    while (arrived.size() <= kMessages) arrived.push_back(receive(*right).id);
    Message none;   // who receives says what has come when it looks for more
    CHECK(right->receive(none, in(std::chrono::milliseconds(20)), std::chrono::microseconds(0)) ==
          Channel::Got::kNothing);
    mover.join();
    const auto at = std::find(arrived.begin(), arrived.end(), urgent);
    REQUIRE(at != arrived.end());
    CHECK(static_cast<std::size_t>(at - arrived.begin()) <= kBulkWindowBytes / piece->size());
    arrived.erase(at);
    CHECK(arrived == ids);
  }
}

TEST_CASE("bulk that was cancelled, or that nobody takes, leaves the window as it was") {
  for (const auto& make : {shm_ends, tcp_ends}) {
    auto [left, right] = make();
    const auto large = std::make_shared<std::vector<std::byte>>(pattern(3 * kBulkWindowBytes, 1));
    SendOptions bulk;
    bulk.priority = Priority::kBulk;
    const std::uint64_t first = send(*left, {slice_of(large)}, bulk);     // more than a window: one at a time
    const std::uint64_t second = send(*left, {slice_of(large)}, bulk);
    const std::uint64_t third = send(*left, {slice_of(large)}, bulk);
    REQUIRE(left->cancel(second));
    std::thread mover([&, channel = left] { CHECK(channel->quiesce(in(kPatience))); });
    CHECK(receive(*right).id == first);
    CHECK(receive(*right).id == third);
    Message none;
    CHECK(right->receive(none, in(std::chrono::milliseconds(20)), std::chrono::microseconds(0)) ==
          Channel::Got::kNothing);
    mover.join();
  }
}

TEST_CASE("an urgent message overtakes bulk that waits, whole messages at a time") {
  // Of lanes with a queue of their own; inproc and shm hand over at once while there is room.
  auto [left, right] = tcp_ends();
  const auto bulk = std::make_shared<std::vector<std::byte>>(pattern(64 << 20, 1));
  const auto small = std::make_shared<std::vector<std::byte>>(pattern(10, 2));
  SendOptions options;
  options.priority = Priority::kBulk;
  for (int i = 0; i < 3; ++i) REQUIRE(send(*left, {slice_of(bulk)}, options) != 0);
  options.priority = Priority::kUrgent;
  REQUIRE(send(*left, {slice_of(small)}, options) != 0);
  std::vector<std::size_t> sizes;
  std::thread mover([&, channel = left] { CHECK(channel->quiesce(in(std::chrono::seconds(20)))); });
  for (int i = 0; i < 4; ++i) sizes.push_back(receive(*right).buffers[0].size_bytes);
  Message none;
  CHECK(right->receive(none, in(std::chrono::milliseconds(20)), std::chrono::microseconds(0)) == Channel::Got::kNothing);
  mover.join();
  CHECK(sizes[1] == 10);
}

TEST_CASE("what waits for a full socket can be cancelled and overtaken, and the lane goes on") {
  // Small ones until the socket takes no more: the head of the queue may have begun, or not.
  for (const bool overtaken : {false, true}) {
    CAPTURE(overtaken);
    auto [left, right] = tcp_ends();
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(600, 1));
    std::vector<std::uint64_t> ids;
    for (Posted posted = Posted::kAccepted; posted == Posted::kAccepted;) {
      const std::uint64_t id = left->send(std::vector<Slice>{slice_of(bytes)}, {}, Clock::now(), posted);
      if (id != 0) ids.push_back(id);
    }
    std::vector<std::uint64_t> cancelled;
    // The last ones: at the head of the queue one may begin between a look and the cancelling, and then it arrives.
    if (!overtaken) {
      for (const std::size_t back : {1U, 2U}) {
        REQUIRE(left->cancel(ids.at(ids.size() - back)));
        cancelled.push_back(ids[ids.size() - back]);
      }
    }
    if (overtaken) {
      CHECK(left->cancel(ids.back()));   // room for one more
      SendOptions urgent;
      urgent.priority = Priority::kUrgent;
      REQUIRE(send(*left, {slice_of(bytes)}, urgent) != 0);
    }
    std::thread mover([&, channel = left] { CHECK(channel->quiesce(in(std::chrono::seconds(20)))); });
    const std::size_t expected = overtaken ? ids.size() : ids.size() - cancelled.size();
    for (std::size_t i = 0; i < expected; ++i) {
      Message message;
      REQUIRE(right->receive(message, in(std::chrono::seconds(10)), std::chrono::microseconds(0)) ==
              Channel::Got::kMessage);
      CHECK(std::find(cancelled.begin(), cancelled.end(), message.id) == cancelled.end());
    }
    Message none;
    CHECK(right->receive(none, in(std::chrono::milliseconds(20)), std::chrono::microseconds(0)) ==
          Channel::Got::kNothing);
    mover.join();
    CHECK_FALSE(left->closed());
  }
}

TEST_CASE("a message of as many slices as a lane names arrives, empty ones among them") {
  over_each([](Channel& left, Channel& right) {
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(20'000, 4));
    const auto none = std::make_shared<std::vector<std::byte>>();
    std::vector<Slice> slices;
    for (std::size_t i = 0; i < left.capabilities().max_slices; ++i) slices.push_back(slice_of(i % 3 == 1 ? none : bytes));
    std::thread sender([&] { CHECK(send(left, slices) != 0); });
    const Message message = receive(right);
    sender.join();
    REQUIRE(message.buffers.size() == slices.size());
    for (std::size_t i = 0; i < slices.size(); ++i) {
      REQUIRE(message.buffers[i].size_bytes == slices[i].size_bytes);
      REQUIRE((i % 3 == 1 || std::memcmp(message.buffers[i].data, bytes->data(), bytes->size()) == 0));
    }
  });
}

TEST_CASE("a message of more slices than a lane names arrives all the same, and beyond the bound it is refused") {
  over_each([](Channel& left, Channel& right) {
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(3'000, 4));
    const auto none = std::make_shared<std::vector<std::byte>>();
    for (const std::size_t count : {left.capabilities().max_slices + 1, std::size_t{20'000}}) {
      std::vector<Slice> slices;
      for (std::size_t i = 0; i < count; ++i) slices.push_back(slice_of(i % 3 == 1 ? none : bytes));
      SendOptions options;
      options.epoch = 5;
      std::thread sender([&] { CHECK(send(left, slices, options) != 0); });
      const Message message = receive(right);
      sender.join();
      CHECK(message.epoch == 5);
      REQUIRE(message.buffers.size() == count);
      for (std::size_t i = 0; i < count; ++i) {
        REQUIRE(message.buffers[i].size_bytes == slices[i].size_bytes);
        REQUIRE((i % 3 == 1 || std::memcmp(message.buffers[i].data, bytes->data(), bytes->size()) == 0));
      }
    }
    const std::vector<Slice> slices(kMaxBundled + 1, slice_of(none));
    Posted posted = Posted::kAccepted;
    CHECK(left.send(slices, {}, Clock::now(), posted) == 0);
    CHECK(posted == Posted::kRefused);
    CHECK_FALSE(left.closed());
  });
}

TEST_CASE("a bundle that cannot be closes the lane of who gets it, and nothing in it is believed") {
  const std::vector<std::vector<std::uint64_t>> tables{
      {}, {0, 1}, {1, 64, 64}, {2, 64, 65}, {1, ~std::uint64_t{0}}, {2, 64, ~std::uint64_t{0} - 63}, {~std::uint64_t{0}, 64}};
  for (const auto& table : tables) {
    CAPTURE(table.size());
    const auto head = std::make_shared<std::vector<std::byte>>(table.size() * 8);
    if (!table.empty()) std::memcpy(head->data(), table.data(), head->size());
    std::vector<Buffer> buffers(2);
    buffers[0] = {head->data(), head->size(), false, head};
    const auto group = std::make_shared<std::vector<std::byte>>(pattern(128, 1));
    buffers[1] = {group->data(), group->size(), false, group};
    CHECK((table == std::vector<std::uint64_t>{~std::uint64_t{0}, 64}) == unbundle(buffers));
  }
}

TEST_CASE("several threads may wait for one transfer, and all learn its end") {
  over_each([](Channel& left, Channel& right) {
    for (int round = 0; round < 20; ++round) {
      SendOptions options;
      options.watch = true;
      const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(100, 1));
      const std::uint64_t id = send(left, {slice_of(bytes)}, options);
      std::atomic<int> learnt{0};
      std::vector<std::thread> waiters;
      for (int i = 0; i < 3; ++i) {
        waiters.emplace_back([&] {
          const auto end = left.wait_ended(id, in(std::chrono::seconds(10)));
          learnt += !end || *end == End::kOk ? 1 : 0;   // or another one has forgotten it
          left.forget(id);
        });
      }
      receive(right);
      Message none;
      CHECK(right.receive(none, in(std::chrono::milliseconds(1)), std::chrono::microseconds(0)) == Channel::Got::kNothing);
      for (std::thread& waiter : waiters) waiter.join();
      CHECK(learnt == 3);
    }
  });
}

TEST_CASE("a forked child does not speak for its parent, whose lane goes on") {
  over_each([](Channel& left, Channel& right) {
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(200'000, 1));
    const pid_t child = ::fork();
    if (child == 0) {
      Posted posted = Posted::kAccepted;
      const std::vector<Slice> slices{slice_of(bytes)};
      Message message;
      const bool refused = left.send(slices, {}, Clock::now(), posted) == 0 && posted == Posted::kClosed && left.closed() &&
                           right.try_receive(message) == Channel::Got::kClosed;
      left.close();
      ::_exit(refused ? 0 : 1);
    }
    int status = -1;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    std::thread sender([&] { CHECK(send(left, {slice_of(bytes)}) != 0); });
    CHECK(receive(right).buffers[0].size_bytes == bytes->size());
    sender.join();
  });
}

TEST_CASE("threads that wait for room in one channel's queue all get their turn") {
  over_each([](Channel& left, Channel& right) {
    constexpr int kThreads = 4;
    constexpr int kCount = 1500;
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(2000, 1));
    std::atomic<int> accepted{0};
    std::vector<std::thread> senders;
    for (int i = 0; i < kThreads; ++i) {
      senders.emplace_back([&] {
        for (int k = 0; k < kCount; ++k) accepted += send(left, {slice_of(bytes)}) != 0 ? 1 : 0;
      });
    }
    std::thread reader([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));   // until the queue is full
      Message message;
      for (int k = 0; k < kThreads * kCount; ++k) {
        if (right.receive(message, in(std::chrono::seconds(2)), std::chrono::microseconds(0)) !=
            Channel::Got::kMessage) {
          break;
        }
      }
    });
    for (std::thread& sender : senders) sender.join();
    reader.join();
    CHECK(accepted == kThreads * kCount);
  });
}

TEST_CASE("statistics count logical bytes once at each end") {
  over_each([](Channel& left, Channel& right) {
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(300'000, 1));
    std::thread sender([&] { send(left, {slice_of(bytes), slice_of(bytes)}); });
    receive(right);
    sender.join();
    CHECK(left.statistics().bytes_sent == 600'000);
    CHECK(right.statistics().bytes_arrived == 600'000);
  });
}

}  // namespace
}  // namespace genie::test

// What is the dpdk lane's own: a thread that moves the port beside those who post and poll, loss, an end in the middle.
#include <atomic>
#include <cstring>
#include <thread>

#include "dpdk/hub.h"
#include "tests/lanes.h"

namespace genie::test {
namespace {

struct Loss {   // on every port of this process, for as long as this is there
  Loss(double chance, std::uint64_t seed) { dpdk::Hub::lose_all(chance, seed); }
  ~Loss() { dpdk::Hub::lose_all(0, 1); }
};

TEST_CASE("both ends send and receive from threads of their own, while frames are lost") {
  auto [left, right] = dpdk_ends();
  const Loss loss(0.02, 7);
  constexpr unsigned kMessages = 60;
  const auto talk = [](Channel& channel, unsigned seed) {
    for (unsigned i = 0; i < kMessages; ++i) {
      const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(1 + i * 7919 % 300'000, seed + i));
      CHECK(send(channel, {slice_of(bytes)}, {.epoch = i, .digest = i % 2 == 0}) != 0);
    }
  };
  const auto listen = [](Channel& channel, unsigned seed) {
    for (unsigned i = 0; i < kMessages; ++i) {
      const Message message = receive(channel);
      const auto expected = pattern(1 + i * 7919 % 300'000, seed + i);
      CHECK(message.epoch == i);
      REQUIRE(message.buffers.at(0).size_bytes == expected.size());
      CHECK(std::memcmp(message.buffers[0].data, expected.data(), expected.size()) == 0);
    }
  };
  std::thread threads[] = {std::thread(talk, std::ref(*left), 100), std::thread(talk, std::ref(*right), 900),
                           std::thread(listen, std::ref(*left), 900), std::thread(listen, std::ref(*right), 100)};
  for (std::thread& thread : threads) thread.join();
  CHECK(left->quiesce(in(std::chrono::seconds(10))));
}

// memif's driver unmaps its rings when it hears that the other end has gone: under a burst, if it were to hear it.
TEST_CASE("an end that is closed while both send ends everything at both, and its memory is let go") {
  for (int round = 0; round < 4; ++round) {
    auto [left, right] = dpdk_ends();
    const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(4'000'000, 1));
    std::atomic<int> running{2};
    const auto talk = [&](Channel& channel) {
      for (Posted posted = Posted::kAccepted; posted != Posted::kClosed;) {
        static_cast<void>(channel.send(std::vector<Slice>{slice_of(bytes)}, {}, in(std::chrono::milliseconds(200)), posted));
        Message message;
        static_cast<void>(channel.try_receive(message));
      }
      --running;
    };
    std::thread first(talk, std::ref(*left)), second(talk, std::ref(*right));
    std::this_thread::sleep_for(std::chrono::milliseconds(5 * (round + 1)));
    (round % 2 == 0 ? left : right)->close();
    first.join();
    second.join();
    CHECK(running == 0);
    left.reset();
    right.reset();
    CHECK(bytes.use_count() == 1);
  }
}

TEST_CASE("lanes come and go while others carry on") {
  auto [left, right] = dpdk_ends();
  std::atomic<bool> done{false};
  std::thread others([&] {
    for (int i = 0; i < 3; ++i) {
      auto [one, other] = dpdk_ends();
      const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(50'000, 3));
      CHECK(send(*one, {slice_of(bytes)}) != 0);
      CHECK(receive(*other).buffers.at(0).size_bytes == bytes->size());
    }
    done = true;
  });
  const auto bytes = std::make_shared<std::vector<std::byte>>(pattern(300'000, 2));
  for (int i = 0; i < 10 || !done; ++i) {
    CHECK(send(*left, {slice_of(bytes)}) != 0);
    CHECK(receive(*right).buffers.at(0).size_bytes == bytes->size());
  }
  others.join();
}

}  // namespace
}  // namespace genie::test

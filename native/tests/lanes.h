// The lanes that the conformance suite runs over, each as a pair of connected ends.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lane/channel.h"
#include "lane/inproc.h"
#include "lane/shm.h"
#include "lane/tcp.h"
#ifdef GENIE_TEST_DPDK
#include "dpdk/lane.h"
#endif

namespace genie::test {

using Ends = std::pair<std::shared_ptr<Channel>, std::shared_ptr<Channel>>;

struct Kind {
  const char* name;
  std::function<Ends()> make;
  bool takes_unasked = false;   // what comes is taken before anybody polls for it
};

inline Ends meet(Listener& listener, std::unique_ptr<Lane> (*connect)(const std::string&)) {
  // The hello of the connecting end waits in the socket until it is accepted, which another thread would do.
  std::unique_ptr<Lane> left;
  std::unique_ptr<Lane> right;
  std::thread other([&] { left = connect(listener.address()); });
  const Deadline until = Clock::now() + std::chrono::seconds(10);
  while (right == nullptr && Clock::now() < until) right = listener.accept();
  other.join();
  REQUIRE(left != nullptr);
  REQUIRE(right != nullptr);
  return {std::make_shared<Channel>(std::move(left)), std::make_shared<Channel>(std::move(right))};
}

inline std::string shm_address() {
  static int number = 0;
  return "@genie-test-" + std::to_string(::getpid()) + "-" + std::to_string(++number);
}

inline Ends shm_ends() {
  const auto listener = listen_shm(shm_address());
  return meet(*listener, [](const std::string& address) { return connect_shm(address, std::chrono::seconds(5)); });
}

inline Ends tcp_ends() {
  const auto listener = listen_tcp("127.0.0.1:0");
  return meet(*listener, [](const std::string& address) { return connect_tcp(address, std::chrono::seconds(5)); });
}

inline Ends inproc_ends() {
  auto [left, right] = make_inproc();
  return {std::make_shared<Channel>(std::move(left)), std::make_shared<Channel>(std::move(right))};
}

#ifdef GENIE_TEST_DPDK
inline Ends dpdk_ends() {
  struct Directory {   // memif's sockets want one that only this user may enter
    std::string path = "/tmp/genie-test-XXXXXX";
    Directory() { REQUIRE(::mkdtemp(path.data()) != nullptr); }
    ~Directory() { ::rmdir(path.c_str()); }
  };
  const Directory directory;
  const auto listener = dpdk::listen_dpdk("memif", directory.path);
  return meet(*listener, [](const std::string& address) {
    return dpdk::connect_dpdk("memif", address, std::chrono::seconds(10));
  });
}

inline const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all{{"dpdk", dpdk_ends, true}};
  return all;
}
#else
inline const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all{{"inproc", inproc_ends}, {"shm", shm_ends}, {"tcp", tcp_ends}};
  return all;
}
#endif

inline std::vector<std::byte> pattern(std::size_t size, unsigned seed) {
  std::vector<std::byte> bytes(size);
  std::uint32_t state = seed * 2654435761U + 1;
  for (std::byte& byte : bytes) {
    state = state * 1664525U + 1013904223U;
    byte = static_cast<std::byte>(state >> 24);
  }
  return bytes;
}

inline Slice slice_of(std::shared_ptr<std::vector<std::byte>> bytes) {
  const std::byte* data = bytes->data();
  const std::size_t size = bytes->size();
  return {data, size, std::move(bytes)};
}

constexpr auto kPatience = std::chrono::seconds(60);   // with a sanitizer, on a busy machine

inline Deadline in(std::chrono::milliseconds time) { return Clock::now() + time; }

inline std::uint64_t send(Channel& channel, const std::vector<Slice>& slices, SendOptions options = {}) {
  Posted posted = Posted::kBusy;
  return channel.send(slices, options, in(kPatience), posted);
}

inline Message receive(Channel& channel) {
  Message message;
  REQUIRE(channel.receive(message, in(kPatience), std::chrono::microseconds(0)) ==
          Channel::Got::kMessage);
  return message;
}

}  // namespace genie::test

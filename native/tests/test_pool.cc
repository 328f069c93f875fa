#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include "memory/pool.h"

namespace genie {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

TEST_CASE("classes round up by at most a quarter") {
  for (std::size_t size = 1; size <= kMaxSlabBytes; size = size * 21 / 20 + 1) {
    const std::size_t bytes = class_bytes(class_of(size));
    REQUIRE(bytes >= size);
    if (size >= kMinSlabBytes) REQUIRE(bytes <= size + size / 4 + 1);
  }
  CHECK(class_bytes(class_of(kMaxSlabBytes)) == kMaxSlabBytes);
}

TEST_CASE("a million allocations and frees leave nothing behind, and slabs do not overlap") {
  PoolOptions options;
  options.limit_bytes = 512 * kMiB;
  const auto pool = Pool::make(options);
  std::mt19937 random(1);
  std::uniform_int_distribution<std::size_t> sizes(1, 400'000);
  struct Held {
    Slab slab;
    std::byte mark;
  };
  std::vector<Held> held;
  for (int i = 0; i < 1'000'000; ++i) {
    if (held.size() < 64 && random() % 2 == 0) {
      Held next;
      REQUIRE(pool->allocate(sizes(random), next.slab));
      next.mark = static_cast<std::byte>(i);
      next.slab.data[0] = next.slab.data[next.slab.asked_bytes - 1] = next.mark;
      held.push_back(std::move(next));
    } else if (!held.empty()) {
      const std::size_t which = random() % held.size();
      std::swap(held[which], held.back());
      REQUIRE(held.back().slab.data[0] == held.back().mark);
      REQUIRE(held.back().slab.data[held.back().slab.asked_bytes - 1] == held.back().mark);
      pool->free(std::move(held.back().slab));
      held.pop_back();
    }
  }
  for (Held& last : held) pool->free(std::move(last.slab));
  CHECK(pool->statistics().used_bytes == 0);
  CHECK(pool->statistics().asked_bytes == 0);
  pool->trim();
  CHECK(pool->statistics().reserved_bytes == 0);
  CHECK(pool->statistics().num_segments == 0);
}

TEST_CASE("beyond its limit a pool refuses and says by how much") {
  PoolOptions options;
  options.limit_bytes = 20 * kMiB;
  const auto pool = Pool::make(options);
  Slab first;
  Slab second;
  REQUIRE(pool->allocate(16 * kMiB, first));
  CHECK_FALSE(pool->allocate(16 * kMiB, second));
  CHECK(pool->last_refusal().find("limit of 20971520") != std::string::npos);
  CHECK_FALSE(pool->allocate(kMaxSlabBytes + 1, second));
  CHECK(pool->statistics().num_refusals == 2);
  pool->free(std::move(first));
  CHECK(pool->allocate(10 * kMiB, second));   // idle segments make room for another class
  pool->free(std::move(second));
}

TEST_CASE("what is reserved is there when it is asked for, and never more than is kept idle") {
  PoolOptions options;
  options.keep_idle_bytes = 64 * kMiB;
  const auto pool = Pool::make(options);
  REQUIRE(pool->reserve(16 * kMiB, 2));
  const auto reserved = pool->statistics().reserved_bytes;
  CHECK(reserved == 32 * kMiB);
  CHECK(pool->statistics().used_bytes == 0);
  std::vector<Slab> slabs(2);
  for (Slab& slab : slabs) REQUIRE(pool->allocate(16 * kMiB, slab));
  CHECK(pool->statistics().reserved_bytes == reserved);
  CHECK_FALSE(pool->reserve(16 * kMiB, 3));   // with what is handed out, 80 MiB
  CHECK_FALSE(pool->reserve(kMaxSlabBytes + 1, 1));
  CHECK(pool->statistics().reserved_bytes == reserved);
  for (Slab& slab : slabs) pool->free(std::move(slab));
  CHECK(pool->reserve(16 * kMiB, 2));         // they are there
  CHECK(pool->statistics().reserved_bytes == reserved);
}

TEST_CASE("what is idle beyond the bound goes back to the system, and its owner is told") {
  PoolOptions options;
  options.keep_idle_bytes = 32 * kMiB;
  std::vector<std::uint32_t> dropped;
  const auto pool = Pool::make(options, [&](std::uint32_t number) { dropped.push_back(number); });
  std::vector<Slab> slabs(8);
  for (Slab& slab : slabs) REQUIRE(pool->allocate(16 * kMiB, slab));
  for (Slab& slab : slabs) pool->free(std::move(slab));
  CHECK(pool->statistics().reserved_bytes <= 32 * kMiB);
  CHECK(dropped.size() >= 6);
}

TEST_CASE("a lent slab outlives its pool") {
  std::shared_ptr<Slab> slab;
  {
    const auto pool = Pool::make({});
    slab = pool->lend(100'000);
  }
  REQUIRE(slab != nullptr);
  std::memset(slab->data, 1, slab->asked_bytes);
}

TEST_CASE("what was used a while ago is kept for as long as asked for, and given back then") {
  PoolOptions options;
  options.keep_idle_bytes = 32 * kMiB;
  options.keep_recent = std::chrono::seconds(10);
  const auto pool = Pool::make(options);
  const auto reserved = [&pool] { return pool->statistics().reserved_bytes; };
  const auto burst = [&pool] {
    std::vector<std::shared_ptr<Slab>> slabs;
    for (int i = 0; i < 16; ++i) slabs.push_back(pool->lend(16 * kMiB));
  };
  const auto start = std::chrono::steady_clock::now();
  burst();
  CHECK(reserved() == 256 * kMiB);
  const auto segments = pool->statistics().num_segments;
  burst();
  CHECK(pool->statistics().num_segments == segments);
  pool->tidy(start + std::chrono::seconds(5));
  CHECK(reserved() == 256 * kMiB);
  pool->tidy(start + std::chrono::seconds(12));   // the first window is over, and was not long ago
  CHECK(reserved() == 256 * kMiB);
  pool->tidy(start + std::chrono::seconds(23));
  CHECK(reserved() <= 32 * kMiB);
  const auto slab = pool->lend(100 * kMiB);
  pool->tidy(start + std::chrono::seconds(60));
  CHECK(reserved() >= 100 * kMiB);                // what is handed out stays
}

TEST_CASE("threads share a pool") {
  const auto pool = Pool::make({});
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&pool] {
      for (int i = 0; i < 5000; ++i) {
        const auto slab = pool->lend(70'000);
        if (slab != nullptr) slab->data[0] = std::byte{1};
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(pool->statistics().used_bytes == 0);
}

TEST_CASE("a segment that was cut short, or is not sealed, is refused") {
  std::string error;
  const auto good = Segment::make(kMiB, Segment::Sharing::kShared, false, error);
  REQUIRE(good != nullptr);
  CHECK(Segment::map(Fd(::dup(good->fd())), kMiB, true, error) != nullptr);
  CHECK(Segment::map(Fd(::dup(good->fd())), 2 * kMiB, true, error) == nullptr);   // longer than it is
  CHECK(::ftruncate(good->fd(), 4096) != 0);                                       // nor can it be cut now
  Fd loose(::memfd_create("loose", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(loose.get(), kMiB) == 0);
  CHECK(Segment::map(std::move(loose), kMiB, true, error) == nullptr);
  CHECK(error.find("sealed") != std::string::npos);
}

TEST_CASE("one-way segments cannot be mapped for writing by anybody else") {
  std::string error;
  const auto segment = Segment::make(kMiB, Segment::Sharing::kSharedOneWay, false, error);
  REQUIRE(segment != nullptr);
  segment->data()[5] = std::byte{9};
  CHECK(Segment::map(Fd(::dup(segment->fd())), kMiB, true, error) == nullptr);
  const auto view = Segment::map(Fd(::dup(segment->fd())), kMiB, false, error);
  REQUIRE(view != nullptr);
  CHECK(view->data()[5] == std::byte{9});
  CHECK(in_foreign_pages(view->data() + 100));
  CHECK_FALSE(in_foreign_pages(segment->data()));
}

}  // namespace
}  // namespace genie

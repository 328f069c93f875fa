#include "lane/fork.h"

#include <pthread.h>

#include <atomic>

namespace genie {
namespace {

std::atomic<unsigned> generation{0};

void in_child() { generation.fetch_add(1, std::memory_order_relaxed); }

[[maybe_unused]] const int registered = ::pthread_atfork(nullptr, nullptr, in_child);

}  // namespace

unsigned fork_generation() noexcept { return generation.load(std::memory_order_relaxed); }

}  // namespace genie

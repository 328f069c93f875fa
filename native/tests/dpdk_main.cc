// The tests of the dpdk lane: both ends of each lane stand in this process, joined by memif. EAL starts once, before all.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "dpdk/eal.h"
#include "dpdk/hub.h"

int main(int argc, char** argv) {
  constexpr int kSkipped = 77;
  try {
    genie::dpdk::EalOptions options;
    options.memory = genie::dpdk::Memory::kNormal;
    options.memory_mb = 512;
    genie::dpdk::start_eal(options);
  } catch (const genie::dpdk::DpdkError& error) {
    std::fprintf(stderr, "no DPDK here: %s\n", error.what());
    return kSkipped;
  }
  const int failed = doctest::Context(argc, argv).run();
  genie::dpdk::Hub::stop_all();
  genie::dpdk::stop_eal();
  return failed;
}

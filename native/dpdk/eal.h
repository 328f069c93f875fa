// DPDK's environment abstraction layer (EAL) inside a process that has other things to do.
//
// It is started once in the life of a process, by a thread of its own: rte_eal_init() pins the thread that calls it, and
// threads that are started later inherit that, which would put all of torch on one core. A child must be spawned, not
// forked: EAL's memory and threads do not survive a fork.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace genie::dpdk {

class DpdkError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Memory { kAuto, kHugepages, kNormal };

struct EalOptions {
  Memory memory = Memory::kAuto;      // kAuto: hugepages where enough are free, else normal pages
  unsigned memory_mb = 128;           // for packet buffers, all ports together
  std::vector<std::string> pci;       // addresses of real NICs; none: the PCI bus is not looked at
  std::string iova_mode;              // "va", "pa"; empty: va without PCI devices, else what EAL finds right
};

struct EalFacts {
  bool hugepages = false;
  std::string memory;                 // what was taken and why, for people
  std::string file_prefix;
  double init_s = 0;
};

// Starts EAL, or returns the facts of its start. Throws DpdkError: it failed, it was stopped before in this process, this
// is a fork of the process that started it, or later options ask for what the first did not bring.
const EalFacts& start_eal(const EalOptions& options);
[[nodiscard]] bool eal_is_running() noexcept;
// Lets go of hugepages, threads and files. Ports must be closed. It cannot be started again in this process.
void stop_eal() noexcept;

// Runs `work` in the thread in which EAL answers interrupts and control channels, and waits for its end. False where
// that cannot be; then it has not been run.
[[nodiscard]] bool in_interrupt_thread(void (*work)(void*), void* argument) noexcept;

// Why hugepages cannot be used for `memory_mb`; empty where they can.
[[nodiscard]] std::string why_no_hugepages(unsigned memory_mb);

}  // namespace genie::dpdk

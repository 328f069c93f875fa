#include "dpdk/eal.h"

#include <pthread.h>
#include <rte_alarm.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_log.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <optional>
#include <thread>

namespace genie::dpdk {
namespace {

namespace fs = std::filesystem;
constexpr const char* kPrefix = "genie-";

enum class Stage { kNever, kRunning, kFailed, kStopped };

std::mutex mutex;
Stage stage = Stage::kNever;
pid_t owner = 0;
EalFacts facts;
EalOptions given;
std::string failure;

// What EAL's interrupt thread is to do: for the life of the process, as that thread is.
struct Job {
  std::mutex mutex;
  std::condition_variable done;
  void (*work)(void*) = nullptr;
  void* argument = nullptr;
};
Job job;
std::mutex jobs_mutex;   // held by who waits for one

// Where EAL keeps a directory for each process; the rule is EAL's own.
fs::path runtime_directory() {
  if (geteuid() == 0) return "/var/run/dpdk";
  const char* user = std::getenv("XDG_RUNTIME_DIR");
  return fs::path(user != nullptr ? user : "/tmp") / "dpdk";
}

// Directories of processes that were killed; `kill -9` lets nobody tidy up.
void remove_dead_directories() noexcept {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(runtime_directory(), ignored)) {
    const std::string name = entry.path().filename();
    if (name.rfind(kPrefix, 0) != 0) continue;
    const long pid = std::strtol(name.c_str() + std::string(kPrefix).size(), nullptr, 10);
    if (pid > 0 && kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH) fs::remove_all(entry.path(), ignored);
  }
}

std::string cores_of_this_process() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return "0";
  std::string list;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) list += (list.empty() ? "" : ",") + std::to_string(core);
  }
  return list;
}

std::vector<std::string> arguments(const EalOptions& options) {
  // One logical core that floats over all the cores that this process may use.
  std::vector<std::string> args{"genie", "--lcores", "0@(" + cores_of_this_process() + ")", "--no-telemetry",
                                "--file-prefix", facts.file_prefix, "-m", std::to_string(options.memory_mb)};
  if (facts.hugepages) {
    // Nothing stays in hugetlbfs, also after kill -9. EAL refuses it together with --single-file-segments, which only
    // memif's zero-copy mode would need; so each page keeps a descriptor.
    args.emplace_back("--huge-unlink");
  } else {
    args.emplace_back("--no-huge");               // which EAL refuses together with --in-memory
  }
  std::string iova = options.iova_mode;
  if (options.pci.empty()) {
    args.emplace_back("--no-pci");
    if (iova.empty()) iova = "va";
  }
  for (const std::string& address : options.pci) args.insert(args.end(), {"-a", address});
  if (!iova.empty()) args.push_back("--iova-mode=" + iova);
  return args;
}

int initialise(std::vector<std::string> args, int& error, std::string& log) {
  std::vector<char*> pointers;
  for (std::string& arg : args) pointers.push_back(arg.data());
  char* text = nullptr;
  std::size_t size = 0;
  std::FILE* stream = open_memstream(&text, &size);
  if (stream != nullptr) rte_openlog_stream(stream);
  int result = -1;
  std::thread thread([&] {
    result = rte_eal_init(static_cast<int>(pointers.size()), pointers.data());
    error = rte_errno;
  });
  thread.join();
  rte_openlog_stream(stderr);
  rte_log_set_global_level(RTE_LOG_CRIT);
  if (stream != nullptr) {
    std::fclose(stream);
    log.assign(text, size);
    std::free(text);
  }
  return result;
}

// The lines of EAL's log that say what went wrong, in one.
std::string complaint(const std::string& log) {
  std::string found;
  std::size_t from = 0;
  while (from < log.size()) {
    const std::size_t to = std::min(log.find('\n', from), log.size());
    const std::string line = log.substr(from, to - from);
    if (line.rfind("EAL: ", 0) == 0 && line.rfind("EAL: Detected", 0) != 0 && line.rfind("EAL: Multi-process", 0) != 0) {
      found = line.substr(5);
    }
    from = to + 1;
  }
  return found;
}

}  // namespace

std::string why_no_hugepages(unsigned memory_mb) {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  unsigned long value = 0, free = 0, size_kb = 0;
  for (std::string line; std::getline(meminfo, line);) {
    char name[64];
    if (std::sscanf(line.c_str(), "%63[^:]: %lu", name, &value) != 2) continue;
    key = name;
    if (key == "HugePages_Free") free = value;
    if (key == "Hugepagesize") size_kb = value;
  }
  const unsigned long free_mb = free * size_kb / 1024;
  if (free_mb < memory_mb) {
    return std::to_string(free_mb) + " MB of hugepages are free, " + std::to_string(memory_mb) +
           " MB are needed (sysctl vm.nr_hugepages=" + std::to_string(memory_mb * 1024 / (size_kb == 0 ? 2048 : size_kb)) + ")";
  }
  std::ifstream mounts("/proc/self/mounts");
  for (std::string device, where, kind, rest; mounts >> device >> where >> kind && std::getline(mounts, rest);) {
    if (kind != "hugetlbfs") continue;
    if (access(where.c_str(), W_OK) == 0) return "";
  }
  return "no writable hugetlbfs is mounted (mount -t hugetlbfs none /dev/hugepages)";
}

const EalFacts& start_eal(const EalOptions& options) {
  const std::lock_guard lock(mutex);
  if (stage == Stage::kRunning) {
    if (owner != getpid()) {
      throw DpdkError("this process is a fork of one that uses DPDK, whose memory and threads are not here; spawn it instead");
    }
    for (const std::string& address : options.pci) {
      if (std::find(given.pci.begin(), given.pci.end(), address) == given.pci.end()) {
        throw DpdkError("DPDK runs already, without PCI device " + address + ": name every device at the first start");
      }
    }
    return facts;
  }
  if (stage == Stage::kStopped) throw DpdkError("DPDK was stopped in this process; it can be started once in the life of one");
  if (stage == Stage::kFailed) throw DpdkError("DPDK failed to start in this process before, and cannot be tried again: " + failure);

  const std::string without = options.memory == Memory::kNormal ? "" : why_no_hugepages(options.memory_mb);
  if (options.memory == Memory::kHugepages && !without.empty()) throw DpdkError("no hugepages for DPDK: " + without);
  facts.hugepages = options.memory != Memory::kNormal && without.empty();
  facts.memory = facts.hugepages ? "hugepages" : without.empty() ? "normal pages, as asked" : "normal pages: " + without;
  if (!facts.hugepages && !options.pci.empty()) {
    throw DpdkError("a real NIC needs hugepages: " + (without.empty() ? std::string("normal pages were asked for") : without));
  }
  facts.file_prefix = kPrefix + std::to_string(getpid());
  remove_dead_directories();

  const auto began = std::chrono::steady_clock::now();
  int error = 0;
  std::string log;
  if (initialise(arguments(options), error, log) < 0) {
    stage = Stage::kFailed;
    failure = rte_strerror(error);
    if (const std::string why = complaint(log); !why.empty()) failure += ": " + why;
    throw DpdkError("DPDK did not start: " + failure);
  }
  facts.init_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  given = options;
  owner = getpid();
  stage = Stage::kRunning;
  return facts;
}

bool eal_is_running() noexcept {
  const std::lock_guard lock(mutex);
  return stage == Stage::kRunning && owner == getpid();
}

bool in_interrupt_thread(void (*work)(void*), void* argument) noexcept {
  const std::lock_guard one_at_a_time(jobs_mutex);
  std::unique_lock lock(job.mutex);
  job.work = work;
  job.argument = argument;
  const auto run = [](void*) {   // as an alarm, which that thread serves
    const std::lock_guard hold(job.mutex);
    job.work(job.argument);
    job.work = nullptr;
    job.done.notify_one();
  };
  if (rte_eal_alarm_set(1, run, nullptr) != 0) return false;
  job.done.wait(lock, [] { return job.work == nullptr; });
  return true;
}

// EAL's cleanup unmaps its memory and leaves this thread, which looks there once more whenever a port that was closed has
// changed what it waits for. It waits in epoll_wait and read, where it holds nothing and can be ended.
static void end_interrupt_thread() noexcept {
  pthread_t thread{};
  if (in_interrupt_thread([](void* mine) { *static_cast<pthread_t*>(mine) = pthread_self(); }, &thread) &&
      pthread_cancel(thread) == 0) {
    pthread_join(thread, nullptr);
  }
}

void stop_eal() noexcept {
  const std::lock_guard lock(mutex);
  if (stage != Stage::kRunning || owner != getpid()) return;
  end_interrupt_thread();
  rte_eal_cleanup();
  stage = Stage::kStopped;
  std::error_code ignored;
  fs::remove_all(runtime_directory() / facts.file_prefix, ignored);
}

}  // namespace genie::dpdk

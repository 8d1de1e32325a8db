#include "base/fault_table.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>

#include "base/status.h"
#include "base/text.h"

namespace attnserve {

namespace {

// More than regions are ever allowed in practice; the handler looks at those in use alone.
constexpr std::size_t kSlots = 4096;

// One range. The handler reads it while other threads may change it, and can wait for nobody: the
// version is odd during a change, and a reader that sees it odd or changed passes the slot over.
// The slot of the faulting address itself never changes meanwhile, since whoever touches a mapping
// keeps it. (All accesses are sequentially consistent; changes are rare.)
struct Slot {
  std::atomic<std::uint32_t> version{0};
  std::atomic<bool> broken{false};
  std::atomic<std::uintptr_t> start{0};  // 0: free
  std::atomic<std::uintptr_t> end{0};
};
static_assert(std::atomic<std::uintptr_t>::is_always_lock_free);
static_assert(std::atomic<bool>::is_always_lock_free);

constinit std::array<Slot, kSlots> slots;
constinit std::atomic<std::size_t> slots_used{0};  // no slot from here on was ever taken
constinit std::mutex slots_mutex;                  // guards who owns which slot

constinit std::atomic<std::size_t> open_scopes{0};
constinit std::atomic<std::size_t> scope_faults{0};  // pages replaced because a scope was open
constinit std::atomic<std::uintptr_t> page_size{4096};

struct sigaction previous_action;  // written once, before the handler can run

void change(Slot& slot, std::uintptr_t start, std::uintptr_t end) {
  slot.version.fetch_add(1);
  slot.start.store(start);
  slot.end.store(end);
  slot.version.fetch_add(1);
}

// Async-signal-safe: atomics and one system call, made directly so that nobody's wrapper with a
// lock of its own lies between.
bool replace_pages(Slot& slot, std::uintptr_t address) {
  const std::uint32_t version = slot.version.load();
  const std::uintptr_t start = slot.start.load(), end = slot.end.load();
  if (version % 2 != 0 || slot.version.load() != version) return false;
  if (start == 0 || address < start || address >= end) return false;
  // First the flag: whoever reads a zero sees it afterwards.
  slot.broken.store(true);
  // All of the range at once: page by page, a caller could make the server run out of mappings.
  const long mapped = syscall(SYS_mmap, start, end - start, PROT_READ | PROT_WRITE,
                              MAP_FIXED | MAP_ANONYMOUS | MAP_PRIVATE | MAP_NORESERVE, -1, 0);
  return static_cast<std::uintptr_t>(mapped) == start;
}

// As safe. One page: nothing is known of the range around it.
bool replace_page(std::uintptr_t address) {
  if (open_scopes.load() == 0) return false;
  scope_faults.fetch_add(1);
  const std::uintptr_t page = page_size.load();
  const std::uintptr_t start = address / page * page;
  const long mapped = syscall(SYS_mmap, start, page, PROT_READ | PROT_WRITE,
                              MAP_FIXED | MAP_ANONYMOUS | MAP_PRIVATE | MAP_NORESERVE, -1, 0);
  return static_cast<std::uintptr_t>(mapped) == start;
}

void pass_on(int number, siginfo_t* info, void* context) {
  if ((previous_action.sa_flags & SA_SIGINFO) != 0) {
    previous_action.sa_sigaction(number, info, context);
    return;
  }
  const bool sent = info->si_code <= 0;  // by kill(2), not by touching memory
  if (previous_action.sa_handler == SIG_IGN && sent) return;
  if (previous_action.sa_handler != SIG_IGN && previous_action.sa_handler != SIG_DFL) {
    previous_action.sa_handler(number);
    return;
  }
  // Ends the process: by the same instruction once this returns, or by the signal sent again.
  signal(number, SIG_DFL);
  if (sent) raise(number);
}

void on_sigbus(int number, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  bool replaced = false;
  if (info->si_code > 0) {
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    const std::size_t used = slots_used.load();
    for (std::size_t index = 0; index < used && !replaced; ++index) {
      replaced = replace_pages(slots[index], address);
    }
    replaced = replaced || (info->si_code == BUS_ADRERR && replace_page(address));
  }
  if (!replaced) pass_on(number, info, context);
  errno = saved_errno;
}

void install_once() {
  static std::once_flag installed;
  std::call_once(installed, [] {
    page_size.store(static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE)));
    sigaction(SIGBUS, nullptr, &previous_action);
    struct sigaction action{};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, nullptr);
  });
}

}  // namespace

FaultGuard::FaultGuard(std::byte* start, std::size_t size) : slot_(0) {
  install_once();
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t whole = (size + page - 1) / page * page;
  const auto first = reinterpret_cast<std::uintptr_t>(start);
  const std::scoped_lock lock(slots_mutex);
  while (slot_ < kSlots && slots[slot_].start.load() != 0) ++slot_;
  if (slot_ == kSlots) {
    throw RequestError(Code::kResourceExhausted,
                       text("shared-memory regions: ", kSlots, " are mapped; allowed: ", kSlots));
  }
  slots[slot_].broken.store(false);
  change(slots[slot_], first, first + whole);
  if (slot_ >= slots_used.load()) slots_used.store(slot_ + 1);
}

FaultGuard::~FaultGuard() {
  const std::scoped_lock lock(slots_mutex);
  change(slots[slot_], 0, 0);
}

bool FaultGuard::broken() const { return slots[slot_].broken.load(); }

FaultScope::FaultScope() : faults_before_(scope_faults.load()) {
  install_once();
  open_scopes.fetch_add(1);
}

FaultScope::~FaultScope() { open_scopes.fetch_sub(1); }

bool FaultScope::broken() const { return scope_faults.load() != faults_before_; }

}  // namespace attnserve

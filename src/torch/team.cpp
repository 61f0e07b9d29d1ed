// The threads that torch's own operations run on, for kernels of ours.
//
// at::parallel_for is a template: compiled here it would bring in a second OpenMP runtime, whose threads
// would compete with torch's for the cores. It amounts to one call into the OpenMP runtime, which is made
// here directly, into the one that torch has loaded. The symbol is weak: a torch built on another runtime
// has no such function, and kernels then start threads of their own.
#include <atomic>

#ifdef __linux__
#include <pthread.h>
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags)
    __attribute__((weak));
#endif

namespace {

// The runtime's threads do not survive a fork, and its next parallel region would wait for them.
std::atomic<bool> forked{false};

}  // namespace

extern "C" {

// Once, before tllib_team. False where there is no team to borrow.
bool tllib_team_ready() {
#ifdef __linux__
  if (!GOMP_parallel) return false;
  return pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); }) == 0;
#else
  return false;
#endif
}

// Calls work(data) on every thread of the team, this one among them, and returns when all are done.
// False, with nothing called, in a forked child. `work` must not throw.
bool tllib_team(void (*work)(void*), void* data) {
  if (forked.load(std::memory_order_relaxed)) return false;
#ifdef __linux__
  // Always the whole team: if asked for fewer threads, the runtime ends the others, and the next operation
  // of torch would start them again.
  GOMP_parallel(work, data, /*threads=*/0, /*flags=*/0);
#endif
  return true;
}

}  // extern "C"

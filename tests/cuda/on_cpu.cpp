// The scheduler of on_cpu.h, and the entry that tllib_rs calls.
#define ELEMENT f32
#include "on_cpu.h"

#include <dlfcn.h>

#include <mutex>

namespace emulated {

Index thread_index, block_index, block_size, grid_size;
Block* block = nullptr;
const char* kernel_name = "";
unsigned long launch_number = 0;

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

// The C library's own: that of a sanitizer, which is found first, takes a jump to another stack for an error.
[[noreturn]] void jump(jmp_buf& to) {
  using Jump = void (*)(jmp_buf, int);
  static const auto own = (Jump)dlsym(dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD), "_longjmp");
  own(to, 1);
  std::abort();
}

// With setjmp, as swapcontext asks the system at each turn.
void yield() {
  const Index here = thread_index;
  if (_setjmp(self().here) == 0) jump(block->scheduler);
  thread_index = here;
}

void meet(Barrier& barrier, unsigned size) {
  const unsigned long turn = barrier.came++ / size + 1;
  while (barrier.came < turn * size) {
    if (barrier.left > 0) {
      std::fprintf(stderr, "a thread of block %u left before a barrier that thread %u waits at\n", block_index.x,
                   thread_index.x);
      std::abort();
    }
    yield();
  }
}

namespace {

const size_t STACK = 1 << 16;

void enter() {
  block->body();
  self().finished = true;
  ++block->finished;
  ++block->all.left;
  ++block->warps[thread_index.x / 32].left;
  jump(block->scheduler);
}

// Until it yields or ends. A function of its own: what a caller of setjmp changes does not survive a jump.
void resume(Thread& thread) {
  if (_setjmp(block->scheduler) != 0) return;
  if (thread.started) jump(thread.here);
  thread.started = true;
  setcontext(&thread.start);
}

void run_block(Block& now) {
  now.all = {};
  now.finished = 0;
  now.last = false;
  for (auto& warp : now.warps) warp = {};
  for (auto& thread : now.threads) {
    thread.started = thread.finished = false;
    thread.block_turn = thread.warp_turn = 0;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = STACK;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, enter, 0);
  }
  while (now.finished < now.threads.size()) {
    for (unsigned t = 0; t < now.threads.size(); ++t) {
      if (now.threads[t].finished) continue;
      thread_index.x = t;
      resume(now.threads[t]);
    }
  }
}

}  // namespace

void run(unsigned grid, unsigned size, std::function<void()> body) {
  Block now;
  now.threads.resize(size);
  now.warps.resize((size + 31) / 32);
  for (auto& thread : now.threads) thread.stack.reset(new char[STACK]);
  now.body = std::move(body);
  block = &now;
  block_size.x = size;
  grid_size.x = grid;
  // From the last to the first: no kernel may count on an order.
  for (unsigned b = grid; b-- > 0;) {
    block_index.x = b;
    run_block(now);
  }
  block = nullptr;
}

}  // namespace emulated

namespace {

// Writes what was launched into the file that TLLIB_EMULATED_LAUNCHES names, when the process ends.
struct Launches {
  std::map<std::string, long> of_kernel;
  ~Launches() {
    const char* path = std::getenv("TLLIB_EMULATED_LAUNCHES");
    std::FILE* file = path ? std::fopen(path, "a") : nullptr;
    if (!file) return;
    for (const auto& [name, count] : of_kernel) std::fprintf(file, "%s %ld\n", name.c_str(), count);
    std::fclose(file);
  }
};

}  // namespace

extern "C" int tllib_emulated_launch(const char* name, unsigned grid, unsigned size, const void* args) {
  static std::mutex one_at_a_time;
  static Launches launches;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  const auto found = emulated::kernels().find(name);
  if (found == emulated::kernels().end()) return 1;
  ++launches.of_kernel[name];
  emulated::kernel_name = name;
  ++emulated::launch_number;
  emulated::run(grid, size, [&] { found->second(args); });
  return 0;
}

// The scheduler of on_cpu.h, and the entry that tllib_rs calls.
#define ELEMENT f32
#include "on_cpu.h"

#include <mutex>

namespace emulated {

Index thread_index, block_index, block_size, grid_size;
Block* block = nullptr;

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

void yield() {
  const Index here = thread_index;
  swapcontext(&self().context, &block->scheduler);
  thread_index = here;
}

void meet(unsigned from, unsigned to, unsigned Thread::*turns) {
  const unsigned turn = ++(self().*turns);
  for (;;) {
    bool all = true;
    for (unsigned t = from; t < to && all; ++t) {
      const Thread& other = block->threads[t];
      if (other.finished && (int)(other.*turns - turn) < 0) {
        std::fprintf(stderr, "thread %u of block %u left before a barrier that thread %u waits at\n", t,
                     block_index.x, thread_index.x);
        std::abort();
      }
      all = (int)(other.*turns - turn) >= 0;
    }
    if (all) return;
    yield();
  }
}

namespace {

const size_t STACK = 1 << 16;

void enter() {
  block->body();
  self().finished = true;
  swapcontext(&self().context, &block->scheduler);
}

void run_block(Block& now) {
  for (auto& thread : now.threads) {
    thread.finished = false;
    thread.block_turns = thread.warp_turns = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (unsigned t = 0; t < now.threads.size(); ++t) {
      if (now.threads[t].finished) continue;
      thread_index.x = t;
      swapcontext(&now.scheduler, &now.threads[t].context);
      left |= !now.threads[t].finished;
    }
  }
}

}  // namespace

void run(unsigned grid, unsigned size, std::function<void()> body) {
  Block now;
  now.threads.resize(size);
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
  emulated::run(grid, size, [&] { found->second(args); });
  return 0;
}

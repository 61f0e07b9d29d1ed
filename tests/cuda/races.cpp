// Looks for races in kernels that were compiled with -fsanitize=thread: the compiler then calls these functions
// at each access. They stand in the place of the sanitizer's own, which knows nothing of blocks and warps. With
// -fsanitize=bounds-strict it calls one at an index that an array, shared or a thread's own, has no place for.
//
//   of one block      two threads, one of them writing, with no __syncthreads between, nor, in one warp,
//                     __syncwarp
//   of two blocks     one of them writing; the block that comes last is behind all others
//   shared memory     read before anybody in the block wrote it
//   global memory     that no allocation holds, or that was given back; only where the address sanitizer is loaded
//
// Two atomic accesses are none. Only accesses are seen, not fences.
#define ELEMENT f32
#include "on_cpu.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdint>

// The address sanitizer's, where its library was loaded first: the first byte that no allocation holds, or null;
// and where it notes that of eight bytes, as 0 where all of them may be used.
extern "C" {
__attribute__((weak)) void* __asan_region_is_poisoned(void* begin, size_t size);
__attribute__((weak)) void __asan_get_shadow_mapping(size_t* shift, size_t* offset);
}

namespace emulated {
namespace {

struct Access {
  unsigned long block_turn = 0, warp_turn = 0;
  unsigned block = 0, thread = 0;
  bool made = false, atomic = false;
};

// What is known of four bytes, or of a smaller variable. Of reads the last one, and the last one by another
// warp than that, and by another thread.
struct Cell {
  uintptr_t address = 0;
  unsigned long launch = 0;
  Access write, read, of_other_warp, of_other_thread;
};

std::vector<Cell> table(1 << 16);
size_t used = 0;

Cell& slot(std::vector<Cell>& of, uintptr_t address) {
  size_t at = (address * 0x9e3779b97f4a7c15ull) >> 20;
  for (;; ++at) {
    Cell& cell = of[at & (of.size() - 1)];
    if (cell.launch != launch_number || cell.address == address) return cell;
  }
}

Cell& cell_of(uintptr_t address) {
  static unsigned long launch = 0;
  if (launch != launch_number) used = 0;
  launch = launch_number;
  if (used * 2 > table.size()) {
    std::vector<Cell> larger(table.size() * 2);
    for (const Cell& cell : table) {
      if (cell.launch == launch_number) slot(larger, cell.address) = cell;
    }
    table.swap(larger);
  }
  Cell& cell = slot(table, address);
  if (cell.launch != launch_number) {
    ++used;
    cell = {};
    cell.address = address;
    cell.launch = launch_number;
  }
  return cell;
}

// The variables of this library: those of its kernels that stay are what they call __shared__.
struct Variables {
  uintptr_t begin = 0, end = 0;
  Variables() {
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* found) {
          for (int k = 0; k < library->dlpi_phnum; ++k) {
            const auto& part = library->dlpi_phdr[k];
            const uintptr_t begin = library->dlpi_addr + part.p_vaddr, end = begin + part.p_memsz;
            const auto own = (uintptr_t)&launch_number;
            if (part.p_type == PT_LOAD && begin <= own && own < end) *(Variables*)found = Variables(begin, end);
          }
          return 0;
        },
        this);
  }
  Variables(uintptr_t begin, uintptr_t end) : begin(begin), end(end) {}
};

bool shared(uintptr_t address) {
  static const Variables all;
  return address >= all.begin && address < all.end;
}

// What tells a thread where it is.
bool built_in(uintptr_t address) {
  for (const Index* index : {&thread_index, &block_index, &block_size, &grid_size}) {
    if (address - (uintptr_t)index < sizeof *index) return true;
  }
  return false;
}

bool out_of_bounds(uintptr_t address, size_t size) {
  if (!__asan_region_is_poisoned) return false;
  static const uintptr_t notes = [] {
    size_t shift = 0, offset = 0;
    __asan_get_shadow_mapping(&shift, &offset);
    return (uintptr_t)offset;
  }();
  const auto usable = [](uintptr_t byte) { return *(const char*)(notes + (byte >> 3)) == 0; };
  const bool all = usable(address) && usable(address + size / 2) && usable(address + size - 1);
  if (all && size <= 16) return false;
  return __asan_region_is_poisoned((void*)address, size) != nullptr;
}

[[noreturn]] void report(const char* what, uintptr_t address, const Access& before, const Access& now, void* caller) {
  Dl_info info = {};
  dladdr(caller, &info);
  std::fprintf(stderr, "%s in %s: %s memory, block %u thread %u, before it block %u thread %u (at %s+%#lx)\n", what,
               kernel_name, shared(address) ? "shared" : "global", now.block, now.thread, before.block, before.thread,
               info.dli_fname ? info.dli_fname : "?", (unsigned long)((char*)caller - (char*)info.dli_fbase));
  std::abort();
}

// Whether nothing orders an access and one before it. Shared memory is another one in each block.
bool unordered(const Access& before, const Access& now, bool in_shared) {
  if (!before.made || (before.atomic && now.atomic)) return false;
  if (before.block != now.block) return !in_shared && !block->last;
  if (before.thread == now.thread || before.block_turn != now.block_turn) return false;
  return before.thread / 32 != now.thread / 32 || before.warp_turn == now.warp_turn;
}

void take(uintptr_t address, bool writes, const Access& now, void* caller) {
  Cell& cell = cell_of(address);
  const bool in_shared = shared(address);
  if (in_shared && !writes && (!cell.write.made || cell.write.block != now.block)) {
    report("read of what nobody wrote", address, cell.write, now, caller);
  }
  if (unordered(cell.write, now, in_shared)) report("race", address, cell.write, now, caller);
  if (writes) {
    for (const Access* read : {&cell.read, &cell.of_other_warp, &cell.of_other_thread}) {
      if (unordered(*read, now, in_shared)) report("race", address, *read, now, caller);
    }
    cell.write = now;
  }
  if (writes && !now.atomic) return;
  if (cell.read.made && (cell.read.block != now.block || cell.read.thread / 32 != now.thread / 32)) {
    cell.of_other_warp = cell.read;
  } else if (cell.read.made && cell.read.thread != now.thread) {
    cell.of_other_thread = cell.read;
  }
  cell.read = now;
}

void access(const void* at, size_t size, bool writes, bool atomic, void* caller) {
  if (!block) return;
  const auto address = (uintptr_t)at;
  const Thread& thread = self();
  const auto stack = (uintptr_t)thread.stack.get();
  if (address - stack < (1 << 16) || built_in(address)) return;
  const Access now = {thread.block_turn, thread.warp_turn, block_index.x, thread_index.x, true, atomic};
  if (out_of_bounds(address, size)) report("access out of bounds", address, {}, now, caller);
  if (size < 4) return take(address, writes, now, caller);
  for (uintptr_t word = address & ~(uintptr_t)3; word < address + size; word += 4) take(word, writes, now, caller);
}

}  // namespace

void atomic_access(const void* at, unsigned size) { access(at, size, true, true, __builtin_return_address(0)); }

}  // namespace emulated

// What the compiler says of where it compiled an index.
struct SourceLocation {
  const char* file;
  unsigned line, column;
};

#define SIZED(size)                                                                               \
  void __tsan_read##size(void* at) { emulated::access(at, size, false, false, CALLER); }         \
  void __tsan_write##size(void* at) { emulated::access(at, size, true, false, CALLER); }         \
  void __tsan_unaligned_read##size(void* at) { emulated::access(at, size, false, false, CALLER); } \
  void __tsan_unaligned_write##size(void* at) { emulated::access(at, size, true, false, CALLER); } \
  void __tsan_volatile_read##size(void* at) { emulated::access(at, size, false, false, CALLER); } \
  void __tsan_volatile_write##size(void* at) { emulated::access(at, size, true, false, CALLER); }
#define CALLER __builtin_return_address(0)

extern "C" {
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)
void __tsan_read_range(void* at, size_t size) { emulated::access(at, size, false, false, CALLER); }
void __tsan_write_range(void* at, size_t size) { emulated::access(at, size, true, false, CALLER); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __ubsan_handle_out_of_bounds_abort(const SourceLocation* at, size_t index) {
  std::fprintf(stderr, "index out of bounds in %s: %zu, block %u thread %u (at %s:%u)\n", emulated::kernel_name, index,
               blockIdx.x, threadIdx.x, at->file, at->line);
  std::abort();
}
}

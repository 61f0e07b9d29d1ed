// What a CUDA device gives to kernels, on the CPU: blocks one after another, the threads of a block as
// coroutines that meet at barriers. For tests: it is slow, and the order of threads is a fixed one, so that
// it finds wrong indices, formulas and barriers that not all reach. Races are found by what races.cpp is told of
// each access, where the kernels are compiled for that.
#pragma once
#define TLLIB_ON_CPU
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static
// What stands for the device itself is nobody's access.
#define DEVICE __attribute__((no_sanitize_thread))

namespace emulated {

struct Index { unsigned x = 0, y = 0, z = 0; };

struct Thread {
  ucontext_t start;
  jmp_buf here;  // where it goes on
  std::unique_ptr<char[]> stack;
  bool started = false, finished = false;
  unsigned long block_turn = 0, warp_turn = 0;  // barriers that order memory, passed so far
  alignas(8) unsigned char given[8];            // what a shuffle or vote hands over
};

// Threads that wait for each other. Nobody comes a second time before all came once, so `came` is at least
// `turn` times their number when all have reached that turn.
struct Barrier {
  unsigned long came = 0;
  unsigned left = 0;  // threads that will not come again
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  Barrier all;
  unsigned finished = 0;
  bool last = false;  // and all others are done
  jmp_buf scheduler;
  std::function<void()> body;
};

extern Index thread_index, block_index, block_size, grid_size;
extern Block* block;
void run(unsigned grid, unsigned size, std::function<void()> body);
void yield();
// Waits for all `size` threads of the barrier.
void meet(Barrier& barrier, unsigned size);

// Where races are looked for: a read and a write at once of the memory at `at`.
void atomic_access(const void* at, unsigned size);

DEVICE inline Thread& self() { return block->threads[thread_index.x]; }
DEVICE inline void meet_warp() { meet(block->warps[thread_index.x / 32], 32); }

template <typename T>
DEVICE T exchange(T x, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(self().given, &x, sizeof x);
  meet_warp();
  T other;
  std::memcpy(&other, block->threads[thread_index.x / 32 * 32 + lane].given, sizeof other);
  meet_warp();  // nobody gives again before all have taken
  return other;
}

using Kernel = void (*)(const void*);
std::map<std::string, Kernel>& kernels();
// Of the launch that runs.
extern const char* kernel_name;
extern unsigned long launch_number;

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

DEVICE inline void __syncthreads() {
  emulated::meet(emulated::block->all, blockDim.x);
  ++emulated::self().block_turn;
}
// Unlike shuffles and votes, it orders memory.
DEVICE inline void __syncwarp(unsigned = ~0u) {
  emulated::meet_warp();
  ++emulated::self().warp_turn;
}
template <typename T> DEVICE T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulated::exchange(x, (threadIdx.x % 32) ^ mask);
}
DEVICE inline unsigned __ballot_sync(unsigned, int predicate) {
  std::memcpy(emulated::self().given, &predicate, sizeof predicate);
  emulated::meet_warp();
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    int other;
    std::memcpy(&other, emulated::block->threads[threadIdx.x / 32 * 32 + lane].given, sizeof other);
    bits |= (other ? 1u : 0u) << lane;
  }
  emulated::meet_warp();  // nobody gives again before all have taken
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Of the counters of blocks: the block that comes last sees what all others wrote.
DEVICE inline unsigned count_in_order(unsigned* at, unsigned limit) {
  const unsigned old = *at;
  *at = old >= limit ? 0 : old + 1;
  if (old == limit) emulated::block->last = true;
  return old;
}
template <typename T, typename U> DEVICE T atomicAdd(T* at, U x) {
  emulated::atomic_access(at, sizeof(T));
  const T old = *at;
  *at = old + T(x);
  return old;
}
template <typename T> DEVICE T atomicCAS(T* at, T expected, T x) {
  emulated::atomic_access(at, sizeof(T));
  const T old = *at;
  if (old == expected) *at = x;
  return old;
}
template <typename T> DEVICE T atomicMax(T* at, T x) {
  emulated::atomic_access(at, sizeof(T));
  const T old = *at;
  *at = std::max(old, x);
  return old;
}

// A device refuses all further work; here the process ends.
inline void __trap() {
  std::fprintf(stderr, "trap in block %u\n", blockIdx.x);
  std::abort();
}

#define __builtin_assume(fact)
inline float __log2f(float x) { return std::log2(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
inline float reciprocal(float x) { return 1 / x; }

inline float half_to_float(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude = std::ldexp((float)(exponent ? fraction | 1024 : fraction), (int)(exponent ? exponent : 1) - 25);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return __uint_as_float(__float_as_uint(magnitude) | sign);
}
inline unsigned short float_to_half(float x) {
  const unsigned short sign = __float_as_uint(x) >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude == 0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  // The step between neighbors here; nearbyint rounds to even.
  const int step = std::max(exponent - 11, -24);
  const float rounded = std::nearbyint(std::ldexp(magnitude, -step));
  if (step == -24) return sign | (unsigned short)rounded;
  return sign + ((step + 24) << 10) + (unsigned short)rounded;
}

// A kernel is registered under stem/element/name, and takes its struct through a pointer.
#define TLLIB_TEXT(x) #x
#define TLLIB_STRING(x) TLLIB_TEXT(x)
#define KERNEL(threads, name, Args, call)                                                              \
  static void name##_kernel(const Args args) { call; }                                                 \
  static const bool name##_known = [] {                                                                \
    emulated::kernels()[TLLIB_STRING(STEM) "/" TLLIB_STRING(ELEMENT) "/" #name] =                      \
        [](const void* args) { name##_kernel(*static_cast<const Args*>(args)); };                      \
    return true;                                                                                       \
  }();

#include "common.cuh"
#include "softmax.cuh"

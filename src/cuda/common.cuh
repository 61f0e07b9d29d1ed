// What the kernels of all methods share: element types, the threads of a row, sums over a grid.
//
// NVRTC compiles it in front of each <method>.cu with -DELEMENT=f32, f16 or bf16, and without any CUDA
// header. tests/cuda compiles the same for the CPU, with TLLIB_ON_CPU and stand-ins for what the device has.

typedef long long i64;

// ---- element types -----------------------------------------------------------------------------

#ifndef TLLIB_ON_CPU
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// 1 / x to a unit in the last place, in one instruction, for an x that is not subnormal. Above 2^126 it is 0.
__device__ __forceinline__ float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}
#endif
// One instruction for each of the next two functions, where the device has one.
#if !defined(TLLIB_ON_CPU) && __CUDA_ARCH__ >= 800
#define TLLIB_EXTREME(instruction, a, b, otherwise)                       \
  float extreme;                                                          \
  asm(instruction ".NaN.f32 %0, %1, %2;" : "=f"(extreme) : "f"(a), "f"(b)); \
  return extreme
#else
#define TLLIB_EXTREME(instruction, a, b, otherwise) return otherwise
#endif
// NaN wins, as in torch.
__device__ __forceinline__ float larger(float a, float b) { TLLIB_EXTREME("max", a, b, (b <= a || a != a) ? a : b); }
__device__ __forceinline__ float smaller(float a, float b) { TLLIB_EXTREME("min", a, b, (b >= a || a != a) ? a : b); }

struct f32 { float value; };
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
typedef ELEMENT E;

__device__ __forceinline__ float load(f32 x) { return x.value; }
__device__ __forceinline__ float load(f16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ float load(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ void store(f32& to, float x) { to.value = x; }
__device__ __forceinline__ void store(f16& to, float x) { to.bits = float_to_half(x); }
// To the nearest, ties to even: one instruction, where the device has it.
__device__ __forceinline__ void store(bf16& to, float x) {
#if !defined(TLLIB_ON_CPU) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const unsigned bits = __float_as_uint(x);
  to.bits = x != x ? 0x7fc0 : (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

template <typename T>
__device__ __forceinline__ float rounded(float x) {
  T held;
  store(held, x);
  return load(held);
}

__device__ __forceinline__ float nan32() { return __uint_as_float(0x7fc00000u); }
__device__ __forceinline__ float infinity32() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ bool finite(float x) { return fabsf(x) < infinity32(); }

// N elements that are loaded or stored together, 16 bytes at a time if they have as many.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T at[N];
  __device__ static __forceinline__ bool fits(const void* p) { return (unsigned long long)p % alignof(Pack) == 0; }
};

// A scalar, or numbers that follow each other, of a dtype that is known on the host only. Mirrored by
// `Scalar` in src/cuda/args.rs.
struct Scalar { void* to; int dtype; };
__device__ __forceinline__ void store(Scalar s, float x, i64 at = 0) {
  if (s.dtype == 0) store(((f32*)s.to)[at], x);
  if (s.dtype == 1) store(((f16*)s.to)[at], x);
  if (s.dtype == 2) store(((bf16*)s.to)[at], x);
}

// Numbers to be read, likewise. Mirrored by `Numbers` in src/cuda/args.rs.
struct Numbers {
  const void* data;
  i64 stride;  // in elements
  int dtype;
  __device__ __forceinline__ float at(i64 i) const {
    if (dtype == 0) return load(((const f32*)data)[i * stride]);
    if (dtype == 1) return load(((const f16*)data)[i * stride]);
    return load(((const bf16*)data)[i * stride]);
  }
};

// ---- the threads of a row ----------------------------------------------------------------------

const int WARP = 32;
const unsigned ALL = 0xffffffffu;

struct Add {
  template <typename T> __device__ static T of(T a, T b) { return a + b; }
  template <typename T> __device__ static T identity() { return T(0); }
};
struct Largest {
  __device__ static float of(float a, float b) { return larger(a, b); }
  template <typename T> __device__ static T identity() { return -infinity32(); }
};
// Of integers that are not negative.
struct LargestInteger {
  template <typename T> __device__ static T of(T a, T b) { return a > b ? a : b; }
  template <typename T> __device__ static T identity() { return 0; }
};
struct Smallest {
  __device__ static float of(float a, float b) { return smaller(a, b); }
  template <typename T> __device__ static T identity() { return infinity32(); }
};

// Reduces over LANES neighboring threads, a power of two, in a fixed order; all get the result.
template <typename Op, int LANES = WARP, typename T>
__device__ __forceinline__ T across_warp(T x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// Reduces each x[n] over the block, which has WARPS warps, or any number if WARPS is 0, in a fixed order. All threads
// of the block must call it; all get the results.
template <typename Op, int WARPS, int N, typename T>
__device__ __forceinline__ void across_block(T (&x)[N]) {
  __shared__ T of_warp[N][WARPS > 0 ? WARPS : WARP];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = across_warp<Op>(x[n]);
    if (lane == 0) of_warp[n][warp] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if constexpr (WARPS > 0) {
      x[n] = across_warp<Op, WARPS>(of_warp[n][lane % WARPS]);
    } else {
      x[n] = across_warp<Op>(lane < blockDim.x / WARP ? of_warp[n][lane] : Op::template identity<T>());
    }
  }
  __syncthreads();  // of_warp may be written again
}
template <typename Op, int WARPS = 0, typename T>
__device__ __forceinline__ T across_block(T x) {
  T only[1] = {x};
  across_block<Op, WARPS>(only);
  return only[0];
}

// Sums `own` over the threads with the same lane in all warps, into the first warp, in a fixed order. All threads of
// the block must call it.
template <int N>
__device__ __forceinline__ void across_warps(double (&own)[N]) {
  __shared__ double of_warp[N][WARP][WARP];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  for (int n = 0; n < N; ++n) of_warp[n][warp][lane] = own[n];
  __syncthreads();
  if (warp == 0) {
    for (int n = 0; n < N; ++n) {
      own[n] = 0;
      for (int w = 0; w < warps; ++w) own[n] += of_warp[n][w][lane];
    }
  }
  __syncthreads();  // of_warp may be written again
}

// Runs f(c), in all threads, for the columns of block `block` where `blocks` blocks share `cols` columns: WARP at a
// time, the same in each warp.
template <typename F>
__device__ __forceinline__ void tiles(int cols, int block, int blocks, F f) {
  for (int tile = block * WARP; tile < cols; tile += blocks * WARP) f(tile + (int)(threadIdx.x % WARP));
}

// SIZE threads that share a row: a warp, or the whole block (which then has SIZE threads).
template <int SIZE>
struct Group {
  // Which of the block's rows is this thread's, and how many the block has at a time.
  __device__ static int row() { return SIZE == WARP ? threadIdx.x / WARP : 0; }
  __device__ static int rows() { return SIZE == WARP ? blockDim.x / WARP : 1; }
  __device__ static int lane() { return SIZE == WARP ? threadIdx.x % WARP : threadIdx.x; }
  template <typename Op, typename T>
  __device__ static __forceinline__ T reduce(T x) {
    if constexpr (SIZE == WARP) return across_warp<Op>(x);
    else return across_block<Op, SIZE / WARP>(x);
  }
  // Several at once, which takes hardly longer than one.
  template <typename Op, int N, typename T>
  __device__ static __forceinline__ void reduce(T (&x)[N]) {
    if constexpr (SIZE == WARP) {
#pragma unroll
      for (int n = 0; n < N; ++n) x[n] = across_warp<Op>(x[n]);
    } else {
      across_block<Op, SIZE / WARP>(x);
    }
  }
  template <typename T> __device__ static __forceinline__ T sum(T x) { return reduce<Add>(x); }
  __device__ static __forceinline__ float max(float x) { return reduce<Largest>(x); }
};

// The rows of this group: `for (i64 i = first_row<SIZE>(); i < rows; i += step_rows<SIZE>())`. With
// SIZE > WARP all threads of a block run the same iterations, so that they may synchronize inside.
template <int SIZE> __device__ __forceinline__ i64 first_row() {
  return (i64)blockIdx.x * Group<SIZE>::rows() + Group<SIZE>::row();
}
template <int SIZE> __device__ __forceinline__ i64 step_rows() {
  return (i64)gridDim.x * Group<SIZE>::rows();
}

// Columns of a thread that are read at once, where a row is not held in registers.
const int TOGETHER = 4;

// Runs f(k, c, there) for this thread's columns c, and for places beyond the last one, with `there` false: a branch
// around each would take more instructions than most of what f does. k counts the columns. KEEP > 0 promises at most
// KEEP * SIZE columns; the loop is then unrolled, so that arrays indexed by k stay in registers. With KEEP = 0, k is
// below TOGETHER, and the rows that f reads must be passed: TOGETHER columns of each are fetched before f runs on them.
template <int SIZE, int KEEP, typename F, typename... Rows>
__device__ __forceinline__ void places(int cols, F f, Rows&... read) {
  const int lane = Group<SIZE>::lane();
  if constexpr (KEEP > 0) {
    int left = cols - lane;
    // Makes the number opaque in each sweep: otherwise the compiler would keep the first sweep's comparisons for all
    // others, as bits packed into registers, and unpack them at twice the cost.
    asm volatile("" : "+r"(left));
#pragma unroll
    for (int k = 0; k < KEEP; ++k) f(k, lane + k * SIZE, left > k * SIZE);
  } else {
    for (int from = lane; from < cols; from += TOGETHER * SIZE) {
      (read.fetch(from, cols), ...);
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) f(k, from + k * SIZE, from + k * SIZE < cols);
    }
  }
}
// Runs f(k, c) for the columns that exist.
template <int SIZE, int KEEP, typename F, typename... Rows>
__device__ __forceinline__ void columns(int cols, F f, Rows&... read) {
  places<SIZE, KEEP>(
      cols,
      [&](int k, int c, bool there) {
        if (there) f(k, c);
      },
      read...);
}

// A matrix with strides in elements. Mirrored by `Matrix` in src/cuda/args.rs.
template <typename T>
struct Matrix {
  const T* data;
  i64 row, col;
  __device__ __forceinline__ float at(i64 i, i64 c) const { return load(data[i * row + c * col]); }
};

// A vector of labels or indices, with its stride in elements. Mirrored by `Labels` in src/cuda/args.rs.
struct Labels {
  const i64* data;
  i64 stride;
  __device__ __forceinline__ i64 at(i64 i) const { return data[i * stride]; }
};

// One row as a thread of its group sees it: held in registers (KEEP > 0), or read again in each sweep, TOGETHER columns
// at a time. Places beyond the last column hold `pad`.
template <typename T, int SIZE, int KEEP>
struct Row {
  const T* data;
  i64 stride;
  float pad;
  float kept[KEEP > 0 ? KEEP : TOGETHER];

  __device__ __forceinline__ Row(const Matrix<T>& of, i64 i, int cols, float pad = -infinity32())
      : data(of.data + i * of.row), stride(of.col), pad(pad) {
    if constexpr (KEEP > 0) {
      const T* first = data + Group<SIZE>::lane() * stride;
      if (stride == 1) {  // one address, and constant offsets
        places<SIZE, KEEP>(cols, [&](int k, int, bool there) { kept[k] = there ? load(first[k * SIZE]) : pad; });
      } else {
        const i64 step = SIZE * stride;
        places<SIZE, KEEP>(cols, [&](int k, int, bool there) {
          kept[k] = there ? load(*first) : pad;
          first += step;
        });
      }
    }
  }
  // Reads the columns from `from` on, where the row is not held.
  __device__ __forceinline__ void fetch(int from, int cols) {
    if constexpr (KEEP == 0) {
      const T* first = data + from * stride;
      const i64 step = SIZE * stride;
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) kept[k] = from + k * SIZE < cols ? load(first[k * step]) : pad;
    }
  }
  __device__ __forceinline__ float at(int k) const { return kept[k]; }
  // From memory, for any column and by any thread.
  __device__ __forceinline__ float again(int c) const { return load(data[c * stride]); }
  // e^{(z_c - max) times}. A row that is held stores it in place of z_c.
  __device__ __forceinline__ float exponential(int k, float max, float times = 1) {
    const float x = expf((at(k) - max) * times);
    if constexpr (KEEP > 0) kept[k] = x;
    return x;
  }
  // The same in a later sweep.
  __device__ __forceinline__ float held_exponential(int k, float max, float times = 1) const {
    if constexpr (KEEP > 0) return kept[k];
    else return expf((at(k) - max) * times);
  }
};

// This thread's part of max_c z_c, NaN if any of its z_c is.
template <int SIZE, int KEEP, typename R>
__device__ __forceinline__ float own_max(R& z, int cols) {
  float max = -infinity32();
  places<SIZE, KEEP>(cols, [&](int k, int, bool) { max = larger(max, z.at(k)); }, z);
  return max;
}
template <int SIZE, int KEEP, typename R>
__device__ __forceinline__ float row_max(R& z, int cols) {
  return Group<SIZE>::max(own_max<SIZE, KEEP>(z, cols));
}

// A row's maximum, and sum_c e^{(z_c - max) times} over all columns but one.
struct Normalizer { float max, sum; };

// A row in registers holds exponentials from then on; those of places beyond the last column are 0.
template <int SIZE, int KEEP, typename R>
__device__ __forceinline__ Normalizer normalizer(R& z, int cols, float times = 1, int except = -1) {
  if constexpr (KEEP > 0) {
    const float max = row_max<SIZE, KEEP>(z, cols);
    float sum = 0;
    places<SIZE, KEEP>(cols, [&](int k, int c, bool) {
      const float x = z.exponential(k, max, times);
      if (c != except) sum += x;
    });
    return {max, Group<SIZE>::sum(sum)};
  } else {
    // In one sweep: the sum is rescaled when the maximum grows, which is rare.
    float max = -infinity32(), sum = 0;
    for (int from = Group<SIZE>::lane(); from < cols; from += TOGETHER * SIZE) {
      z.fetch(from, cols);
      float top = max;
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) top = larger(top, z.at(k));
      if (top == -infinity32()) continue;  // only -inf so far: these add 0, or the whole row is -inf
      if (top != max) sum *= expf((max - top) * times);
      max = top;
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) {
        if (from + k * SIZE != except) sum += z.held_exponential(k, max, times);
      }
    }
    const float all = Group<SIZE>::max(max);
    return {all, Group<SIZE>::sum(sum * expf((max - all) * times))};
  }
}

// ---- sums over the grid ------------------------------------------------------------------------

// Where blocks leave their sums, and how many have done so. Mirrored by `Gathering` in src/cuda/args.rs.
struct Gathering {
  double* partials;  // [gridDim.x][N]
  unsigned* done;    // zero before and after
};

#ifndef TLLIB_ON_CPU
// Counts from 0 to `limit` and again from 0; returns the number before. What this thread knows to be written is known
// to those that count later: a release and an acquire, for which one fence is enough.
__device__ __forceinline__ unsigned count_in_order(unsigned* at, unsigned limit) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(limit) : "memory");
  return before;
}
#endif

// True in all threads of the last block to arrive, which then sees what the others wrote before. `done` is
// zero before and after. All threads must call it.
__device__ __forceinline__ bool last_block(unsigned* done) {
  __shared__ bool last;
  __syncthreads();  // all that the block wrote is before it is counted
  if (gridDim.x == 1) return true;
  // Wraps to 0 with the last block, for the next launch.
  if (threadIdx.x == 0) last = count_in_order(done, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  return last;
}

// Sums `own` over all threads of the grid. True in the threads of the last block, where `own` then is the
// total; the order of summation does not depend on which block that is. All threads must call it.
template <int N>
__device__ bool gathered(const Gathering& g, double (&own)[N]) {
  across_block<Add, 0>(own);
  if (threadIdx.x == 0) {
    for (int n = 0; n < N; ++n) g.partials[(i64)blockIdx.x * N + n] = own[n];
  }
  if (!last_block(g.done)) return false;
  for (int n = 0; n < N; ++n) own[n] = 0;
#pragma unroll 4
  for (i64 b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
    for (int n = 0; n < N; ++n) own[n] += ((volatile double*)g.partials)[b * N + n];
  }
  across_block<Add, 0>(own);
  return true;
}

// In a sum over rows, a row counts once: in the first thread of its group.
template <int SIZE> __device__ __forceinline__ double once(float x) {
  return Group<SIZE>::lane() == 0 ? (double)x : 0.0;
}

// ---- kernels -----------------------------------------------------------------------------------

// A kernel `name` that takes one struct by value, for blocks of at most `threads` threads, of which a multiprocessor
// holds at least `blocks`.
#ifdef TLLIB_ON_CPU
#define RESIDENT_KERNEL(threads, blocks, name, Args, call) KERNEL(threads, name, Args, call)
#else
#define RESIDENT_KERNEL(threads, blocks, name, Args, call) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Args args) { call; }
#define KERNEL(threads, name, Args, call) RESIDENT_KERNEL(threads, 1, name, Args, call)
#endif

// The forms of a kernel `template <int SIZE, int KEEP> void name(const Args&)` over rows, by the number of
// columns: a warp for each row as long as its registers hold it, so that the fixed cost per row, which each of its
// threads pays, is spread over as many columns as possible. Mirrored by `ROWS` in src/cuda/plan.rs.
#define ROW_KERNEL(name, Args)                                       \
  KERNEL(256, name##_128, Args, (name<32, 4>(args)))                 \
  RESIDENT_KERNEL(128, 8, name##_256, Args, (name<32, 8>(args)))     \
  RESIDENT_KERNEL(128, 6, name##_512, Args, (name<32, 16>(args)))    \
  RESIDENT_KERNEL(128, 4, name##_1024, Args, (name<32, 32>(args)))   \
  RESIDENT_KERNEL(128, 6, name##_2048, Args, (name<128, 16>(args)))  \
  RESIDENT_KERNEL(128, 4, name##_4096, Args, (name<128, 32>(args)))  \
  KERNEL(1024, name##_any, Args, (name<1024, 0>(args)))

// The forms of a kernel that holds more than one number per column, or has few rows: more threads for each row.
// Mirrored by `FEW_ROWS` in src/cuda/plan.rs.
#define FEW_ROWS_KERNEL(name, Args)                     \
  KERNEL(256, name##_128, Args, (name<32, 4>(args)))    \
  KERNEL(128, name##_1024, Args, (name<128, 8>(args)))  \
  KERNEL(512, name##_4096, Args, (name<512, 8>(args)))  \
  KERNEL(1024, name##_any, Args, (name<1024, 0>(args)))

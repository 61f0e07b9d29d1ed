// What the kernels of all methods share: element types, the threads of a row, sums over a grid.
//
// NVRTC compiles it in front of each <method>.cu with -DELEMENT=f32, f16 or bf16, and without any header
// of CUDA. tests/cuda compiles the same for the CPU, where TLLIB_ON_CPU supplies what the device has.

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
#endif

struct f32 { float value; };
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
typedef ELEMENT E;

__device__ __forceinline__ float load(f32 x) { return x.value; }
__device__ __forceinline__ float load(f16 x) { return half_to_float(x.bits); }
__device__ __forceinline__ float load(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ void store(f32& to, float x) { to.value = x; }
__device__ __forceinline__ void store(f16& to, float x) { to.bits = float_to_half(x); }
// To the nearest, ties to even.
__device__ __forceinline__ void store(bf16& to, float x) {
  const unsigned bits = __float_as_uint(x);
  to.bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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
// NaN wins, as in torch.
__device__ __forceinline__ float larger(float a, float b) { return (b <= a || a != a) ? a : b; }
__device__ __forceinline__ float smaller(float a, float b) { return (b >= a || a != a) ? a : b; }

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

template <typename Op, typename T>
__device__ __forceinline__ T across_warp(T x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

// All threads of the block must call it; all get the result, in an order that does not vary.
template <typename Op, typename T>
__device__ T across_block(T x) {
  __shared__ T of_warp[WARP];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  x = across_warp<Op>(x);
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  x = lane < warps ? of_warp[lane] : Op::template identity<T>();
  x = across_warp<Op>(x);
  __syncthreads();  // of_warp may be written again
  return x;
}

// Adds up what threads of the same place in their warps have, into those of the first warp; in an order that
// does not vary. All threads of the block must call it.
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
    else return across_block<Op>(x);
  }
  template <typename T> __device__ static __forceinline__ T sum(T x) { return reduce<Add>(x); }
  __device__ static __forceinline__ float max(float x) { return reduce<Largest>(x); }
};

// The rows of this group: `for (i64 i = first_row<SIZE>(); i < rows; i += step_rows<SIZE>())`. With
// SIZE > WARP all threads of a block take the same turns, so that they may meet inside.
template <int SIZE> __device__ __forceinline__ i64 first_row() {
  return (i64)blockIdx.x * Group<SIZE>::rows() + Group<SIZE>::row();
}
template <int SIZE> __device__ __forceinline__ i64 step_rows() {
  return (i64)gridDim.x * Group<SIZE>::rows();
}

// Runs f(k, c) for this thread's columns c; k counts them. KEEP > 0 promises at most KEEP * SIZE columns,
// and unrolls, so that arrays that k indexes stay in registers.
template <int SIZE, int KEEP, typename F>
__device__ __forceinline__ void columns(int cols, F f) {
  const int lane = Group<SIZE>::lane();
  if constexpr (KEEP > 0) {
#pragma unroll
    for (int k = 0; k < KEEP; ++k) {
      const int c = lane + k * SIZE;
      if (c < cols) f(k, c);
    }
  } else {
    for (int c = lane; c < cols; c += SIZE) f(0, c);
  }
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

// One row as a thread of its group sees it: held in registers (KEEP > 0), or read again each time.
template <typename T, int SIZE, int KEEP>
struct Row {
  const T* data;
  i64 stride;
  float kept[KEEP > 0 ? KEEP : 1];

  __device__ __forceinline__ Row(const Matrix<T>& of, i64 i, int cols)
      : data(of.data + i * of.row), stride(of.col) {
    if constexpr (KEEP > 0) {
      columns<SIZE, KEEP>(cols, [&](int k, int c) { kept[k] = load(data[c * stride]); });
    }
  }
  __device__ __forceinline__ float at(int k, int c) const {
    if constexpr (KEEP > 0) return kept[k];
    else return again(c);
  }
  // From memory, for any column and by any thread.
  __device__ __forceinline__ float again(int c) const { return load(data[c * stride]); }
};

// max_c z_c, NaN where one is.
template <int SIZE, int KEEP, typename R>
__device__ __forceinline__ float row_max(const R& z, int cols) {
  float max = -infinity32();
  columns<SIZE, KEEP>(cols, [&](int k, int c) { max = larger(max, z.at(k, c)); });
  return Group<SIZE>::max(max);
}

// sum_c e^{(z_c - max) times}
template <int SIZE, int KEEP, typename R>
__device__ __forceinline__ float row_sum_exp(const R& z, int cols, float max, float times) {
  float sum = 0;
  columns<SIZE, KEEP>(cols, [&](int k, int c) { sum += expf((z.at(k, c) - max) * times); });
  return Group<SIZE>::sum(sum);
}

// ---- sums over the grid ------------------------------------------------------------------------

// Where blocks leave their sums, and how many have done so. Mirrored by `Gathering` in src/cuda/args.rs.
struct Gathering {
  double* partials;  // [gridDim.x][N]
  unsigned* done;    // zero before and after
};

// True in all threads of the block that comes last, which then sees what the others wrote before. `done` is
// zero before and after. All threads must call it.
__device__ __forceinline__ bool last_block(unsigned* done) {
  __shared__ bool last;
  __syncthreads();  // all that the block wrote is before the fence
  if (threadIdx.x == 0) {
    __threadfence();
    // Wraps to 0 with the last block, for the next launch.
    last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();  // what the others wrote is before all that this block does from here on
  }
  __syncthreads();
  return last;
}

// Adds up `own` over all threads of the grid. True in the threads of one block, the last, where `own` then
// is the total; in an order that does not depend on which block it was. All threads must call it.
template <int N>
__device__ bool gathered(const Gathering& g, double (&own)[N]) {
  for (int n = 0; n < N; ++n) own[n] = across_block<Add>(own[n]);
  if (threadIdx.x == 0) {
    for (int n = 0; n < N; ++n) g.partials[(i64)blockIdx.x * N + n] = own[n];
  }
  if (!last_block(g.done)) return false;
  for (int n = 0; n < N; ++n) {
    double sum = 0;
    for (i64 b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
      sum += ((volatile double*)g.partials)[b * N + n];
    }
    own[n] = across_block<Add>(sum);
  }
  return true;
}

// In a sum over rows, a row counts once: in the first thread of its group.
template <int SIZE> __device__ __forceinline__ double once(float x) {
  return Group<SIZE>::lane() == 0 ? (double)x : 0.0;
}

// ---- kernels -----------------------------------------------------------------------------------

// A kernel `name` that takes one struct by value, for blocks of at most `threads` threads.
#ifndef TLLIB_ON_CPU
#define KERNEL(threads, name, Args, call) \
  extern "C" __global__ void __launch_bounds__(threads, 1) name(const Args args) { call; }
#endif

// The forms of a kernel `template <int SIZE, int KEEP> void name(const Args&)` over rows, by the number of
// columns. Mirrored by `Form` in src/cuda/plan.rs.
#define ROW_KERNEL(name, Args)                          \
  KERNEL(256, name##_128, Args, (name<32, 4>(args)))    \
  KERNEL(128, name##_1024, Args, (name<128, 8>(args)))  \
  KERNEL(512, name##_4096, Args, (name<512, 8>(args)))  \
  KERNEL(1024, name##_any, Args, (name<1024, 0>(args)))

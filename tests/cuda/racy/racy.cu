// Kernels that are wrong unless `right`, each in one way that a device may forgive and races.cpp may not.

struct Racy {
  int* out;
  unsigned* done;
  int right;
};

__device__ __forceinline__ void no_barrier(const Racy& a) {
  __shared__ int x[64];
  x[threadIdx.x] = threadIdx.x;
  if (a.right) __syncthreads();
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = x[63 - threadIdx.x];
}
KERNEL(64, no_barrier, Racy, no_barrier(args))

__device__ __forceinline__ void written_too_early(const Racy& a) {
  __shared__ int x[64];
  x[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int other = x[63 - threadIdx.x];
  if (a.right) __syncthreads();
  x[threadIdx.x] = other;
}
KERNEL(64, written_too_early, Racy, written_too_early(args))

// A shuffle lets the threads of a warp meet, and orders no memory.
__device__ __forceinline__ void no_warp_barrier(const Racy& a) {
  __shared__ int x[32];
  x[threadIdx.x] = threadIdx.x;
  __shfl_xor_sync(ALL, 0, 1);
  if (a.right) __syncwarp();
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = x[31 - threadIdx.x];
}
KERNEL(32, no_warp_barrier, Racy, no_warp_barrier(args))

__device__ __forceinline__ void never_written(const Racy& a) {
  __shared__ int x[32];
  if (a.right || blockIdx.x == gridDim.x - 1) x[threadIdx.x] = 1;
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x];
}
KERNEL(32, never_written, Racy, never_written(args))

__device__ __forceinline__ void two_blocks(const Racy& a) {
  if (threadIdx.x > 0) return;
  if (a.right) atomicAdd(a.out, 1);
  else a.out[0] += 1;
}
KERNEL(32, two_blocks, Racy, two_blocks(args))

__device__ __forceinline__ void sum_of_blocks(const Racy& a) {
  if (threadIdx.x == 0) a.out[1 + blockIdx.x] = 1;
  const bool last = last_block(a.done);
  if (threadIdx.x > 0 || !(a.right ? last : blockIdx.x == 1)) return;
  for (int b = 0; b < gridDim.x; ++b) a.out[0] += a.out[1 + b];
}
KERNEL(32, sum_of_blocks, Racy, sum_of_blocks(args))

__device__ __forceinline__ void behind_the_end(const Racy& a) {
  if (blockIdx.x == 0) a.out[a.right ? threadIdx.x : 256 + threadIdx.x] = 1;
}
KERNEL(32, behind_the_end, Racy, behind_the_end(args))

__device__ __forceinline__ void before_the_start(const Racy& a) {
  if (blockIdx.x == 0) a.out[threadIdx.x] = a.out[(int)threadIdx.x - (a.right ? 0 : 1)];
}
KERNEL(32, before_the_start, Racy, before_the_start(args))

__device__ __forceinline__ void past_an_array(const Racy& a) {
  __shared__ int x[32], y[32];
  x[threadIdx.x + (a.right ? 0 : 1)] = 1;
  y[threadIdx.x] = 2;
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = y[threadIdx.x];
}
KERNEL(32, past_an_array, Racy, past_an_array(args))

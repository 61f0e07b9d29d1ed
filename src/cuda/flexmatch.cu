// FlexMatch's two steps: the formula is in src/kernels/flexmatch.rs, the handling of equal indices in
// src/ops/flexmatch/device.rs. Everything is integers: ELEMENT is unused.
//
// An index or label out of range traps, where the composite fails a device-side assertion: nothing is
// read or written out of bounds, and torch raises at its next call that synchronizes.

typedef unsigned long long u64;

// Mirrored by `Entries` in src/cuda/flexmatch.rs.
struct Entries {
  const void* data;
  i64 stride;  // in elements
  int type;    // c10::ScalarType
};

__device__ __forceinline__ i64 integer(const Entries& n, i64 k) {
  const i64 at = k * n.stride;
  switch (n.type) {
    case 0: return ((const unsigned char*)n.data)[at];
    case 1: return ((const signed char*)n.data)[at];
    case 2: return ((const short*)n.data)[at];
    case 3: return ((const int*)n.data)[at];
    default: return ((const i64*)n.data)[at];
  }
}

__device__ __forceinline__ bool is_one(const Entries& n, i64 k) {
  const i64 at = k * n.stride;
  switch (n.type) {
    case 5: return ((const unsigned short*)n.data)[at] == 0x3c00;
    case 6: return ((const float*)n.data)[at] == 1;
    case 7: return ((const double*)n.data)[at] == 1;
    case 11: return ((const unsigned char*)n.data)[at] != 0;
    case 15: return ((const unsigned short*)n.data)[at] == 0x3f80;
    default: return integer(n, k) == 1;
  }
}

// Negative indices count from the end; a result out of range is at least `length` as u64.
__device__ __forceinline__ i64 wrapped(i64 index, i64 length) { return index < 0 ? index + length : index; }

// ---- the status of each label's class ----------------------------------------------------------

struct FlexmatchStatus {  // mirrored by `StatusArgs` in src/cuda/flexmatch.rs
  const i64* counts;      // [classes + 1], of -1 first
  int classes, warmup;
  i64 samples;
  Entries labels;
  i64 length;
  float* status;
};

__device__ __forceinline__ void flexmatch_status_all(const FlexmatchStatus& a) {
  // Every block finds the maximum for itself: that is cheaper than a second launch.
  i64 largest = 0;
  for (int c = threadIdx.x; c < a.classes; c += blockDim.x) largest = LargestInteger::of(largest, a.counts[c + 1]);
  largest = across_block<LargestInteger>(largest);
  const i64 all = LargestInteger::of(largest, a.counts[0]);
  const double divisor = (double)(a.warmup ? all : largest);
  const i64 step = (i64)gridDim.x * blockDim.x;
  for (i64 k = (i64)blockIdx.x * blockDim.x + threadIdx.x; k < a.length; k += step) {
    const i64 label = wrapped(integer(a.labels, k), a.classes);
    if ((u64)label >= (u64)a.classes) {
      __trap();
      return;
    }
    a.status[k] = all == a.samples ? 0 : (float)((double)a.counts[label + 1] / divisor);
  }
}
KERNEL(1024, flexmatch_status, FlexmatchStatus, flexmatch_status_all(args))

// ---- update ------------------------------------------------------------------------------------

struct FlexmatchUpdate {  // mirrored by `UpdateArgs` in src/cuda/flexmatch.rs
  i64* counts;
  int classes;
  int outputs_type;  // c10::ScalarType
  void* outputs;
  i64 samples;
  Entries idxes, mask, labels;
  int batch;
  int slots;  // a power of two, at least twice the batch and at most SLOTS
};

const int SLOTS = 8192;
const int ROWS_EACH = 4;  // of a thread, at most

// The slot of this row's index. A slot holds 1 + the last row so far of the index that owns it, or 0.
//
// All rows of an index probe the same slots in the same order, and a slot never changes its owner: they
// end at the same one, whatever the order of threads.
__device__ __forceinline__ int claim(const FlexmatchUpdate& a, unsigned* last, int row) {
  const i64 index = wrapped(integer(a.idxes, row), a.samples);
  if ((u64)index >= (u64)a.samples) {
    __trap();
    return -1;
  }
  // 2^64 over the golden ratio; the upper bits are the mixed ones.
  unsigned slot = (unsigned)(((u64)index * 0x9e3779b97f4a7c15ull) >> 32) & (a.slots - 1);
  for (;;) {
    const unsigned holder = atomicCAS(&last[slot], 0u, row + 1u);
    if (holder == 0) return slot;
    // Another row may hold the slot by now, but one of the same index as `holder`.
    if (wrapped(integer(a.idxes, holder - 1), a.samples) == index) {
      atomicMax(&last[slot], row + 1u);
      return slot;
    }
    slot = (slot + 1) & (a.slots - 1);
  }
}

template <typename L>
__device__ __forceinline__ i64 exchange_label(void* outputs, i64 at, i64 label) {
  const i64 old = ((L*)outputs)[at];
  ((L*)outputs)[at] = (L)label;
  return old;
}

// For the last selected row of an index: no other thread touches the label. Counts are integers, so that
// the order of the additions does not matter.
__device__ __forceinline__ void relabel(const FlexmatchUpdate& a, int row) {
  const i64 at = wrapped(integer(a.idxes, row), a.samples), label = integer(a.labels, row);
  i64 old = a.classes;
  if ((u64)label + 1 <= (u64)a.classes) {
    switch (a.outputs_type) {
      case 1: old = exchange_label<signed char>(a.outputs, at, label); break;
      case 2: old = exchange_label<short>(a.outputs, at, label); break;
      case 3: old = exchange_label<int>(a.outputs, at, label); break;
      default: old = exchange_label<i64>(a.outputs, at, label);
    }
  }
  // The old label is a class or -1 as well, unless it was written by other code.
  if ((u64)old + 1 > (u64)a.classes) {
    __trap();
    return;
  }
  if (old == label) return;
  atomicAdd((u64*)&a.counts[old + 1], ~0ull);
  atomicAdd((u64*)&a.counts[label + 1], 1ull);
}

// One block: its threads agree in shared memory on the last row of each index.
__device__ __forceinline__ void flexmatch_update_all(const FlexmatchUpdate& a) {
  __shared__ unsigned last[SLOTS];
  for (int s = threadIdx.x; s < a.slots; s += blockDim.x) last[s] = 0;
  __syncthreads();
  int slot[ROWS_EACH];
#pragma unroll
  for (int k = 0; k < ROWS_EACH; ++k) {
    const int row = threadIdx.x + k * blockDim.x;
    slot[k] = row < a.batch && is_one(a.mask, row) ? claim(a, last, row) : -1;
  }
  __syncthreads();  // all rows have claimed: a slot's number is final
#pragma unroll
  for (int k = 0; k < ROWS_EACH; ++k) {
    const int row = threadIdx.x + k * blockDim.x;
    if (slot[k] >= 0 && last[slot[k]] == row + 1u) relabel(a, row);
  }
}
KERNEL(1024, flexmatch_update, FlexmatchUpdate, flexmatch_update_all(args))

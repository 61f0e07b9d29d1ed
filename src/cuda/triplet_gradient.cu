// The gradient of the triplet losses with respect to one side: each row searches for the pairs that it is in, so
// that sums have a fixed order. The formulas are in src/kernels/reid_loss/triplet.rs.

const int BLOCK = 256, WARPS = BLOCK / WARP;
const int EACH = 8;   // columns that a thread has at a time
const int CHUNK = EACH * BLOCK;
const int TURNS = 4;  // iterations of a warp over its share of a tile of pairs
const int TILE = TURNS * BLOCK;

struct Pull {  // mirrored by `Pull` in src/cuda/triplet_gradient.rs
  const float* own;         // rows of this side
  const float* candidates;  // for rows that are anchors, or null
  const float* anchors;     // for rows that are candidates, or null
  const double* norms;      // that the rows of this side were divided by, as `prepare` left them; or null
  i64 rows, pairs;          // pairs: two for each anchor
  int dim;
  const int* found;
  const double* weights;
  float factor;    // of the stored gradient
  float* divisor;  // the smallest norm, at most 1, if the stored gradient is to be multiplied by it
  E* grad;         // contiguous
};

// Runs f(k, c) for this thread's columns among the CHUNK from `from` on.
template <typename F>
__device__ __forceinline__ void in_chunk(int from, int dim, F f) {
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const i64 c = (i64)from + k * BLOCK + threadIdx.x;
    if (c < dim) f(k, (int)c);
  }
}

// A row's columns from `from` on, and the sum of what pulls at them.
struct Pulled {
  float x[EACH];
  double sum[EACH];

  __device__ __forceinline__ void add(const Pull& a, int from, i64 pair, const float* y) {
    const double weight = a.weights[pair];
    if (weight == 0) return;
    in_chunk(from, a.dim, [&](int k, int c) { sum[k] += weight * ((double)x[k] - y[c]); });
  }

  // All threads must call it: the pairs that have row `row` as their candidate are put into a list in shared
  // memory, in a fixed order.
  __device__ __forceinline__ void gather(const Pull& a, i64 row, int from) {
    __shared__ int hits[TILE], counts[WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const i64 anchors = a.pairs / 2;
    in_chunk(from, a.dim, [&](int k, int c) {
      x[k] = a.own[row * a.dim + c];
      sum[k] = 0;
    });
    if (a.candidates) {
      for (int end = 0; end < 2; ++end) {
        const i64 pair = end * anchors + row;
        add(a, from, pair, a.candidates + (i64)a.found[pair] * a.dim);
      }
    }
    if (!a.anchors) return;
    for (i64 tile = 0; tile < a.pairs; tile += TILE) {
      unsigned who[TURNS];
      int count = 0;
      const i64 first = tile + warp * (TURNS * WARP) + lane;
#pragma unroll
      for (int t = 0; t < TURNS; ++t) {
        const i64 pair = first + t * WARP;
        const bool hit = pair < a.pairs && a.found[pair] == row && a.weights[pair] != 0;
        who[t] = __ballot_sync(ALL, hit);
        count += __popc(who[t]);
      }
      if (lane == 0) counts[warp] = count;
      __syncthreads();  // also: all are done with the list of the tile before
      int place = 0, all = 0;
      for (int w = 0; w < WARPS; ++w) {
        if (w == warp) place = all;
        all += counts[w];
      }
#pragma unroll
      for (int t = 0; t < TURNS; ++t) {
        if (who[t] >> lane & 1) {
          hits[place + __popc(who[t] & ((1u << lane) - 1))] = (int)(first + t * WARP);
        }
        place += __popc(who[t]);
      }
      __syncthreads();  // also: all have read the counts
      for (int h = 0; h < all; ++h) {
        const i64 anchor = hits[h] < anchors ? hits[h] : hits[h] - anchors;
        add(a, from, hits[h], a.anchors + anchor * a.dim);
      }
    }
  }
};

// The smallest norm, at most 1: a gradient is divided by its row's. In all threads, which must all call it.
__device__ float smallest_norm(const Pull& a) {
  float smallest = 1;
  for (i64 i = threadIdx.x; i < a.rows; i += BLOCK) {
    if (a.norms[i] > 0) smallest = smaller(smallest, (float)a.norms[i]);
  }
  return across_block<Smallest>(smallest);
}

__device__ __forceinline__ void pull_all(const Pull& a) {
  double factor = a.factor;
  if (a.divisor) {
    const float smallest = smallest_norm(a);
    factor *= smallest;
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.divisor = smallest;
  }
  for (i64 row = blockIdx.x; row < a.rows; row += gridDim.x) {
    Pulled pulled;
    double along = 0, divisor = 1;
    // The component of the sum along the row is removed: found over all columns before any is written.
    bool projected = false;
    if (a.norms) {
      const double norm = a.norms[row];
      projected = !(norm < 0);
      divisor = projected ? norm : -norm;
    }
    if (projected) {
      for (int from = 0; from < a.dim; from += CHUNK) {
        pulled.gather(a, row, from);
        in_chunk(from, a.dim, [&](int k, int c) { along += pulled.sum[k] * pulled.x[k]; });
      }
      along = across_block<Add>(along);
    }
    for (int from = 0; from < a.dim; from += CHUNK) {
      if (!projected || a.dim > CHUNK) pulled.gather(a, row, from);
      in_chunk(from, a.dim, [&](int k, int c) {
        const double sum = pulled.sum[k] - along * pulled.x[k];
        store(a.grad[row * a.dim + c], (float)(sum * (factor / divisor)));
      });
    }
  }
}
KERNEL(256, pull, Pull, pull_all(args))

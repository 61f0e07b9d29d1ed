// The triplet losses: the formulas are in src/kernels/reid_loss/mining.rs and triplet.rs.
//
//   prepare   features in float32, divided by their norms if requested, and their squared norms
//   mine      for each anchor the hardest pair, its distances, its loss, its weights in the gradient
//
// Between the two, libtorch computes the products; the gradient is in triplet_gradient.cu. Sums over the features
// are in double: there are only 2N pairs, and their distances are small differences of large numbers.

const double CLAMP = 1e-12;          // of squared distances, which get no gradient below it
const double SMALLEST_NORM = 1e-12;
const double OFFSET = 1e7;           // what tllib adds to the distance of a candidate that is missing
const int BLOCK = 256, WARPS = BLOCK / WARP;

// ---- features ----------------------------------------------------------------------------------

struct Prepare {  // mirrored by `Prepare` in src/cuda/triplet.rs
  Matrix<E> x;
  i64 rows;
  int cols;
  float* out;      // contiguous, or null
  float* squares;  // of the rows of `out`, or null
  double* norms;   // null where rows are not divided by them; -1e-12 for a norm that was raised to 1e-12
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void prepare(const Prepare& a) {
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    Row<E, SIZE, KEEP> x(a.x, i, a.cols, 0);
    float divisor = 1;
    if (a.norms) {
      double square = 0;
      places<SIZE, KEEP>(a.cols, [&](int k, int, bool) { square += (double)x.at(k) * x.at(k); }, x);
      const double norm = sqrt(Group<SIZE>::sum(square));
      const bool raised = norm < SMALLEST_NORM;
      divisor = (float)(raised ? SMALLEST_NORM : norm);
      if (Group<SIZE>::lane() == 0) a.norms[i] = raised ? -SMALLEST_NORM : norm;
    }
    double square = 0;
    const auto divide = [&](int k, int c, bool there) {
      const float u = x.at(k) / divisor;
      square += (double)u * u;
      if (a.out && there) a.out[i * a.cols + c] = u;
    };
    places<SIZE, KEEP>(a.cols, divide, x);
    if (!a.squares) continue;
    square = Group<SIZE>::sum(square);
    if (Group<SIZE>::lane() == 0) a.squares[i] = (float)square;
  }
}
FEW_ROWS_KERNEL(prepare, Prepare)

// ---- mining and loss ---------------------------------------------------------------------------

// Candidates of one anchor that are compared by their distances from differences, as in mining.rs.
const int COMPARED = 16;

struct Mine {  // mirrored by `Mine` in src/cuda/triplet.rs
  const float* products;  // [rows][candidates], of the anchors from `first` on
  i64 first, rows;
  i64 anchors;            // of all launches
  int candidates, dim, teacher_dim;
  const float *u, *v;     // features of anchors and candidates
  const float *u_squares, *v_squares;
  Labels u_labels, v_labels;
  const float* teacher;   // features, or null
  float error;            // of a key, for each unit of the squared norms
  int objective;          // 0: hinge, 1: soft with `margin`, 2: soft with the teacher's reference
  double margin;
  int* found;             // [2][anchors]: the positives, the negatives
  float* offsets;         // [2][anchors]: what is added to their distances
  double* weights;        // [2][anchors]: the pair pulls u with weight (u - v)
  float* references;      // [anchors], or null
  double* total;          // of the launches so far
  Scalar loss;
  Gathering gathering;
};

// What the first sweep over a row's keys finds. All are maxima.
enum { SAME_FAR, OTHER_FAR, SAME_NEAR, OTHER_NEAR, MAGNITUDE, SQUARE, EXTREMES };

// |v_j|^2 - 2 u_i.v_j, by one instruction, so that both sweeps see the same bits.
__device__ __forceinline__ float key_of(const Mine& a, const float* products, int j) {
  return fmaf(-2.0f, products[j], a.v_squares[j]);
}

// |x - y|^2 by the threads of one warp, in all of them.
__device__ double square_between(const float* x, const float* y, int dim) {
  double square = 0;
#pragma unroll 4
  for (int c = threadIdx.x % WARP; c < dim; c += WARP) {
    const double difference = (double)x[c] - y[c];
    square += difference * difference;
  }
  return across_warp<Add>(square);
}

__device__ __forceinline__ double distance(double square) { return sqrt(square < CLAMP ? CLAMP : square); }

// The candidates that are compared for one end of the pair, as the warps find them in their shares of a row.
struct Finds {
  int count[WARPS];
  int index[WARPS][COMPARED];  // ascending
  int largest[WARPS];          // the first index with the largest key, or -1

  // The k-th of all warps' candidates, or -1.
  __device__ int at(int k) const {
    for (int w = 0; w < WARPS; ++w) {
      const int here = count[w] < COMPARED ? count[w] : COMPARED;
      if (k < here) return index[w][k];
      k -= here;
    }
    return -1;
  }
  // The first index with the largest key if it is not among the first COMPARED, or -1.
  __device__ int late() const {
    const int last = at(COMPARED - 1);
    int first = -1;
    for (int w = WARPS; w-- > 0;) first = largest[w] >= 0 ? largest[w] : first;
    return last >= 0 && first > last ? first : -1;
  }
};

struct Best { int index; double square, taught; };

// The two ends of row `i`: 0 is the positive, the farthest; 1 the negative, the nearest. All threads must call
// it; the result is in `best`, in shared memory, after the next barrier.
__device__ void compare(const Mine& a, i64 i, const float* products, const float (&extreme)[EXTREMES],
                        Best (&best)[2]) {
  __shared__ Finds finds[2];
  __shared__ int compared[2][COMPARED + 1];
  __shared__ double squares[2][COMPARED + 1];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const i64 own = a.u_labels.at(i);
  // If no candidate qualifies, all do.
  const bool no_same = extreme[SAME_FAR] == -infinity32(), no_other = extreme[OTHER_FAR] == -infinity32();
  const float far = no_same ? extreme[OTHER_FAR] : extreme[SAME_FAR];
  const float near = no_other ? extreme[SAME_NEAR] : extreme[OTHER_NEAR];
  const float error = a.error * (a.u_squares[i] + extreme[SQUARE]);

  const int share = (a.candidates + BLOCK - 1) / BLOCK * WARP;
  const i64 from = (i64)warp * share;
  const i64 to = from + share < a.candidates ? from + share : a.candidates;
  int count[2] = {0, 0}, largest[2] = {-1, -1};
  for (i64 base = from; base < to; base += WARP) {
    const int j = (int)base + lane;
    unsigned flags = 0;
    if (j < to) {
      const float key = key_of(a, products, j);
      const bool same = a.v_labels.at(j) == own;
      if (same || no_same) flags |= (key >= far - error ? 1 : 0) | (key == far ? 4 : 0);
      if (!same || no_other) flags |= (-key >= near - error ? 2 : 0) | (-key == near ? 8 : 0);
    }
    if (!__ballot_sync(ALL, flags != 0)) continue;
#pragma unroll
    for (int end = 0; end < 2; ++end) {
      const bool takes_part = flags & (1u << end);
      const unsigned who = __ballot_sync(ALL, takes_part);
      const int rank = count[end] + __popc(who & ((1u << lane) - 1));
      if (takes_part && rank < COMPARED) finds[end].index[warp][rank] = j;
      count[end] += __popc(who);
      const unsigned tops = __ballot_sync(ALL, flags & (4u << end));
      if (largest[end] < 0 && tops) largest[end] = (int)base + __ffs(tops) - 1;
    }
  }
  if (lane < 2) {
    finds[lane].count[warp] = count[lane];
    finds[lane].largest[warp] = largest[lane];
  }
  __syncthreads();
  if (threadIdx.x < 2 * (COMPARED + 1)) {
    const int end = threadIdx.x / (COMPARED + 1), k = threadIdx.x % (COMPARED + 1);
    compared[end][k] = k < COMPARED ? finds[end].at(k) : finds[end].late();
  }
  __syncthreads();
  const float* u = a.u + i * a.dim;
  for (int t = warp; t < 2 * (COMPARED + 1); t += WARPS) {
    const int end = t / (COMPARED + 1), k = t % (COMPARED + 1), j = compared[end][k];
    if (j < 0) continue;
    const double square = square_between(u, a.v + (i64)j * a.dim, a.dim);
    // Below the clamp all distances are equal, and equal to a value that gets no gradient.
    if (lane == 0) squares[end][k] = square < CLAMP ? 0 : square;
  }
  __syncthreads();
  if (warp >= 2) return;
  Best found = {0, 0, 0};
  bool any = false;
  for (int k = 0; k <= COMPARED; ++k) {  // in the order of their indices: of equal ones the first wins
    if (compared[warp][k] < 0) continue;
    const double square = squares[warp][k];
    if (any && !(warp == 0 ? square > found.square : square < found.square)) continue;
    found.index = compared[warp][k];
    found.square = square;
    any = true;
  }
  if (a.teacher) {
    const float* w = a.teacher + i * a.teacher_dim;
    const float* other = a.teacher + (i64)found.index * a.teacher_dim;
    found.taught = distance(square_between(w, other, a.teacher_dim));
  }
  if (lane == 0) best[warp] = found;
}

// An anchor's loss, and its derivative with respect to t.
__device__ double term(const Mine& a, double t, double reference, double& slope) {
  if (a.objective == 0) {
    const double hinge = t + a.margin;
    // The derivative at 0 is 1, as in torch's clamp_min. NaN propagates.
    slope = hinge < 0 ? 0 : hinge != hinge ? hinge : 1;
    return hinge < 0 ? 0 : hinge;
  }
  const double r = a.objective == 1 ? a.margin : reference;
  const double tail = exp(-fabs(t)), both = log1p(tail), small = tail / (1 + tail);
  slope = t < 0 ? small - r : (1 - r) - small;
  // ln sigma(t) and ln sigma(-t), neither of which cancels; NaN where t is.
  return -r * ((t < 0 ? t : 0) - both) - (1 - r) * ((t < 0 ? 0 : -t) - both);
}

// The loss of an anchor's pair, and what the gradient needs of it. By one thread.
__device__ double finish(const Mine& a, i64 i, const Best (&best)[2], bool no_same, bool no_other) {
  const double ends[2] = {distance(best[0].square), distance(best[1].square)};
  const double offsets[2] = {no_same ? -OFFSET : 0, no_other ? OFFSET : 0};
  // The teacher does not see the offset, as in tllib.
  const double reference = a.references ? 1 / (1 + exp(best[1].taught - best[0].taught)) : 0;
  double slope;
  const double t = (ends[0] + offsets[0]) - (ends[1] + offsets[1]);
  const double value = term(a, t, reference, slope);
  if (a.references) a.references[i] = (float)reference;
  slope /= (double)a.anchors;
  for (int end = 0; end < 2; ++end) {
    const i64 at = end * a.anchors + i;
    // A clamped distance or a slope of 0 gives no weight; NaN is neither, and propagates.
    const bool none = best[end].square < CLAMP || slope == 0;
    a.found[at] = best[end].index;
    a.offsets[at] = (float)offsets[end];
    a.weights[at] = none ? 0 : (end == 0 ? slope : -slope) / ends[end];
  }
  return value;
}

__device__ __forceinline__ void mine_all(const Mine& a) {
  __shared__ Best best[2];
  double found[1] = {0};
  for (i64 row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const i64 i = a.first + row, own = a.u_labels.at(i);
    const float* products = a.products + row * a.candidates;
    const float none = -infinity32();
    float extreme[EXTREMES];
    for (int n = 0; n < EXTREMES; ++n) extreme[n] = none;
    for (i64 j = threadIdx.x; j < a.candidates; j += BLOCK) {
      const float key = key_of(a, products, (int)j);
      const bool same = a.v_labels.at(j) == own;
      extreme[SAME_FAR] = larger(extreme[SAME_FAR], same ? key : none);
      extreme[SAME_NEAR] = larger(extreme[SAME_NEAR], same ? -key : none);
      extreme[OTHER_FAR] = larger(extreme[OTHER_FAR], same ? none : key);
      extreme[OTHER_NEAR] = larger(extreme[OTHER_NEAR], same ? none : -key);
      extreme[MAGNITUDE] = larger(extreme[MAGNITUDE], fabsf(key));
      extreme[SQUARE] = larger(extreme[SQUARE], a.v_squares[j]);
    }
    across_block<Largest, WARPS>(extreme);
    // The same in all threads. Where a distance is not finite, the pair and its gradient are NaN.
    const bool sound = finite(extreme[MAGNITUDE]);
    if (sound) {
      compare(a, i, products, extreme, best);
    } else if (threadIdx.x == 0) {
      const double nan = nan32();
      best[0] = {0, nan, nan};
      best[1] = {0, nan, nan};
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const bool no_same = sound && extreme[SAME_FAR] == -infinity32();
      const bool no_other = sound && extreme[OTHER_FAR] == -infinity32();
      found[0] += finish(a, i, best, no_same, no_other);
    }
    // `best` is written again only after the barriers of the next row's maxima.
  }
  if (gathered(a.gathering, found) && threadIdx.x == 0) {
    const double total = (a.first > 0 ? *a.total : 0) + found[0];
    *a.total = total;
    store(a.loss, (float)(total / (double)a.anchors));
  }
}
KERNEL(256, mine, Mine, mine_all(args))

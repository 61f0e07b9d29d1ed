// Class balance: the formulas are in src/kernels/self_ensemble.rs.
//
// class_balance_sums   sums of each column over a part of the rows; over all, and the loss, if there is one part
// class_balance_means  otherwise the sums of the parts, and the loss
// class_balance_grad   the backward pass: the gradient with respect to any row, times the incoming one

struct ClassBalance {  // mirrored by `Args` in src/cuda/self_ensemble.rs
  Matrix<E> p;
  i64 rows;
  int cols;
  int parts;
  double* partials;  // [parts][cols], if there are several
  float* slope;      // the gradient with respect to any row; or null
  Scalar loss;
  Gathering gathering;
};

// False for NaN, which passes.
__device__ __forceinline__ double at_least(double floor, double x) { return x < floor ? floor : x; }

// Takes the sum of a column over all rows; returns its term of the loss.
__device__ __forceinline__ double settle(const ClassBalance& a, int c, double sum) {
  const double u = 1.0 / a.cols, mean = sum / a.rows;
  // To raise, as on the CPU, would wait for the device.
  const double m = mean < 0 || mean > 1 ? (double)nan32() : mean;
  if (a.slope) {
    a.slope[c] = (m - u) / (at_least(9.999999960041972e-13, m * (1 - m)) * ((double)a.rows * a.cols));
  }
  return -(u * at_least(-100, log(m)) + (1 - u) * at_least(-100, log(1 - m))) / a.cols;
}

// Takes each warp's share of the sum of column c, in one block of those that have all columns.
__device__ __forceinline__ void settle_all(const ClassBalance& a, int c, double (&sum)[1]) {
  double loss[1] = {0};
  across_warps(sum);
  if (threadIdx.x < WARP && c < a.cols) loss[0] = settle(a, c, sum[0]);
  if (gathered(a.gathering, loss) && threadIdx.x == 0) store(a.loss, (float)loss[0]);
}

// Blocks have WARP columns, and one part after the other has all columns.
__device__ __forceinline__ void sums(const ClassBalance& a) {
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int tiles = gridDim.x / a.parts, part = blockIdx.x / tiles;
  const int c = blockIdx.x % tiles * WARP + threadIdx.x % WARP;
  double sum[1] = {0};
  if (c < a.cols) {
#pragma unroll 8
    for (i64 i = (i64)part * warps + warp; i < a.rows; i += (i64)a.parts * warps) sum[0] += a.p.at(i, c);
  }
  if (a.parts == 1) {
    settle_all(a, c, sum);
    return;
  }
  across_warps(sum);
  if (warp == 0 && c < a.cols) a.partials[(i64)part * a.cols + c] = sum[0];
}
KERNEL(1024, class_balance_sums, ClassBalance, sums(args))

__device__ __forceinline__ void means(const ClassBalance& a) {
  const int warps = blockDim.x / WARP, c = blockIdx.x * WARP + threadIdx.x % WARP;
  double sum[1] = {0};
  if (c < a.cols) {
#pragma unroll 4
    for (int part = threadIdx.x / WARP; part < a.parts; part += warps) {
      sum[0] += a.partials[(i64)part * a.cols + c];
    }
  }
  settle_all(a, c, sum);
}
KERNEL(1024, class_balance_means, ClassBalance, means(args))

struct Repeat {  // mirrored by `Repeat` in src/cuda/self_ensemble.rs
  const float* slope;
  i64 length;
  int cols;
  Numbers incoming;
  E* grad;
};

__device__ __forceinline__ void repeat(const Repeat& a) {
  const float incoming = a.incoming.at(0);
  const i64 step = (i64)gridDim.x * blockDim.x, first = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  // The column goes along, without a division for each element.
  const int further = step % a.cols;
  int c = first % a.cols;
  for (i64 i = first; i < a.length; i += step) {
    store(a.grad[i], a.slope[c] * incoming);
    c += c < a.cols - further ? further : further - a.cols;
  }
}
KERNEL(256, class_balance_grad, Repeat, repeat(args))

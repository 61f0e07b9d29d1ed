// Class balance: the formulas are in src/kernels/self_ensemble.rs.
//
// class_balance_sums   sums of each column over a part of the rows; if that is all of them, also the loss
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

// The comparison is false for NaN, which passes through.
__device__ __forceinline__ double at_least(double floor, double x) { return x < floor ? floor : x; }

// Takes the sum of a column over all rows; returns its term of the loss.
__device__ __forceinline__ double settle(const ClassBalance& a, int c, double sum) {
  const double u = 1.0 / a.cols, mean = sum / a.rows;
  // Raising an error, as on the CPU, would wait for the device.
  const double m = mean < 0 || mean > 1 ? (double)nan32() : mean;
  if (a.slope) {
    a.slope[c] = (m - u) / (at_least(9.999999960041972e-13, m * (1 - m)) * ((double)a.rows * a.cols));
  }
  return -(u * at_least(-100, log(m)) + (1 - u) * at_least(-100, log(1 - m))) / a.cols;
}

// The sum of number(i) over a part of the `count` numbers of column `c`, in the threads of the first warp.
template <typename F>
__device__ __forceinline__ double sum_of_part(const ClassBalance& a, int c, i64 count, int part, int parts, F number) {
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  double sum[1] = {0};
  if (c < a.cols) {
#pragma unroll 8
    for (i64 i = (i64)part * warps + warp; i < count; i += (i64)parts * warps) sum[0] += number(i);
  }
  across_warps(sum);
  return sum[0];
}

// Whether this thread writes the results of column `c`.
__device__ __forceinline__ bool writes(const ClassBalance& a, int c) { return threadIdx.x < WARP && c < a.cols; }

__device__ __forceinline__ void store_loss(const ClassBalance& a, double (&loss)[1]) {
  if (gathered(a.gathering, loss) && threadIdx.x == 0) store(a.loss, (float)loss[0]);
}

// The grid has the blocks of one part after the other, each part covering all columns.
__device__ __forceinline__ void sums(const ClassBalance& a) {
  const int blocks = gridDim.x / a.parts, part = blockIdx.x / blocks;
  double loss[1] = {0};
  tiles(a.cols, blockIdx.x % blocks, blocks, [&](int c) {
    const double sum = sum_of_part(a, c, a.rows, part, a.parts, [&](i64 i) { return a.p.at(i, c); });
    if (!writes(a, c)) return;
    if (a.parts == 1) loss[0] += settle(a, c, sum);
    else a.partials[(i64)part * a.cols + c] = sum;
  });
  if (a.parts == 1) store_loss(a, loss);
}
KERNEL(1024, class_balance_sums, ClassBalance, sums(args))

__device__ __forceinline__ void means(const ClassBalance& a) {
  double loss[1] = {0};
  tiles(a.cols, blockIdx.x, gridDim.x, [&](int c) {
    const double sum = sum_of_part(a, c, a.parts, 0, 1, [&](i64 part) { return a.partials[part * a.cols + c]; });
    if (writes(a, c)) loss[0] += settle(a, c, sum);
  });
  store_loss(a, loss);
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
  // The column is updated incrementally, without a division for each element.
  const int further = step % a.cols;
  int c = first % a.cols;
  for (i64 i = first; i < a.length; i += step) {
    store(a.grad[i], a.slope[c] * incoming);
    c += c < a.cols - further ? further : further - a.cols;
  }
}
KERNEL(256, class_balance_grad, Repeat, repeat(args))

// Worst-case estimation: the formulas are in src/kernels/dst.rs.

struct Heads {  // mirrored by `Heads` in src/cuda/dst.rs
  Matrix<E> adversarial, main;
  i64 rows;
  int cols;
  float weight;  // of the stored gradient
  E* grad;       // or null
  i64* labels;   // or null
};
struct Dst {  // mirrored by `Args` in src/cuda/dst.rs
  Heads labeled, unlabeled;
  double eta;
  float offset;
  Scalar loss;
  Gathering gathering;
};

// One of the two losses, as `Goal` in src/kernels/dst.rs.
struct Agree {
  __device__ static float loss(Split row, float gap, float) { return row.log_total() + gap; }
  __device__ static float slope(Split, float) { return 1; }
};
struct Disagree {
  // u > 1; false for NaN, which stays in the result.
  __device__ static bool clamped(Split row, float offset) { return row.probability() < offset; }
  __device__ static float loss(Split row, float, float offset) {
    const float p = row.probability();
    if (clamped(row, offset)) return 0;
    return p < 0.5f ? -log1pf(offset - p) : -logf(row.remainder() + offset);
  }
  __device__ static float slope(Split row, float offset) {
    if (clamped(row, offset)) return 0;
    return -row.probability() / (row.remainder() + offset);
  }
};

// The loss of row i, and its gradient.
template <int SIZE, int KEEP, typename Goal>
__device__ __forceinline__ float dst_row(const Heads& a, i64 i, float offset) {
  int label;
  {
    const Row<E, SIZE, KEEP> y(a.main, i, a.cols);
    const float largest = row_max<SIZE, KEEP>(y, a.cols);
    label = first_column<SIZE, KEEP>(y, a.cols, [&](float x) { return x == largest || x != x; });
  }
  if (a.labels && Group<SIZE>::lane() == 0) a.labels[i] = label;
  const Row<E, SIZE, KEEP> z(a.adversarial, i, a.cols);
  const float max = row_max<SIZE, KEEP>(z, a.cols), z_label = z.again(label);
  const Split row = split<SIZE, KEEP>(z, a.cols, max, label, z_label);
  if (a.grad) {
    const float weight = a.weight * Goal::slope(row, offset);
    split_gradient<SIZE, KEEP>(z, a.cols, max, label, row, weight, a.grad + i * a.cols);
  }
  return Goal::loss(row, max - z_label, offset);
}

template <int SIZE, int KEEP>
__device__ __forceinline__ void dst(const Dst& a) {
  double total[2] = {0, 0};
  const i64 rows = a.labeled.rows + a.unlabeled.rows;
  // A row is that of a whole group, whose threads take the same branch.
  for (i64 i = first_row<SIZE>(); i < rows; i += step_rows<SIZE>()) {
    if (i < a.labeled.rows) {
      total[0] += once<SIZE>(dst_row<SIZE, KEEP, Agree>(a.labeled, i, a.offset));
    } else {
      total[1] += once<SIZE>(dst_row<SIZE, KEEP, Disagree>(a.unlabeled, i - a.labeled.rows, a.offset));
    }
  }
  if (gathered(a.gathering, total) && threadIdx.x == 0) {
    // Over no rows a mean is 0/0, as in tllib.
    store(a.loss, (float)(a.eta * total[0] / a.labeled.rows + total[1] / a.unlabeled.rows));
  }
}
ROW_KERNEL(dst, Dst)

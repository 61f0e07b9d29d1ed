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

// The heads of the first rows, which are labeled, or of the rest.
__device__ __forceinline__ Heads heads_of(const Dst& a, bool labeled) {
  const Heads &x = a.labeled, &y = a.unlabeled;
  return {
      {labeled ? x.adversarial.data : y.adversarial.data, labeled ? x.adversarial.row : y.adversarial.row,
       labeled ? x.adversarial.col : y.adversarial.col},
      {labeled ? x.main.data : y.main.data, labeled ? x.main.row : y.main.row, labeled ? x.main.col : y.main.col},
      labeled ? x.rows : y.rows,
      labeled ? x.cols : y.cols,
      labeled ? x.weight : y.weight,
      labeled ? x.grad : y.grad,
      labeled ? x.labels : y.labels,
  };
}

template <int SIZE, int KEEP>
__device__ __forceinline__ int predicted(const Matrix<E>& main, i64 i, int cols) {
  Row<E, SIZE, KEEP> y(main, i, cols);
  return first_max<SIZE, KEEP>(y, cols);
}

template <int SIZE, int KEEP>
__device__ __forceinline__ void dst(const Dst& a) {
  double total[2] = {0, 0};
  const i64 rows = a.labeled.rows + a.unlabeled.rows;
  // All threads of a group have the same row, and take the same branch.
  for (i64 at = first_row<SIZE>(); at < rows; at += step_rows<SIZE>()) {
    const bool labeled = at < a.labeled.rows;
    const Heads heads = heads_of(a, labeled);
    const i64 i = labeled ? at : at - a.labeled.rows;
    const int label = predicted<SIZE, KEEP>(heads.main, i, heads.cols);
    if (heads.labels && Group<SIZE>::lane() == 0) heads.labels[i] = label;
    Row<E, SIZE, KEEP> z(heads.adversarial, i, heads.cols);
    const float z_label = z.again(label);
    float max;
    const Split row = split<SIZE, KEEP>(z, heads.cols, label, z_label, max);
    if (heads.grad) {
      const float slope = labeled ? Agree::slope(row, a.offset) : Disagree::slope(row, a.offset);
      E* grad = heads.grad + i * heads.cols;
      split_gradient<SIZE, KEEP>(z, heads.cols, max, label, row, heads.weight * slope, grad);
    }
    const float gap = max - z_label;
    if (labeled) total[0] += once<SIZE>(Agree::loss(row, gap, a.offset));
    else total[1] += once<SIZE>(Disagree::loss(row, gap, a.offset));
  }
  if (gathered(a.gathering, total) && threadIdx.x == 0) {
    // Over no rows a mean is 0/0, as in tllib.
    store(a.loss, (float)(a.eta * total[0] / a.labeled.rows + total[1] / a.unlabeled.rows));
  }
}
ROW_KERNEL(dst, Dst)

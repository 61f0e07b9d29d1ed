// Cross entropy with confident pseudo labels: the formulas are in src/kernels/pseudo_label.rs.

struct PseudoLabel {  // mirrored by `Args` in src/cuda/pseudo_label.rs
  Matrix<E> logits, targets;
  i64 rows;
  int cols;
  float threshold;  // rounded to E
  float weight;     // of the stored gradient
  E* grad;          // or null
  float* mask;
  i64* labels;
  Scalar loss;
  Gathering gathering;
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void pseudo_label(const PseudoLabel& a) {
  double total[1] = {0};
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    const Row<E, SIZE, KEEP> z(a.logits, i, a.cols), t(a.targets, i, a.cols);
    const float z_max = row_max<SIZE, KEEP>(z, a.cols), t_max = row_max<SIZE, KEEP>(t, a.cols);
    const float t_total = row_sum_exp<SIZE, KEEP>(t, a.cols, t_max, 1);
    const float confidence = rounded<E>(1 / t_total);
    // Logits that round to one probability lie within two spacings of E there: of bf16, which has the
    // coarsest, or of f16 below its normal numbers. It spares the exponentials of the others.
    const float near = 0x1p-6f + 0x1p-23f * t_total;
    // Where the total is NaN all probabilities are, and the first wins.
    const int label = first_column<SIZE, KEEP>(t, a.cols, [&](float x) {
      return t_total == t_total && t_max - x <= near &&
             (x == t_max || rounded<E>(expf(x - t_max) / t_total) == confidence);
    });
    const bool selected = confidence > a.threshold;
    if (Group<SIZE>::lane() == 0) {
      a.labels[i] = label;
      a.mask[i] = selected;
    }
    const float z_label = z.again(label);
    E* grad = a.grad ? a.grad + i * a.cols : nullptr;
    if (selected) {
      const Split row = split<SIZE, KEEP>(z, a.cols, z_max, label, z_label);
      total[0] += once<SIZE>(row.log_total() + (z_max - z_label));
      if (grad) split_gradient<SIZE, KEEP>(z, a.cols, z_max, label, row, a.weight, grad);
    } else {
      // 0 times the cross entropy: 0, or NaN where that is not finite.
      const float nothing = finite(z_max) ? 0 : nan32();
      total[0] += once<SIZE>(nothing + 0 * z_label);
      if (grad) columns<SIZE, KEEP>(a.cols, [&](int, int c) { store(grad[c], nothing); });
    }
  }
  if (gathered(a.gathering, total) && threadIdx.x == 0) store(a.loss, (float)(total[0] / a.rows));
}
ROW_KERNEL(pseudo_label, PseudoLabel)

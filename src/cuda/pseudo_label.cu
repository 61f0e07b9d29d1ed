// Cross entropy with confident pseudo labels: the formulas are in src/kernels/pseudo_label.rs.

struct PseudoLabel {  // mirrored by `Args` in src/cuda/pseudo_label.rs
  Matrix<E> logits, targets;
  i64 rows;
  int cols;
  float threshold;  // rounded to E
  float weight;     // of the stored gradient
  E* grad;          // or null
  unsigned char* chosen;  // for each row, or null
  float* mask;
  i64* labels;
  Scalar loss;
  Gathering gathering;
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void pseudo_label(const PseudoLabel& a) {
  double total[1] = {0};
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    Row<E, SIZE, KEEP> z(a.logits, i, a.cols), t(a.targets, i, a.cols);
    const Normalizer of_t = normalizer<SIZE, KEEP>(t, a.cols);
    const float confidence = rounded<E>(1 / of_t.sum);
    // Only exponentials within two spacings of 1 can round to the same probability: the spacings of bf16, which are
    // the coarsest, or of subnormal f16. The others need no division.
    const float near = 1 - (0x1p-6f + 0x1p-23f * of_t.sum);
    // Where the total is NaN all probabilities are, and the first wins.
    const auto as_confident = [&](int k) {
      const float x = t.held_exponential(k, of_t.max);
      return x >= near && (x == 1 || rounded<E>(x / of_t.sum) == confidence);
    };
    const int label = first_column<SIZE, KEEP>(a.cols, as_confident, t);
    const bool selected = confidence > a.threshold;
    if (Group<SIZE>::lane() == 0) {
      a.labels[i] = label;
      a.mask[i] = selected;
    }
    const float z_label = z.again(label);
    E* grad = a.grad ? a.grad + i * a.cols : nullptr;
    if (a.chosen && Group<SIZE>::lane() == 0) a.chosen[i] = selected;
    float z_max;
    if (selected) {
      const Split row = split<SIZE, KEEP>(z, a.cols, label, z_label, z_max);
      total[0] += once<SIZE>(row.log_total() + (z_max - z_label));
      if (grad) split_gradient<SIZE, KEEP>(z, a.cols, z_max, label, row, a.weight, grad);
    } else {
      z_max = row_max<SIZE, KEEP>(z, a.cols);
      // 0 times the cross entropy: 0, or NaN where that is not finite.
      const float nothing = finite(z_max) ? 0 : nan32();
      total[0] += once<SIZE>(nothing + 0 * z_label);
      if (grad) columns<SIZE, KEEP>(a.cols, [&](int, int c) { store(grad[c], nothing); });
    }
  }
  if (gathered(a.gathering, total) && threadIdx.x == 0) store(a.loss, (float)(total[0] / a.rows));
}
ROW_KERNEL(pseudo_label, PseudoLabel)

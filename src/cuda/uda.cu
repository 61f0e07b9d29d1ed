// Strong-weak consistency: the formulas are in src/kernels/uda.rs.

struct Uda {  // mirrored by `Args` in src/cuda/uda.rs
  Matrix<E> strong, weak;
  i64 rows;
  int cols;
  float threshold;  // rounded to E
  float inverse_t;
  float factor;     // of the stored gradient
  E* grad;          // or null
  Scalar loss;
  float* selected;  // max(number of selected rows, 1)
  Gathering gathering;
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void uda(const Uda& a) {
  double found[2] = {0, 0};  // divergences and selected rows
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    const Row<E, SIZE, KEEP> z(a.strong, i, a.cols), y(a.weak, i, a.cols);
    const float z_max = row_max<SIZE, KEEP>(z, a.cols), y_max = row_max<SIZE, KEEP>(y, a.cols);
    const float z_total = row_sum_exp<SIZE, KEEP>(z, a.cols, z_max, a.inverse_t);
    const float y_total = row_sum_exp<SIZE, KEEP>(y, a.cols, y_max, 1);
    const bool chosen = rounded<E>(1 / y_total) > a.threshold;
    float terms = 0;
    if (chosen) {
      columns<SIZE, KEEP>(a.cols, [&](int k, int c) {
        const float ln_q = y.at(k, c) - y_max, q = expf(ln_q);
        // q ln q is 0 at q = 0; q ln p is not replaced, and NaN where p = 0 too, as in tllib.
        terms += q * ((q == 0 ? 0 : ln_q) - (z.at(k, c) - z_max) * a.inverse_t);
      });
    } else if (finite(y_max)) {
      // 0 times the divergence: 0, or NaN where it is not finite.
      columns<SIZE, KEEP>(a.cols, [&](int k, int c) { terms += z.at(k, c) * 0; });
    } else {
      terms = nan32();
    }
    terms = Group<SIZE>::sum(terms);
    found[0] += once<SIZE>(chosen ? terms / y_total - logf(y_total) + logf(z_total) : terms);
    found[1] += once<SIZE>(chosen ? 1 : 0);
    if (!a.grad) continue;
    E* grad = a.grad + i * a.cols;
    const float of_p = a.factor / z_total, of_q = a.factor / y_total;
    const float unchosen = finite(y_max) && finite(z_max) ? 0 : nan32();
    columns<SIZE, KEEP>(a.cols, [&](int k, int c) {
      const float p = expf((z.at(k, c) - z_max) * a.inverse_t), q = expf(y.at(k, c) - y_max);
      store(grad[c], chosen ? p * of_p - q * of_q : unchosen);
    });
  }
  if (gathered(a.gathering, found) && threadIdx.x == 0) {
    const double selected = found[1] > 1 ? found[1] : 1;
    store(a.loss, (float)(found[0] / selected));
    *a.selected = (float)selected;
  }
}
ROW_KERNEL(uda, Uda)

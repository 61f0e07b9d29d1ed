// Strong-weak consistency: the formulas are in src/kernels/uda.rs.

struct Uda {  // mirrored by `Args` in src/cuda/uda.rs
  Matrix<E> strong, weak;
  i64 rows;
  int cols;
  float threshold;  // rounded to E
  float inverse_t;
  float factor;     // of the stored gradient
  E* grad;          // or null
  unsigned char* chosen;  // for each row, or null
  Scalar loss;
  float* selected;  // max(number of selected rows, 1)
  Gathering gathering;
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void uda(const Uda& a) {
  double found[2] = {0, 0};  // divergences and selected rows
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    Row<E, SIZE, KEEP> z(a.strong, i, a.cols), y(a.weak, i, a.cols);
    float maxima[2] = {own_max<SIZE, KEEP>(z, a.cols), own_max<SIZE, KEEP>(y, a.cols)};
    Group<SIZE>::template reduce<Largest>(maxima);
    const float z_max = maxima[0], y_max = maxima[1];
    float sums[4] = {0, 0, 0, 0};
    const auto sum = [&](int k, int, bool there) {
      const float logit = z.at(k), ln_p = (logit - z_max) * a.inverse_t, ln_q = y.at(k) - y_max;
      const float q = y.exponential(k, y_max);
      sums[0] += z.exponential(k, z_max, a.inverse_t);
      sums[1] += q;
      // q ln q is defined as 0 at q = 0; q ln p is not, and NaN where p = 0 too, as in tllib.
      sums[2] += there ? q * ((q == 0 ? 0 : ln_q) - ln_p) : 0;
      sums[3] += there ? logit * 0 : 0;  // 0, or NaN where one is not finite
    };
    places<SIZE, KEEP>(a.cols, sum, z, y);
    Group<SIZE>::template reduce<Add>(sums);
    const float z_total = sums[0], y_total = sums[1];
    const bool chosen = rounded<E>(1 / y_total) > a.threshold;
    // Otherwise 0 times the divergence: 0, or NaN where it is not finite.
    const float nothing = finite(y_max) ? sums[3] : nan32();
    found[0] += once<SIZE>(chosen ? sums[2] / y_total - logf(y_total) + logf(z_total) : nothing);
    found[1] += once<SIZE>(chosen ? 1 : 0);
    if (!a.grad) continue;
    if (a.chosen && Group<SIZE>::lane() == 0) a.chosen[i] = chosen;
    E* grad = a.grad + i * a.cols;
    if (chosen) {
      const float of_p = a.factor / z_total, of_q = a.factor / y_total;
      const auto difference = [&](int k, int c) {
        const float p = z.held_exponential(k, z_max, a.inverse_t), q = y.held_exponential(k, y_max);
        store(grad[c], scaled(p, of_p) - scaled(q, of_q));
      };
      columns<SIZE, KEEP>(a.cols, difference, z, y);
    } else {
      const float unchosen = finite(y_max) && finite(z_max) ? 0 : nan32();
      columns<SIZE, KEEP>(a.cols, [&](int, int c) { store(grad[c], unchosen); });
    }
  }
  if (gathered(a.gathering, found) && threadIdx.x == 0) {
    const double selected = found[1] > 1 ? found[1] : 1;
    store(a.loss, (float)(found[0] / selected));
    *a.selected = (float)selected;
  }
}
ROW_KERNEL(uda, Uda)

// Cross entropy with soft targets: the formulas are in src/kernels/reid_loss/cross_entropy.rs.

struct Rows {  // mirrored by `Rows` in src/cuda/cross_entropy.rs
  Matrix<E> logits;
  i64 count;
  int cols;
  float weight;  // of the stored gradient
  E* grad;       // or null
  Scalar loss;
  Gathering gathering;
};

// The loss is the mean over rows of what each row has added, once, to `total`.
__device__ __forceinline__ void finish(const Rows& rows, double (&total)[1]) {
  if (gathered(rows.gathering, total) && threadIdx.x == 0) {
    store(rows.loss, (float)(total[0] / rows.count));  // over no rows 0/0, as in tllib
  }
}

struct Soft {  // mirrored by `Soft` in src/cuda/cross_entropy.rs
  Rows rows;
  Matrix<E> targets;
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void soft(const Soft& a) {
  const int cols = a.rows.cols;
  const float weight = a.rows.weight;
  double total[1] = {0};
  for (i64 i = first_row<SIZE>(); i < a.rows.count; i += step_rows<SIZE>()) {
    Row<E, SIZE, KEEP> z(a.rows.logits, i, cols), y(a.targets, i, cols);
    float maxima[2] = {own_max<SIZE, KEEP>(z, cols), own_max<SIZE, KEEP>(y, cols)};
    Group<SIZE>::template reduce<Largest>(maxima);
    const float z_max = maxima[0], y_max = maxima[1];
    float sums[3] = {0, 0, 0};
    const auto sum = [&](int k, int, bool there) {
      const float shifted = z.at(k) - z_max, q = y.exponential(k, y_max);
      sums[0] += z.exponential(k, z_max);
      sums[1] += q;
      sums[2] += there ? q * shifted : 0;
    };
    places<SIZE, KEEP>(cols, sum, z, y);
    Group<SIZE>::template reduce<Add>(sums);
    const float z_total = sums[0], y_total = sums[1];
    total[0] += once<SIZE>(logf(z_total) - sums[2] / y_total);
    if (!a.rows.grad) continue;
    E* grad = a.rows.grad + i * cols;
    const float of_p = weight / z_total, of_q = weight / y_total;
    const auto difference = [&](int k, int c) {
      store(grad[c], scaled(z.held_exponential(k, z_max), of_p) - scaled(y.held_exponential(k, y_max), of_q));
    };
    columns<SIZE, KEEP>(cols, difference, z, y);
  }
  finish(a.rows, total);
}
ROW_KERNEL(soft, Soft)

struct Smooth {  // mirrored by `Smooth` in src/cuda/cross_entropy.rs
  Rows rows;
  Labels labels;
  float hit, rest, mass;
};

// `split`, and the sum of z_c - max over the other classes: in one sweep where the row is held, which then holds
// exponentials.
template <int SIZE, int KEEP, typename R>
__device__ __forceinline__ Split shifted_split(R& z, int cols, int label, float at_label, float& max, float& shifted) {
  if constexpr (KEEP > 0) {
    max = row_max<SIZE, KEEP>(z, cols);
    float sums[2] = {0, 0};
    places<SIZE, KEEP>(cols, [&](int k, int c, bool there) {
      sums[0] += there && c != label ? z.at(k) - max : 0;
      const float x = z.exponential(k, max);
      if (c != label) sums[1] += x;
    });
    Group<SIZE>::template reduce<Add>(sums);
    shifted = sums[0];
    return {expf(at_label - max), sums[1]};
  } else {
    const Split row = split<SIZE, KEEP>(z, cols, label, at_label, max);
    float sum = 0;
    places<SIZE, KEEP>(cols, [&](int k, int c, bool there) { sum += there && c != label ? z.at(k) - max : 0; }, z);
    shifted = Group<SIZE>::sum(sum);
    return row;
  }
}

template <int SIZE, int KEEP>
__device__ __forceinline__ void smooth(const Smooth& a) {
  const int cols = a.rows.cols;
  const float weight = a.rows.weight;
  double total[1] = {0};
  for (i64 i = first_row<SIZE>(); i < a.rows.count; i += step_rows<SIZE>()) {
    Row<E, SIZE, KEEP> z(a.rows.logits, i, cols);
    const i64 given = a.labels.at(i);
    // An invalid label cannot be reported without synchronizing. It makes the loss and the gradient of its
    // row NaN; in torch's operations it would make the context unusable.
    const bool known = given >= 0 && given < cols;
    const int label = known ? (int)given : 0;
    const float z_label = known ? z.again(label) : nan32();
    float max, shifted;
    const Split row = shifted_split<SIZE, KEEP>(z, cols, label, z_label, max, shifted);
    // Where a target is 0, 0 times an infinite logarithm is NaN, as in tllib.
    total[0] += once<SIZE>(a.mass * row.log_total() - (a.hit + a.rest) * (z_label - max) - a.rest * shifted);
    if (!a.rows.grad) continue;
    E* grad = a.rows.grad + i * cols;
    const float of_p = weight * a.mass / row.total(), constant = weight * a.rest;
    const float p = row.probability();
    // S (p - 1) + (S - t): 1 - p keeps its digits where p is near 1.
    const float at_label = p < 0.5f ? a.mass * p - a.hit - a.rest
                                    : (cols - 1) * a.rest - a.mass * row.remainder();
    const auto gradient = [&](int k, int c) {
      store(grad[c], c == label ? weight * at_label : z.held_exponential(k, max) * of_p - constant);
    };
    columns<SIZE, KEEP>(cols, gradient, z);
  }
  finish(a.rows, total);
}
ROW_KERNEL(smooth, Smooth)

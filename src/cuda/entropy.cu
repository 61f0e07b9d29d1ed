// Row entropy of probabilities: the formulas are in src/kernels/entropy.rs.

struct Entropy {  // mirrored by `Args` in src/cuda/entropy.rs
  Matrix<E> p;
  i64 rows;
  int cols;
  float epsilon;
  float weight;  // of the stored gradient
  E* grad;       // or null
  Scalar out;    // one, or one for each row
  int mean;
  Gathering gathering;  // where mean
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void entropy(const Entropy& a) {
  double total[1] = {0};
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    Row<E, SIZE, KEEP> p(a.p, i, a.cols, 0);
    E* grad = a.grad ? a.grad + i * a.cols : nullptr;
    float sum = 0;
    const auto term = [&](int k, int c, bool there) {
      const float x = p.at(k), shifted = x + a.epsilon, log = logf(shifted);
      sum -= x * log;
      // A division, with its branch for exponents at both ends, would not overlap with those of other columns.
      const float slope = -(log + x * reciprocal(shifted)) * a.weight;
      if (grad && there) store(grad[c], slope);
    };
    places<SIZE, KEEP>(a.cols, term, p);
    sum = Group<SIZE>::sum(sum);
    if (!a.mean && Group<SIZE>::lane() == 0) store(a.out, sum, i);
    total[0] += once<SIZE>(sum);
  }
  if (a.mean && gathered(a.gathering, total) && threadIdx.x == 0) {
    store(a.out, (float)(total[0] / a.rows));
  }
}
ROW_KERNEL(entropy, Entropy)

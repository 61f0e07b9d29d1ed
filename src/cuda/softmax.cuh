// One row of logits: its first maximum, and its softmax split into one class and the rest. As src/kernels/softmax.rs.
//
// Compiled between common.cuh and each <method>.cu.

// The smaller of two columns, where NONE is no column.
const int NONE = 0x7fffffff;
struct First {
  __device__ static int of(int a, int b) { return a < b ? a : b; }
  template <typename T> __device__ static T identity() { return NONE; }
};

// The first column of `read` that `found(k)` accepts, 0 where there is none.
template <int SIZE, int KEEP, typename F, typename R>
__device__ __forceinline__ int first_column(int cols, F found, R& read) {
  int first = NONE;
  columns<SIZE, KEEP>(
      cols,
      [&](int k, int c) {
        if (first == NONE && found(k)) first = c;
      },
      read);
  first = Group<SIZE>::template reduce<First>(first);
  return first == NONE ? 0 : first;
}

// The first column that has the maximum, or NaN, if there is one.
template <int SIZE, int KEEP, typename R>
__device__ __forceinline__ int first_max(R& z, int cols) {
  float best = -infinity32();
  int first = NONE;
  // A place beyond the last column holds -inf, and has a higher index than all columns.
  places<SIZE, KEEP>(
      cols,
      [&](int k, int c, bool) {
        const float x = z.at(k);
        if (first == NONE || x > best || (x != x && best == best)) {
          best = x;
          first = c;
        }
      },
      z);
  const float max = Group<SIZE>::max(best);
  return Group<SIZE>::template reduce<First>(best == max || best != best ? first : NONE);
}

// x factor, rounded, so that the difference of two that are equal is 0: otherwise the compiler fuses one product into
// the subtraction, unrounded.
__device__ __forceinline__ float scaled(float x, float factor) { return __fmul_rn(x, factor); }

// sum_c e^{z_c - max} in two parts: of one class and of all others, so that 1 - p, p - 1 and ln p keep
// their digits where p is near 1.
struct Split {
  float own, others;

  __device__ __forceinline__ float total() const { return own + others; }
  // Where own is 1 the class has the maximum, and the others may be next to nothing.
  __device__ __forceinline__ float log_total() const { return own == 1 ? log1pf(others) : logf(total()); }
  __device__ __forceinline__ float probability() const { return own / total(); }
  __device__ __forceinline__ float remainder() const { return others / total(); }
};

// Splits the row z at the class `label`, whose logit is `at_label`; also gives the row's maximum.
template <int SIZE, int KEEP, typename R>
__device__ __forceinline__ Split split(R& z, int cols, int label, float at_label, float& max) {
  const Normalizer others = normalizer<SIZE, KEEP>(z, cols, 1, label);
  max = others.max;
  return {expf(at_label - max), others.sum};
}

// Writes weight (p - onehot) of a row that was split.
template <int SIZE, int KEEP, typename R, typename T>
__device__ __forceinline__ void split_gradient(R& z, int cols, float max, int label, Split row, float weight,
                                               T* grad) {
  const float factor = weight / row.total(), own = -row.others * factor;
  columns<SIZE, KEEP>(
      cols, [&](int k, int c) { store(grad[c], c == label ? own : z.held_exponential(k, max) * factor); }, z);
}

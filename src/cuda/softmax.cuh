// One row of logits: its first maximum, and its softmax seen from one class. As src/kernels/softmax.rs.
//
// Compiled between common.cuh and each <method>.cu.

// The smaller of two columns, where NONE is no column.
const int NONE = 0x7fffffff;
struct First {
  __device__ static int of(int a, int b) { return a < b ? a : b; }
  template <typename T> __device__ static T identity() { return NONE; }
};

// The first column whose value `found` accepts, 0 where there is none.
template <int SIZE, int KEEP, typename R, typename F>
__device__ __forceinline__ int first_column(const R& z, int cols, F found) {
  int first = NONE;
  columns<SIZE, KEEP>(cols, [&](int k, int c) {
    if (first == NONE && found(z.at(k, c))) first = c;
  });
  first = Group<SIZE>::template reduce<First>(first);
  return first == NONE ? 0 : first;
}

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

// The row z seen from the class `label`, whose logit is `at_label`; `max` is the row's maximum.
template <int SIZE, int KEEP, typename R>
__device__ __forceinline__ Split split(const R& z, int cols, float max, int label, float at_label) {
  float others = 0;
  columns<SIZE, KEEP>(cols, [&](int k, int c) {
    if (c != label) others += expf(z.at(k, c) - max);
  });
  return {expf(at_label - max), Group<SIZE>::sum(others)};
}

// Writes weight (p - onehot) of a row that was split.
template <int SIZE, int KEEP, typename R, typename T>
__device__ __forceinline__ void split_gradient(const R& z, int cols, float max, int label, Split row,
                                               float weight, T* grad) {
  const float factor = weight / row.total(), own = -row.others * factor;
  columns<SIZE, KEEP>(cols, [&](int k, int c) {
    store(grad[c], c == label ? own : expf(z.at(k, c) - max) * factor);
  });
}

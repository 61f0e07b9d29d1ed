// Self-tuning: the formulas are in src/kernels/self_tuning.rs.
//
//   forward    products with the queue, in its order, to log-probabilities in the order of the output
//   backward   the gradient of the products, in the order of the queue, and what the own key adds
//   enqueue    the keys of a batch, at the pointers of their classes
//
// libtorch computes the products with the queue. A label that is not a class aborts the kernel, as in libtorch's
// own kernels.

__device__ __forceinline__ i64 class_of(const Labels& labels, i64 i, i64 classes) {
  const i64 label = labels.at(i);
  if (label < 0 || label >= classes) __trap();
  return label;
}

// ---- log-probabilities -------------------------------------------------------------------------

struct Forward {  // mirrored by `Forward` in src/cuda/self_tuning.rs
  Matrix<E> queries, keys;
  i64 rows;
  int dim;
  Matrix<f32> products;
  int cols, of_class;  // columns of the queue, and of each class
  Labels labels;
  float inverse_t;
  float* out;          // [rows][1 + cols]
  E* kept_keys;        // [rows][dim], and
  i64* kept_labels;    // [rows]: copies for backward, or null
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void forward(const Forward& a) {
  const int lane = Group<SIZE>::lane();
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    const i64 label = class_of(a.labels, i, a.cols / a.of_class);
    Row<E, SIZE, 0> query(a.queries, i, a.dim, 0), key(a.keys, i, a.dim, 0);
    double dot = 0;
    const auto product = [&](int k, int c, bool there) {
      dot += (double)query.at(k) * key.at(k);
      if (a.kept_keys && there) store(a.kept_keys[i * a.dim + c], key.at(k));
    };
    places<SIZE, 0>(a.dim, product, query, key);
    if (a.kept_labels && lane == 0) a.kept_labels[i] = label;
    const float own = (float)Group<SIZE>::sum(dot);
    Row<f32, SIZE, KEEP> s(a.products, i, a.cols);
    const float max = larger(row_max<SIZE, KEEP>(s, a.cols), own);
    float others = 0;
    places<SIZE, KEEP>(a.cols, [&](int k, int, bool) { others += expf((s.at(k) - max) * a.inverse_t); }, s);
    others = Group<SIZE>::sum(others);
    const float log_total = logf(others + expf((own - max) * a.inverse_t));
    float* out = a.out + i * (a.cols + 1ll);
    if (lane == 0) out[0] = (own - max) * a.inverse_t - log_total;
    const int keys = a.of_class, before = (int)label * keys;
    const auto put = [&](int k, int n) {
      const int place = n < before ? n + keys : n < before + keys ? n - before : n;
      out[1 + (i64)place] = (s.at(k) - max) * a.inverse_t - log_total;
    };
    columns<SIZE, KEEP>(a.cols, put, s);
  }
}
FEW_ROWS_KERNEL(forward, Forward)

// ---- their gradient ----------------------------------------------------------------------------

struct Backward {  // mirrored by `Backward` in src/cuda/self_tuning.rs
  Matrix<f32> incoming;
  const f32* out;  // [rows][cols], of forward
  i64 rows;
  int cols, of_class;  // cols: one more than the queue has
  Labels labels;
  float inverse_t;
  Matrix<E> keys;
  int dim;
  float* products;  // [rows][cols - 1], the gradient of the products
  float* grad;      // [rows][dim], the part of the own key
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void backward(const Backward& a) {
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    const i64 label = class_of(a.labels, i, (a.cols - 1) / a.of_class);
    // Both before the first store, which may be to their memory as far as the compiler knows.
    Row<f32, SIZE, KEEP> g(a.incoming, i, a.cols, 0), out({a.out, a.cols, 1}, i, a.cols);
    const float of_key = a.incoming.at(i, 0), out_of_key = out.again(0);
    double sum = 0;
    places<SIZE, KEEP>(a.cols, [&](int k, int, bool) { sum += g.at(k); }, g);
    const float total = (float)Group<SIZE>::sum(sum);
    float* products = a.products + i * (a.cols - 1ll);
    const int keys = a.of_class, before = (int)label * keys;
    const auto put = [&](int k, int j) {
      if (j == 0) return;
      // In the order of the output: the own class, the classes before it, the rest.
      const int n = j - 1, place = n < keys ? n + before : n < before + keys ? n - keys : n;
      products[place] = (g.at(k) - expf(out.at(k)) * total) * a.inverse_t;
    };
    columns<SIZE, KEEP>(a.cols, put, g, out);
    const float own = (of_key - expf(out_of_key) * total) * a.inverse_t;
    Row<E, SIZE, 0> key(a.keys, i, a.dim, 0);
    columns<SIZE, 0>(a.dim, [&](int k, int c) { a.grad[i * a.dim + c] = own * key.at(k); }, key);
  }
}
FEW_ROWS_KERNEL(backward, Backward)

// ---- the queue ---------------------------------------------------------------------------------

struct Enqueue {  // mirrored by `Enqueue` in src/cuda/self_tuning.rs
  Matrix<E> keys;
  Labels labels;
  i64 rows, of_class, classes;
  int dim;
  float* queue;  // (dim, classes of_class)
  i64 row, col;  // its strides
  i64* pointers; // [classes]
  i64 stride;
  i64* moved;    // [rows]: where the pointer of the row's class goes, or -1
  unsigned* done;
};

__device__ __forceinline__ void enqueue_all(const Enqueue& a) {
  for (i64 i = blockIdx.x; i < a.rows; i += gridDim.x) {
    const i64 label = class_of(a.labels, i, a.classes);
    // How many of the class come before, and how many after.
    i64 before = 0, after = 0;
    for (i64 j = threadIdx.x; j < a.rows; j += blockDim.x) {
      const bool same = a.labels.at(j) == label;
      before += same && j < i;
      after += same && j > i;
    }
    before = across_block<Add>(before);
    after = across_block<Add>(after);
    // A pointer that an outside write left out of range wraps around, as with torch's remainder.
    const i64 wrapped = (a.pointers[label * a.stride] + before) % a.of_class;
    const i64 at = wrapped < 0 ? wrapped + a.of_class : wrapped;
    if (threadIdx.x == 0) a.moved[i] = after == 0 ? (at + 1) % a.of_class : -1;
    // Otherwise a later key of the batch replaces it: no two rows write one column.
    if (after < a.of_class) {
      float* column = a.queue + (label * a.of_class + at) * a.col;
      for (int c = threadIdx.x; c < a.dim; c += blockDim.x) column[c * a.row] = a.keys.at(i, c);
    }
  }
  // The last block knows that no other reads the pointers any more.
  if (!last_block(a.done)) return;
  for (i64 i = threadIdx.x; i < a.rows; i += blockDim.x) {
    const i64 moved = ((volatile i64*)a.moved)[i];
    if (moved >= 0) a.pointers[a.labels.at(i) * a.stride] = moved;
  }
}
KERNEL(256, enqueue, Enqueue, enqueue_all(args))

// Minimum class confusion: the formulas are in src/kernels/mcc.rs.
//
// mcc_rows     what the gradient needs to know of each row; the sums of each column over a block's rows
// mcc_columns  the sums over all rows: from the blocks' sums or, where rows are long, the logits; the loss
// mcc_grad     the gradient, by rows
// mcc_small    all of it in one block

// What the gradient needs to know of a column: 1 - e_c / s_c, and 1 / s_c or 0 where no row has the class.
struct alignas(8) Coefficients { float ratio, inverse; };

struct Mcc {  // mirrored by `Args` in src/cuda/mcc.rs
  Matrix<E> logits;
  i64 rows;
  int cols;
  int parts;            // blocks of mcc_rows, 0 where rows are long
  float inverse_t;
  float epsilon;
  float factor;         // of the stored gradient
  float* of_rows;       // [4][rows]: maximum, 1 / sum of the exponentials, weight, 1 - largest probability; or null
  float* partials;      // [parts][2][cols]: s_c and e_c over the rows of a block
  Coefficients* coefficients;  // [cols]
  E* grad;              // or null
  Scalar loss;
  Gathering gathering;
};

// A sum whose error does not grow with the number of terms.
struct Compensated {
  float sum = 0, lost = 0;
  __device__ __forceinline__ void add(float x) {
    const float y = x - lost, next = sum + y;
    lost = (next - sum) - y;
    sum = next;
  }
  __device__ __forceinline__ double value() const { return (double)sum - lost; }
};

struct Softmax {
  float max, reciprocal, inverse_t;
  float others;  // 1 - largest probability, from the sum of all others
  __device__ __forceinline__ float of(float z) const { return expf((z - max) * inverse_t) * reciprocal; }
  // 1 - p, which keeps its digits where p is near 1.
  __device__ __forceinline__ float not_(float p) const { return p == reciprocal ? others : 1 - p; }
};

__device__ __forceinline__ Softmax softmax_of(const Mcc& a, i64 i) {
  return {a.of_rows[i], a.of_rows[a.rows + i], a.inverse_t, a.of_rows[3 * a.rows + i]};
}

// Sweeps the group's rows. With KEEP > 0 calls each(c, s_c, e_c) with the sums over the rows of the block, in
// one thread for each column; the group is then the whole block, or one of at most WARPS warps.
template <int SIZE, int KEEP, int WARPS, typename F>
__device__ __forceinline__ void sweep(const Mcc& a, F each) {
  Compensated s[KEEP > 0 ? KEEP : 1], e[KEEP > 0 ? KEEP : 1];
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    Row<E, SIZE, KEEP> z(a.logits, i, a.cols);
    const float max = row_max<SIZE, KEEP>(z, a.cols);
    // Summed separately: in a confident row, the rest is far below the precision of 1.
    float sums[2] = {0, 0};
    const auto sum = [&](int k, int, bool) {
      const float x = z.exponential(k, max, a.inverse_t);
      sums[x == 1 ? 0 : 1] += x;
    };
    places<SIZE, KEEP>(a.cols, sum, z);
    Group<SIZE>::template reduce<Add>(sums);
    // 1 / (ones + rest), without rounding the sum first, by a step of Newton's method; then off by less than a unit in
    // the last place. `ones` is an integer, of which 1 can be taken away exactly.
    const float ones = sums[0], rest = sums[1], about = reciprocal(ones + rest);
    const float inverse = fmaf(about, fmaf(-about, rest, fmaf(-about, ones, 1)), about);
    const Softmax p = {max, inverse, a.inverse_t, (ones - 1 + rest) * inverse};
    // This logarithm is off by 2 units in the last place, and near 1 by 2^-22, so that e^-H is off by at most
    // (1 + H) e^-H 2^-22 < 2.4e-7. An exact one would take a quarter of the row's instructions.
    float p_log2_p = 0;
    const auto entropy = [&](int k, int, bool) {
      float own;
      if constexpr (KEEP > 0) own = z.kept[k] = z.kept[k] * p.reciprocal;
      else own = p.of(z.at(k));
      p_log2_p += own * __log2f(own + a.epsilon);
    };
    places<SIZE, KEEP>(a.cols, entropy, z);
    const float weight = 1 + expf(Group<SIZE>::sum(p_log2_p) * 0.693147181f);
    if (a.of_rows && Group<SIZE>::lane() == 0) {
      a.of_rows[i] = p.max;
      a.of_rows[a.rows + i] = p.reciprocal;
      a.of_rows[2 * a.rows + i] = weight;
      a.of_rows[3 * a.rows + i] = p.others;
    }
    if constexpr (KEEP > 0) {
      places<SIZE, KEEP>(a.cols, [&](int k, int, bool) {
        const float of_s = weight * z.kept[k];
        s[k].add(of_s);
        e[k].add(of_s * p.not_(z.kept[k]));
      });
    }
  }
  if constexpr (KEEP > 0 && SIZE > WARP) {
    columns<SIZE, KEEP>(a.cols, [&](int k, int c) { each(c, s[k].value(), e[k].value()); });
  } else if constexpr (KEEP > 0) {
    // Written once in a launch, so that one barrier suffices.
    __shared__ float of_warp[WARPS][2][KEEP * WARP];
    float(&own)[2][KEEP * WARP] = of_warp[threadIdx.x / WARP];
    columns<SIZE, KEEP>(a.cols, [&](int k, int c) {
      own[0][c] = s[k].value();
      own[1][c] = e[k].value();
    });
    __syncthreads();
    for (int c = threadIdx.x; c < a.cols; c += blockDim.x) {
      double sums[2] = {0, 0};
      for (int w = 0; w < blockDim.x / WARP; ++w) {
        sums[0] += of_warp[w][0][c];
        sums[1] += of_warp[w][1][c];
      }
      each(c, sums[0], sums[1]);
    }
  }
}

// Processes the sums of a column over all rows. Adds to `found` its share that is off the diagonal, and 1 if the
// class is present.
__device__ __forceinline__ void settle(const Mcc& a, int c, double s, double e, double (&found)[2]) {
  // NaN is not below the least normal number: it stays in the loss.
  const bool present = !(s < 1.1754943508222875e-38);
  const double off = present ? e / s : 1;
  found[0] += off;
  found[1] += present;
  if (!a.grad) return;
  a.coefficients[c] = {(float)(1 - off), present ? (float)(1 / s) : 0};
}

// If there is a row, some class is present.
__device__ __forceinline__ void store_loss(const Mcc& a, const double (&found)[2]) {
  store(a.loss, found[1] > 0 ? (float)(found[0] / a.cols) : nan32());
}

template <int SIZE, int KEEP>
__device__ __forceinline__ void mcc_grad(const Mcc& a) {
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    Row<E, SIZE, KEEP> z(a.logits, i, a.cols);
    const Softmax softmax = softmax_of(a, i);
    const float times = a.factor * a.of_rows[2 * a.rows + i];
    const auto slope = [&](float p, int c, bool there) {
      const Coefficients of_c = there ? a.coefficients[c] : Coefficients{0, 0};
      return of_c.inverse * (p + p - of_c.ratio);
    };
    // Any number in the place of `lead` gives the same gradient: with the slope of the class that has most of the
    // row it is a sum of small terms (src/kernels/mcc.rs).
    float lead = 0;
    if (softmax.reciprocal > 0.5f) {
      const auto add = [&](int k, int c) {
        if (z.at(k) == softmax.max) lead += slope(softmax.reciprocal, c, true);
      };
      columns<SIZE, KEEP>(a.cols, add, z);
      lead = Group<SIZE>::sum(lead);
    }
    const auto share = [&](float p, int c, bool there) { return p * (slope(p, c, there) - lead); };
    float total = 0, shares[KEEP > 0 ? KEEP : TOGETHER];
    const auto add = [&](int k, int c, bool there) {
      const float p = softmax.of(z.at(k));
      total += shares[k] = share(p, c, there);
      if constexpr (KEEP > 0) z.kept[k] = p;
    };
    places<SIZE, KEEP>(a.cols, add, z);
    total = Group<SIZE>::sum(total);
    E* grad = a.grad + i * a.cols;
    const auto gradient = [&](int k, int c) {
      // Where the row is held, so are the shares: coefficients that are read again would wait for the stores before,
      // which may be to the same memory as far as the compiler knows.
      const float p = KEEP > 0 ? z.at(k) : softmax.of(z.at(k));
      store(grad[c], times * ((KEEP > 0 ? shares[k] : share(p, c, true)) - p * total));
    };
    columns<SIZE, KEEP>(a.cols, gradient, z);
  }
}
FEW_ROWS_KERNEL(mcc_grad, Mcc)

template <int SIZE, int KEEP>
__device__ __forceinline__ void mcc_rows(const Mcc& a) {
  // Warps share blocks of 256 threads.
  sweep<SIZE, KEEP, 256 / WARP>(a, [&](int c, double s, double e) {
    float* own = a.partials + (i64)blockIdx.x * 2 * a.cols;
    own[c] = s;
    own[a.cols + c] = e;
  });
}
FEW_ROWS_KERNEL(mcc_rows, Mcc)

// The block's warps share the rows or parts of column `c`.
__device__ __forceinline__ void column_of_all(const Mcc& a, int c, double (&found)[2]) {
  const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  double sums[2] = {0, 0};
  if (c < a.cols && a.parts > 0) {
#pragma unroll 4
    for (int part = warp; part < a.parts; part += warps) {
      const float* of_part = a.partials + (i64)part * 2 * a.cols;
      sums[0] += of_part[c];
      sums[1] += of_part[a.cols + c];
    }
  } else if (c < a.cols) {
    Compensated s, e;
#pragma unroll 4
    for (i64 i = warp; i < a.rows; i += warps) {
      const Softmax softmax = softmax_of(a, i);
      const float p = softmax.of(a.logits.at(i, c)), of_s = a.of_rows[2 * a.rows + i] * p;
      s.add(of_s);
      e.add(of_s * softmax.not_(p));
    }
    sums[0] = s.value();
    sums[1] = e.value();
  }
  across_warps(sums);
  if (warp == 0 && c < a.cols) settle(a, c, sums[0], sums[1], found);
}

__device__ __forceinline__ void columns_of_all(const Mcc& a) {
  double found[2] = {0, 0};
  tiles(a.cols, blockIdx.x, gridDim.x, [&](int c) { column_of_all(a, c, found); });
  if (gathered(a.gathering, found) && threadIdx.x == 0) store_loss(a, found);
}
KERNEL(1024, mcc_columns, Mcc, columns_of_all(args))

__device__ __forceinline__ void all_in_one(const Mcc& a) {
  double found[2] = {0, 0};
  sweep<WARP, 4, 1024 / WARP>(a, [&](int c, double s, double e) { settle(a, c, s, e, found); });
  across_block<Add, 0>(found);
  if (threadIdx.x == 0) store_loss(a, found);
  if (!a.grad) return;
  __syncthreads();  // rows and coefficients are visible to all threads
  mcc_grad<WARP, 4>(a);
}
KERNEL(1024, mcc_small, Mcc, all_in_one(args))

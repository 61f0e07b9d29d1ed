// The backward pass of every loss: a stored gradient times the incoming one.

struct Scale {  // mirrored by `Args` in src/cuda/scale.rs
  const E* grad;
  E* out;            // may be grad
  i64 length;
  i64 of_row;        // elements for each number of incoming, if there are several, and of chosen
  Numbers incoming;  // one, or one for each row
  float factor;
  const float* divisor;         // one number, or null
  const unsigned char* chosen;  // 0 where a row of grad is 0 or NaN throughout; or null
};

const int AHEAD = 4;  // units in flight at once

// Scales units of N elements, of which `of_row` make a row; `of_all` is what all are multiplied by where incoming is
// one number. A unit that would not change is not even read.
template <int N>
__device__ __forceinline__ void scale_units(const Scale& a, i64 units, i64 of_row, float factor, float of_all) {
  typedef Pack<E, N> Unit;
  const Unit* grad = (const Unit*)a.grad;
  Unit* out = (Unit*)a.out;
  const bool in_place = a.out == a.grad, one = a.incoming.stride == 0;
  const i64 step = (i64)gridDim.x * blockDim.x, first = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  // The row is updated incrementally, without a division for each unit.
  const i64 further_rows = step / of_row, further = step % of_row;
  i64 row = first / of_row, at = first % of_row;
  for (i64 i = first; i < units; i += AHEAD * step) {
    float times[AHEAD];
    bool changes[AHEAD];
    Unit held[AHEAD];
#pragma unroll
    for (int n = 0; n < AHEAD; ++n) {
      const bool there = i + n * step < units;
      const i64 here = there ? row : 0;
      times[n] = one ? of_all : a.incoming.at(here) * factor;
      const bool nothing = a.chosen && !a.chosen[here] && finite(times[n]);
      changes[n] = there && !(in_place && (nothing || times[n] == 1));
      row += further_rows;
      at += further;
      if (at >= of_row) {
        at -= of_row;
        ++row;
      }
    }
#pragma unroll
    for (int n = 0; n < AHEAD; ++n) {
      if (changes[n]) held[n] = grad[i + n * step];
    }
#pragma unroll
    for (int n = 0; n < AHEAD; ++n) {
      if (!changes[n]) continue;
#pragma unroll
      for (int e = 0; e < N; ++e) store(held[n].at[e], load(held[n].at[e]) * times[n]);
      out[i + n * step] = held[n];
    }
  }
}

__device__ __forceinline__ void scale_all(const Scale& a) {
  const float factor = a.divisor ? a.factor / *a.divisor : a.factor;
  const bool one = a.incoming.stride == 0, rows = !one || a.chosen;
  const float of_all = one ? a.incoming.at(0) * factor : 0;
  // The case where backward() is called on the loss itself.
  if (a.out == a.grad && of_all == 1) return;
  const int N = 16 / sizeof(E);
  const bool packed = Pack<E, N>::fits(a.grad) && Pack<E, N>::fits(a.out) && (!rows || a.of_row % N == 0);
  if (!packed) {
    scale_units<1>(a, a.length, a.of_row, factor, of_all);
    return;
  }
  const i64 units = a.length / N;
  scale_units<N>(a, units, rows ? a.of_row / N : units + 1, factor, of_all);
  // The remainder that does not fill a unit; there is none where rows matter.
  for (i64 i = units * N + (i64)blockIdx.x * blockDim.x + threadIdx.x; i < a.length; i += (i64)gridDim.x * blockDim.x) {
    store(a.out[i], load(a.grad[i]) * of_all);
  }
}
KERNEL(256, scale, Scale, scale_all(args))

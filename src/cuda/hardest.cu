// Hard example mining of a given matrix of distances: the formulas are in src/kernels/reid_loss/matrix.rs.

struct Hardest {  // mirrored by `Args` in src/cuda/hardest.rs
  Matrix<E> distances, identity;
  i64 rows;
  int cols;
  i64 *positive, *negative;
};

// A rank above those of all smaller numbers, and of equal ones at a later index. NaN ranks highest.
__device__ __forceinline__ unsigned long long rank(float x, int index) {
  const unsigned bits = __float_as_uint(x != x ? nan32() : x + 0.0f);  // -0 is 0
  const unsigned order = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (unsigned long long)order << 32 | (0xffffffffu - (unsigned)index);
}
__device__ __forceinline__ i64 index_of(unsigned long long rank) { return 0xffffffffu - (unsigned)rank; }

// s 1e7 + d in the storage type, each operation rounded as torch's: in float16 the offset is infinite.
__device__ __forceinline__ float moved(float d, float s) {
  return rounded<E>(__fadd_rn(rounded<E>(__fmul_rn(s, 1e7f)), d));
}

__device__ __forceinline__ void hardest_all(const Hardest& a) {
  for (i64 i = blockIdx.x; i < a.rows; i += gridDim.x) {
    unsigned long long farthest = 0, nearest = 0;
    for (i64 c = threadIdx.x; c < a.cols; c += blockDim.x) {
      const float d = a.distances.at(i, c), s = a.identity.at(i, c);
      farthest = LargestInteger::of(farthest, rank(moved(d, rounded<E>(s - 1)), (int)c));
      // A sort puts NaN last, and tllib takes the first.
      const float sum = moved(d, s);
      nearest = LargestInteger::of(nearest, rank(sum != sum ? -infinity32() : -sum, (int)c));
    }
    farthest = across_block<LargestInteger>(farthest);
    nearest = across_block<LargestInteger>(nearest);
    if (threadIdx.x == 0) {
      a.positive[i] = index_of(farthest);
      a.negative[i] = index_of(nearest);
    }
  }
}
KERNEL(256, hardest, Hardest, hardest_all(args))

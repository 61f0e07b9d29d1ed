// The backward pass of every loss: a stored gradient times the incoming one.

struct Scale {  // mirrored by `Args` in src/cuda/scale.rs
  const E* grad;
  E* out;  // may be grad
  i64 length;
  i64 per_incoming;  // elements of grad for each element of incoming
  Numbers incoming;
  float factor;
  const float* divisor;  // one number, or null
};

__device__ __forceinline__ void scale_all(const Scale& a) {
  const float factor = a.divisor ? a.factor / *a.divisor : a.factor;
  const bool one = a.per_incoming == a.length;
  const float of_all = one ? a.incoming.at(0) * factor : 0;
  const i64 step = (i64)gridDim.x * blockDim.x;
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < a.length; i += step) {
    const float times = one ? of_all : a.incoming.at(i / a.per_incoming) * factor;
    store(a.out[i], load(a.grad[i]) * times);
  }
}
KERNEL(256, scale, Scale, scale_all(args))

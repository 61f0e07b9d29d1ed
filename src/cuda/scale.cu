// The backward pass of every loss: a stored gradient times the incoming one.

struct Scale {  // mirrored by `Args` in src/cuda/scale.rs
  const E* grad;
  E* out;  // may be grad
  i64 length;
  i64 per_incoming;  // elements of grad for each element of incoming
  const void* incoming;
  i64 stride;  // of incoming, in elements
  int dtype;   // of incoming, as in Scalar
  float factor;
  const float* divisor;  // one number, or null
};

__device__ __forceinline__ float number(const Scale& a, i64 at) {
  if (a.dtype == 0) return load(((const f32*)a.incoming)[at]);
  if (a.dtype == 1) return load(((const f16*)a.incoming)[at]);
  return load(((const bf16*)a.incoming)[at]);
}

__device__ __forceinline__ void scale_all(const Scale& a) {
  const float factor = a.divisor ? a.factor / *a.divisor : a.factor;
  const bool one = a.per_incoming == a.length;
  const float of_all = one ? number(a, 0) * factor : 0;
  const i64 step = (i64)gridDim.x * blockDim.x;
  for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < a.length; i += step) {
    const float times = one ? of_all : number(a, i / a.per_incoming * a.stride) * factor;
    store(a.out[i], load(a.grad[i]) * times);
  }
}
KERNEL(256, scale, Scale, scale_all(args))

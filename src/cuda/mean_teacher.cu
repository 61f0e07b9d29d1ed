// The teacher's moving average: the formula is in src/kernels/mean_teacher.rs. All parameters of a model in
// one launch, a block for each chunk. A chunk says what its dtypes are: ELEMENT is unused.

struct Chunk {  // mirrored by `words` in src/cuda/mean_teacher.rs
  void* teacher;
  const void* student;  // may be teacher
  int length;
  short teacher_dtype, student_dtype;  // as in Scalar
};

struct MeanTeacher {  // mirrored by `Args` in src/cuda/mean_teacher.rs
  const Chunk* chunks;
  float keep, take;
};

template <typename T, typename S>
__device__ __forceinline__ void blend(T& t, S s, float keep, float take) {
  // In float32 three roundings, as on the CPU and in tllib. A half teacher is rounded once, when it is stored.
  store(t, __fadd_rn(__fmul_rn(keep, load(t)), __fmul_rn(take, load(s))));
}

template <typename T, typename S>
__device__ __forceinline__ void blend_chunk(const Chunk& c, float keep, float take) {
  const int N = 16 / sizeof(T);
  T* teacher = (T*)c.teacher;
  const S* student = (const S*)c.student;
  // The compiler does not know the address space of pointers that were loaded from memory.
  __builtin_assume(__isGlobal(teacher) && __isGlobal(student));
  int done = 0;
  if (Pack<T, N>::fits(teacher) && Pack<S, N>::fits(student)) {
    const int packs = c.length / N;
    for (int k = threadIdx.x; k < packs; k += blockDim.x) {
      Pack<T, N> t = ((const Pack<T, N>*)teacher)[k];
      const Pack<S, N> s = ((const Pack<S, N>*)student)[k];
#pragma unroll
      for (int n = 0; n < N; ++n) blend(t.at[n], s.at[n], keep, take);
      ((Pack<T, N>*)teacher)[k] = t;
    }
    done = packs * N;
  }
  for (int k = done + threadIdx.x; k < c.length; k += blockDim.x) blend(teacher[k], student[k], keep, take);
}

template <typename T>
__device__ __forceinline__ void blend_into(const Chunk& c, float keep, float take) {
  if (c.student_dtype == 0) blend_chunk<T, f32>(c, keep, take);
  if (c.student_dtype == 1) blend_chunk<T, f16>(c, keep, take);
  if (c.student_dtype == 2) blend_chunk<T, bf16>(c, keep, take);
}

// All threads of a block have the same chunk, and take the same branches.
__device__ __forceinline__ void mean_teacher_all(const MeanTeacher& a) {
  const Chunk c = a.chunks[blockIdx.x];
  if (c.teacher_dtype == 0) blend_into<f32>(c, a.keep, a.take);
  if (c.teacher_dtype == 1) blend_into<f16>(c, a.keep, a.take);
  if (c.teacher_dtype == 2) blend_into<bf16>(c, a.keep, a.take);
}
KERNEL(256, mean_teacher, MeanTeacher, mean_teacher_all(args))

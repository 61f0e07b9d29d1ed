// Squared distance between two predictions: the formulas are in src/kernels/pi_model.rs.

struct PiModel {  // mirrored by `Args` in src/cuda/pi_model.rs
  Matrix<E> first, second;
  i64 rows;
  int cols;
  Numbers mask;  // of the rows; data may be null
  float number;  // in place of a mask
  float factor;  // of the gradients stored for the two
  double mean;   // what the sum of the rows is multiplied by
  E* grad_first;     // or null
  E* grad_second;    // or null
  float* grad_mask;  // or null
  Scalar out;        // one, or one for each row
  int each;
  Gathering gathering;  // unless each
};

template <int SIZE, int KEEP>
__device__ __forceinline__ void pi_model(const PiModel& a) {
  double total[1] = {0};
  for (i64 i = first_row<SIZE>(); i < a.rows; i += step_rows<SIZE>()) {
    Row<E, SIZE, KEEP> x(a.first, i, a.cols, 0), y(a.second, i, a.cols, 0);
    const float mask = a.mask.data ? a.mask.at(i) : a.number, factor = 2 * a.factor * mask;
    E* to_first = a.grad_first ? a.grad_first + i * a.cols : nullptr;
    E* to_second = a.grad_second ? a.grad_second + i * a.cols : nullptr;
    float distance = 0;
    const auto term = [&](int k, int c, bool there) {
      const float difference = x.at(k) - y.at(k);
      distance += difference * difference;
      if (to_first && there) store(to_first[c], difference * factor);
      if (to_second && there) store(to_second[c], difference * -factor);
    };
    places<SIZE, KEEP>(a.cols, term, x, y);
    distance = Group<SIZE>::sum(distance);
    total[0] += once<SIZE>(distance * mask);
    if (Group<SIZE>::lane() != 0) continue;
    if (a.each) store(a.out, distance * mask, i);
    if (a.grad_mask) a.grad_mask[i] = (float)(distance * a.mean);
  }
  if (!a.each && gathered(a.gathering, total) && threadIdx.x == 0) {
    store(a.out, (float)(total[0] * a.mean));
  }
}
ROW_KERNEL(pi_model, PiModel)

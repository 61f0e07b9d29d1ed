//! All distances between the rows of two matrices, and what their gradients are computed from.
//!
//! ```text
//! d_ij    = sqrt(max(|x_i|^2 + |y_j|^2 - 2 x_i . y_j, 1e-12))
//! f_ij    = g_ij / d_ij, or 0 where d_ij was raised to 1e-6        g: the incoming gradient
//! dL/dx_i = x_i sum_j f_ij - sum_j f_ij y_j
//! dL/dy_j = y_j sum_i f_ij - sum_i f_ij x_i
//! ```
//!
//! The caller computes the products; this module, what precedes and follows them.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::parallel::{cut, run, split};
use super::super::real::Real;
use super::super::reduce;
use super::super::rows::Rows;
use super::{CLAMP, RAISED};
use std::num::NonZeroUsize;

/// Turns the products `x_i . y_j` into distances; `x` and `y` are the squared norms of the rows.
pub fn distances<F: Real>(products: &mut [F], x: &[F], y: &[F], threads: NonZeroUsize) {
    let ranges = split(x.len(), threads);
    let jobs: Vec<_> = cut(products, &ranges, y.len())
        .into_iter()
        .zip(ranges)
        .map(|(products, range)| {
            let x = &x[range];
            move || dispatch(Distances { products, x, y })
        })
        .collect();
    run(jobs);
}

struct Distances<'a, F> {
    products: &'a mut [F],
    x: &'a [F],
    y: &'a [F],
}

impl<F: Real> Kernel for Distances<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let (clamp, raised) = (F::of(CLAMP), F::of(CLAMP.sqrt()));
        let rows = self.products.chunks_exact_mut(self.y.len().max(1));
        for (row, &x) in rows.zip(self.x) {
            for (d, &y) in row.iter_mut().zip(self.y) {
                let square = (x + y) - (*d + *d);
                let root = square.sqrt();
                // NaN stays.
                *d = if square < clamp { raised } else { root };
            }
        }
    }
}

/// Writes `-f` into `negative` and returns the sums of `f` over the rows and, if `columns`, over the
/// columns. `distances` are contiguous and of the shape of `incoming`.
pub fn factors<F: Element<Acc = F> + Real>(
    distances: &[F],
    incoming: Rows<'_, F>,
    negative: &mut [F],
    columns: bool,
    threads: NonZeroUsize,
) -> (Vec<F>, Vec<F>) {
    let cols = incoming.cols();
    let ranges = split(incoming.rows(), threads);
    let jobs: Vec<_> = cut(negative, &ranges, cols)
        .into_iter()
        .zip(ranges)
        .map(|(negative, range)| {
            let job = Factors {
                distances: &distances[range.start * cols..range.end * cols],
                incoming: incoming.slice(range),
                negative,
                columns,
            };
            move || dispatch(job)
        })
        .collect();
    let (mut of_rows, mut of_columns) = (Vec::with_capacity(incoming.rows()), vec![0.0; cols]);
    for (rows, part) in run(jobs) {
        of_rows.extend(rows);
        for (sum, part) in of_columns.iter_mut().zip(part) {
            *sum += part;
        }
    }
    (of_rows, of_columns.into_iter().map(F::of).collect())
}

struct Factors<'a, 'b, F> {
    distances: &'a [F],
    incoming: Rows<'a, F>,
    negative: &'b mut [F],
    columns: bool,
}

impl<F: Element<Acc = F> + Real> Kernel for Factors<'_, '_, F> {
    type Output = (Vec<F>, Vec<f64>);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let cols = self.incoming.cols();
        let mut scratch = self.incoming.scratch();
        let mut of_rows = Vec::with_capacity(self.incoming.rows());
        let mut of_columns = vec![0.0; if self.columns { cols } else { 0 }];
        let raised = F::of(RAISED);
        for i in 0..self.incoming.rows() {
            let here = i * cols..(i + 1) * cols;
            let g = self.incoming.in_turn(i, &mut scratch);
            let (d, out) = (&self.distances[here.clone()], &mut self.negative[here]);
            for ((out, &d), &g) in out.iter_mut().zip(d).zip(g) {
                let f = g / d;
                *out = if d > raised { -f } else { F::ZERO };
            }
            of_rows.push(F::of(-reduce::sum(out)));
            for (sum, &f) in of_columns.iter_mut().zip(&*out) {
                *sum -= f.to_f64();
            }
        }
        (of_rows, of_columns)
    }
}

/// Each row of `x` times its factor.
pub fn multiples<F: Real>(x: &[F], factors: &[F], out: &mut [F], threads: NonZeroUsize) {
    let cols = x.len() / factors.len().max(1);
    let ranges = split(factors.len(), threads);
    let jobs: Vec<_> = cut(out, &ranges, cols)
        .into_iter()
        .zip(ranges)
        .map(|(out, range)| {
            let x = &x[range.start * cols..range.end * cols];
            let factors = &factors[range];
            move || dispatch(Multiples { x, factors, out })
        })
        .collect();
    run(jobs);
}

struct Multiples<'a, F> {
    x: &'a [F],
    factors: &'a [F],
    out: &'a mut [F],
}

impl<F: Real> Kernel for Multiples<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let cols = (self.x.len() / self.factors.len().max(1)).max(1);
        let rows = self
            .x
            .chunks_exact(cols)
            .zip(self.out.chunks_exact_mut(cols));
        for ((x, out), &factor) in rows.zip(self.factors) {
            for (out, &x) in out.iter_mut().zip(x) {
                *out = factor * x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: [f64; 6] = [1.0, 2.0, -1.0, 0.5, 0.0, 3.0];
    const Y: [f64; 4] = [1.0, 2.0, 2.0, -1.0];

    fn of(x: &[f64], threads: usize) -> Vec<f64> {
        let square = |r: &[f64]| r[0] * r[0] + r[1] * r[1];
        let squares = |of: &[f64]| of.chunks(2).map(square).collect::<Vec<_>>();
        let mut d: Vec<f64> = x
            .chunks(2)
            .flat_map(|x| Y.chunks(2).map(move |y| x[0] * y[0] + x[1] * y[1]))
            .collect();
        let threads = NonZeroUsize::new(threads).unwrap();
        distances(&mut d, &squares(x), &squares(&Y), threads);
        d
    }

    #[test]
    fn distances_and_the_smallest_one() {
        for threads in [1, 2] {
            let d = of(&X, threads);
            // The first rows are equal.
            assert_eq!(d[0], 1e-6);
            for (d, square) in d[1..].iter().zip([10.0f64, 6.25, 11.25, 2.0, 20.0]) {
                assert!((d - square.sqrt()).abs() < 1e-15, "{d} {square}");
            }
        }
        let mut d = [f64::NAN, 0.0];
        distances(&mut d, &[1.0], &[1.0, f64::INFINITY], NonZeroUsize::MIN);
        assert!(d[0].is_nan() && d[1] == f64::INFINITY, "{d:?}");
    }

    #[test]
    fn factors_make_the_gradient() {
        let g = [7.0, -1.0, 0.5, 2.0, -0.25, 1.5];
        let loss = |x: &[f64]| -> f64 { of(x, 1).iter().zip(&g).map(|(d, g)| d * g).sum() };
        let d = of(&X, 1);
        for threads in [1, 2, 3] {
            let threads = NonZeroUsize::new(threads).unwrap();
            let rows = Rows::contiguous(&g, 3, 2).unwrap();
            let (mut negative, mut grad) = ([9.0; 6], [9.0; 6]);
            let (of_rows, of_columns) = factors(&d, rows, &mut negative, true, threads);
            multiples(&X, &of_rows, &mut grad, threads);
            for k in 0..6 {
                let (i, c) = (k / 2, k % 2);
                grad[k] += negative[2 * i] * Y[c] + negative[2 * i + 1] * Y[2 + c];
                let (mut up, mut down) = (X, X);
                up[k] += 1e-6;
                down[k] -= 1e-6;
                // The distance that was raised is a constant.
                let slope = match i {
                    0 => {
                        (loss(&up) - of(&up, 1)[0] * g[0] - loss(&down) + of(&down, 1)[0] * g[0])
                            / 2e-6
                    }
                    _ => (loss(&up) - loss(&down)) / 2e-6,
                };
                assert!((grad[k] - slope).abs() < 1e-8, "{k}: {} {slope}", grad[k]);
            }
            let sum = |j: usize| -(negative[j] + negative[2 + j] + negative[4 + j]);
            assert!(
                (of_columns[0] - sum(0)).abs() < 1e-15 && (of_columns[1] - sum(1)).abs() < 1e-15
            );
        }
    }
}

//! All distances between the rows of two matrices, and what their gradients are computed from.
//!
//! ```text
//! d_ij    = sqrt(max(|x_i|^2 + |y_j|^2 - 2 x_i . y_j, 1e-12))
//! f_ij    = g_ij / d_ij, or 0 where d_ij was raised to 1e-6        g: the incoming gradient
//! dL/dx_i = x_i sum_j f_ij - sum_j f_ij y_j
//! dL/dy_j = y_j sum_i f_ij - sum_i f_ij x_i
//! ```
//!
//! With `y = x` both are symmetric, and `x` gets `dL/dx + dL/dy = x_i sum_j s_ij - sum_j s_ij x_j` with
//! `s_ij = f_ij + f_ji`: one product in place of two ([`own_distances`], [`own_factors`]).
//!
//! The caller computes the products; this module, what precedes and follows them.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::mirror::{Triangle, mirror};
use super::super::parallel::{cut, run, split};
use super::super::real::Real;
use super::super::reduce;
use super::super::rows::Rows;
use super::{CLAMP, RAISED};
use std::num::NonZeroUsize;
use std::ops::Range;

/// Columns that become rows together.
const TILE: usize = 16;

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
        let rows = self.products.chunks_exact_mut(self.y.len().max(1));
        for (row, &x) in rows.zip(self.x) {
            finish(row, x, self.y);
        }
    }
}

/// Turns the products of a row with others into distances.
#[inline(always)]
fn finish<F: Real>(row: &mut [F], x: F, y: &[F]) {
    let (clamp, raised) = (F::of(CLAMP), F::of(CLAMP.sqrt()));
    for (d, &y) in row.iter_mut().zip(y) {
        let square = (x + y) - (*d + *d);
        let root = square.sqrt();
        // NaN stays.
        *d = if square < clamp { raised } else { root };
    }
}

/// [`distances`] of rows with these squared norms from each other; only the products on and above the diagonal need
/// be there.
pub fn own_distances<F: Real>(products: &mut [F], squares: &[F], threads: NonZeroUsize) {
    let ranges = Triangle::Upper.split(squares.len(), threads);
    let jobs: Vec<_> = cut(products, &ranges, squares.len())
        .into_iter()
        .zip(ranges)
        .map(|(products, rows)| {
            let upper = Upper {
                products,
                squares,
                first: rows.start,
            };
            move || dispatch(upper)
        })
        .collect();
    run(jobs);
    mirror(products, squares.len(), threads);
}

struct Upper<'a, F> {
    products: &'a mut [F],
    squares: &'a [F],
    /// The first row.
    first: usize,
}

impl<F: Real> Kernel for Upper<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let rows = self.products.chunks_exact_mut(self.squares.len().max(1));
        for (i, row) in (self.first..).zip(rows) {
            finish(&mut row[i..], self.squares[i], &self.squares[i..]);
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
        reduce::add(&mut of_columns, &part);
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

/// Writes `-s` into `negative` and returns the sums of `s` over the rows, where the distances are those of rows from
/// each other: symmetric and contiguous.
pub fn own_factors<F: Element<Acc = F> + Real>(
    distances: &[F],
    incoming: Rows<'_, F>,
    negative: &mut [F],
    threads: NonZeroUsize,
) -> Vec<F> {
    let n = incoming.rows();
    let ranges = split(n, threads);
    let jobs: Vec<_> = cut(negative, &ranges, n)
        .into_iter()
        .zip(ranges)
        .map(|(negative, rows)| {
            let job = OwnFactors {
                distances: &distances[rows.start * n..rows.end * n],
                incoming,
                negative,
                rows,
            };
            move || dispatch(job)
        })
        .collect();
    run(jobs).concat()
}

struct OwnFactors<'a, 'b, F> {
    distances: &'a [F],
    incoming: Rows<'a, F>,
    negative: &'b mut [F],
    rows: Range<usize>,
}

impl<F: Element<Acc = F> + Real> Kernel for OwnFactors<'_, '_, F> {
    type Output = Vec<F>;

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let n = self.incoming.cols();
        let mut scratch = self.incoming.scratch();
        // Columns that begin a power of two apart would share a set of the cache.
        let apart = n + TILE;
        let (mut columns, mut room) = (vec![F::ZERO; TILE * apart], [F::ZERO; TILE]);
        let mut sums = Vec::with_capacity(self.rows.len());
        let raised = F::of(RAISED);
        let rows = self
            .distances
            .chunks_exact(n.max(1))
            .zip(self.negative.chunks_exact_mut(n.max(1)));
        for (i, (d, out)) in self.rows.clone().zip(rows) {
            let place = (i - self.rows.start) % TILE;
            if place == 0 {
                let tile = self.incoming.columns(i..self.rows.end.min(i + TILE));
                for j in 0..n {
                    for (l, &g) in tile.row(j, &mut room).iter().enumerate() {
                        columns[l * apart + j] = g;
                    }
                }
            }
            let g = self.incoming.in_turn(i, &mut scratch);
            let h = &columns[place * apart..][..n];
            for (((out, &d), &g), &h) in out.iter_mut().zip(d).zip(g).zip(h) {
                let s = (g + h) / d;
                *out = if d > raised { -s } else { F::ZERO };
            }
            sums.push(F::of(-reduce::sum(out)));
        }
        sums
    }
}

/// Writes each row of `x` times its factor into `out`, contiguous.
pub fn multiples<F: Element<Acc = F> + Real>(
    x: Rows<'_, F>,
    factors: &[F],
    out: &mut [F],
    threads: NonZeroUsize,
) {
    let ranges = split(factors.len(), threads);
    let jobs: Vec<_> = cut(out, &ranges, x.cols())
        .into_iter()
        .zip(ranges)
        .map(|(out, range)| {
            let x = x.slice(range.clone());
            let factors = &factors[range];
            move || dispatch(Multiples { x, factors, out })
        })
        .collect();
    run(jobs);
}

struct Multiples<'a, 'b, F> {
    x: Rows<'a, F>,
    factors: &'a [F],
    out: &'b mut [F],
}

impl<F: Element<Acc = F> + Real> Kernel for Multiples<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let mut scratch = self.x.scratch();
        let rows = self.out.chunks_exact_mut(self.x.cols().max(1));
        for (i, (out, &factor)) in rows.zip(self.factors).enumerate() {
            for (out, &x) in out.iter_mut().zip(self.x.in_turn(i, &mut scratch)) {
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
            let x = Rows::contiguous(&X, 3, 2).unwrap();
            multiples(x, &of_rows, &mut grad, threads);
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

    #[test]
    fn a_matrix_with_itself_is_symmetric() {
        for n in [0, 1, 5, 16, 37, 70] {
            let x: Vec<f64> = (0..2 * n).map(|k| (k * k % 23) as f64 / 4.0).collect();
            let g: Vec<f64> = (0..n * n).map(|k| (k * 7 % 13) as f64 - 6.0).collect();
            let row = |i: usize| &x[2 * i..2 * i + 2];
            let dot = |i: usize, j: usize| row(i)[0] * row(j)[0] + row(i)[1] * row(j)[1];
            let squares: Vec<f64> = (0..n).map(|i| dot(i, i)).collect();
            let products: Vec<f64> = (0..n * n).map(|k| dot(k / n, k % n)).collect();
            let mut plain = products.clone();
            distances(&mut plain, &squares, &squares, NonZeroUsize::MIN);
            let grads = Rows::contiguous(&g, n, n).unwrap();
            let mut apart = vec![9.0; n * n];
            let (of_rows, of_columns) = factors(&plain, grads, &mut apart, true, NonZeroUsize::MIN);
            for threads in [1, 2, 3] {
                let threads = NonZeroUsize::new(threads).unwrap();
                // Below the diagonal is nothing.
                let mut d: Vec<f64> = (0..n * n)
                    .map(|k| if k % n < k / n { f64::NAN } else { products[k] })
                    .collect();
                own_distances(&mut d, &squares, threads);
                assert_eq!(d, plain);
                let mut negative = vec![9.0; n * n];
                let sums = own_factors(&d, grads, &mut negative, threads);
                for i in 0..n {
                    assert!((sums[i] - of_rows[i] - of_columns[i]).abs() < 1e-9);
                    for j in 0..n {
                        let both = apart[i * n + j] + apart[j * n + i];
                        assert!((negative[i * n + j] - both).abs() < 1e-9);
                    }
                }
            }
        }
    }
}

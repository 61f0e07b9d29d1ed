//! Class balance: binary cross entropy of the mean probabilities of a batch against the uniform ones.
//!
//! With `u = 1/C`:
//!
//! ```text
//! m_c      = 1/B sum_i p_ic
//! loss     = -1/C sum_c (u ln m_c + (1 - u) ln(1 - m_c))        no logarithm below -100
//! dL/dp_ic = (m_c - u) / (B C max(m_c (1 - m_c), 1e-12))        the same in every row
//! ```
//!
//! Both clamps are those of torch's `binary_cross_entropy`, which holds the 1e-12 in float32.

use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::parallel::{cut, run, split, split_classes};
use super::real::Real;
use super::reduce;
use std::num::NonZeroUsize;

mod sums;

pub use sums::{column_means, column_sums};

/// Lower bound of the logarithms.
pub const LOG_FLOOR: f64 = -100.0;
/// Lower bound of the divisors of the gradient.
pub const SLOPE_FLOOR: f64 = 9.999_999_960_041_972e-13;
/// Several narrow rows are processed at a time, as one of about this width.
const WIDTH: usize = 128;
/// Columns whose terms are computed before they are added up.
const BLOCK: usize = 512;

/// The loss over `rows` rows with these means, and the gradient with respect to any one of them.
pub fn class_balance(means: &[f64], rows: usize, threads: NonZeroUsize) -> (f64, Vec<f64>) {
    let classes = means.len() as f64;
    let mut slopes = vec![0.0; means.len()];
    let ranges = split_classes(means.len(), threads.get());
    let jobs: Vec<_> = cut(&mut slopes, &ranges, 1)
        .into_iter()
        .zip(ranges)
        .map(|(slopes, range)| {
            let balance = Balance {
                means: &means[range],
                u: 1.0 / classes,
                count: rows as f64 * classes,
                slopes,
            };
            move || dispatch(balance)
        })
        .collect();
    let total: f64 = run(jobs).into_iter().sum();
    (-total / classes, slopes)
}

/// `sum_c (u ln m_c + (1 - u) ln(1 - m_c))`, and the gradient into `slopes`.
struct Balance<'a, 'b> {
    means: &'a [f64],
    u: f64,
    count: f64,
    slopes: &'b mut [f64],
}

impl Kernel for Balance<'_, '_> {
    type Output = f64;

    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let Self { u, count, .. } = self;
        for (slope, &m) in self.slopes.iter_mut().zip(self.means) {
            *slope = (m - u) / (at_least(SLOPE_FLOOR, m * (1.0 - m)) * count);
        }
        let (mut terms, mut total) = ([0.0; BLOCK], 0.0);
        for means in self.means.chunks(BLOCK) {
            // Not in a closure: with two logarithms, one that is called in two places would not be inlined, and
            // would then not be compiled for the instruction set.
            for (term, &m) in terms.iter_mut().zip(means) {
                let rest = at_least(LOG_FLOOR, Real::ln::<I>(1.0 - m));
                *term = u * at_least(LOG_FLOOR, Real::ln::<I>(m)) + (1.0 - u) * rest;
            }
            total += reduce::sum(&terms[..means.len()]);
        }
        total
    }
}

/// A comparison that is false for NaN, so that NaN passes through.
#[inline(always)]
fn at_least(floor: f64, x: f64) -> f64 {
    if x < floor { floor } else { x }
}

/// Writes `row`, times `scale`, into every row of `out` (contiguous).
pub fn repeat_row<E: Element>(row: &[f64], scale: f64, out: &mut [E], threads: NonZeroUsize) {
    let group = (WIDTH / row.len().max(1)).max(1);
    let pattern: Vec<E> = row
        .iter()
        .map(|&g| E::store(E::Acc::of(g * scale)))
        .collect::<Vec<_>>()
        .repeat(group);
    let ranges = split(out.len() / row.len().max(1), threads);
    let pattern = &pattern;
    let jobs: Vec<_> = cut(out, &ranges, row.len())
        .into_iter()
        .map(|out| {
            move || {
                for rows in out.chunks_mut(pattern.len().max(1)) {
                    rows.copy_from_slice(&pattern[..rows.len()]);
                }
            }
        })
        .collect();
    run(jobs);
}

/// The same, `out` being contiguous column by column.
pub fn repeat_row_by_columns<E: Element>(
    row: &[f64],
    scale: f64,
    out: &mut [E],
    threads: NonZeroUsize,
) {
    let rows = out.len() / row.len().max(1);
    let ranges = split(row.len(), threads);
    let jobs: Vec<_> = cut(out, &ranges, rows)
        .into_iter()
        .zip(ranges)
        .map(|(out, range)| {
            move || {
                for (column, &g) in out.chunks_mut(rows.max(1)).zip(&row[range]) {
                    column.fill(E::store(E::Acc::of(g * scale)));
                }
            }
        })
        .collect();
    run(jobs);
}

#[cfg(test)]
mod tests {
    use super::super::element::Bf16;
    use super::super::rows::Rows;
    use super::*;

    fn probabilities(rows: usize, cols: usize) -> Vec<f64> {
        (0..rows * cols)
            .map(|k| ((k * 7919 + 13) % 97 + 1) as f64 / 100.0)
            .collect()
    }

    fn loss(p: &[f64], rows: usize, cols: usize) -> f64 {
        let view = Rows::contiguous(p, rows, cols).unwrap();
        class_balance(
            &column_means(view, NonZeroUsize::MIN),
            rows,
            NonZeroUsize::MIN,
        )
        .0
    }

    #[test]
    fn matches_the_formula_and_finite_differences() {
        for (rows, cols) in [
            (1, 3),
            (7, 2),
            (129, 5),
            (11, 130),
            (63, 40),
            (64, 1),
            (3, 4001),
        ] {
            let p = probabilities(rows, cols);
            for threads in [1, 3] {
                let threads = NonZeroUsize::new(threads).unwrap();
                let means = column_means(Rows::contiguous(&p, rows, cols).unwrap(), threads);
                let by_columns: Vec<f64> = (0..cols)
                    .flat_map(|c| p.iter().skip(c).step_by(cols).copied())
                    .collect();
                let columns = Rows::contiguous(&by_columns, cols, rows).unwrap();
                let others = column_means(columns.transposed(), threads);
                for c in 0..cols {
                    let column = &by_columns[c * rows..(c + 1) * rows];
                    let exact = column.iter().sum::<f64>() / rows as f64;
                    assert!((means[c] - exact).abs() < 1e-14, "{rows} {cols} {c}");
                    assert!((others[c] - exact).abs() < 1e-14, "{rows} {cols} {c}");
                }
                let (value, slope) = class_balance(&means, rows, threads);
                let u = 1.0 / cols as f64;
                let each = |m: &f64| -u * m.ln() - (1.0 - u) * (1.0 - m).ln();
                assert!((value - means.iter().map(each).sum::<f64>() * u).abs() < 1e-12);
                let mut grad = vec![9.0; rows * cols];
                repeat_row_by_columns(&slope, 2.0, &mut grad, threads);
                for (c, column) in grad.chunks(rows).enumerate() {
                    assert!(column.iter().all(|&g| g == 2.0 * slope[c]));
                }
                repeat_row(&slope, 2.0, &mut grad, threads);
                for k in (0..grad.len()).step_by(7) {
                    let (mut up, mut down) = (p.clone(), p.clone());
                    up[k] += 1e-6;
                    down[k] -= 1e-6;
                    let difference = (loss(&up, rows, cols) - loss(&down, rows, cols)) / 2e-6;
                    assert!(
                        (grad[k] / 2.0 - difference).abs() < 1e-7,
                        "{k}: {} {difference}",
                        grad[k]
                    );
                }
            }
        }
    }

    #[test]
    fn clamps_are_those_of_torch() {
        let (value, slope) = class_balance(&[1.0, 0.0], 4, NonZeroUsize::MIN);
        assert_eq!(value, 50.0);
        assert_eq!(
            slope,
            [0.5 / (SLOPE_FLOOR * 8.0), -0.5 / (SLOPE_FLOOR * 8.0)]
        );
    }

    #[test]
    fn strides_half_types_nan_and_no_rows() {
        let data: Vec<f32> = (0..6).map(|k| k as f32 / 8.0).collect();
        // SAFETY: the transpose of a 2 x 3 matrix addresses the same 6 elements.
        let transposed = unsafe { Rows::strided(data.as_ptr(), (3, 2), (1, 3)) };
        assert_eq!(column_means(transposed, NonZeroUsize::MIN), [0.125, 0.5]);
        let half: Vec<Bf16> = data.iter().map(|&p| Bf16::store(p)).collect();
        let rows = Rows::contiguous(&half, 3, 2).unwrap();
        assert_eq!(
            column_means(rows, NonZeroUsize::new(2).unwrap()),
            [0.25, 0.375]
        );

        let empty = Rows::<f32>::contiguous(&[], 0, 3).unwrap();
        let (value, slope) = class_balance(
            &column_means(empty, NonZeroUsize::MIN),
            0,
            NonZeroUsize::MIN,
        );
        assert!(value.is_nan());
        repeat_row::<f32>(&slope, 1.0, &mut [], NonZeroUsize::MIN);
        let (value, slope) = class_balance(&[f64::NAN, 0.5], 2, NonZeroUsize::MIN);
        assert!(value.is_nan() && slope[0].is_nan() && slope[1] == 0.0);
    }
}

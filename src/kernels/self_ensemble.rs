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
use super::rows::{CACHE_LINE, Rows, prefetch};
use std::array::from_fn;
use std::num::NonZeroUsize;
use std::ops::Add;

/// Lower bound of the logarithms.
pub const LOG_FLOOR: f64 = -100.0;
/// Lower bound of the divisors of the gradient.
pub const SLOPE_FLOOR: f64 = 9.999_999_960_041_972e-13;
/// Several narrow rows are processed at a time, as one of about this width.
const WIDTH: usize = 128;
/// Numbers that are added before they are added to a sum.
const TOGETHER: usize = 4;
/// Independent sums of a contiguous column.
const SUMS: usize = 64;
/// Contiguous columns are read by the column if they have as many rows.
const TALL: usize = 12;
/// Independent sums of a column of fewer rows than [`SUMS`].
const FEW_SUMS: usize = 8;
/// Rows of at most as many columns that are not adjacent are summed in registers.
const NARROW: usize = 8;
/// Columns whose sums stay in the cache while the rows are read: the longer a piece of a row, the better does the
/// processor foresee what is read.
const TILE: usize = 4096;
/// The same where rows are converted first, for which there is room for fewer.
const CONVERTED: usize = 1024;
/// Columns that are worth a thread of their own.
const PIECE: usize = 1024;
/// Rows of a thread, for each thread, that take much longer than adding up the threads' sums.
const SPLIT: usize = 32;
/// Adjacent columns, of which the next rows' elements are prefetched while these are added: one cache line at a time,
/// for a long row's at once are more than a processor waits for, and hold up what it reads now.
const LINE: usize = 32;
/// Columns whose terms are computed before they are added up.
const BLOCK: usize = 512;

/// The mean of each column; NaN over no rows.
pub fn column_means<E: Element>(p: Rows<'_, E>, threads: NonZeroUsize) -> Vec<f64> {
    let mut means = column_sums(p, threads);
    for mean in &mut means {
        *mean /= p.rows() as f64;
    }
    means
}

/// The sum of each column.
pub fn column_sums<E: Element>(p: Rows<'_, E>, threads: NonZeroUsize) -> Vec<f64> {
    let mut sums = vec![0.0; p.cols()];
    if parts_are_columns(&p, threads.get()) {
        let ranges = split(p.cols(), threads);
        let jobs: Vec<_> = cut(&mut sums, &ranges, 1)
            .into_iter()
            .zip(ranges)
            .map(|(sums, range)| {
                let part = ColumnSums {
                    p: p.columns(range),
                    sums,
                };
                move || dispatch(part)
            })
            .collect();
        run(jobs);
        return sums;
    }
    let jobs: Vec<_> = split(p.rows(), threads)
        .into_iter()
        .map(|range| {
            move || {
                let mut sums = vec![0.0; p.cols()];
                dispatch(ColumnSums {
                    p: p.slice(range),
                    sums: &mut sums,
                });
                sums
            }
        })
        .collect();
    for part in run(jobs) {
        reduce::add(&mut sums, &part);
    }
    sums
}

/// Whether each thread gets some columns, of all rows, and not some rows, of whose sums one thread makes one.
fn parts_are_columns<E: Element>(p: &Rows<'_, E>, threads: usize) -> bool {
    if by_columns(p) {
        return p.cols() >= threads;
    }
    p.cols() >= PIECE * threads && p.rows() < threads * threads * SPLIT
}

/// Whether a sum takes one column after the other.
fn by_columns<E: Element>(p: &Rows<'_, E>) -> bool {
    p.column_major() && p.rows() >= TALL
}

/// Adds every row to `sums`.
struct ColumnSums<'a, 'b, E> {
    p: Rows<'a, E>,
    sums: &'b mut [f64],
}

impl<E: Element> Kernel for ColumnSums<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { p, sums } = self;
        if by_columns(&p) {
            let columns = p.transposed();
            let mut scratch = columns.scratch();
            for (c, sum) in sums.iter_mut().enumerate() {
                let column = columns.in_turn(c, &mut scratch);
                *sum += if column.len() < SUMS {
                    short_sum(column)
                } else {
                    wide_sum::<E>(column)
                };
            }
            return;
        }
        let cols = p.cols();
        let group = (WIDTH / cols.max(1)).max(1);
        let mut start = 0;
        if let Some(wide) = p.grouped(group).filter(|_| group > 1) {
            let mut partial = vec![0.0; group * cols];
            add_rows(wide, &mut partial);
            for part in partial.chunks_exact(cols) {
                reduce::add(sums, part);
            }
            start = wide.rows() * group;
        } else if cols <= NARROW {
            return narrow(p, sums);
        }
        let p = p.slice(start..p.rows());
        const { assert!(CONVERTED <= Rows::<E>::WIDEST / TOGETHER) };
        let tile = if p.in_place(1) { TILE } else { CONVERTED };
        for (k, sums) in sums.chunks_mut(tile).enumerate() {
            add_rows(p.columns(k * tile..k * tile + sums.len()), sums);
        }
    }
}

/// The sum of a few numbers, in f64: for a mean near 1, `1 - mean` is in the last digits. Only of half types, which
/// have fewer digits than f32, are so few added in f32, which saves conversions.
#[inline(always)]
fn few<E: Element>([a, b, c, d]: [E::Acc; TOGETHER]) -> f64 {
    if E::EXACT {
        return (a.to_f64() + b.to_f64()) + (c.to_f64() + d.to_f64());
    }
    ((a + b) + (c + d)).to_f64()
}

/// The sum of adjacent numbers.
#[inline(always)]
fn wide_sum<E: Element>(numbers: &[E::Acc]) -> f64 {
    let mut lanes = [0.0; SUMS];
    let (chunks, rest) = numbers.as_chunks::<{ SUMS * TOGETHER }>();
    for chunk in chunks {
        for (k, lane) in lanes.iter_mut().enumerate() {
            let [a, b, c, d] = [k, SUMS + k, 2 * SUMS + k, 3 * SUMS + k];
            *lane += few::<E>([chunk[a], chunk[b], chunk[c], chunk[d]]);
        }
    }
    for chunk in rest.chunks(SUMS) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x.to_f64();
        }
    }
    reduce::sum(&lanes)
}

/// The sum of a few adjacent numbers, for which clearing and adding up many lanes would take longer.
#[inline(always)]
fn short_sum<F: Real>(numbers: &[F]) -> f64 {
    let mut lanes = [0.0; FEW_SUMS];
    let (chunks, rest) = numbers.as_chunks::<FEW_SUMS>();
    for chunk in chunks {
        for k in 0..FEW_SUMS {
            lanes[k] += chunk[k].to_f64();
        }
    }
    let mut total = 0.0;
    for x in rest {
        total += x.to_f64();
    }
    total + reduce::folded_eight(lanes, f64::add)
}

/// Adds the rows, of at most [`CONVERTED`] columns unless they are read in place, to `sums`.
#[inline(always)]
fn add_rows<E: Element>(p: Rows<'_, E>, sums: &mut [f64]) {
    let mut scratch = p.scratch();
    let whole = p.rows() / TOGETHER * TOGETHER;
    let in_place = p.in_place(1);
    for i in (0..whole).step_by(TOGETHER) {
        if in_place {
            add_in_place(&p, i, sums);
        } else {
            add_together::<E>(p.several::<TOGETHER>(i, &mut scratch), sums);
        }
    }
    for i in whole..p.rows() {
        for (sum, &p) in sums.iter_mut().zip(p.in_turn(i, &mut scratch)) {
            *sum += p.to_f64();
        }
    }
}

/// Adds [`TOGETHER`] rows to `sums`.
#[inline(always)]
fn add_together<E: Element>([a, b, c, d]: [&[E::Acc]; TOGETHER], sums: &mut [f64]) {
    for ((((sum, &a), &b), &c), &d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        *sum += few::<E>([a, b, c, d]);
    }
}

/// Adds [`TOGETHER`] rows from `i` on, which are read in place, to `sums`, and prefetches as many after them.
#[inline(always)]
fn add_in_place<E: Element>(p: &Rows<'_, E>, i: usize, sums: &mut [f64]) {
    let rows: [_; TOGETHER] = from_fn(|k| p.row(i + k, &mut []).as_chunks::<LINE>());
    let (lines, rest) = sums.as_chunks_mut::<LINE>();
    for (at, sums) in lines.iter_mut().enumerate() {
        for next in i + TOGETHER..i + 2 * TOGETHER {
            for column in (0..LINE).step_by(CACHE_LINE / size_of::<E>()) {
                prefetch(p.address(next, at * LINE + column));
            }
        }
        let [a, b, c, d] = rows.map(|(lines, _)| &lines[at]);
        for l in 0..LINE {
            sums[l] += few::<E>([a[l], b[l], c[l], d[l]]);
        }
    }
    add_together::<E>(rows.map(|(_, rest)| rest), rest);
}

/// Adds rows of at most [`NARROW`] columns to `sums`.
#[inline(always)]
fn narrow<E: Element>(p: Rows<'_, E>, sums: &mut [f64]) {
    match p.cols() {
        1 => add_narrow::<E, 1>(p, sums),
        2 => add_narrow::<E, 2>(p, sums),
        3 => add_narrow::<E, 3>(p, sums),
        4 => add_narrow::<E, 4>(p, sums),
        5 => add_narrow::<E, 5>(p, sums),
        6 => add_narrow::<E, 6>(p, sums),
        7 => add_narrow::<E, 7>(p, sums),
        NARROW => add_narrow::<E, NARROW>(p, sums),
        _ => {}
    }
}

/// Adds rows of `N` columns to `sums`.
#[inline(always)]
fn add_narrow<E: Element, const N: usize>(p: Rows<'_, E>, sums: &mut [f64]) {
    let mut total = [0.0; N];
    let whole = p.rows() / TOGETHER * TOGETHER;
    for i in (0..whole).step_by(TOGETHER) {
        for (c, sum) in total.iter_mut().enumerate() {
            let [a, b, c, d] = [i, i + 1, i + 2, i + 3].map(|i| p.element(i, c));
            *sum += few::<E>([a, b, c, d]);
        }
    }
    for i in whole..p.rows() {
        for (c, sum) in total.iter_mut().enumerate() {
            *sum += p.element(i, c).to_f64();
        }
    }
    reduce::add(sums, &total);
}

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
    fn sums_of_f32_are_not_rounded() {
        // In f32, four of these numbers add up to 4.
        let column = |k: usize| {
            if k % 4 == 3 {
                1.0
            } else {
                1.0 - f32::EPSILON / 2.0
            }
        };
        for (rows, cols) in [(40, 2), (400, 3), (1024, 9), (64, 70), (8, 9001)] {
            let by_columns: Vec<f32> = (0..rows * cols).map(|at| column(at % rows)).collect();
            let by_rows: Vec<f32> = (0..rows * cols).map(|at| column(at / cols)).collect();
            let apart: Vec<f32> = by_rows.iter().flat_map(|&x| [x, 9.0]).collect();
            let blocks: Vec<f32> = (0..rows * cols)
                .map(|at| column(at / cols / (rows / 4)))
                .collect();
            let exact = 1.0 - 0.75 * f64::from(f32::EPSILON) / 2.0;
            for p in [
                Rows::contiguous(&by_columns, cols, rows)
                    .unwrap()
                    .transposed(),
                Rows::contiguous(&by_rows, rows, cols).unwrap(),
                Rows::contiguous(&blocks, rows, cols).unwrap(),
                // SAFETY: every second element of `apart`.
                unsafe { Rows::strided(apart.as_ptr(), (rows, cols), (2 * cols as isize, 2)) },
            ] {
                for mean in column_means(p, NonZeroUsize::MIN) {
                    assert!((mean - exact).abs() < 1e-15, "{rows} {cols} {mean}");
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

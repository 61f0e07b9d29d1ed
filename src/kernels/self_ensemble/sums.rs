//! The sums of the columns of a matrix, in f64.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::parallel::{cut, run, split};
use super::super::real::Real;
use super::super::reduce;
use super::super::rows::{CACHE_LINE, Rows, prefetch};
use super::WIDTH;
use std::array::from_fn;
use std::num::NonZeroUsize;
use std::ops::Add;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}

//! Products on one thread, which need not wait for others.

use super::Multiply;
use crate::kernels::isa::{Isa, Kernel, dispatch};
use crate::kernels::mirror::mirror;
use crate::kernels::real::Real;
use std::convert::Infallible;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::ops::Range;

/// This thread alone.
pub struct Alone;

impl<F: Real> Multiply<F> for Alone {
    type Error = Infallible;

    fn dots(
        &self,
        x: &[F],
        y: &[F],
        width: usize,
        upper: bool,
        out: &mut [F],
    ) -> Result<(), Infallible> {
        dispatch(Dots {
            x,
            y,
            width,
            upper,
            out,
        });
        Ok(())
    }

    fn combine(
        &self,
        f: &[F],
        x: &[F],
        width: usize,
        add: bool,
        out: &mut [F],
    ) -> Result<(), Infallible> {
        dispatch(Combine {
            f,
            strides: (x.len() / width, 1),
            x,
            width,
            add,
            upper: false,
            out,
        });
        Ok(())
    }

    fn outer(&self, x: &[F], width: usize, out: &mut [F]) -> Result<(), Infallible> {
        dispatch(Combine {
            f: x,
            strides: (1, width),
            x,
            width,
            add: true,
            upper: true,
            out,
        });
        Ok(())
    }

    fn finish(&self, width: usize, out: &mut [F]) {
        mirror(out, width, NonZeroUsize::MIN);
    }
}

/// Rows and columns of the result of [`Dots`] that are computed together.
const WIDE: usize = 3;
/// Independent partial sums of a dot product.
const TERMS: usize = 4;
/// Rows of the result of [`Combine`] that are computed together: enough to hide the latency of their sums, and
/// few enough for the registers of AVX2.
const HIGH: usize = 6;
/// Columns of the result of [`Combine`] that are computed together.
const LANES: usize = 8;

struct Dots<'a, F> {
    x: &'a [F],
    y: &'a [F],
    width: usize,
    upper: bool,
    out: &'a mut [F],
}

impl<F: Real> Kernel for Dots<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let (high, across) = (self.x.len() / self.width, self.y.len() / self.width);
        for top in (0..high).step_by(WIDE) {
            let x = rows(self.x, top..high.min(top + WIDE), self.width);
            let left = if self.upper { top } else { 0 };
            for left in (left..across).step_by(WIDE) {
                let right = across.min(left + WIDE);
                let sums = dots::<I, F>(x, rows(self.y, left..right, self.width));
                let out = self.out.chunks_exact_mut(across).skip(top);
                for (out, sums) in out.zip(&sums) {
                    for (out, &sum) in out[left..right].iter_mut().zip(sums) {
                        *out += sum;
                    }
                }
            }
        }
    }
}

/// The rows of `range`. The last one stands in for missing ones, whose sums are discarded.
#[inline(always)]
fn rows<F>(of: &[F], range: Range<usize>, width: usize) -> [&[F]; WIDE] {
    std::array::from_fn(|r| {
        let i = (range.start + r).min(range.end - 1);
        &of[i * width..(i + 1) * width]
    })
}

#[inline(always)]
fn dots<I: Isa, F: Real>(x: [&[F]; WIDE], y: [&[F]; WIDE]) -> [[F; WIDE]; WIDE] {
    let (x, x_rest) = chunks(x);
    let (y, y_rest) = chunks(y);
    let mut sums = [[[F::ZERO; TERMS]; WIDE]; WIDE];
    let count = x[0].len();
    let (x, y) = (x.map(|x| &x[..count]), y.map(|y| &y[..count]));
    for c in 0..count {
        for r in 0..WIDE {
            for s in 0..WIDE {
                for t in 0..TERMS {
                    sums[r][s][t] = x[r][c][t].mul_add::<I>(y[s][c][t], sums[r][s][t]);
                }
            }
        }
    }
    // If LLVM saw how the lanes are reduced, it would shuffle them accordingly in each iteration of the loop.
    let sums = black_box(sums);
    let mut out = [[F::ZERO; WIDE]; WIDE];
    for r in 0..WIDE {
        for s in 0..WIDE {
            let [a, b, c, d] = sums[r][s];
            out[r][s] = (a + c) + (b + d);
            for (&x, &y) in x_rest[r].iter().zip(y_rest[s]) {
                out[r][s] = x.mul_add::<I>(y, out[r][s]);
            }
        }
    }
    out
}

/// Each row in pieces of [`TERMS`], and its remainder.
#[inline(always)]
fn chunks<const N: usize, F>(rows: [&[F]; N]) -> ([&[[F; TERMS]]; N], [&[F]; N]) {
    (
        rows.map(|row| row.as_chunks::<TERMS>().0),
        rows.map(|row| row.as_chunks::<TERMS>().1),
    )
}

struct Combine<'a, F> {
    f: &'a [F],
    /// From `f_ij` to `f_(i+1)j` and to `f_i(j+1)`.
    strides: (usize, usize),
    x: &'a [F],
    width: usize,
    add: bool,
    upper: bool,
    out: &'a mut [F],
}

impl<F: Real> Kernel for Combine<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let width = self.width;
        let (down, along) = self.strides;
        let mut panel = vec![[F::ZERO; HIGH]; self.x.len() / width];
        let last = padded(self.x, width);
        for (k, rows) in self.out.chunks_mut(HIGH * width).enumerate() {
            let high = rows.len() / width;
            for r in 0..HIGH {
                // As in `rows`.
                let start = (k * HIGH + r.min(high - 1)) * down;
                for (j, f) in panel.iter_mut().enumerate() {
                    f[r] = self.f[start + j * along];
                }
            }
            let first = if self.upper { k * HIGH } else { 0 };
            for left in (first / LANES * LANES..width).step_by(LANES) {
                let wide = LANES.min(width - left);
                let mut sums = [[F::ZERO; LANES]; HIGH];
                if wide == LANES {
                    for (f, x) in panel.iter().zip(self.x.chunks_exact(width)) {
                        if let Some(x) = x[left..].first_chunk() {
                            add_multiples::<I, F>(&mut sums, f, x);
                        }
                    }
                } else {
                    for (f, x) in panel.iter().zip(&last) {
                        add_multiples::<I, F>(&mut sums, f, x);
                    }
                }
                for (row, sums) in rows.chunks_exact_mut(width).zip(&sums) {
                    for (out, &sum) in row[left..left + wide].iter_mut().zip(sums) {
                        *out = if self.add { *out + sum } else { sum };
                    }
                }
            }
        }
    }
}

/// The last `width % LANES` columns of each row, padded with zeros.
#[inline(always)]
fn padded<F: Real>(rows: &[F], width: usize) -> Vec<[F; LANES]> {
    let start = width / LANES * LANES;
    if start == width {
        return Vec::new();
    }
    let pad = |row: &[F]| {
        let mut all = [F::ZERO; LANES];
        for (all, &x) in all.iter_mut().zip(&row[start..]) {
            *all = x;
        }
        all
    };
    rows.chunks_exact(width).map(pad).collect()
}

#[inline(always)]
fn add_multiples<I: Isa, F: Real>(sums: &mut [[F; LANES]; HIGH], f: &[F; HIGH], x: &[F; LANES]) {
    for r in 0..HIGH {
        for l in 0..LANES {
            sums[r][l] = f[r].mul_add::<I>(x[l], sums[r][l]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, step: usize) -> Vec<f64> {
        (0..count).map(|k| (k * step % 11) as f64 - 5.0).collect()
    }

    #[test]
    fn products_match_loops_in_every_size() {
        for (n, m, width) in [
            (1, 1, 1),
            (2, 5, 3),
            (3, 3, 4),
            (7, 4, 13),
            (5, 9, 8),
            (4, 8, 21),
        ] {
            let (x, y) = (numbers(n * width, 7), numbers(m * width, 3));
            let dot = |i: usize, j: usize| -> f64 {
                (0..width)
                    .map(|c| x[i * width + c] * y[j * width + c])
                    .sum()
            };
            let (mut all, mut upper) = (vec![1.0; n * m], vec![1.0; n * m]);
            let Ok(()) = Alone.dots(&x, &y, width, false, &mut all);
            let Ok(()) = Alone.dots(&x, &y, width, true, &mut upper);
            for (i, j) in (0..n).flat_map(|i| (0..m).map(move |j| (i, j))) {
                assert_eq!(all[i * m + j], 1.0 + dot(i, j));
                assert!(j < i || upper[i * m + j] == 1.0 + dot(i, j));
            }

            let f = numbers(n * m, 5);
            let (mut out, mut sum) = (vec![2.0; n * width], vec![2.0; n * width]);
            let Ok(()) = Alone.combine(&f, &y, width, false, &mut out);
            let Ok(()) = Alone.combine(&f, &y, width, true, &mut sum);
            for (i, c) in (0..n).flat_map(|i| (0..width).map(move |c| (i, c))) {
                let expected: f64 = (0..m).map(|j| f[i * m + j] * y[j * width + c]).sum();
                assert_eq!(out[i * width + c], expected);
                assert_eq!(sum[i * width + c], 2.0 + expected);
            }

            let mut out = vec![3.0; width * width];
            let Ok(()) = Alone.outer(&x, width, &mut out);
            Alone.finish(width, &mut out);
            for (c, d) in (0..width).flat_map(|c| (0..width).map(move |d| (c, d))) {
                let expected: f64 = (0..n).map(|i| x[i * width + c] * x[i * width + d]).sum();
                assert_eq!(out[c * width + d], 3.0 + expected);
            }
        }
    }
}

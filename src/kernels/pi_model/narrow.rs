//! The sweep over narrow rows, many at a time; their sums are taken side by side.

use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::lanes::Narrow;
use super::super::quad::{self, Quad, STEP};
use super::super::real::Real;
use super::super::rows::{Spread, store_row};
use super::Sweep;

impl<E: Element> Kernel for Narrow<Sweep<'_, E>> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self(Sweep {
            a,
            b,
            mask,
            factor,
            range,
            mut out,
        }) = self;
        let cols = a.cols();
        let ((group, mut scratch_a), (_, mut scratch_b)) = (a.groups(), b.groups());
        let mut difference = vec![E::Acc::ZERO; group * cols];
        for start in range.clone().step_by(group) {
            let rows = start..range.end.min(start + group);
            let here = start - range.start..rows.end - range.start;
            let a = a.block(rows.clone(), &mut scratch_a);
            let b = b.block(rows.clone(), &mut scratch_b);
            let difference = &mut difference[..a.len()];
            for ((d, &a), &b) in difference.iter_mut().zip(a).zip(b) {
                *d = a - b;
            }
            sums_of_squares(difference, &mut out.distances[here.clone()]);
            let mut grads = [&mut out.grad_a, &mut out.grad_b].map(|grad| {
                let grad = grad.as_deref_mut()?;
                Some(&mut grad[here.start * cols..here.end * cols])
            });
            match mask {
                Some(mask) => dispatch(Weighted {
                    difference,
                    mask: &mask[rows],
                    factor: 2.0 * factor,
                    grads,
                }),
                None => {
                    for (grad, sign) in grads.iter_mut().zip([1.0, -1.0]) {
                        if let Some(grad) = grad {
                            store_row(difference, E::Acc::of(sign * 2.0 * factor), grad);
                        }
                    }
                }
            }
        }
    }
}

/// The sum of squares of each of `sums.len()` contiguous rows.
#[inline(always)]
fn sums_of_squares<F: Real>(rows: &[F], sums: &mut [f64]) {
    match rows.len() / sums.len().max(1) {
        0 => sums.fill(0.0),
        1 => of_few::<F, 1>(rows, sums),
        2 => of_few::<F, 2>(rows, sums),
        3 => of_few::<F, 3>(rows, sums),
        cols => {
            let (quads, others) = sums.as_chunks_mut::<STEP>();
            let (whole, rest) = rows.split_at(quads.len() * STEP * cols);
            for (sums, rows) in quads.iter_mut().zip(whole.chunks_exact(STEP * cols)) {
                *sums = of_quad(rows, cols).map(F::to_f64);
            }
            for (sum, row) in others.iter_mut().zip(rest.chunks_exact(cols)) {
                *sum = of_one(row).to_f64();
            }
        }
    }
}

/// For rows of `N` numbers.
#[inline(always)]
fn of_few<F: Real, const N: usize>(rows: &[F], sums: &mut [f64]) {
    for (sum, row) in sums.iter_mut().zip(rows.as_chunks::<N>().0) {
        *sum = of_one(row).to_f64();
    }
}

/// For [`STEP`] rows of `cols >= STEP` numbers.
#[inline(always)]
fn of_quad<F: Real>(rows: &[F], cols: usize) -> Quad<F> {
    let mut totals = [F::ZERO; STEP];
    let mut add = |column: &Quad<F>| {
        for (total, &x) in totals.iter_mut().zip(column) {
            *total += x * x;
        }
    };
    let last = cols - cols % STEP;
    for c in (0..last).step_by(STEP) {
        quad::columns(rows, c, cols).iter().for_each(&mut add);
    }
    for c in last..cols {
        add(&[
            rows[c],
            rows[cols + c],
            rows[2 * cols + c],
            rows[3 * cols + c],
        ]);
    }
    totals
}

/// For one row.
#[inline(always)]
fn of_one<F: Real>(row: &[F]) -> F {
    let mut total = F::ZERO;
    for &x in row {
        total += x * x;
    }
    total
}

/// Writes the gradients of some rows where each has a factor of its own. Compiled separately from the sums, which would
/// otherwise lose registers to it.
struct Weighted<'a, 'b, E: Element> {
    difference: &'a [E::Acc],
    mask: &'a [f64],
    factor: f64,
    grads: [Option<&'b mut [E]>; 2],
}

impl<E: Element> Kernel for Weighted<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self) {
        let cols = self.difference.len() / self.mask.len();
        let mut spread = Spread::new(cols);
        let rows = spread.rows();
        let groups = self.difference.chunks(rows * cols);
        for (k, (difference, mask)) in groups.zip(self.mask.chunks(rows)).enumerate() {
            let factors = spread.each(mask, self.factor);
            for (grad, sign) in self.grads.iter_mut().zip([E::Acc::ONE, -E::Acc::ONE]) {
                if let Some(grad) = grad {
                    let grad = &mut grad[k * rows * cols..];
                    for ((g, &d), &factor) in grad.iter_mut().zip(difference).zip(factors) {
                        *g = E::store(d * factor * sign);
                    }
                }
            }
        }
    }
}

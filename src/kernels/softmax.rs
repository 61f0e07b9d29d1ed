//! One softmax row: its largest probability, and its split into one class and the rest.
//!
//! `p = softmax(z)` splits into `p_a` of class `a` and the rest, which is summed on its own: `1 - p_a`
//! and `p_a - 1` then keep their digits where `p_a` is near 1. Every loss that depends on `z` through
//! `p_a` alone has the gradient `w (p - onehot_a)` with some number `w`: 1 for the cross entropy
//! `-ln p_a`, `-p_a dL/dp_a` in general.

use super::element::{Element, round_to};
use super::isa::Isa;
use super::real::Real;
use super::reduce;
use super::rows::store_row;

/// The largest probability as the storage type holds it, from `total = sum_c e^{z_c - max}`.
#[inline(always)]
pub fn confidence<E: Element>(total: f64) -> E::Acc {
    round_to::<E>(E::Acc::ONE / E::Acc::of(total))
}

/// `sum_c e^{z_c - max}` in two parts.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// Of the class itself.
    pub own: f64,
    /// Of all others.
    pub others: f64,
}

impl Split {
    /// Both parts.
    #[inline(always)]
    pub fn total(&self) -> f64 {
        self.own + self.others
    }

    /// `p_a`
    #[inline(always)]
    pub fn probability(&self) -> f64 {
        self.own / self.total()
    }

    /// `1 - p_a`, without cancellation.
    #[inline(always)]
    pub fn remainder(&self) -> f64 {
        self.others / self.total()
    }
}

/// Splits the row `z` at class `label`; `max` is the row's maximum. Leaves in `p`, of the same length,
/// `e^{z_c - max}` of the other classes, and 0 at `label`.
#[inline(always)]
pub fn split<I: Isa, F: Real>(z: &[F], max: F, label: usize, p: &mut [F]) -> Split {
    reduce::exp_shifted::<I, _>(z, max, F::ONE, p);
    let own = std::mem::replace(&mut p[label], F::ZERO);
    Split {
        own: own.to_f64(),
        others: reduce::sum(p),
    }
}

/// As [`split`], and writes `weight (p - onehot)` into `grad`. `spare` has room for the row.
#[inline(always)]
pub fn split_with_gradient<I: Isa, E: Element>(
    z: &[E::Acc],
    max: E::Acc,
    label: usize,
    weight: impl FnOnce(&Split) -> f64,
    spare: &mut [E::Acc],
    grad: &mut [E],
) -> Split {
    if let Some(grad) = E::exact_mut(grad) {
        return fill::<I, _>(z, max, label, weight, grad);
    }
    let split = fill::<I, _>(z, max, label, weight, spare);
    store_row(spare, E::Acc::ONE, grad);
    split
}

/// [`split_with_gradient`] in the computing type. A function, not a closure: only functions can be forced
/// inline into the code for an instruction set.
#[inline(always)]
fn fill<I: Isa, F: Real>(
    z: &[F],
    max: F,
    label: usize,
    weight: impl FnOnce(&Split) -> f64,
    p: &mut [F],
) -> Split {
    let split = split::<I, _>(z, max, label, p);
    let factor = weight(&split) / split.total();
    let rounded = F::of(factor);
    for p in &mut *p {
        *p *= rounded;
    }
    p[label] = F::of(-split.others * factor);
    split
}

#[cfg(test)]
mod tests {
    use super::super::element::Bf16;
    use super::super::isa::Baseline;
    use super::*;

    #[test]
    fn the_remainder_keeps_its_digits() {
        let z = [30.0f32, 0.0, 1.0];
        let got = split::<Baseline, _>(&z, 30.0, 0, &mut [0.0; 3]);
        let exact = ((-30f64).exp() + (-29f64).exp()) / (1.0 + (-30f64).exp() + (-29f64).exp());
        assert!((got.remainder() / exact - 1.0).abs() < 1e-6);
        assert!((got.probability() - 1.0).abs() < 1e-12);
        let mut grad = [0.0f32; 3];
        let same = split_with_gradient::<Baseline, f32>(&z, 30.0, 0, |_| 2.0, &mut [], &mut grad);
        assert!((same.total() - got.total()).abs() < 1e-12);
        assert!(
            (f64::from(grad[0]) / (-2.0 * exact) - 1.0).abs() < 1e-6,
            "{grad:?}"
        );
        assert!(f64::from(grad[0] + grad[1] + grad[2]).abs() < 1e-6 * exact);
    }

    #[test]
    fn half_types_pass_through_the_spare_row() {
        let z = [1.0f32, 2.0];
        let (mut spare, mut grad) = ([0.0f32; 2], [Bf16(0); 2]);
        split_with_gradient::<Baseline, Bf16>(
            &z,
            2.0,
            1,
            |s| 1.0 / s.probability(),
            &mut spare,
            &mut grad,
        );
        let p = 1.0 / (1.0 + 1f32.exp());
        assert!((grad[0].load() - p / (1.0 - p)).abs() < 4e-3);
        assert_eq!(confidence::<Bf16>(2.0), 0.5);
    }
}

//! The sweep over contiguous columns.

use super::super::columns::{Each, sweep};
use super::super::element::Element;
use super::super::isa::Isa;
use super::super::mcc::ENTROPY_EPSILON;
use super::super::real::Real;
use super::super::rows::Rows;
use std::num::NonZeroUsize;

/// As [`entropy`](super::entropy()), for a matrix with contiguous columns; the columns of the gradient are, too.
pub fn entropy_by_columns<E: Element>(
    p: Rows<'_, E>,
    out: &mut [f64],
    grad: Option<&mut [E]>,
    weight: f64,
    threads: NonZeroUsize,
) {
    let weights = vec![E::Acc::of(weight); p.rows()];
    sweep::<E, Entropy, 1>([p], &weights, out, [grad], threads);
}

/// `-p ln(p + epsilon)`
struct Entropy;

impl Each<1> for Entropy {
    #[inline(always)]
    fn term<I: Isa, F: Real>([p]: [F; 1]) -> (F, F) {
        let shifted = p + F::of(ENTROPY_EPSILON);
        let log = shifted.ln::<I>();
        (-p * log, -(log + p / shifted))
    }
}

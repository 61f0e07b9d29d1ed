//! The sweep over contiguous columns.

use super::super::columns::{Each, sweep};
use super::super::element::Element;
use super::super::isa::Isa;
use super::super::real::Real;
use super::super::rows::Rows;
use super::Outputs;
use std::num::NonZeroUsize;

/// As [`pi_model`](super::pi_model()), for matrices with contiguous columns; the columns of the gradients are, too.
pub fn pi_model_by_columns<E: Element>(
    a: Rows<'_, E>,
    b: Rows<'_, E>,
    mask: Option<&[f64]>,
    factor: f64,
    out: Outputs<'_, E>,
    threads: NonZeroUsize,
) {
    let weight = |m: f64| E::Acc::of(2.0 * factor * m);
    let weights = match mask {
        Some(mask) => mask.iter().map(|&m| weight(m)).collect(),
        None => vec![weight(1.0); a.rows()],
    };
    let grads = [out.grad_a, out.grad_b];
    sweep::<E, Squares, 2>([a, b], &weights, out.distances, grads, threads);
}

/// `(a - b)^2`; the factor 2 of its derivative is in the weights.
struct Squares;

impl Each<2> for Squares {
    #[inline(always)]
    fn term<I: Isa, F: Real>([a, b]: [F; 2]) -> (F, F) {
        let difference = a - b;
        (difference * difference, difference)
    }
}

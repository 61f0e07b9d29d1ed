//! The matrices for a range of classes, and the sweeps over them.

use super::super::super::element::Element;
use super::super::super::isa::{Isa, Kernel, dispatch};
use super::super::super::parallel::{cut, run, split};
use super::super::super::real::Real;
use super::super::super::reduce;
use super::super::{Inverse, Pair, Pairs, Reader};
use std::num::NonZeroUsize;
use std::ops::Range;

/// The matrices for a range of classes: each row has one element per class.
pub(super) struct Matrices {
    delta: Vec<f64>,
    b: Vec<f64>,
    alpha: Vec<f64>,
    epsilon: Vec<f64>,
    /// The classes that they are of.
    classes: Range<usize>,
}

impl Matrices {
    pub(super) fn new(size: usize) -> Self {
        let room = || vec![0.0; size];
        Self {
            delta: room(),
            b: room(),
            alpha: room(),
            epsilon: room(),
            classes: 0..0,
        }
    }

    /// `delta`, `b`, `alpha` and `epsilon`, of which `size` elements are in use.
    pub(super) fn of(&self, size: usize) -> [&[f64]; 4] {
        [&self.delta, &self.b, &self.alpha, &self.epsilon].map(|of| &of[..size])
    }

    /// Computes the matrices for `classes`, if they are of others. All else is the same in every call.
    pub(super) fn load<E: Element>(
        &mut self,
        pairs: Pairs<'_, E>,
        (found, inverse): (&[Pair], &Inverse),
        classes: &Range<usize>,
        threads: NonZeroUsize,
    ) {
        if self.classes == *classes {
            return;
        }
        self.classes = classes.clone();
        let width = classes.len();
        let shares = split(found.len(), threads);
        let rows = shares.iter();
        let matrices = cut(&mut self.delta, &shares, width)
            .into_iter()
            .zip(cut(&mut self.b, &shares, width))
            .zip(cut(&mut self.alpha, &shares, width))
            .zip(cut(&mut self.epsilon, &shares, width));
        let jobs: Vec<_> = rows
            .zip(matrices)
            .map(|(rows, (((delta, b), alpha), epsilon))| {
                let load = Load {
                    pairs,
                    found: &found[rows.clone()],
                    inverse,
                    classes: classes.clone(),
                    delta,
                    b,
                    alpha,
                    epsilon,
                };
                move || dispatch(load)
            })
            .collect();
        run(jobs);
    }
}

struct Load<'a, E> {
    pairs: Pairs<'a, E>,
    found: &'a [Pair],
    inverse: &'a Inverse,
    classes: Range<usize>,
    delta: &'a mut [f64],
    b: &'a mut [f64],
    alpha: &'a mut [f64],
    epsilon: &'a mut [f64],
}

impl<E: Element> Kernel for Load<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let width = self.classes.len();
        let mut reader = Reader::new(self.pairs, width);
        let inverse = &self.inverse.weak[self.classes.clone()];
        let inverse_strong = &self.inverse.strong[self.classes.clone()];
        let matrices = self
            .delta
            .chunks_exact_mut(width)
            .zip(self.b.chunks_exact_mut(width))
            .zip(self.alpha.chunks_exact_mut(width))
            .zip(self.epsilon.chunks_exact_mut(width));
        for (pair, (((delta, b), alpha), epsilon)) in self.found.iter().zip(matrices) {
            reader.read_again::<I>(pair, self.classes.clone());
            let sides = || reader.a.iter().zip(&reader.b);
            for ((delta, kept), (&a, &b)) in delta.iter_mut().zip(b).zip(sides()) {
                *delta = a - b;
                *kept = b;
            }
            let out = alpha.iter_mut().zip(epsilon);
            let inverses = inverse.iter().zip(inverse_strong);
            for (((alpha, epsilon), (&a, &b)), (weak, strong)) in out.zip(sides()).zip(inverses) {
                *alpha = a * weak;
                *epsilon = a * weak - b * strong;
            }
        }
    }
}

/// `h_c = sum_i w'_i q'_ic Y_ic` for a range of classes, and `sum_c q'_ic h_c` over them.
pub(super) struct Levels<'a> {
    pub(super) found: &'a [Pair],
    pub(super) alpha: &'a [f64],
    pub(super) epsilon: &'a [f64],
    pub(super) y: &'a [f64],
    pub(super) width: usize,
}

impl Kernel for Levels<'_> {
    type Output = (Vec<f64>, Vec<f64>);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let width = self.width;
        let mut h = vec![0.0; width];
        let rows = self
            .alpha
            .chunks_exact(width)
            .zip(self.epsilon.chunks_exact(width));
        let y = self.y.chunks_exact(width);
        for ((pair, y), (alpha, epsilon)) in self.found.iter().zip(y).zip(rows.clone()) {
            let root = pair.strong.root;
            for (((h, alpha), epsilon), y) in h.iter_mut().zip(alpha).zip(epsilon).zip(y) {
                *h += root * (alpha - epsilon) * y;
            }
        }
        let mut means = Vec::with_capacity(self.found.len());
        for (pair, (alpha, epsilon)) in self.found.iter().zip(rows) {
            let alpha = reduce::sum_of_pairs(alpha, &h, |x, h| x * h);
            let epsilon = reduce::sum_of_pairs(epsilon, &h, |x, h| x * h);
            means.push((alpha - epsilon) / pair.strong.root);
        }
        (h, means)
    }
}

/// The gradient of the chosen rows with respect to a range of classes.
pub(super) struct Gradient<'a, E> {
    pub(super) found: &'a [Pair],
    pub(super) b: &'a [f64],
    pub(super) x: &'a [f64],
    pub(super) y: &'a [f64],
    pub(super) h: &'a [f64],
    /// `1 / s'`
    pub(super) inverse: &'a [f64],
    pub(super) means: &'a [f64],
    pub(super) factor: f64,
    pub(super) out: &'a mut [E],
}

impl<E: Element> Kernel for Gradient<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let width = self.h.len();
        let rows = self
            .b
            .chunks_exact(width)
            .zip(self.x.chunks_exact(width))
            .zip(self.y.chunks_exact(width))
            .zip(self.out.chunks_exact_mut(width));
        for ((pair, &mean), (((b, x), y), out)) in self.found.iter().zip(self.means).zip(rows) {
            // b already includes one of the two factors sqrt(w').
            let factor = self.factor * pair.strong.root;
            let levels = self.h.iter().zip(self.inverse);
            for ((((o, b), x), y), (h, inverse)) in out.iter_mut().zip(b).zip(x).zip(y).zip(levels)
            {
                *o = E::store(E::Acc::of(factor * b * (x + (y - h) * inverse - mean)));
            }
        }
    }
}

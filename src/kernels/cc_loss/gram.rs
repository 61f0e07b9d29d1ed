//! The algorithm that avoids the `C x C` matrix, in f64 as it subtracts nearly equal numbers. With `alpha = a / s`,
//! `beta = b / s'`, `delta = a - b` and `epsilon = alpha - beta` (`n x C`, a range of classes at a time)
//!
//! ```text
//! D = delta^T alpha + b^T epsilon
//! sum D^2 = <delta delta^T, alpha alpha^T> + 2 <delta b^T, alpha epsilon^T> + <b b^T, epsilon epsilon^T>
//! X = (Q' alpha^T) delta + (Q' epsilon^T) b    Q' = beta / sqrt w'
//! Y = (P' delta^T) alpha + (P' b^T) epsilon    P' = b / sqrt w'
//! ```
//!
//! The parenthesized factors are computed from the same `n x n` products, and give
//! `sum_k p'_ik X_ik = sum_k q'_ik Y_ik`. `h` needs `Y` of all rows, and the gradient of any class needs `h` of all
//! classes: hence three passes over the classes.

mod classes;
mod products;

use super::super::Loss;
use super::super::element::Element;
use super::super::isa::{Isa, Kernel, dispatch};
use super::super::parallel::run;
use super::super::product::Multiply;
use super::super::real::Real;
use super::{Inverse, Pair, Pairs, Reader, Sums};
use classes::{Gradient, Levels, Matrices};
use products::{Factors, Grams};
use std::num::NonZeroUsize;
use std::ops::Range;

/// Elements of each matrix for a range of classes, so that the matrices stay in cache.
const ELEMENTS: usize = 1 << 15;
/// Minimum number of classes that are processed at a time.
const CLASSES: usize = 136;
/// Maximum number of rows for which each thread has its own classes and its own products of rows with rows.
pub const FEW: usize = 32;

/// How many numbers [`gram`] keeps of more than [`FEW`] rows, at most.
pub fn room(rows: usize) -> usize {
    6 * rows * rows + 7 * ELEMENTS.max(CLASSES * rows)
}

/// The loss; with `grad` (contiguous, of the shape of the logits) also its gradient. With at most [`FEW`] rows,
/// all threads call `products`.
pub fn gram<E: Element, M>(
    pairs: Pairs<'_, E>,
    grad: Option<&mut [E]>,
    products: &M,
) -> Result<Loss, M::Error>
where
    M: Multiply<f64, Error: Send> + Sync,
{
    let (found, sums) = read(pairs);
    let inverse = sums.inverse();
    drop(sums);
    let scale = pairs.scale(&inverse);
    let mut way = Way::new(pairs, products, &found, &inverse);
    let grams = way.grams()?;
    let square = grams.square();
    if let Some(grad) = grad {
        let factors = grams.factors(&found);
        let (h, means) = way.levels(&factors)?;
        let factor = -2.0 * pairs.factor() * scale / pairs.temperature;
        way.gradient(&factors, (&h, &means), factor, grad)?;
    }
    Ok(Loss {
        value: pairs.factor() * square,
        scale,
    })
}

/// The chosen rows, and their sums.
fn read<E: Element>(pairs: Pairs<'_, E>) -> (Vec<Pair>, Sums) {
    let jobs: Vec<_> = pairs
        .shares(pairs.chosen.len())
        .into_iter()
        .map(|share| {
            let chosen = &pairs.chosen[share];
            move || dispatch(Read { pairs, chosen })
        })
        .collect();
    let (mut found, mut sums) = (Vec::new(), Sums::new(pairs.cols()));
    for (part, of_part) in run(jobs) {
        found.extend(part);
        sums.add(&of_part);
    }
    (found, sums)
}

struct Read<'a, E> {
    pairs: Pairs<'a, E>,
    chosen: &'a [usize],
}

impl<E: Element> Kernel for Read<'_, E> {
    type Output = (Vec<Pair>, Sums);

    #[inline(always)]
    fn run<I: Isa>(self) -> Self::Output {
        let mut reader = Reader::new(self.pairs, self.pairs.cols());
        let mut sums = Sums::new(self.pairs.cols());
        let mut found = Vec::with_capacity(self.chosen.len());
        for &index in self.chosen {
            found.push(reader.read::<I>(index, &mut sums));
        }
        (found, sums)
    }
}

/// One call.
struct Way<'a, E, M> {
    pairs: Pairs<'a, E>,
    products: &'a M,
    found: &'a [Pair],
    inverse: &'a Inverse,
    /// The workers, at least one, that process classes in turn.
    workers: Vec<Worker>,
    /// How many classes each processes at a time.
    width: usize,
    /// Whether all is done in one turn of each worker, which then need not compute anything again.
    once: bool,
}

struct Worker {
    /// Maximum number of threads that compute the matrices.
    threads: NonZeroUsize,
    matrices: Matrices,
    grams: Grams,
    /// `Y`
    y: Vec<f64>,
}

impl<'a, E: Element, M> Way<'a, E, M>
where
    M: Multiply<f64, Error: Send> + Sync,
{
    fn new(pairs: Pairs<'a, E>, products: &'a M, found: &'a [Pair], inverse: &'a Inverse) -> Self {
        let (rows, cols) = (found.len(), pairs.cols());
        let (workers, threads) = if rows <= FEW {
            (pairs.threads, NonZeroUsize::MIN)
        } else {
            (NonZeroUsize::MIN, pairs.threads)
        };
        // The same number of turns for each worker: they wait for each other.
        let most = (ELEMENTS / rows).max(CLASSES);
        let turns = cols.div_ceil(most).next_multiple_of(workers.get());
        let width = cols.div_ceil(turns);
        let worker = |_| Worker {
            threads,
            matrices: Matrices::new(rows * width),
            grams: Grams::default(),
            y: vec![0.0; rows * width],
        };
        Self {
            pairs,
            products,
            found,
            inverse,
            workers: (0..workers.get()).map(worker).collect(),
            width,
            once: turns == workers.get(),
        }
    }

    /// Calls `take` on all classes, a range per worker at a time, and `keep` on the results, in order.
    fn each<T: Send>(
        &mut self,
        take: impl Fn(&mut Worker, Range<usize>) -> Result<T, M::Error> + Sync,
        mut keep: impl FnMut(Range<usize>, T),
    ) -> Result<(), M::Error> {
        let (pairs, found, inverse) = (self.pairs, self.found, self.inverse);
        let (cols, width) = (pairs.cols(), self.width);
        let turns: Vec<_> = (0..cols)
            .step_by(width)
            .map(|start| start..cols.min(start + width))
            .collect();
        let take = &take;
        for turns in turns.chunks(self.workers.len()) {
            let jobs: Vec<_> = self
                .workers
                .iter_mut()
                .zip(turns)
                .map(|(worker, classes)| {
                    move || {
                        let threads = worker.threads;
                        worker
                            .matrices
                            .load(pairs, (found, inverse), classes, threads);
                        take(worker, classes.clone())
                    }
                })
                .collect();
            for (classes, result) in turns.iter().zip(run(jobs)) {
                keep(classes.clone(), result?);
            }
        }
        Ok(())
    }

    /// The products of rows with rows, over all classes.
    fn grams(&mut self) -> Result<Grams, M::Error> {
        let (rows, products) = (self.found.len(), self.products);
        for worker in &mut self.workers {
            worker.grams = Grams::new(rows);
        }
        self.each(
            |worker, classes| {
                let width = classes.len();
                let Worker {
                    matrices, grams, ..
                } = worker;
                let [delta, b, alpha, epsilon] = matrices.of(rows * width);
                products.dots(delta, delta, width, true, &mut grams.dd)?;
                products.dots(delta, b, width, false, &mut grams.db)?;
                products.dots(b, b, width, true, &mut grams.bb)?;
                products.dots(alpha, alpha, width, true, &mut grams.aa)?;
                products.dots(alpha, epsilon, width, false, &mut grams.ae)?;
                products.dots(epsilon, epsilon, width, true, &mut grams.ee)
            },
            |_, ()| {},
        )?;
        let mut parts = self
            .workers
            .iter_mut()
            .map(|worker| std::mem::take(&mut worker.grams));
        let mut sums = parts.next().unwrap_or_default();
        for part in parts {
            sums.add(&part);
        }
        sums.mirror();
        Ok(sums)
    }

    /// `h` of each class, and `sum_k p'_ik (X_ik + (Y_ik - h_k) / s'_k)` of each row.
    fn levels(&mut self, factors: &Factors) -> Result<(Vec<f64>, Vec<f64>), M::Error> {
        let (found, products) = (self.found, self.products);
        let mut h = vec![0.0; self.pairs.cols()];
        let mut means = factors.sums();
        self.each(
            |worker, classes| {
                let width = classes.len();
                let Worker { matrices, y, .. } = worker;
                let [_, _, alpha, epsilon] = matrices.of(found.len() * width);
                let y = &mut y[..alpha.len()];
                factors.y(products, (alpha, epsilon), width, y)?;
                Ok(dispatch(Levels {
                    found,
                    alpha,
                    epsilon,
                    y,
                    width,
                }))
            },
            |classes, (of_classes, of_rows)| {
                h[classes].copy_from_slice(&of_classes);
                for (mean, part) in means.iter_mut().zip(of_rows) {
                    *mean -= part;
                }
            },
        )?;
        Ok((h, means))
    }

    /// Writes the gradient, zeros where no row was chosen.
    fn gradient(
        &mut self,
        factors: &Factors,
        (h, means): (&[f64], &[f64]),
        factor: f64,
        grad: &mut [E],
    ) -> Result<(), M::Error> {
        let (found, products, once) = (self.found, self.products, self.once);
        let (inverse, cols) = (&self.inverse.strong, self.pairs.cols());
        let mut next = found.iter().map(|pair| pair.index).peekable();
        for (i, row) in grad.chunks_exact_mut(cols).enumerate() {
            if next.next_if_eq(&i).is_none() {
                row.fill(E::store(E::Acc::ZERO));
            }
        }
        self.each(
            |worker, classes| {
                let width = classes.len();
                let Worker { matrices, y, .. } = worker;
                let [delta, b, alpha, epsilon] = matrices.of(found.len() * width);
                let (mut x, y) = (vec![0.0; b.len()], &mut y[..b.len()]);
                factors.x(products, (delta, b), width, &mut x)?;
                if !once {
                    factors.y(products, (alpha, epsilon), width, y)?;
                }
                let mut out = vec![E::store(E::Acc::ZERO); b.len()];
                dispatch(Gradient {
                    found,
                    b,
                    x: &x,
                    y,
                    h: &h[classes.clone()],
                    inverse: &inverse[classes],
                    means,
                    factor,
                    out: &mut out,
                });
                Ok(out)
            },
            |classes, out| {
                for (pair, row) in found.iter().zip(out.chunks_exact(classes.len())) {
                    let start = pair.index * cols;
                    grad[start + classes.start..start + classes.end].copy_from_slice(row);
                }
            },
        )
    }
}

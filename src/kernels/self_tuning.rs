//! Contrastive log-probabilities over a key and a queue of keys ordered by class, and where the
//! queue's columns are replaced.
//!
//! Row `i` of the batch has the class `l_i`. Its scores are `s_i0 = q_i . k_i` with its own key and
//! `s_i,1+n = q_i . queue_n` with the `N = K C` columns of the queue, of which class `c` owns
//! `cK..(c+1)K`. The output has the own key first, then the own class, then the others in order:
//!
//! ```text
//! order_i     = 0 | 1 + l_i K .. 1 + (l_i + 1) K | 1 .. 1 + l_i K | 1 + (l_i + 1) K .. 1 + N
//! out_ij      = s_i,order_i(j) / T - ln sum_n e^{s_in / T}
//! ds_i,order_i(j) = (g_ij - e^{out_ij} sum_n g_in) / T        with the incoming gradient g
//! ```
//!
//! The sum does not depend on the order, so one sweep over the scores does both, in place.

use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::parallel::{cut, run, split};
use super::real::Real;
use super::reduce;
use super::rows::{Rows, prefetch};
use std::num::NonZeroUsize;
use std::ops::Range;

/// The number of keys per class, and the temperature.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Keys per class, `K`.
    pub keys: usize,
    /// `T`
    pub temperature: f64,
}

/// Turns scores into log-probabilities, in place. A row of `scores` has `1 + N` places, of which the
/// first is computed here from `queries` and `keys`. Labels must be below `N / K`.
pub fn log_probabilities<F: Element<Acc = F> + Real>(
    scores: &mut [F],
    queries: Rows<'_, F>,
    keys: Rows<'_, F>,
    labels: &[usize],
    shape: Shape,
    threads: NonZeroUsize,
) {
    if labels.is_empty() {
        return;
    }
    let ranges = split(labels.len(), threads);
    let width = scores.len() / labels.len();
    let jobs: Vec<_> = cut(scores, &ranges, width)
        .into_iter()
        .zip(ranges)
        .map(|(scores, range)| {
            let labels = &labels[range.clone()];
            let sweep = Forward {
                scores,
                queries,
                keys,
                range,
                labels,
                width,
                shape,
            };
            move || dispatch(sweep)
        })
        .collect();
    run(jobs);
}

struct Forward<'a, F> {
    scores: &'a mut [F],
    queries: Rows<'a, F>,
    keys: Rows<'a, F>,
    range: Range<usize>,
    labels: &'a [usize],
    width: usize,
    shape: Shape,
}

impl<F: Element<Acc = F> + Real> Kernel for Forward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let keys = self.shape.keys;
        let inverse_t = F::of(1.0 / self.shape.temperature);
        let mut own = vec![F::ZERO; keys];
        let (mut query, mut key) = (self.queries.scratch(), self.keys.scratch());
        let rows = self.scores.chunks_exact_mut(self.width);
        for ((row, i), &label) in rows.zip(self.range).zip(self.labels) {
            let (q, k) = (
                self.queries.in_turn(i, &mut query),
                self.keys.in_turn(i, &mut key),
            );
            row[0] = F::of(reduce::sum_of_pairs(q, k, |q, k| q * k));
            let max = reduce::max(row);
            let total = reduce::sum_of(row, |s| ((s - max) * inverse_t).exp_nonpositive::<I>());
            let log_total = F::of(total.ln());
            let (queue, before) = (&mut row[1..], label * keys);
            own.copy_from_slice(&queue[before..before + keys]);
            queue.copy_within(..before, keys);
            queue[..keys].copy_from_slice(&own);
            for s in row {
                *s = (*s - max).mul_add::<I>(inverse_t, -log_total);
            }
        }
    }
}

/// The gradient with respect to the scores, in the order of the queue, from the `incoming` one and
/// the log-probabilities `out` (contiguous).
pub fn log_probabilities_backward<F: Element<Acc = F> + Real>(
    incoming: Rows<'_, F>,
    out: &[F],
    labels: &[usize],
    shape: Shape,
    grad: &mut [F],
    threads: NonZeroUsize,
) {
    let ranges = split(labels.len(), threads);
    let width = incoming.cols();
    let jobs: Vec<_> = cut(grad, &ranges, width)
        .into_iter()
        .zip(ranges)
        .map(|(grad, range)| {
            let out = &out[range.start * width..range.end * width];
            let labels = &labels[range.clone()];
            let sweep = Backward {
                incoming,
                out,
                range,
                labels,
                shape,
                grad,
            };
            move || dispatch(sweep)
        })
        .collect();
    run(jobs);
}

struct Backward<'a, F> {
    incoming: Rows<'a, F>,
    out: &'a [F],
    range: Range<usize>,
    labels: &'a [usize],
    shape: Shape,
    grad: &'a mut [F],
}

impl<F: Element<Acc = F> + Real> Kernel for Backward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let (width, keys) = (self.incoming.cols(), self.shape.keys);
        let inverse_t = F::of(1.0 / self.shape.temperature);
        let mut scratch = self.incoming.scratch();
        let rows = self
            .grad
            .chunks_exact_mut(width)
            .zip(self.out.chunks_exact(width));
        for (((grad, out), i), &label) in rows.zip(self.range).zip(self.labels) {
            let g = self.incoming.in_turn(i, &mut scratch);
            let total = F::of(-reduce::sum(g));
            let own = 1 + label * keys;
            // In the order of `out`: the own key, the own class, the classes before it, the rest.
            let (g, out) = (
                (&g[..=keys], &g[1 + keys..]),
                (&out[..=keys], &out[1 + keys..]),
            );
            let mut put = |at: usize, g: &[F], out: &[F]| {
                for ((d, &g), &o) in grad[at..].iter_mut().zip(g).zip(out) {
                    *d = o.exp_nonpositive::<I>().mul_add::<I>(total, g) * inverse_t;
                }
            };
            put(0, &g.0[..1], &out.0[..1]);
            put(own, &g.0[1..], &out.0[1..]);
            put(1, &g.1[..own - 1], &out.1[..own - 1]);
            put(own + keys, &g.1[own - 1..], &out.1[own - 1..]);
        }
    }
}

/// Whether all elements are finite.
pub fn finite<E: Element>(rows: Rows<'_, E>) -> bool {
    dispatch(Finite(rows))
}

struct Finite<'a, E>(Rows<'a, E>);

impl<E: Element> Kernel for Finite<'_, E> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self) -> bool {
        let mut scratch = self.0.scratch();
        let mut total = 0.0;
        for i in 0..self.0.rows() {
            let row = self.0.in_turn(i, &mut scratch);
            // 0 while all are finite, NaN for ever after one that is not.
            total += reduce::sum_of_pairs(row, row, |x, _| x * E::Acc::ZERO);
        }
        !total.is_nan()
    }
}

/// Rows of the queue that are written together: a key's elements for them are in one cache line or two.
const TILE: usize = 16;

/// Puts each of the `keys` into its column of the queue, whose rows are `width` long. What was there goes to
/// `replaced`, in the order of the keys. No column occurs twice, and the queue is not empty.
///
/// # Panics
/// If the sizes do not match: a mistake in a kernel.
pub fn exchange<E: Element>(
    queue: &mut [E],
    width: usize,
    keys: &[E],
    columns: &[usize],
    replaced: &mut [E],
    threads: NonZeroUsize,
) {
    let dim = queue.len() / width;
    assert_eq!(
        (columns.len() * dim, replaced.len()),
        (keys.len(), keys.len()),
        "one key for each column"
    );
    let ranges = split(dim, threads);
    let mut parts: Vec<_> = ranges
        .iter()
        .map(|_| Vec::with_capacity(columns.len()))
        .collect();
    for row in replaced.chunks_exact_mut(dim) {
        for (part, row) in parts.iter_mut().zip(cut(row, &ranges, 1)) {
            part.push(row);
        }
    }
    let jobs: Vec<_> = cut(queue, &ranges, width)
        .into_iter()
        .zip(ranges)
        .zip(parts)
        .map(|((queue, range), mut replaced)| {
            let keys = keys.chunks_exact(dim).map(move |key| &key[range.clone()]);
            move || {
                for (k, rows) in queue.chunks_mut(TILE * width).enumerate() {
                    let here = k * TILE..k * TILE + rows.len() / width;
                    let keys = keys.clone().map(|key| &key[here.clone()]);
                    let replaced = replaced.iter_mut().map(|row| &mut row[here.clone()]);
                    exchange_tile(rows, width, keys.zip(replaced).zip(columns));
                }
            }
        })
        .collect();
    run(jobs);
}

/// [`exchange`] for a few rows, and those after them are prefetched: the processor would not foresee single numbers,
/// each in a page of its own.
fn exchange_tile<'a, E: Element>(
    rows: &mut [E],
    width: usize,
    columns: impl Iterator<Item = ((&'a [E], &'a mut [E]), &'a usize)>,
) {
    let next = rows.as_ptr().wrapping_add(rows.len());
    for ((key, replaced), &column) in columns {
        let places = rows.chunks_exact_mut(width).zip(key).zip(replaced);
        for (i, ((row, &new), old)) in places.enumerate() {
            prefetch(next.wrapping_add(i * width + column));
            *old = std::mem::replace(&mut row[column], new);
        }
    }
}

/// A key of the batch that stays in the queue, and its column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The row of the batch.
    pub row: usize,
    /// The column of the queue.
    pub column: usize,
}

/// Where the keys go when they are enqueued row by row, each at its class's pointer, which then
/// moves on and wraps at `keys`. A key that a later one of the batch replaces is left out, so no
/// column occurs twice. The pointers are moved.
pub fn enqueue(labels: &[usize], pointers: &mut [i64], keys: usize) -> Vec<Place> {
    let mut left = vec![0; pointers.len()];
    for &label in labels {
        left[label] += 1;
    }
    let totals = left.clone();
    let mut places = Vec::with_capacity(labels.len());
    for (row, &label) in labels.iter().enumerate() {
        if left[label] <= keys {
            let turn = totals[label] - left[label];
            let column = label * keys + (pointers[label] as usize + turn) % keys;
            places.push(Place { row, column });
        }
        left[label] -= 1;
    }
    for &label in labels {
        pointers[label] = (pointers[label] + 1) % keys as i64;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: f64 = 0.3;

    fn numbers(n: usize, seed: usize) -> Vec<f64> {
        (0..n)
            .map(|k| ((k * 7919 + seed) % 101) as f64 / 80.0 - 0.6)
            .collect()
    }

    /// The order in which a row's scores come out.
    fn order(label: usize, keys: usize, classes: usize) -> Vec<usize> {
        let own = 1 + label * keys..1 + (label + 1) * keys;
        let others = (1..=keys * classes).filter(|n| !own.contains(n));
        std::iter::once(0)
            .chain(own.clone())
            .chain(others)
            .collect()
    }

    #[test]
    fn forward_and_backward_match_the_formula() {
        for (rows, keys, classes, dim) in [(1, 1, 1, 3), (5, 3, 4, 7), (7, 1, 5, 2), (4, 5, 1, 6)] {
            let width = 1 + keys * classes;
            let (q, k) = (numbers(rows * dim, 3), numbers(rows * dim, 17));
            let (queue, g) = (numbers(dim * width, 29), numbers(rows * width, 41));
            let labels: Vec<usize> = (0..rows).map(|i| (i * 3 + 1) % classes).collect();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let mut scores = Vec::new();
            for (q, k) in q.chunks(dim).zip(k.chunks(dim)) {
                scores.push(dot(q, k));
                scores.extend(
                    queue
                        .chunks(dim)
                        .take(width - 1)
                        .map(|column| dot(q, column)),
                );
            }
            let shape = Shape {
                keys,
                temperature: T,
            };
            let q = Rows::contiguous(&q, rows, dim).unwrap();
            let k = Rows::contiguous(&k, rows, dim).unwrap();
            for threads in [1, 3] {
                let threads = NonZeroUsize::new(threads).unwrap();
                let mut out = scores.clone();
                out.iter_mut().step_by(width).for_each(|s| *s = f64::NAN);
                log_probabilities(&mut out, q, k, &labels, shape, threads);
                let mut grad = vec![f64::NAN; out.len()];
                let incoming = Rows::contiguous(&g, rows, width).unwrap();
                log_probabilities_backward(incoming, &out, &labels, shape, &mut grad, threads);
                for i in 0..rows {
                    let at = i * width..(i + 1) * width;
                    let (s, out, g, grad) = (
                        &scores[at.clone()],
                        &out[at.clone()],
                        &g[at.clone()],
                        &grad[at],
                    );
                    let log_total = s.iter().map(|s| (s / T).exp()).sum::<f64>().ln();
                    let total: f64 = g.iter().sum();
                    for (j, n) in order(labels[i], keys, classes).into_iter().enumerate() {
                        assert!((out[j] - (s[n] / T - log_total)).abs() < 1e-12);
                        let expected = (g[j] - out[j].exp() * total) / T;
                        assert!((grad[n] - expected).abs() < 1e-12, "{i} {j} {n}");
                    }
                }
            }
        }
    }

    #[test]
    fn nan_stays_in_its_row() {
        let (q, k) = ([1.0f32, 1.0], [f32::NAN, 1.0]);
        let mut out = [0.0f32, 1.0, 2.0, 0.0, 1.0, 2.0];
        let rows = |x| Rows::contiguous(x, 2, 1).unwrap();
        let shape = Shape {
            keys: 2,
            temperature: 1.0,
        };
        log_probabilities(
            &mut out,
            rows(&q),
            rows(&k),
            &[0, 0],
            shape,
            NonZeroUsize::MIN,
        );
        assert!(out[..3].iter().all(|o| o.is_nan()) && out[3..].iter().all(|o| o.is_finite()));
        log_probabilities::<f32>(&mut [], rows(&q), rows(&k), &[], shape, NonZeroUsize::MIN);
    }

    #[test]
    fn one_number_that_is_not_finite_is_found() {
        let mut x = numbers(3 * 141, 5);
        x[7] = 0.0;
        for (at, value) in [
            (0, f64::NAN),
            (140, f64::INFINITY),
            (422, f64::NEG_INFINITY),
        ] {
            assert!(finite(Rows::contiguous(&x, 3, 141).unwrap()));
            let old = std::mem::replace(&mut x[at], value);
            assert!(!finite(Rows::contiguous(&x, 3, 141).unwrap()));
            x[at] = old;
        }
        assert!(finite(Rows::contiguous(&[f32::MAX; 256], 1, 256).unwrap()));
    }

    #[test]
    fn keys_and_what_they_replace_change_places() {
        for (dim, width) in [(1, 1), (5, 9), (16, 4), (37, 11), (64, 40)] {
            let columns: Vec<usize> = (0..width).rev().step_by(3).collect();
            let (before, keys) = (numbers(dim * width, 3), numbers(columns.len() * dim, 17));
            for threads in [1, 2, 3] {
                let (mut queue, mut replaced) = (before.clone(), vec![f64::NAN; keys.len()]);
                let threads = NonZeroUsize::new(threads).unwrap();
                exchange(&mut queue, width, &keys, &columns, &mut replaced, threads);
                for (at, (&now, &old)) in queue.iter().zip(&before).enumerate() {
                    let (d, column) = (at / width, at % width);
                    match columns.iter().position(|&c| c == column) {
                        None => assert_eq!(now, old),
                        Some(k) => {
                            assert_eq!((now, replaced[k * dim + d]), (keys[k * dim + d], old));
                        }
                    }
                }
            }
        }
        exchange::<f32>(&mut [1.0, 2.0], 2, &[], &[], &mut [], NonZeroUsize::MIN);
    }

    #[test]
    fn the_last_keys_of_a_batch_stay() {
        let (keys, labels) = (3, [1, 0, 1, 1, 1, 1, 2]);
        let mut pointers = [0, 2, 1];
        let places = enqueue(&labels, &mut pointers, keys);
        // One by one, as defined.
        let mut owner = [None; 9];
        let mut moved = [0, 2, 1];
        for (row, &label) in labels.iter().enumerate() {
            owner[label * keys + moved[label]] = Some(row);
            moved[label] = (moved[label] + 1) % keys;
        }
        assert_eq!(pointers.map(|p| p as usize), moved);
        let mut found = [None; 9];
        for Place { row, column } in places {
            assert!(
                found[column].replace(row).is_none(),
                "column {column} twice"
            );
        }
        assert_eq!(found, owner);
    }
}

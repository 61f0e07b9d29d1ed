//! `FlexMatch`'s learning status from counts that the updates themselves keep, so that a step costs
//! `O(B)` whatever the number of samples.
//!
//! With `n_c` the samples whose latest confident pseudo label is `c`, and `n_-1` those without one,
//!
//! ```text
//! status_c = n_c / max_k n_k        over the classes, and -1 too while `warmup`
//! ```
//!
//! and 0 for every class where all samples have the same value (as in tllib, even if that value is
//! a class).

use super::parallel::{run, split};
use super::reduce;
use super::rows::prefetch;
use std::num::NonZeroUsize;

/// A type that labels are stored in: i8, i16, i32 or i64.
pub trait Label: Copy + Send + Sync + 'static {
    /// Exact.
    fn wide(self) -> i64;
    /// Exact if the label fits, which the caller has checked.
    fn narrow(label: i64) -> Self;
}

macro_rules! label {
    ($($t:ty),+) => {$(
        impl Label for $t {
            #[inline(always)]
            fn wide(self) -> i64 {
                i64::from(self)
            }
            #[inline(always)]
            fn narrow(label: i64) -> Self {
                label as $t
            }
        }
    )+};
}
label!(i8, i16, i32, i64);

/// How often each value occurs in `net_outputs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// `counts[c + 1]` is the number of samples labeled `c`; `counts[0]` of those labeled -1.
    counts: Vec<i64>,
    samples: i64,
}

/// A value that is neither a class nor -1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange {
    /// Where it was found.
    pub position: usize,
    /// The value.
    pub value: i64,
}

/// Tables that are used in turn, so that in a run of equal labels no increment waits for the one before.
const TABLES: usize = 4;
/// How many labels ahead of the one being written are prefetched.
const EARLY: usize = 32;
/// The widest table of which [`TABLES`] fit in the L1 cache.
const NARROW: usize = 1 << 10;

/// `counts[c + 1]` of a part of all labels.
fn tally<L: Label>(outputs: &[L], classes: usize) -> Result<Vec<i64>, OutOfRange> {
    let width = classes + 1;
    let tables = if width <= NARROW { TABLES } else { 1 };
    let mut counts = vec![0; tables * width];
    for (position, &label) in outputs.iter().enumerate() {
        // -1 becomes 0; what is below it becomes a number beyond every class.
        let k = label.wide().wrapping_add(1) as u64;
        if k >= width as u64 {
            let value = label.wide();
            return Err(OutOfRange { position, value });
        }
        counts[(position & (tables - 1)) * width + k as usize] += 1;
    }
    let mut tables = counts.chunks_exact(width);
    let mut sum = tables.next().map_or_else(Vec::new, <[i64]>::to_vec);
    for table in tables {
        reduce::add(&mut sum, table);
    }
    Ok(sum)
}

impl Counts {
    /// Counts `outputs`, whose values must be -1 or a class below `classes`.
    pub fn of<L: Label>(
        outputs: &[L],
        classes: usize,
        threads: NonZeroUsize,
    ) -> Result<Self, OutOfRange> {
        let parts = split(outputs.len(), threads);
        let jobs: Vec<_> = parts
            .iter()
            .map(|part| move || tally(&outputs[part.clone()], classes))
            .collect();
        let mut counts = vec![0; classes + 1];
        for (found, part) in run(jobs).into_iter().zip(&parts) {
            let found = found.map_err(|stray| OutOfRange {
                position: part.start + stray.position,
                ..stray
            })?;
            reduce::add(&mut counts, &found);
        }
        Ok(Self::from_raw(counts))
    }

    /// From the number of samples without a label, and those of each class.
    pub fn from_raw(counts: Vec<i64>) -> Self {
        let samples = counts.iter().sum();
        Self { counts, samples }
    }

    /// Counts of `samples` samples that have no label yet.
    pub fn unlabelled(samples: usize, classes: usize) -> Self {
        let mut counts = vec![0; classes + 1];
        counts[0] = samples as i64;
        Self::from_raw(counts)
    }

    /// The count of -1, followed by the count of each class.
    pub fn raw(&self) -> &[i64] {
        &self.counts
    }

    /// Labels one sample: `outputs[index] = label`. Both must be in range.
    #[inline]
    fn relabel<L: Label>(&mut self, outputs: &mut [L], index: usize, label: i64) {
        let old = std::mem::replace(&mut outputs[index], L::narrow(label)).wide();
        self.counts[(old + 1) as usize] -= 1;
        self.counts[(label + 1) as usize] += 1;
    }

    /// Labels samples one after the other, as (index, label) pairs in range. In a large data set each misses
    /// the cache and the TLB: they are prefetched, so that these misses overlap.
    pub fn relabel_all<L: Label>(&mut self, outputs: &mut [L], pairs: &[(usize, i64)]) {
        for k in 0..pairs.len() + EARLY {
            if let Some(&(index, _)) = pairs.get(k) {
                prefetch(outputs.as_ptr().wrapping_add(index));
            }
            if let Some(&(index, label)) = k.checked_sub(EARLY).and_then(|k| pairs.get(k)) {
                self.relabel(outputs, index, label);
            }
        }
    }

    /// What the counts are divided by, or `None` where every status is 0.
    pub fn largest(&self, warmup: bool) -> Option<i64> {
        let all = self.counts.iter().copied().max().unwrap_or(0);
        if all == self.samples {
            return None;
        }
        let among = if warmup {
            &self.counts[..]
        } else {
            &self.counts[1..]
        };
        among.iter().copied().max()
    }

    /// The status of class `label`, given [`Counts::largest`]. As in tllib the quotient is taken in
    /// f64 and then rounded.
    #[inline]
    pub fn status(&self, label: usize, largest: Option<i64>) -> f32 {
        largest.map_or(0.0, |max| {
            (self.counts[label + 1] as f64 / max as f64) as f32
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: NonZeroUsize = NonZeroUsize::MIN;

    fn random_updates<L: Label + std::fmt::Debug + PartialEq>() {
        let (samples, classes) = (40, 4);
        let mut outputs = vec![L::narrow(-1); samples];
        let mut counts = Counts::unlabelled(samples, classes);
        let mut seed = 1u64;
        let mut next = |n: usize| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % n
        };
        for _ in 0..2000 {
            let count = next(3 * EARLY);
            let mut expected = outputs.clone();
            let pairs: Vec<_> = (0..count)
                .map(|_| (next(samples), next(classes + 1) as i64 - 1))
                .collect();
            counts.relabel_all(&mut outputs, &pairs);
            for (index, label) in pairs {
                expected[index] = L::narrow(label);
            }
            assert_eq!(outputs, expected);
            assert_eq!(counts, Counts::of(&outputs, classes, ONE).unwrap());
        }
    }

    #[test]
    fn random_updates_equal_a_recount() {
        random_updates::<i8>();
        random_updates::<i16>();
        random_updates::<i32>();
        random_updates::<i64>();
    }

    #[test]
    fn threads_and_tables_count_the_same() {
        for classes in [1, 127, NARROW - 1, NARROW, 3000] {
            let outputs: Vec<i16> = (0..10_007)
                .map(|k| (k * k % (classes + 1)) as i16 - 1)
                .collect();
            let mut expected = vec![0; classes + 1];
            for &label in &outputs {
                expected[(label + 1) as usize] += 1;
            }
            for threads in 1..5 {
                let counts = Counts::of(&outputs, classes, NonZeroUsize::new(threads).unwrap());
                assert_eq!(counts.unwrap().raw(), expected);
            }
        }
        let mut outputs = vec![0i8; 1000];
        for (position, value) in [(999, 100), (600, -128)] {
            outputs[position] = value;
            let value = i64::from(value);
            for threads in 1..5 {
                assert_eq!(
                    Counts::of(&outputs, 100, NonZeroUsize::new(threads).unwrap()),
                    Err(OutOfRange { position, value })
                );
            }
        }
    }

    #[test]
    fn status() {
        let counts = Counts::of(&[-1i64, -1, -1, 0, 1, 1], 3, ONE).unwrap();
        let statuses = |warmup| {
            let largest = counts.largest(warmup);
            [0, 1, 2].map(|c| counts.status(c, largest))
        };
        assert_eq!(statuses(false), [0.5, 1.0, 0.0]);
        assert_eq!(
            statuses(true),
            [(1.0f64 / 3.0) as f32, (2.0f64 / 3.0) as f32, 0.0]
        );
        for filled in [-1i64, 2] {
            let counts = Counts::of(&[filled; 4], 3, ONE).unwrap();
            assert_eq!(counts.largest(false), None);
            assert_eq!(counts.status(2, None), 0.0);
        }
        let stray = OutOfRange {
            position: 1,
            value: 3,
        };
        assert_eq!(Counts::of(&[0i64, 3], 3, ONE), Err(stray));
        assert_eq!(Counts::of(&[0i64, -2], 3, ONE).unwrap_err().value, -2);
        assert!(Counts::of(&[i64::MAX], 3, ONE).is_err());
    }
}

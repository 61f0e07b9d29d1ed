//! `FlexMatch`'s learning status from counts that the updates themselves keep, so that a step costs
//! `O(B)` whatever the number of samples.
//!
//! With `n_c` the samples whose latest confident pseudo label is `c`, and `n_-1` those without one,
//!
//! ```text
//! status_c = n_c / max_k n_k        over the classes, and -1 too while `warmup`
//! ```
//!
//! and 0 for every class where one single value fills all samples (tllib does so, also when that
//! value is a class).

/// How often each value occurs in `net_outputs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// `counts[c + 1]` is the number of samples labelled `c`; `counts[0]` of those at -1.
    counts: Vec<i64>,
    samples: i64,
}

/// A value that is no class and not -1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange {
    /// Where it was found.
    pub position: usize,
    /// The value.
    pub value: i64,
}

impl Counts {
    /// Counts `outputs`, whose values must be -1 or a class below `classes`.
    pub fn of(outputs: &[i64], classes: usize) -> Result<Self, OutOfRange> {
        let mut counts = vec![0; classes + 1];
        for (position, &value) in outputs.iter().enumerate() {
            match usize::try_from(value.wrapping_add(1))
                .ok()
                .and_then(|k| counts.get_mut(k))
            {
                Some(count) => *count += 1,
                None => return Err(OutOfRange { position, value }),
            }
        }
        Ok(Self {
            counts,
            samples: outputs.len() as i64,
        })
    }

    /// Counts of `samples` samples that have no label yet.
    pub fn unlabelled(samples: usize, classes: usize) -> Self {
        let mut counts = vec![0; classes + 1];
        counts[0] = samples as i64;
        Self {
            counts,
            samples: samples as i64,
        }
    }

    /// Counts per class, and of -1 in front.
    pub fn raw(&self) -> &[i64] {
        &self.counts
    }

    /// Labels one sample: `outputs[index] = label`. Both must be in range.
    #[inline]
    pub fn relabel(&mut self, outputs: &mut [i64], index: usize, label: i64) {
        let old = std::mem::replace(&mut outputs[index], label);
        self.counts[(old + 1) as usize] -= 1;
        self.counts[(label + 1) as usize] += 1;
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

    #[test]
    fn random_updates_equal_a_recount() {
        let (samples, classes) = (40, 4);
        let mut outputs = vec![-1; samples];
        let mut counts = Counts::unlabelled(samples, classes);
        let mut seed = 1u64;
        let mut next = |n: usize| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % n
        };
        for _ in 0..5000 {
            let (index, label) = (next(samples), next(classes + 1) as i64 - 1);
            counts.relabel(&mut outputs, index, label);
            assert_eq!(counts, Counts::of(&outputs, classes).unwrap());
        }
    }

    #[test]
    fn status() {
        let counts = Counts::of(&[-1, -1, -1, 0, 1, 1], 3).unwrap();
        let statuses = |warmup| {
            let largest = counts.largest(warmup);
            [0, 1, 2].map(|c| counts.status(c, largest))
        };
        assert_eq!(statuses(false), [0.5, 1.0, 0.0]);
        assert_eq!(
            statuses(true),
            [(1.0f64 / 3.0) as f32, (2.0f64 / 3.0) as f32, 0.0]
        );
        for filled in [-1, 2] {
            let counts = Counts::of(&[filled; 4], 3).unwrap();
            assert_eq!(counts.largest(false), None);
            assert_eq!(counts.status(2, None), 0.0);
        }
        let stray = OutOfRange {
            position: 1,
            value: 3,
        };
        assert_eq!(Counts::of(&[0, 3], 3), Err(stray));
        assert_eq!(Counts::of(&[0, -2], 3).unwrap_err().value, -2);
        assert!(Counts::of(&[i64::MAX], 3).is_err());
    }
}

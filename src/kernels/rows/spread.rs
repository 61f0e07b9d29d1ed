//! A factor for each row, where rows are too narrow for a loop over one of them to fill vectors.

use super::super::real::Real;

/// Factors that are written at a time, more than a row has elements if need be: a constant number is one vector.
const STEP: usize = 8;
/// Elements whose factors are spread together: they stay in the L1 cache.
const GROUP: usize = 512;

/// The factors of contiguous rows of a few elements, written out for each element.
pub struct Spread<F> {
    width: usize,
    room: Vec<F>,
}

impl<F: Real> Spread<F> {
    /// For rows of `width` elements.
    #[inline(always)]
    pub fn new(width: usize) -> Self {
        let mut spread = Self {
            width,
            room: Vec::new(),
        };
        spread.room = vec![F::ZERO; spread.rows() * width + STEP];
        spread
    }

    /// How many rows are spread at a time, at most.
    #[inline(always)]
    pub fn rows(&self) -> usize {
        (GROUP / self.width.max(1)).max(1)
    }

    /// The factor of each element, for rows with these factors, of which there are at most [`Spread::rows`].
    #[inline(always)]
    pub fn each(&mut self, factors: &[f64], times: f64) -> &[F] {
        let len = factors.len() * self.width;
        let room = &mut self.room[..len + STEP];
        match self.width {
            1 => copies::<F, 1>(factors, times, room),
            2 => copies::<F, 2>(factors, times, room),
            3 => copies::<F, 3>(factors, times, room),
            4 => copies::<F, 4>(factors, times, room),
            width => {
                // What is written behind a row, the next one overwrites.
                let whole = width.next_multiple_of(STEP);
                for (i, &factor) in factors.iter().enumerate() {
                    let row = &mut room[i * width..][..whole];
                    row.as_chunks_mut().0.fill([F::of(factor * times); STEP]);
                }
            }
        }
        &room[..len]
    }
}

/// Writes `N` times each factor.
#[inline(always)]
fn copies<F: Real, const N: usize>(factors: &[f64], times: f64, out: &mut [F]) {
    for (out, &factor) in out.as_chunks_mut::<N>().0.iter_mut().zip(factors) {
        *out = [F::of(factor * times); N];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_the_factor_of_its_row() {
        for width in [1, 2, 3, 8, 9, 31, 63, 600] {
            let mut spread = Spread::<f32>::new(width);
            let factors: Vec<f64> = (0..spread.rows()).map(|i| i as f64 + 1.0).collect();
            for count in [spread.rows(), 1, 0] {
                let each = spread.each(&factors[..count], 2.0);
                let expected: Vec<f32> = (0..count * width)
                    .map(|k| 2.0 * factors[k / width] as f32)
                    .collect();
                assert_eq!(each, expected, "{width} {count}");
            }
        }
    }
}

//! Transposition of rows, four numbers at a time: by itself, LLVM moves them one by one.

use super::real::Real;

/// Rows and columns that are transposed at a time.
pub const STEP: usize = 4;

/// Adjacent numbers of a row.
pub type Quad<F> = [F; STEP];

/// The columns of the block that starts at `numbers[first]` and whose rows are `stride` apart.
///
/// # Panics
/// If the block leaves `numbers`: a mistake in a kernel.
#[inline(always)]
pub fn columns<F: Real>(numbers: &[F], first: usize, stride: usize) -> [Quad<F>; STEP] {
    // A larger one could overflow the length of the block.
    assert!(stride <= numbers.len(), "stride");
    let block = &numbers[first..][..(STEP - 1) * stride + STEP];
    // SAFETY: `k < STEP`, and so `k * stride + STEP <= block.len()`.
    let row = |k: usize| unsafe { &*block.as_ptr().add(k * stride).cast::<Quad<F>>() };
    F::transposed([row(0), row(1), row(2), row(3)])
}

/// Rows as columns, element by element.
#[inline(always)]
pub fn transposed<F: Copy>(rows: [&Quad<F>; 4]) -> [Quad<F>; 4] {
    let mut columns = rows.map(|row| *row);
    for (c, column) in columns.iter_mut().enumerate() {
        for (k, row) in rows.iter().enumerate() {
            column[k] = row[c];
        }
    }
    columns
}

/// Rows as columns.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub fn transposed_f32(rows: [&Quad<f32>; 4]) -> [Quad<f32>; 4] {
    transposed(rows)
}

/// Rows as columns: eight shuffles, and no number is moved on its own.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn transposed_f32([a, b, c, d]: [&Quad<f32>; 4]) -> [Quad<f32>; 4] {
    use std::arch::x86_64::{
        __m128, _mm_loadu_ps, _mm_movehl_ps, _mm_movelh_ps, _mm_unpackhi_ps, _mm_unpacklo_ps,
    };
    // SAFETY: the address of four numbers; every x86-64 processor has SSE.
    let load = |row: &Quad<f32>| unsafe { _mm_loadu_ps(row.as_ptr()) };
    // SAFETY: both are four numbers.
    let quad = |x: __m128| unsafe { std::mem::transmute::<__m128, Quad<f32>>(x) };
    let (a, b, c, d) = (load(a), load(b), load(c), load(d));
    // SAFETY: every x86-64 processor has SSE.
    unsafe {
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        [
            quad(_mm_movelh_ps(ab, cd)),
            quad(_mm_movehl_ps(cd, ab)),
            quad(_mm_movelh_ps(ab_high, cd_high)),
            quad(_mm_movehl_ps(cd_high, ab_high)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_within_rows() {
        let numbers: [f64; 23] = std::array::from_fn(|k| k as f64);
        let column = |c: usize| [c, c + 6, c + 12, c + 18].map(|k| k as f64);
        assert_eq!(columns(&numbers, 1, 6), [1, 2, 3, 4].map(column));
        for (first, stride) in [(2, 6), (1, 7), (24, 0), (0, usize::MAX / 3)] {
            assert!(std::panic::catch_unwind(|| columns(&numbers, first, stride)).is_err());
        }
    }

    #[test]
    fn columns_are_the_rows_of_the_transpose() {
        let rows: [Quad<f32>; 4] =
            std::array::from_fn(|r| std::array::from_fn(|c| (10 * r + c) as f32));
        let expected: [Quad<f32>; 4] =
            std::array::from_fn(|c| std::array::from_fn(|r| (10 * r + c) as f32));
        assert_eq!(transposed(rows.each_ref()), expected);
        assert_eq!(transposed_f32(rows.each_ref()), expected);
    }
}

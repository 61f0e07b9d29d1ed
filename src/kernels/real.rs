//! The two arithmetic types, f32 and f64, with `exp` and `ln` that LLVM can vectorize.
//!
//! Both functions are branch-free and correct over the whole range, subnormals, infinities and NaN
//! included, to 2 ulp.
//!
//! `exp x = 2^n e^r` with `n = round(x / ln 2)` and `r = x - n ln 2` in two parts (Cody-Waite), and
//! a polynomial on `|r| <= ln 2 / 2`: in f32 the minimax one (error 3e-9), in f64 Taylor's. The power of
//! two is applied in two factors, so that a subnormal result is rounded once.
//!
//! `ln x = e ln 2 + ln(1 + f)` with the mantissa in `[sqrt 1/2, sqrt 2)`; with `s = f / (2 + f)`,
//! `ln(1 + f) = 2 atanh s = f - (f^2/2 - s (f^2/2 + R))`, `R = 2 s^2 (1/3 + s^2/5 + ...)`.

use super::isa::Isa;
use super::quad::{self, Quad};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// f32 or f64.
pub trait Real:
    Copy
    + PartialOrd
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + MulAssign
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// Integers that compare as the magnitudes they represent.
    type Bits: Copy + Ord;
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// Minus infinity, where a maximum starts.
    const NEG_INFINITY: Self;
    /// Not a number.
    const NAN: Self;
    /// Sums below this are treated as zero: their reciprocal would overflow.
    const TINY: Self;

    /// Rounds to this type.
    fn of(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Neither infinite nor NaN.
    #[must_use]
    fn finite(self) -> bool;
    /// Not a number.
    #[must_use]
    fn nan(self) -> bool;
    /// Orders by magnitude: NaN above infinity above all others.
    #[must_use]
    fn magnitude(self) -> Self::Bits;
    /// The larger one of two numbers, `other` where one is NaN.
    #[must_use]
    fn larger(self, other: Self) -> Self;
    /// The square root, correctly rounded.
    #[must_use]
    fn sqrt(self) -> Self;
    /// `self * b + c`, fused where the instruction set has it.
    #[must_use]
    fn mul_add<I: Isa>(self, b: Self, c: Self) -> Self;
    /// `e^self`.
    #[must_use]
    fn exp<I: Isa>(self) -> Self;
    /// `e^self` of a number that is not above 0, such as a logit minus the largest one, in half the
    /// instructions. Results below the normal range are 0.
    #[must_use]
    fn exp_nonpositive<I: Isa>(self) -> Self;
    /// The natural logarithm.
    #[must_use]
    fn ln<I: Isa>(self) -> Self;
    /// The natural logarithm of a positive, normal, finite number, minus `offset` times ln 2. Any
    /// other argument gives an arbitrary number.
    #[must_use]
    fn ln_normal<I: Isa>(self, offset: Self) -> Self;
    /// The logarithm to base 2 of a positive, normal, finite number, for sums: off by no more than
    /// 1e-7 near 1 and an ulp further away. Any other argument gives an arbitrary number.
    #[must_use]
    fn log2_for_sums<I: Isa>(self) -> Self;
    /// Rows as columns.
    #[must_use]
    fn transposed(rows: [&Quad<Self>; 4]) -> [Quad<Self>; 4];
}

/// The polynomial with these coefficients, highest first: Horner's rule for the even and the odd powers
/// separately, which has half the latency.
#[inline(always)]
fn polynomial<I: Isa, F: Real, const N: usize>(x: F, coefficients: [F; N]) -> F {
    let square = x * x;
    let mut sums = [coefficients[0], coefficients[1]];
    for k in 2..N {
        sums[k % 2] = sums[k % 2].mul_add::<I>(square, coefficients[k]);
    }
    sums[N % 2].mul_add::<I>(x, sums[1 - N % 2])
}

macro_rules! real {
    ($f:ident, $bits:ident, $int:ident, $mantissa:literal, $bias:literal, $tiny:literal,
     exp: { low: $low:literal, high: $high:literal, terms: [$($term:expr),+] },
     ln: { root: $root:literal, terms: [$($odd:expr),+] },
     ln2: ($ln2_hi:expr, $ln2_lo:expr), log2: $log2:ident, transposed: $transposed:path) => {
        impl Real for $f {
            type Bits = $int;

            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $f::NEG_INFINITY;
            const NAN: Self = $f::NAN;
            const TINY: Self = $tiny;

            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $f
            }

            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }

            #[inline(always)]
            fn finite(self) -> bool {
                self.is_finite()
            }

            #[inline(always)]
            fn nan(self) -> bool {
                self.is_nan()
            }

            #[inline(always)]
            fn magnitude(self) -> $int {
                (self.to_bits() & ($bits::MAX >> 1)) as $int
            }

            #[inline(always)]
            fn larger(self, other: Self) -> Self {
                // One instruction; `max` would also have to check for NaN.
                if self > other { self } else { other }
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }

            #[inline(always)]
            fn mul_add<I: Isa>(self, b: Self, c: Self) -> Self {
                if I::FMA { $f::mul_add(self, b, c) } else { self * b + c }
            }

            #[inline(always)]
            fn exp<I: Isa>(self) -> Self {
                // Adding it leaves the nearest integer in the low bits of the mantissa.
                const MAGIC: $f = 1.5 * (1u64 << $mantissa) as $f;
                // Comparisons that are false for NaN, so that NaN passes through.
                let x = if self > $high { $high } else { self };
                let x = if x < $low { $low } else { x };
                let shifted = Real::mul_add::<I>(x, std::$f::consts::LOG2_E, MAGIC);
                let n = shifted - MAGIC;
                let power = shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as $int;
                let r = Real::mul_add::<I>(n, -$ln2_hi, x);
                let r = Real::mul_add::<I>(n, -$ln2_lo, r);
                let tail = polynomial::<I, $f, _>(r, [$($term),+]);
                let value = Real::mul_add::<I>(r * r, tail, r) + 1.0;
                let half = power >> 1;
                let two_to = |k: $int| $f::from_bits((k.wrapping_add($bias) << $mantissa) as $bits);
                value * two_to(half) * two_to(power.wrapping_sub(half))
            }

            #[inline(always)]
            fn exp_nonpositive<I: Isa>(self) -> Self {
                // As in `exp`, with the exponent bias added in the low bits: shifted into the exponent
                // field they are the power of two, which is 0 where n is minus the bias.
                const MAGIC: $f = (3u64 << ($mantissa - 1) | $bias) as $f;
                const LOW: $f = -($bias as $f) * std::$f::consts::LN_2;
                let x = if self < LOW { LOW } else { self };
                let shifted = Real::mul_add::<I>(x, std::$f::consts::LOG2_E, MAGIC);
                let n = shifted - MAGIC;
                let r = Real::mul_add::<I>(n, -$ln2_hi, x);
                let r = Real::mul_add::<I>(n, -$ln2_lo, r);
                let tail = polynomial::<I, $f, _>(r, [$($term),+]);
                let value = Real::mul_add::<I>(r * r, tail, r) + 1.0;
                value * $f::from_bits(shifted.to_bits() << $mantissa)
            }

            #[inline(always)]
            fn ln<I: Isa>(self) -> Self {
                const BITS: $f = $mantissa as $f;
                // Subnormal numbers are multiplied by a power of two. No branches: LLVM would extend one
                // to the whole logarithm, and then compute it twice for each vector.
                let subnormal = $bits::from(self < $f::MIN_POSITIVE);
                let lift = (1.0 as $f).to_bits() + subnormal * ($mantissa << $mantissa);
                let offset = $f::from_bits(subnormal.wrapping_neg() & BITS.to_bits());
                let value = (self * $f::from_bits(lift)).ln_normal::<I>(offset);
                // Positive and finite, in one comparison.
                let ordinary = self.to_bits().wrapping_sub(1) < $f::INFINITY.to_bits() - 1;
                let special = if self < 0.0 { $f::NAN } else { self };
                let special = if self == 0.0 { $f::NEG_INFINITY } else { special };
                if ordinary { value } else { special }
            }

            #[inline(always)]
            fn ln_normal<I: Isa>(self, offset: Self) -> Self {
                const SHIFT: $int = 1 << ($mantissa - 1);
                const UNIT: $f = (1u64 << $mantissa) as $f;
                let bits = self.to_bits();
                let exponent = (bits.wrapping_sub($root) as $int) >> $mantissa;
                let f = $f::from_bits(bits.wrapping_sub((exponent << $mantissa) as $bits)) - 1.0;
                // From integer to float without the conversion that AVX2 lacks for 64 bits: the
                // integer becomes the low bits of a number whose spacing is 1.
                let biased = exponent.wrapping_add(SHIFT) as $bits | UNIT.to_bits();
                let e = ($f::from_bits(biased) - (UNIT + SHIFT as $f)) - offset;
                let s = f / (2.0 + f);
                let z = s * s;
                let r = z * polynomial::<I, $f, _>(z, [$($odd),+]);
                let half_square = 0.5 * f * f;
                let low = Real::mul_add::<I>(s, half_square + r, e * $ln2_lo);
                Real::mul_add::<I>(e, $ln2_hi, f - (half_square - low))
            }

            #[inline(always)]
            fn log2_for_sums<I: Isa>(self) -> Self {
                $log2::<I>(self)
            }

            #[inline(always)]
            fn transposed(rows: [&Quad<Self>; 4]) -> [Quad<Self>; 4] {
                $transposed(rows)
            }
        }
    };
}

/// `log2 x = e + log2(1 + f)`, the latter by the minimax polynomial on the mantissas in
/// `[sqrt 1/2, sqrt 2)`: an error of 5e-8 at most, and no division.
#[inline(always)]
fn log2_f32<I: Isa>(x: f32) -> f32 {
    const ROOT: u32 = 0x3f35_04f3;
    let bits = x.to_bits().wrapping_sub(ROOT);
    let e = (bits as i32 >> 23) as f32;
    let f = f32::from_bits((bits & 0x7f_ffff) + ROOT) - 1.0;
    let slope = polynomial::<I, f32, _>(
        f,
        [
            -0.145_752_3,
            0.236_901_09,
            -0.250_070_84,
            0.286_706_15,
            -0.360_086_95,
            0.480_939_48,
            -0.721_357_17,
            1.442_694_8,
        ],
    );
    Real::mul_add::<I>(slope, f, e)
}

#[inline(always)]
fn log2_f64<I: Isa>(x: f64) -> f64 {
    x.ln_normal::<I>(0.0) * std::f64::consts::LOG2_E
}

real!(f32, u32, i32, 23, 127, 1e-30,
    exp: {
        low: -104.0, high: 89.0,
        terms: [1.381_459_9e-3, 8.368_717e-3, 4.166_839e-2, 0.166_665_2, 0.499_999_94]
    },
    ln: { root: 0x3f35_04f3, terms: [2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0] },
    // The first part has 10 bits: times an exponent it is exact.
    ln2: (f32::from_bits(0x3f31_8000), -2.121_944_4e-4_f32),
    log2: log2_f32, transposed: quad::transposed_f32);

real!(f64, u64, i64, 52, 1023, 1e-290,
    exp: {
        low: -746.0, high: 710.0,
        terms: [
            1.0 / 6_227_020_800.0, 1.0 / 479_001_600.0, 1.0 / 39_916_800.0, 1.0 / 3_628_800.0,
            1.0 / 362_880.0, 1.0 / 40_320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0,
            1.0 / 6.0, 0.5
        ]
    },
    ln: {
        root: 0x3fe6_a09e_667f_3bcd,
        terms: [
            2.0 / 23.0, 2.0 / 21.0, 2.0 / 19.0, 2.0 / 17.0, 2.0 / 15.0, 2.0 / 13.0, 2.0 / 11.0,
            2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0
        ]
    },
    // The first part has 32 bits: times an exponent it is exact.
    ln2: (f64::from_bits(0x3fe6_2e42_fee0_0000), 1.908_214_929_270_587_7e-10_f64),
    log2: log2_f64, transposed: quad::transposed);

#[cfg(test)]
mod tests;

//! The two arithmetic types, f32 and f64, with `exp` and `ln` that LLVM can vectorise.
//!
//! Both functions are branch-free and correct over the whole range, subnormals, infinities and NaN
//! included, to 2 ulp.
//!
//! `exp x = 2^n e^r` with `n = round(x / ln 2)` and `r = x - n ln 2` in two parts (Cody-Waite), and
//! the Taylor polynomial of `e^r` on `|r| <= ln 2 / 2`. The power of two is applied in two factors,
//! so that a subnormal result is rounded once.
//!
//! `ln x = e ln 2 + ln(1 + f)` with the mantissa in `[sqrt 1/2, sqrt 2)`; with `s = f / (2 + f)`,
//! `ln(1 + f) = 2 atanh s = f - (f^2/2 - s (f^2/2 + R))`, `R = 2 s^2 (1/3 + s^2/5 + ...)`.

use super::isa::Isa;
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
    /// `self * b + c`, fused where the instruction set has it.
    #[must_use]
    fn mul_add<I: Isa>(self, b: Self, c: Self) -> Self;
    /// `e^self`.
    #[must_use]
    fn exp<I: Isa>(self) -> Self;
    /// The natural logarithm.
    #[must_use]
    fn ln<I: Isa>(self) -> Self;
    /// The natural logarithm of a positive, normal, finite number, minus `offset` times ln 2. Any
    /// other argument gives an arbitrary number.
    #[must_use]
    fn ln_normal<I: Isa>(self, offset: Self) -> Self;
}

/// Horner's rule, highest coefficient first.
#[inline(always)]
fn polynomial<I: Isa, F: Real, const N: usize>(x: F, coefficients: [F; N]) -> F {
    let mut sum = coefficients[0];
    for k in 1..N {
        sum = sum.mul_add::<I>(x, coefficients[k]);
    }
    sum
}

macro_rules! real {
    ($f:ident, $bits:ident, $int:ident, $mantissa:literal, $bias:literal, $tiny:literal,
     exp: { low: $low:literal, high: $high:literal, terms: [$($term:expr),+] },
     ln: { root: $root:literal, terms: [$($odd:expr),+] },
     ln2: ($ln2_hi:expr, $ln2_lo:expr)) => {
        impl Real for $f {
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
            fn ln<I: Isa>(self) -> Self {
                const LIFT: $f = (1u64 << $mantissa) as $f;
                let subnormal = self < $f::MIN_POSITIVE;
                let x = if subnormal { self * LIFT } else { self };
                let offset: $f = if subnormal { ($mantissa as i16).into() } else { 0.0 };
                let value = x.ln_normal::<I>(offset);
                // Ordered so that NaN falls through every test.
                let value = if self == $f::INFINITY { self } else { value };
                let value = if self == 0.0 { $f::NEG_INFINITY } else { value };
                let value = if self < 0.0 { $f::NAN } else { value };
                if self.is_nan() { self } else { value }
            }

            #[inline(always)]
            fn ln_normal<I: Isa>(self, offset: Self) -> Self {
                const SHIFT: $int = 1 << ($mantissa - 1);
                const UNIT: $f = (1u64 << $mantissa) as $f;
                let bits = self.to_bits();
                let exponent = (bits.wrapping_sub($root) as $int) >> $mantissa;
                let f = $f::from_bits(bits.wrapping_sub((exponent << $mantissa) as $bits)) - 1.0;
                // An integer to a float without a conversion, which AVX2 lacks for 64 bits: as the
                // low bits of a number whose spacing is 1.
                let biased = exponent.wrapping_add(SHIFT) as $bits | UNIT.to_bits();
                let e = ($f::from_bits(biased) - (UNIT + SHIFT as $f)) - offset;
                let s = f / (2.0 + f);
                let z = s * s;
                let r = z * polynomial::<I, $f, _>(z, [$($odd),+]);
                let half_square = 0.5 * f * f;
                let low = Real::mul_add::<I>(s, half_square + r, e * $ln2_lo);
                Real::mul_add::<I>(e, $ln2_hi, f - (half_square - low))
            }
        }
    };
}

real!(f32, u32, i32, 23, 127, 1e-30,
    exp: {
        low: -104.0, high: 89.0,
        terms: [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5]
    },
    ln: { root: 0x3f35_04f3, terms: [2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0] },
    // The first part has 10 bits: times an exponent it is exact.
    ln2: (f32::from_bits(0x3f31_8000), -2.121_944_4e-4_f32));

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
    ln2: (f64::from_bits(0x3fe6_2e42_fee0_0000), 1.908_214_929_270_587_7e-10_f64));

#[cfg(test)]
mod tests {
    use super::super::isa::{Avx2, Baseline};
    use super::*;

    fn ulps(got: f32, exact: f64) -> f64 {
        if f64::from(got) == exact || (got.is_nan() && exact.is_nan()) {
            return 0.0;
        }
        let rounded = exact as f32;
        if !rounded.is_finite() || !got.is_finite() {
            return if got == rounded { 0.0 } else { f64::INFINITY };
        }
        let ulp = f64::from(f32::from_bits(rounded.abs().to_bits() + 1)) - f64::from(rounded.abs());
        (f64::from(got) - exact).abs() / ulp
    }

    /// Every 97th float of both signs: a prime stride visits all exponents and mantissa patterns.
    fn sweep(check: impl Fn(f32)) {
        (0..=u32::MAX)
            .step_by(97)
            .for_each(|bits| check(f32::from_bits(bits)));
        for x in [
            0.0,
            -0.0,
            1.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MIN_POSITIVE,
        ] {
            check(x);
        }
    }

    #[test]
    fn exp_f32_is_within_2_ulp() {
        sweep(|x| {
            let exact = f64::from(x).exp();
            assert!(ulps(Real::exp::<Baseline>(x), exact) <= 2.0, "exp({x:e})");
            assert!(
                ulps(Real::exp::<Avx2>(x), exact) <= 2.0,
                "exp({x:e}) with FMA"
            );
        });
    }

    #[test]
    fn ln_f32_is_within_2_ulp() {
        sweep(|x| {
            let exact = f64::from(x).ln();
            assert!(ulps(Real::ln::<Baseline>(x), exact) <= 2.0, "ln({x:e})");
            assert!(
                ulps(Real::ln::<Avx2>(x), exact) <= 2.0,
                "ln({x:e}) with FMA"
            );
        });
    }

    #[test]
    fn f64_agrees_with_libm() {
        let close =
            |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || ((a - b) / b).abs() < 5e-16;
        for i in -76_000..76_000 {
            let x = f64::from(i) * 0.01;
            let (ours, libm) = (Real::exp::<Baseline>(x), x.exp());
            // A subnormal has fewer bits than the bound asks for.
            assert!(
                close(ours, libm) || (ours - libm).abs() <= 1e-323,
                "exp({x})"
            );
            let y = libm * 1.234_567;
            assert!(
                close(Real::ln::<Baseline>(y), y.ln()) || y.ln().abs() < 1e-3,
                "ln({y:e})"
            );
        }
        for x in [
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            0.0,
            -1.0,
            5e-324,
            f64::MAX,
        ] {
            assert!(close(Real::exp::<Baseline>(x), x.exp()), "exp({x:e})");
            assert!(close(Real::ln::<Baseline>(x), x.ln()), "ln({x:e})");
        }
    }
}

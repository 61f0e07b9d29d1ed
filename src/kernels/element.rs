//! Storage types. Half types are computed in f32 and converted inside the sweep.

use super::real::Real;

/// A type that tensors store: f32, f64, [`F16`] or [`Bf16`].
pub trait Element: Copy + Send + Sync + 'static {
    /// The type it is computed in.
    type Acc: Real;
    /// Whether it is computed as it is stored: [`Element::exact`] then is the slice itself.
    const EXACT: bool = false;
    /// Machine epsilon of the storage type: the spacing of numbers at 1.
    const EPSILON: f64;
    /// The smallest positive number: the spacing of numbers at 0.
    const SMALLEST: f64;
    /// The largest magnitude that a stored gradient may be scaled up to. Only float16 needs it:
    /// its range ends at 6e-8, above the gradients of a large batch.
    const HEADROOM: Option<f64> = None;

    /// Exact.
    fn load(self) -> Self::Acc;
    /// Rounds to nearest, ties to even.
    fn store(value: Self::Acc) -> Self;
    /// The slice itself, where it needs no conversion.
    fn exact(slice: &[Self]) -> Option<&[Self::Acc]>;
    /// The slice itself, where it needs no conversion.
    fn exact_mut(slice: &mut [Self]) -> Option<&mut [Self::Acc]>;
}

macro_rules! computed_as_stored {
    ($f:ty) => {
        impl Element for $f {
            type Acc = $f;
            const EXACT: bool = true;
            const EPSILON: f64 = <$f>::EPSILON as f64;
            const SMALLEST: f64 = <$f>::from_bits(1) as f64;

            #[inline(always)]
            fn load(self) -> $f {
                self
            }
            #[inline(always)]
            fn store(value: $f) -> $f {
                value
            }
            #[inline(always)]
            fn exact(slice: &[$f]) -> Option<&[$f]> {
                Some(slice)
            }
            #[inline(always)]
            fn exact_mut(slice: &mut [$f]) -> Option<&mut [$f]> {
                Some(slice)
            }
        }
    };
}
computed_as_stored!(f32);
computed_as_stored!(f64);

/// IEEE 754 binary16, torch.float16.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(transparent)]
pub struct F16(pub u16);

/// The upper half of an f32, torch.bfloat16.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Element for F16 {
    type Acc = f32;
    const EPSILON: f64 = 0.000_976_562_5;
    const SMALLEST: f64 = 5.960_464_477_539_063e-8;
    const HEADROOM: Option<f64> = Some(16_384.0);

    #[inline(always)]
    fn load(self) -> f32 {
        // No arithmetic on a subnormal f32, which takes a hundred times as long: half the probabilities of a
        // wide row may be subnormal in f16.
        const REBIAS: u32 = 112 << 23;
        const SMALLEST_NORMAL: f32 = f32::from_bits(113 << 23);
        let bits = u32::from(self.0);
        let shifted = (bits & 0x7fff) << 13;
        let rebiased = shifted + REBIAS;
        // With the exponent of the smallest normal number, a subnormal one gains an implicit leading 1: subtract it.
        let subnormal = f32::from_bits(rebiased + (1 << 23)) - SMALLEST_NORMAL;
        let special = rebiased + REBIAS;
        let number = if shifted < 1 << 23 {
            subnormal.to_bits()
        } else {
            rebiased
        };
        let magnitude = if shifted >= 31 << 23 { special } else { number };
        f32::from_bits(magnitude | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn store(value: f32) -> Self {
        let bits = value.to_bits();
        let (sign, magnitude) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
        // Rebias the exponent (112 << 23 less) and round the 13 dropped bits to even.
        let normal = magnitude
            .wrapping_sub(0x3800_0000)
            .wrapping_add(0xfff + ((magnitude >> 13) & 1))
            >> 13;
        // The spacing of f32 at 0.5 is that of f16's subnormals: the addition rounds.
        let subnormal = (f32::from_bits(magnitude) + 0.5)
            .to_bits()
            .wrapping_sub(0.5f32.to_bits());
        let half = if magnitude < 0x3880_0000 {
            subnormal
        } else {
            normal
        };
        let half = if magnitude >= 0x4780_0000 {
            0x7c00
        } else {
            half
        };
        let half = if magnitude > 0x7f80_0000 {
            0x7e00
        } else {
            half
        };
        Self((half | sign) as u16)
    }

    #[inline(always)]
    fn exact(_: &[Self]) -> Option<&[f32]> {
        None
    }
    #[inline(always)]
    fn exact_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

impl Element for Bf16 {
    type Acc = f32;
    const EPSILON: f64 = 0.007_812_5;
    const SMALLEST: f64 = 9.183_549_615_799_121e-41;

    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline(always)]
    fn store(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        Self(if value.is_nan() { 0x7fc0 } else { rounded } as u16)
    }

    #[inline(always)]
    fn exact(_: &[Self]) -> Option<&[f32]> {
        None
    }
    #[inline(always)]
    fn exact_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

/// Rounds a computed value to what the storage type can hold, still in the computing type.
#[inline(always)]
pub fn round_to<E: Element>(value: E::Acc) -> E::Acc {
    E::store(value).load()
}

/// The power of two by which a gradient of at most `bound` is stored scaled up, 1 except for
/// float16. Backward divides it out again in f32.
pub fn stored_scale<E: Element>(bound: f64) -> f64 {
    match E::HEADROOM {
        Some(headroom) if bound > 0.0 && bound.is_finite() => {
            (headroom / bound).log2().floor().exp2()
        }
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// f16 from its definition, in f64.
    fn f16_value(bits: u16) -> f64 {
        let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
        let magnitude = match exponent {
            0 => fraction * (-24f64).exp2(),
            31 if fraction == 0.0 => f64::INFINITY,
            31 => f64::NAN,
            _ => (1024.0 + fraction) * f64::from(exponent - 25).exp2(),
        };
        if bits & 0x8000 == 0 {
            magnitude
        } else {
            -magnitude
        }
    }

    #[test]
    fn f16_round_trips_and_rounds_to_even() {
        for bits in 0..=u16::MAX {
            let (value, loaded) = (f16_value(bits), F16(bits).load());
            assert!(
                f64::from(loaded) == value || (loaded.is_nan() && value.is_nan()),
                "{bits:#x}"
            );
            if !value.is_nan() {
                assert_eq!(F16::store(loaded).0, bits);
            }
            let next = f16_value(bits.wrapping_add(1));
            if value.is_finite() && next.is_finite() && bits != 0x7fff && bits != 0xffff {
                let tie = f64::midpoint(value, next) as f32;
                let even = if bits & 1 == 0 { bits } else { bits + 1 };
                assert_eq!(F16::store(tie).0, even, "tie after {bits:#x}");
            }
        }
        assert_eq!(F16::store(65_520.0).0, 0x7c00);
        assert_eq!(F16::store(65_519.0).0, 0x7bff);
        assert!(F16::store(f32::NAN).load().is_nan());
    }

    #[test]
    fn bf16_round_trips_and_rounds_to_even() {
        for bits in 0..=u16::MAX {
            let value = Bf16(bits).load();
            if value.is_nan() {
                assert!(Bf16::store(value).load().is_nan());
            } else {
                assert_eq!(Bf16::store(value).0, bits);
            }
        }
        assert_eq!(Bf16::store(1.0 + 1.0 / 256.0).load(), 1.0);
        assert_eq!(Bf16::store(1.0 + 3.0 / 256.0).load(), 1.0 + 4.0 / 256.0);
    }

    #[test]
    fn float16_gradients_are_stored_within_range() {
        assert_eq!(stored_scale::<f32>(1e-9), 1.0);
        let scale = stored_scale::<F16>(1.0 / 65_536.0);
        assert!(scale / 65_536.0 <= 16_384.0 && scale / 65_536.0 > 8_192.0);
        assert_eq!(scale.log2().fract(), 0.0);
    }
}

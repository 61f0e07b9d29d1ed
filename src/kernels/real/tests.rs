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
fn exp_of_what_is_not_positive_is_within_2_ulp() {
    sweep(|x| {
        if x > 0.0 {
            return;
        }
        let exact = f64::from(x).exp();
        for got in [
            Real::exp_nonpositive::<Baseline>(x),
            Real::exp_nonpositive::<Avx2>(x),
        ] {
            let flushed = got == 0.0 && exact < f64::from(f32::MIN_POSITIVE);
            assert!(flushed || ulps(got, exact) <= 2.0, "exp({x:e})");
        }
    });
    for x in [0.0f64, -1e-9, -0.3, -1.0, -87.5, -700.0] {
        let got = Real::exp_nonpositive::<Baseline>(x);
        assert!((got / x.exp() - 1.0).abs() < 5e-16, "exp({x})");
    }
    for x in [-710.0, -1e300, f64::NEG_INFINITY] {
        assert!(Real::exp_nonpositive::<Baseline>(x) < f64::MIN_POSITIVE);
    }
    assert!(Real::exp_nonpositive::<Baseline>(f64::NAN).is_nan());
}

#[test]
fn log2_for_sums_is_close_near_1_and_an_ulp_further_away() {
    sweep(|x| {
        if !x.is_normal() || x < 0.0 {
            return;
        }
        let exact = f64::from(x).log2();
        for got in [
            Real::log2_for_sums::<Baseline>(x),
            Real::log2_for_sums::<Avx2>(x),
        ] {
            let bound = 1e-7 + f64::from(f32::EPSILON) * exact.abs();
            assert!((f64::from(got) - exact).abs() <= bound, "log2({x:e})");
        }
    });
    for x in [1e-300f64, 1e-5, 0.3, 1.0, 2.5] {
        let got = Real::log2_for_sums::<Baseline>(x);
        assert!(
            (got - x.log2()).abs() <= 1e-15 * (1.0 + x.log2().abs()),
            "log2({x})"
        );
    }
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

//! The innermost loops of [`super::blocked`]: as many sums as fill 24 of the 32 registers of AVX-512, which is more
//! than hide the latency of a sum, and few enough that all factors of a step are in registers too. Written out, because
//! LLVM would not keep so many sums in registers.

use super::super::element::Bf16;
use super::super::rows::prefetch_far;
use super::blocked::{Dot, HIGH, ROWS, STRIP, Tiles, WIDE};
use std::arch::is_x86_feature_detected;
use std::arch::x86_64::{
    __m512, __m512bh, __m512d, __m512i, _mm256_storeu_ps, _mm512_add_pd, _mm512_add_ps,
    _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps512_ps256, _mm512_dpbf16_ps, _mm512_fmadd_pd,
    _mm512_fmadd_ps, _mm512_loadu_epi16, _mm512_loadu_pd, _mm512_loadu_ps, _mm512_mask_storeu_pd,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_pd, _mm512_maskz_loadu_ps,
    _mm512_set1_pd, _mm512_set1_ps, _mm512_setzero_pd, _mm512_setzero_ps, _mm512_shuffle_f32x4,
    _mm512_shuffle_f64x2, _mm512_storeu_pd, _mm512_unpackhi_pd, _mm512_unpackhi_ps,
    _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::hint::black_box;
use std::mem::transmute;

macro_rules! dots {
    ($e:ident, sum: $f:ident, lanes: $lanes:literal, mask: $mask:ident, there: $there:expr,
     features: $features:literal, zero: $zero:ident, load: $load:ident, load_some: $load_some:ident,
     multiply_add: $multiply_add:ident, eight: $eight:ident) => {
        impl Dot for $e {
            type Sum = $f;

            fn there() -> bool {
                $there
            }

            #[target_feature(enable = $features)]
            unsafe fn dots(
                x: [*const Self; HIGH],
                y: [*const Self; WIDE],
                count: usize,
                ahead: *const Self,
            ) -> [[$f; WIDE]; HIGH] {
                let mut sums = [[$zero(); WIDE]; HIGH];
                let whole = count / $lanes * $lanes;
                for c in (0..whole).step_by($lanes) {
                    prefetch_far(ahead.wrapping_add(c));
                    // SAFETY: `c + LANES <= count`, and so many elements are behind each address.
                    let mut of_y = [unsafe { $load(y[0].add(c).cast()) }; WIDE];
                    for s in 1..WIDE {
                        // SAFETY: as above.
                        of_y[s] = unsafe { $load(y[s].add(c).cast()) };
                    }
                    for r in 0..HIGH {
                        // SAFETY: as above.
                        let of_x = unsafe { $load(x[r].add(c).cast()) };
                        for s in 0..WIDE {
                            sums[r][s] = $multiply_add(of_x, of_y[s], sums[r][s]);
                        }
                    }
                }
                // In memory from here on, or LLVM would keep some of them there in the loop.
                let mut sums = black_box(sums);
                if whole < count {
                    let rest = !($mask::MAX << (count - whole));
                    // SAFETY: only the elements of the mask are read, which are below `count`.
                    let mut of_y = [unsafe { $load_some(rest, y[0].add(whole).cast()) }; WIDE];
                    for s in 1..WIDE {
                        // SAFETY: as above.
                        of_y[s] = unsafe { $load_some(rest, y[s].add(whole).cast()) };
                    }
                    for r in 0..HIGH {
                        // SAFETY: as above.
                        let of_x = unsafe { $load_some(rest, x[r].add(whole).cast()) };
                        for s in 0..WIDE {
                            sums[r][s] = $multiply_add(of_x, of_y[s], sums[r][s]);
                        }
                    }
                }
                let mut out = [[0.0; WIDE]; HIGH];
                let (places, _) = out.as_flattened_mut().as_chunks_mut::<8>();
                for (place, sums) in places.iter_mut().zip(sums.as_flattened().as_chunks::<8>().0) {
                    *place = $eight(sums);
                }
                out
            }
        }
    };
}

macro_rules! tiles {
    ($f:ident, lanes: $lanes:literal, mask: $mask:ident, zero: $zero:ident, one: $one:ident,
     load: $load:ident, load_some: $load_some:ident, store_some: $store_some:ident,
     add: $add:ident, multiply_add: $multiply_add:ident) => {
        impl Tiles for $f {
            const LANES: usize = $lanes;

            #[target_feature(enable = "avx512f")]
            unsafe fn combine<const REGISTERS: usize>(
                factors: &[[Self; ROWS]],
                strip: &[Self],
                (out, stride): (*mut Self, usize),
                (high, wide): (usize, usize),
                add: bool,
            ) {
                const LONG: usize = STRIP * $lanes;
                let mut sums = [[$zero(); REGISTERS]; ROWS];
                for (f, x) in factors.iter().zip(strip.as_chunks::<LONG>().0) {
                    let mut of_x = [$zero(); REGISTERS];
                    for v in 0..REGISTERS {
                        // SAFETY: there are `STRIP >= REGISTERS` registers in `x`.
                        of_x[v] = unsafe { $load(x.as_ptr().add(v * $lanes)) };
                    }
                    for r in 0..ROWS {
                        let f = $one(f[r]);
                        for v in 0..REGISTERS {
                            sums[r][v] = $multiply_add(f, of_x[v], sums[r][v]);
                        }
                    }
                }
                for (r, row) in sums.iter().enumerate().take(high) {
                    for (v, &sum) in row.iter().enumerate() {
                        let left = wide.saturating_sub(v * $lanes).min($lanes);
                        let some = (((1u32 << left) - 1) & u32::from($mask::MAX)) as $mask;
                        // SAFETY: of row `r < high` only the columns below `wide` are read and written, and
                        // these are there.
                        unsafe {
                            let at = out.add(r * stride + v * $lanes);
                            let sum = if add {
                                $add(sum, $load_some(some, at))
                            } else {
                                sum
                            };
                            $store_some(at, some, sum);
                        }
                    }
                }
            }
        }
    };
}

/// The sum of each of eight registers: the halves of two are added as one register, again and again, which takes a
/// third of the instructions of one sum after the other.
#[inline]
#[target_feature(enable = "avx512f")]
fn eight_f32(of: &[__m512; 8]) -> [f32; 8] {
    let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    // In each quarter of a register: partial sums of four registers.
    let four = |a, b, c, d| {
        let (ab, cd) = (_mm512_castps_pd(pair(a, b)), _mm512_castps_pd(pair(c, d)));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)))
    };
    let (low, high) = (
        four(of[0], of[1], of[2], of[3]),
        four(of[4], of[5], of[6], of[7]),
    );
    let quarters = _mm512_add_ps(
        _mm512_shuffle_f32x4::<0x88>(low, high),
        _mm512_shuffle_f32x4::<0xdd>(low, high),
    );
    let quarters = _mm512_add_ps(quarters, _mm512_shuffle_f32x4::<0xb1>(quarters, quarters));
    let sums = _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0x08>(quarters, quarters));
    let mut out = [0.0; 8];
    // SAFETY: eight places.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

/// The same of eight doubles each.
#[inline]
#[target_feature(enable = "avx512f")]
fn eight_f64(of: &[__m512d; 8]) -> [f64; 8] {
    let pair = |a, b| _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
    let quarters = |a, b| {
        let even = _mm512_shuffle_f64x2::<0x88>(a, b);
        _mm512_add_pd(even, _mm512_shuffle_f64x2::<0xdd>(a, b))
    };
    let low = quarters(pair(of[0], of[1]), pair(of[2], of[3]));
    let high = quarters(pair(of[4], of[5]), pair(of[6], of[7]));
    let sums = quarters(low, high);
    let mut out = [0.0; 8];
    // SAFETY: eight places.
    unsafe { _mm512_storeu_pd(out.as_mut_ptr(), sums) };
    out
}

/// The products of two numbers in each lane are added up. Numbers below the smallest normal one count as 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_add_bf16(x: __m512i, y: __m512i, sum: __m512) -> __m512 {
    // SAFETY: 32 numbers of 16 bits in a register, which either type stands for.
    let (x, y) = unsafe {
        (
            transmute::<__m512i, __m512bh>(x),
            transmute::<__m512i, __m512bh>(y),
        )
    };
    _mm512_dpbf16_ps(sum, x, y)
}

dots!(f32, sum: f32, lanes: 16, mask: u16, there: true, features: "avx512f",
    zero: _mm512_setzero_ps, load: _mm512_loadu_ps, load_some: _mm512_maskz_loadu_ps,
    multiply_add: _mm512_fmadd_ps, eight: eight_f32);
dots!(f64, sum: f64, lanes: 8, mask: u8, there: true, features: "avx512f",
    zero: _mm512_setzero_pd, load: _mm512_loadu_pd, load_some: _mm512_maskz_loadu_pd,
    multiply_add: _mm512_fmadd_pd, eight: eight_f64);
dots!(Bf16, sum: f32, lanes: 32, mask: u32, there: is_x86_feature_detected!("avx512bf16"),
    features: "avx512f,avx512bw,avx512bf16",
    zero: _mm512_setzero_ps, load: _mm512_loadu_epi16, load_some: _mm512_maskz_loadu_epi16,
    multiply_add: multiply_add_bf16, eight: eight_f32);

tiles!(f32, lanes: 16, mask: u16, zero: _mm512_setzero_ps, one: _mm512_set1_ps,
    load: _mm512_loadu_ps, load_some: _mm512_maskz_loadu_ps, store_some: _mm512_mask_storeu_ps,
    add: _mm512_add_ps, multiply_add: _mm512_fmadd_ps);
tiles!(f64, lanes: 8, mask: u8, zero: _mm512_setzero_pd, one: _mm512_set1_pd,
    load: _mm512_loadu_pd, load_some: _mm512_maskz_loadu_pd, store_some: _mm512_mask_storeu_pd,
    add: _mm512_add_pd, multiply_add: _mm512_fmadd_pd);

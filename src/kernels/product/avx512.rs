//! The innermost loops of [`super::blocked`]: as many sums as fill 24 of the 32 registers of AVX-512, which is more than
//! hide the latency of a sum, and few enough that all factors of a step are in registers too. Written out, because
//! LLVM would not keep so many sums in registers.

use super::blocked::{HIGH, ROWS, STRIP, Tiles, WIDE};
use std::arch::x86_64::{
    _mm512_add_pd, _mm512_add_ps, _mm512_fmadd_pd, _mm512_fmadd_ps, _mm512_loadu_pd,
    _mm512_loadu_ps, _mm512_mask_storeu_pd, _mm512_mask_storeu_ps, _mm512_maskz_loadu_pd,
    _mm512_maskz_loadu_ps, _mm512_reduce_add_pd, _mm512_reduce_add_ps, _mm512_set1_pd,
    _mm512_set1_ps, _mm512_setzero_pd, _mm512_setzero_ps,
};
use std::hint::black_box;

macro_rules! tiles {
    ($f:ident, lanes: $lanes:literal, mask: $mask:ident, zero: $zero:ident, one: $one:ident,
     load: $load:ident, load_some: $load_some:ident, store_some: $store_some:ident,
     add: $add:ident, multiply_add: $multiply_add:ident, sum: $sum:ident) => {
        impl Tiles for $f {
            const LANES: usize = $lanes;

            #[target_feature(enable = "avx512f")]
            unsafe fn dots(
                x: [*const Self; HIGH],
                y: [*const Self; WIDE],
                count: usize,
            ) -> [[Self; WIDE]; HIGH] {
                let mut sums = [[$zero(); WIDE]; HIGH];
                let whole = count / $lanes * $lanes;
                for c in (0..whole).step_by($lanes) {
                    let mut of_y = [$zero(); WIDE];
                    for s in 0..WIDE {
                        // SAFETY: `c + LANES <= count`, and so many elements are behind each address.
                        of_y[s] = unsafe { $load(y[s].add(c)) };
                    }
                    for r in 0..HIGH {
                        // SAFETY: as above.
                        let of_x = unsafe { $load(x[r].add(c)) };
                        for s in 0..WIDE {
                            sums[r][s] = $multiply_add(of_x, of_y[s], sums[r][s]);
                        }
                    }
                }
                // In memory from here on, or LLVM would keep some of them there in the loop.
                let mut sums = black_box(sums);
                if whole < count {
                    let rest = !($mask::MAX << (count - whole));
                    let mut of_y = [$zero(); WIDE];
                    for s in 0..WIDE {
                        // SAFETY: only the elements of the mask are read, which are below `count`.
                        of_y[s] = unsafe { $load_some(rest, y[s].add(whole)) };
                    }
                    for r in 0..HIGH {
                        // SAFETY: as above.
                        let of_x = unsafe { $load_some(rest, x[r].add(whole)) };
                        for s in 0..WIDE {
                            sums[r][s] = $multiply_add(of_x, of_y[s], sums[r][s]);
                        }
                    }
                }
                let mut out = [[0.0; WIDE]; HIGH];
                for r in 0..HIGH {
                    for s in 0..WIDE {
                        out[r][s] = $sum(sums[r][s]);
                    }
                }
                out
            }

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

tiles!(f32, lanes: 16, mask: u16, zero: _mm512_setzero_ps, one: _mm512_set1_ps,
    load: _mm512_loadu_ps, load_some: _mm512_maskz_loadu_ps, store_some: _mm512_mask_storeu_ps,
    add: _mm512_add_ps, multiply_add: _mm512_fmadd_ps, sum: _mm512_reduce_add_ps);
tiles!(f64, lanes: 8, mask: u8, zero: _mm512_setzero_pd, one: _mm512_set1_pd,
    load: _mm512_loadu_pd, load_some: _mm512_maskz_loadu_pd, store_some: _mm512_mask_storeu_pd,
    add: _mm512_add_pd, multiply_add: _mm512_fmadd_pd, sum: _mm512_reduce_add_pd);

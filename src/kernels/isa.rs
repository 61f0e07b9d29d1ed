//! Run-time choice of the instruction set.
//!
//! A kernel is a value that implements [`Kernel`]; [`dispatch`] runs it inside a function compiled
//! for the best instruction set of the processor. `run` and everything it calls is
//! `#[inline(always)]`, so that LLVM vectorizes one source three times.

use std::sync::OnceLock;

/// What the code generator may assume inside [`Kernel::run`].
pub trait Isa: Copy {
    /// Whether a fused multiply-add is one instruction (and not a call into libm).
    const FMA: bool;
}

/// The target's baseline: SSE2 on x86-64, NEON on aarch64.
#[derive(Clone, Copy)]
pub struct Baseline;
/// AVX2 with FMA (x86-64-v3).
#[derive(Clone, Copy)]
pub struct Avx2;
/// AVX-512 F, BW, DQ and VL (x86-64-v4).
#[derive(Clone, Copy)]
pub struct Avx512;

impl Isa for Baseline {
    const FMA: bool = cfg!(target_arch = "aarch64");
}
impl Isa for Avx2 {
    const FMA: bool = true;
}
impl Isa for Avx512 {
    const FMA: bool = true;
}

/// A computation that [`dispatch`] compiles once per instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// The computation. Implementations must be `#[inline(always)]`.
    fn run<I: Isa>(self) -> Self::Output;
}

/// An instruction set that this build has code for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// [`Baseline`].
    Baseline,
    /// [`Avx2`].
    Avx2,
    /// [`Avx512`].
    Avx512,
}

impl Level {
    /// The name that `TLLIB_RS_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Level::Baseline if cfg!(target_arch = "aarch64") => "neon",
            Level::Baseline => "baseline",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn supported() -> Level {
    use std::arch::is_x86_feature_detected as has;
    let v3 = has!("avx2") && has!("fma") && has!("bmi1") && has!("bmi2") && has!("f16c");
    let v4 = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
    match (v3, v4) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        _ => Level::Baseline,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn supported() -> Level {
    Level::Baseline
}

/// The instruction set in use: the best that the processor has, or the lower one that the
/// environment variable `TLLIB_RS_ISA` (`baseline`, `avx2`, `avx512`) asks for. Read once.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let asked = match std::env::var("TLLIB_RS_ISA").as_deref() {
            Ok("baseline") => Level::Baseline,
            Ok("avx2") => Level::Avx2,
            _ => Level::Avx512,
        };
        asked.min(supported())
    })
}

/// Whether the processor is Intel's: some libraries use AVX-512 on no other.
#[cfg(target_arch = "x86_64")]
pub fn intel() -> bool {
    static INTEL: OnceLock<bool> = OnceLock::new();
    *INTEL.get_or_init(|| {
        // SAFETY: every x86-64 processor has the instruction. (Compilers disagree on whether that needs saying.)
        #[allow(unused_unsafe)]
        let leaf = unsafe { std::arch::x86_64::__cpuid(0) };
        let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        name.as_flattened() == b"GenuineIntel"
    })
}

/// Runs `kernel` with the instruction set of [`level`].
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: `level` never exceeds what `supported` detected on this processor, and that
        // covers each feature the function enables.
        Level::Avx512 => return unsafe { x86::avx512(kernel) },
        // SAFETY: as above.
        Level::Avx2 => return unsafe { x86::avx2(kernel) },
        Level::Baseline => {}
    }
    kernel.run::<Baseline>()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Avx2, Avx512, Kernel};

    #[target_feature(enable = "avx2,fma,bmi1,bmi2,f16c")]
    pub fn avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Avx2>()
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,f16c")]
    pub fn avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Avx512>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_ordered_and_named() {
        assert!(Level::Baseline < Level::Avx2 && Level::Avx2 < Level::Avx512);
        assert_eq!(Level::Avx2.name(), "avx2");
        assert!(level() <= supported());
    }
}

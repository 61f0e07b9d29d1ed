//! The kernels alone, without torch and Python: `cargo bench --no-default-features`.
//!
//! What a call of the Python class costs beyond these figures is the way to the kernel.
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::num::NonZeroUsize;
use tllib_rs::kernels::isa::{Isa, Kernel, dispatch};
use tllib_rs::kernels::mean_teacher::{Pair, blend_all};
use tllib_rs::kernels::real::Real;
use tllib_rs::kernels::rows::Rows;
use tllib_rs::kernels::{entropy, mcc, uda};

const SHAPES: [(usize, usize); 4] = [(32, 31), (64, 100), (256, 1000), (8, 100_000)];
const ONE: NonZeroUsize = NonZeroUsize::MIN;

/// Numbers between -3 and 3 that follow no pattern.
fn numbers(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| 6.0 * next() - 3.0).collect()
}

/// Value and gradient of losses over rows, on one thread.
fn losses(c: &mut Criterion) {
    for (rows, cols) in SHAPES {
        let (data, other) = (numbers(rows * cols), numbers(rows * cols + 1));
        let positive: Vec<f32> = data.iter().map(|x| x.abs() / 3.0).collect();
        let view = |data| Rows::contiguous(data, rows, cols);
        let (Some(z), Some(weak), Some(p)) = (view(&data), view(&other[1..]), view(&positive))
        else {
            return;
        };
        let mut grad = vec![0.0f32; rows * cols];
        let mut out = vec![0.0f64; rows];
        let mut group = c.benchmark_group("losses");
        group.throughput(Throughput::Elements((rows * cols) as u64));
        let id = |name| BenchmarkId::new(name, format!("{rows}x{cols}"));
        group.bench_function(id("mcc"), |b| {
            b.iter(|| mcc::mcc(black_box(z), 2.0, Some(&mut grad), ONE));
        });
        group.bench_function(id("uda"), |b| {
            b.iter(|| uda::uda(black_box(z), weak, 0.0, 0.85, Some(&mut grad), ONE));
        });
        group.bench_function(id("entropy"), |b| {
            b.iter(|| entropy::entropy(black_box(p), &mut out, Some(&mut grad), 1.0, ONE));
        });
        group.finish();
    }
}

/// A function of every number, in place.
struct Each<'a, const EXP: bool>(&'a [f32], &'a mut [f32]);

impl<const EXP: bool> Kernel for Each<'_, EXP> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        for (y, &x) in self.1.iter_mut().zip(self.0) {
            *y = if EXP {
                Real::exp::<I>(x)
            } else {
                Real::ln::<I>(x)
            };
        }
    }
}

/// How many `exp` and `ln` a second, in the nearest cache.
fn functions(c: &mut Criterion) {
    let x: Vec<f32> = numbers(2048).iter().map(|x| x.abs()).collect();
    let mut y = vec![0.0; x.len()];
    let mut group = c.benchmark_group("functions");
    group.throughput(Throughput::Elements(x.len() as u64));
    group.bench_function("exp", |b| {
        b.iter(|| dispatch(Each::<true>(black_box(&x), &mut y)));
    });
    group.bench_function("ln", |b| {
        b.iter(|| dispatch(Each::<false>(black_box(&x), &mut y)));
    });
    group.finish();
}

/// The sweep over a teacher's parameters: one large tensor, and as many numbers in small ones.
fn average(c: &mut Criterion) {
    const NUMBERS: usize = 1 << 20;
    let (mut teacher, student) = (numbers(NUMBERS), numbers(NUMBERS));
    let mut group = c.benchmark_group("mean_teacher");
    group.throughput(Throughput::Bytes(12 * NUMBERS as u64));
    for len in [NUMBERS, 64] {
        group.bench_function(BenchmarkId::new("tensors of", len), |b| {
            b.iter(|| blend_all(&pairs(&mut teacher, &student, len), 0.99, ONE));
        });
    }
    group.finish();
}

fn pairs(teacher: &mut [f32], student: &[f32], len: usize) -> Vec<Pair> {
    let tensors = teacher.chunks_mut(len).zip(student.chunks(len));
    tensors
        .map(|(t, s)| {
            // SAFETY: both slices have this length and outlive the pairs, which the caller drops while
            // it still holds the borrows; chunks do not overlap, and nothing else writes them.
            unsafe { Pair::new(t.as_mut_ptr(), s.as_ptr(), t.len()) }
        })
        .collect()
}

criterion_group!(kernels, losses, functions, average);
criterion_main!(kernels);

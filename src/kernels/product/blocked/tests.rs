use super::super::super::element::Bf16;
use super::super::super::rows::CACHE_LINE;
use super::*;

fn numbers<F: Real>(count: usize, step: usize) -> Vec<F> {
    (0..count)
        .map(|k| F::of((k * step % 11) as f64 - 5.0))
        .collect()
}

/// The numbers, `offset` elements behind a cache line, and where they begin.
fn placed<E: Element>(numbers: &[E], offset: usize) -> (Vec<E>, usize) {
    let room = vec![E::store(E::Acc::ZERO); CACHE_LINE / size_of::<E>() + offset];
    let mut all = [&room, numbers].concat();
    let start = all.as_ptr().align_offset(CACHE_LINE) + offset;
    all.copy_within(room.len().., start);
    (all, start)
}

/// Whole numbers, so that sums in any order are exact. Rows begin at cache lines if the offset is 0 and `k` a multiple
/// of 16.
fn matches_loops<F: Element<Acc = F> + Real + Tiles>(
    (n, k, m): (usize, usize, usize),
    threads: usize,
    offset: usize,
) {
    let width = k + 16;
    let (x, y) = (numbers::<F>(n * width, 7), numbers::<F>(k * m, 3));
    let expected = |i: usize, j: usize| -> f64 {
        let term = |c: usize| x[i * width + c].to_f64() * y[c * m + j].to_f64();
        (0..k).map(term).sum()
    };
    let turned = |x: &[F], rows: usize, cols: usize| -> Vec<F> {
        (0..rows * cols)
            .map(|at| x[at % rows * cols + at / rows])
            .collect()
    };
    let (x_turned, y_turned) = (turned(&x, n, width), turned(&y, k, m));
    let ((x, x_at), (y_turned, y_at)) = (placed(&x, offset), placed(&y_turned, offset));
    let (x, y_turned) = (&x[x_at..][..n * width], &y_turned[y_at..][..m * k]);
    let x_turned = Rows::contiguous(&x_turned, width, n).unwrap().transposed();
    let y_turned = Rows::contiguous(y_turned, m, k).unwrap().transposed();
    let x = Rows::contiguous(x, n, width).unwrap();
    let rows = Rows::contiguous(&y, k, m).unwrap();
    for (x, y) in [(x, y_turned), (x, rows), (x_turned, rows)] {
        for (add, upper) in [(false, false), (true, false), (true, true)] {
            let stride = m + 3;
            let mut out = vec![F::of(0.5); n * stride];
            // SAFETY: the matrix is in `out`, which nobody else has.
            let target = unsafe { Target::new(out.as_mut_ptr(), (n, m), stride) };
            let product = Product {
                x: x.columns(0..k),
                y,
                out: target,
                add,
                upper,
            };
            if !product.compute(threads) {
                let fits = n >= HIGH && m >= WIDE && k > 0;
                assert!(level() < Level::Avx512 || !fits);
                assert!(out.iter().all(|out| out.to_f64() == 0.5));
                continue;
            }
            for (at, out) in out.iter().enumerate() {
                let (i, j) = (at / stride, at % stride);
                if j >= m {
                    assert_eq!(out.to_f64(), 0.5);
                } else if j >= i || !upper {
                    let before = if add { 0.5 } else { 0.0 };
                    assert_eq!(out.to_f64(), before + expected(i, j), "{i} {j}");
                }
            }
        }
    }
}

#[test]
fn products_match_loops_in_every_size() {
    for sizes in [
        (4, 1, 6),
        (5, 17, 7),
        (8, 16, 48),
        (13, 200, 50),
        (3, 5, 9),
        (9, 5, 5),
        (8, 0, 8),
        (33, 1100, 97),
        (26, 1216, 50),
        (150, 30, 150),
        (300, 3, 100),
    ] {
        for (threads, offset) in [(1, 0), (3, 0), (1, 1)] {
            matches_loops::<f32>(sizes, threads, offset);
            matches_loops::<f64>(sizes, threads, offset);
        }
    }
}

/// Numbers that bfloat16 has, and sums that float32 has.
#[test]
fn dot_products_of_bfloat16() {
    for (n, k, m) in [
        (4, 7, 6),
        (5, 32, 9),
        (13, 100, 50),
        (9, 2100, 8),
        (150, 333, 150),
    ] {
        let numbers = |count, step| -> Vec<Bf16> {
            let all = numbers::<f32>(count, step);
            all.into_iter().map(Bf16::store).collect()
        };
        let (x, y) = (numbers(n * (k + 2), 7), numbers(m * k, 3));
        for (threads, upper) in [(1, false), (3, false), (2, n == m)] {
            let mut out = vec![0.5f32; n * m];
            // SAFETY: the matrix is `out`, which nobody else has.
            let target = unsafe { Target::new(out.as_mut_ptr(), (n, m), m) };
            let product = Product {
                x: Rows::contiguous(&x, n, k + 2).unwrap().columns(0..k),
                y: Rows::contiguous(&y, m, k).unwrap().transposed(),
                out: target,
                add: true,
                upper,
            };
            if !product.compute_dots(threads) {
                let fits = Bf16::there() && level() == Level::Avx512 && k >= short::<Bf16>((n, m));
                assert!(!fits && out.iter().all(|&out| out == 0.5));
                continue;
            }
            for (at, &out) in out.iter().enumerate() {
                let (i, j) = (at / m, at % m);
                let term = |c: usize| x[i * (k + 2) + c].load() * y[j * k + c].load();
                let expected = 0.5 + (0..k).map(term).sum::<f32>();
                assert!(out == expected || (upper && j < i), "{i} {j}");
            }
        }
    }
}

#[test]
fn blocks_cover_each_place_once() {
    for (rows, cols) in [
        (1, 1),
        (32, 6400),
        (64, 64),
        (129, 47),
        (256, 256),
        (1000, 1000),
    ] {
        for (upper, threads) in [(false, 1), (false, 3), (true, 2)] {
            for cut in [DOTS, STRIPS] {
                let mut seen = vec![0; rows * cols];
                let all = blocks(
                    (rows, cols),
                    upper,
                    cut,
                    NonZeroUsize::new(threads).unwrap(),
                );
                for (down, across) in all {
                    for i in down {
                        for j in across.clone() {
                            seen[i * cols + j] += 1;
                        }
                    }
                }
                for (at, &seen) in seen.iter().enumerate() {
                    let needed = !upper || at % cols >= at / cols;
                    assert!(seen == 1 || (seen == 0 && !needed), "{at}");
                }
            }
        }
    }
}

#[test]
fn a_small_square_of_dot_products_is_work_for_many() {
    for threads in [2, 4] {
        for upper in [false, true] {
            let threads = NonZeroUsize::new(threads).unwrap();
            let all = blocks((64, 64), upper, DOTS, threads);
            let areas = all.iter().map(|(down, across)| down.len() * across.len());
            let (most, total) = (areas.clone().max().unwrap(), areas.sum::<usize>());
            assert!(most * threads.get() <= total, "{most} of {total}");
        }
    }
}

#[test]
fn small_is_what_an_intel_library_is_slow_for() {
    let all = vec![1.0f32; 600 * 528];
    let start = all.as_ptr().align_offset(CACHE_LINE);
    let small = |(n, m): (usize, usize), width: usize, upper: bool| {
        let rows = |count| Rows::contiguous(&all[start..start + count * width], count, width);
        let mut out = [0.0f32];
        Product {
            x: rows(n).unwrap(),
            y: rows(m).unwrap().transposed(),
            // SAFETY: nothing is written.
            out: unsafe { Target::new(out.as_mut_ptr(), (n, m), m) },
            add: false,
            upper,
        }
        .small()
    };
    assert!(small((128, 128), 32, false) && !small((129, 128), 32, false));
    assert!(small((256, 256), 32, true) && !small((257, 257), 32, true));
    // Rows that do not begin at cache lines.
    assert!(small((64, 64), 33, false) && !small((65, 64), 33, false));
    assert!(small((128, 128), 33, true) && !small((129, 129), 33, true));
    assert!(small((128, 128), 513, false) && !small((129, 128), 513, false));
    // Few rows, and long ones.
    assert!(small((64, 600), 513, false) && !small((65, 600), 513, false));
    assert!(!small((64, 600), 511, false));
}

#[test]
fn what_is_not_finite_stays_in_its_row_and_column() {
    let (mut x, y) = (vec![1.0f32; 9 * 20], vec![1.0f32; 20 * 50]);
    x[8 * 20 + 19] = f32::INFINITY;
    let mut out = vec![0.0; 9 * 50];
    // SAFETY: the matrix is in `out`, which nobody else has.
    let target = unsafe { Target::new(out.as_mut_ptr(), (9, 50), 50) };
    let product = Product {
        x: Rows::contiguous(&x, 9, 20).unwrap(),
        y: Rows::contiguous(&y, 20, 50).unwrap(),
        out: target,
        add: false,
        upper: false,
    };
    if product.compute(1) {
        assert!(out[..8 * 50].iter().all(|&out| out == 20.0));
        assert!(out[8 * 50..].iter().all(|&out| out == f32::INFINITY));
    }
}

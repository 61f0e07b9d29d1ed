use super::*;

fn features(n: usize, dim: usize, offset: f64) -> Vec<f64> {
    (0..n * dim)
        .map(|k| ((k * 7919 + 31 * (k / dim)) % 101) as f64 / 50.0 + offset)
        .collect()
}

/// In tiles of this height and width, only those above the diagonal if `mirrored`.
fn mined_in<F: Element<Acc = F> + Real>(
    x: &[F],
    dim: usize,
    labels: &[i64],
    threads: usize,
    (height, width, mirrored): (usize, usize, bool),
) -> Vec<Hardest> {
    let n = labels.len();
    let rows = Rows::contiguous(x, n, dim).unwrap();
    let dot = |i: usize, j: usize| {
        (0..dim)
            .map(|k| x[i * dim + k].to_f64() * x[j * dim + k].to_f64())
            .sum::<f64>()
    };
    let products: Vec<F> = (0..n * n).map(|k| F::of(dot(k / n, k % n))).collect();
    let identities = Identities::new(labels, None);
    let squares = squares(rows, NonZeroUsize::new(2).unwrap());
    let mining = Mining {
        anchors: rows,
        candidates: rows,
        identities: &identities,
        anchor_squares: &squares,
        squares: &squares,
        largest_square: reduce::max(&squares),
    };
    let threads = NonZeroUsize::new(threads).unwrap();
    let mut seen = mining.start();
    for top in (0..n).step_by(height) {
        let bottom = n.min(top + height);
        for left in (if mirrored { top } else { 0 }..n).step_by(width) {
            let right = n.min(left + width);
            let part: Vec<F> = (top..bottom)
                .flat_map(|i| products[i * n + left..i * n + right].iter().copied())
                .collect();
            let tile = Tile {
                products: Rows::contiguous(&part, bottom - top, right - left).unwrap(),
                first: (top, left),
                mirrored,
            };
            if (bottom, right) == (n, n) {
                return mining.finish(tile, &mut seen, threads);
            }
            mining.look(tile, &mut seen, threads);
        }
    }
    unreachable!("no last tile")
}

fn mined<F: Element<Acc = F> + Real>(
    x: &[F],
    dim: usize,
    labels: &[i64],
    threads: usize,
) -> Vec<Hardest> {
    let n = labels.len();
    mined_in(x, dim, labels, threads, (n, n, false))
}

#[test]
fn finds_what_a_plain_search_finds() {
    // Fewer candidates than are compared at once, as many, and more.
    for n in [7, 32, 37, 64, 101] {
        plain_search(n, 19);
    }
}

fn plain_search(n: usize, dim: usize) {
    let x = features(n, dim, 0.0);
    let labels: Vec<i64> = (0..n as i64).map(|i| i * i % 7 - 3).collect();
    let d = |i: usize, j: usize| {
        squared_distance(&x[i * dim..(i + 1) * dim], &x[j * dim..(j + 1) * dim])
    };
    for threads in [1, 3] {
        for (i, got) in mined(&x, dim, &labels, threads).iter().enumerate() {
            let same: Vec<usize> = (0..n).filter(|&j| labels[j] == labels[i]).collect();
            let others: Vec<usize> = (0..n).filter(|&j| labels[j] != labels[i]).collect();
            let farthest = same.iter().map(|&j| d(i, j)).fold(0.0, f64::max);
            let nearest = others.iter().map(|&j| d(i, j)).fold(f64::MAX, f64::min);
            assert_eq!(
                (got.positive.square, got.negative.square),
                (farthest, nearest)
            );
            assert_eq!(d(i, got.positive.index), farthest);
            assert!(labels[got.negative.index] != labels[i] && !got.positive.missing);
        }
    }
}

#[test]
fn any_labels_are_numbered_in_the_order_of_their_first_occurrence() {
    // Close to each other, far apart, and too far apart to be subtracted.
    for labels in [
        [7, -2, 7, 3, -2, 8],
        [7000, -2000, 7000, 3, -2000, 8],
        [i64::MAX, i64::MIN, i64::MAX, 3, i64::MIN, -1],
    ] {
        let own = Identities::new(&labels, None);
        assert_eq!(own.anchors, [0, 1, 0, 2, 1, 3]);
        assert_eq!(
            (own.anchors, own.counts),
            (own.candidates, vec![2, 2, 1, 1])
        );
        let other = Identities::new(&labels[2..4], Some(&labels));
        assert_eq!(other.anchors, [0, 1]);
        assert_eq!(other.candidates, [0, 2, 0, 1, 2, 3]);
        assert_eq!(other.counts, [2, 1, 2, 1]);
    }
    assert!(Identities::new(&[], None).counts.is_empty());
}

#[test]
fn a_common_offset_does_not_change_the_pairs() {
    let (n, dim) = (16, 8);
    let labels: Vec<i64> = (0..n as i64).map(|i| i / 4).collect();
    let index = |offset: f64| -> Vec<_> {
        // Halves of integers are exact in f32 with the offset too.
        let x: Vec<f32> = features(n, dim, 0.0)
            .iter()
            .map(|x| ((x * 50.0).round() / 2.0 + offset) as f32)
            .collect();
        mined(&x, dim, &labels, 1)
            .iter()
            .map(|h| (h.positive, h.negative))
            .collect()
    };
    assert_eq!(index(0.0), index(4000.0));
}

#[test]
fn singletons_twins_and_one_identity() {
    let x = [0.0f32, 1.0, 0.0, 1.0, 5.0, 1.0, 9.0, 9.0];
    let got = mined(&x, 2, &[1, 1, 2, 3], 1);
    // Twins: the anchor and its double are equally far, the first index wins.
    assert_eq!(
        got[1].positive,
        Found {
            index: 0,
            square: 0.0,
            missing: false
        }
    );
    assert_eq!(
        got[2].positive,
        Found {
            index: 2,
            square: 0.0,
            missing: false
        }
    );
    assert_eq!(
        got[2].negative,
        Found {
            index: 0,
            square: 25.0,
            missing: false
        }
    );
    let got = mined(&x, 2, &[1, 1, 1, 1], 1);
    assert_eq!(
        got[3].negative,
        Found {
            index: 3,
            square: 0.0,
            missing: true
        }
    );
    let collapsed = [0.5f32; 128];
    assert_eq!(mined(&collapsed, 2, &[4; 64], 1)[40].positive.index, 0);
}

#[test]
fn values_that_are_not_finite_reach_the_pair() {
    let x = [0.0f32, 1.0, f32::NAN, 1.0];
    assert!(
        mined(&x, 2, &[1, 2], 1)
            .iter()
            .all(|h| h.positive.square.is_nan() && h.negative.square.is_nan())
    );
}

#[test]
fn tiles_and_their_mirror_images_make_no_difference() {
    let (n, dim) = (45, 6);
    // Copies of rows, whose distances are equal, next to rows of their own.
    let spread: Vec<f32> = features(n, dim, 0.0).iter().map(|&x| x as f32).collect();
    let twins: Vec<f32> = (0..n * dim)
        .map(|k| spread[k / dim % 9 * dim + k % dim])
        .collect();
    let labels: [Vec<i64>; 3] = [
        (0..n as i64).map(|i| i % 7).collect(),
        (0..n as i64).collect(),
        vec![3; n],
    ];
    for x in [&spread, &twins] {
        for labels in &labels {
            let whole = mined(x, dim, labels, 1);
            for tiles in [
                (45, 7, true),
                (8, 45, true),
                (8, 5, true),
                (5, 16, false),
                (16, 16, true),
            ] {
                for threads in [1, 2, 40] {
                    assert_eq!(mined_in(x, dim, labels, threads, tiles), whole, "{tiles:?}");
                }
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_reaches_anchors_through_every_tile() {
    let mut x = features(20, 3, 0.0);
    x[3 * 13 + 1] = f64::INFINITY;
    for tiles in [(20, 20, false), (4, 6, true), (4, 6, false)] {
        let labels: Vec<i64> = (0..20).map(|i| i / 2).collect();
        for found in mined_in(&x, 3, &labels, 2, tiles) {
            assert!(found.positive.square.is_nan() && found.negative.square.is_nan());
        }
    }
}

#[test]
fn of_more_close_candidates_than_are_compared_the_largest_is_one() {
    let mut near = Near::<f32>::NOTHING;
    for index in 0..40 {
        let key = if index == 33 { 1.5 } else { 1.0 };
        near.raise(key, 1.0);
        near.push(key, index);
    }
    let indices: Vec<usize> = near.indices().collect();
    assert_eq!(indices, (0..15).chain([33]).collect::<Vec<_>>());
    near.raise(9.0, 1.0);
    assert_eq!(near.indices().count(), 0);
}

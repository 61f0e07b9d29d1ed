use super::super::element::{Bf16, F16};
use super::super::lanes::{self, LANES, Tile};
use super::super::real::Real;
use super::*;
use std::ops::Range;

#[test]
fn strides_and_conversion() {
    let data: Vec<f32> = (0..24).map(|x| x as f32).collect();
    let plain = Rows::contiguous(&data, 4, 6).unwrap();
    assert_eq!(plain.row(2, &mut []), &data[12..18]);
    // SAFETY: the transpose of a 4 x 6 matrix addresses the same 24 elements.
    let transposed = unsafe { Rows::strided(data.as_ptr(), (6, 4), (1, 6)) };
    assert_eq!(transposed.row(1, &mut [0.0; 4]), &[1.0, 7.0, 13.0, 19.0]);
    // SAFETY: one column, of which row 1 is element 6.
    let column = unsafe { Rows::strided(data.as_ptr(), (4, 1), (6, 9)) };
    assert_eq!(column.row(1, &mut []), &[6.0]);
    assert!(!plain.same(&transposed) && plain.same(&plain));
    assert!(Rows::contiguous(&data, 5, 5).is_none());
    assert_eq!(plain.slice(1..3).row(1, &mut []), &data[12..18]);
    assert_eq!(plain.columns(2..4).row(1, &mut []), &data[8..10]);
    assert_eq!(transposed.columns(1..2).row(5, &mut [0.0]), &[11.0]);
    assert_eq!(plain.grouped(2).unwrap().row(1, &mut []), &data[12..24]);
    assert_eq!(plain.grouped(3).unwrap().rows(), 1);
    assert!(transposed.grouped(2).is_none());

    let half: Vec<Bf16> = data.iter().map(|&x| Bf16::store(x)).collect();
    let rows = Rows::contiguous(&half, 4, 6).unwrap();
    assert_eq!(rows.row(3, &mut [0.0; 6]), &data[18..24]);
    let mut out = [Bf16(0); 2];
    store_row(&[1.0, 2.0], 4.0, &mut out);
    assert_eq!(out.map(Element::load), [4.0, 8.0]);
}

#[test]
fn numbers_are_rounded_as_each_alone() {
    let values: Vec<f64> = (0..75).map(|k| f64::from(k) * 0.1234 - 3.0).collect();
    let mut out = [F16(0); 75];
    round(&values, &mut out);
    assert_eq!(
        out.to_vec(),
        values
            .iter()
            .map(|&v| F16::store(v as f32))
            .collect::<Vec<_>>()
    );
}

/// Every row, every group of rows and every tile of the matrix, all ways of reading.
fn check<E: Element>(rows: Rows<'_, E>, value: impl Fn(usize, usize) -> f64) {
    let expect = |range: Range<usize>, got: &[E::Acc]| {
        let got: Vec<f64> = got.iter().map(|x| x.to_f64()).collect();
        let expected: Vec<f64> = range
            .flat_map(|i| (0..rows.cols).map(move |j| (i, j)))
            .map(|(i, j)| value(i, j))
            .collect();
        assert_eq!(got, expected);
    };
    let mut scratch = rows.scratch();
    for i in (0..rows.height).chain([0]) {
        expect(i..i + 1, rows.in_turn(i, &mut scratch));
    }
    let (count, mut scratch) = rows.groups();
    for start in (0..rows.height).step_by(count) {
        let range = start..rows.height.min(start + count);
        expect(range.clone(), rows.block(range, &mut scratch));
    }
    let mut columns = Tile::new(rows.cols);
    let expect_columns = |picked: &[usize], columns: &Tile<E::Acc>| {
        for (c, lanes) in columns.iter().enumerate() {
            for (k, lane) in lanes.iter().enumerate() {
                assert_eq!(lane.to_f64(), value(picked[k.min(picked.len() - 1)], c));
            }
        }
    };
    for (range, _) in lanes::tiles(0..rows.height) {
        rows.side_by_side(range.clone(), &mut columns);
        expect_columns(&range.collect::<Vec<_>>(), &columns);
    }
    // In another order, with gaps, and one of them twice.
    for count in [1, LANES - 1, LANES] {
        let picked: Vec<usize> = (0..count)
            .map(|k| (5 * k.max(1) + 3) % rows.height)
            .collect();
        rows.picked_side_by_side(&picked, &mut columns);
        expect_columns(&picked, &columns);
    }
}

fn every_layout<E: Element>(height: usize, cols: usize) {
    // Exact in every type.
    let number = |k: usize| (k % 251) as f64;
    let data: Vec<E> = (0..=2 * height * cols)
        .map(|k| E::store(E::Acc::of(number(k))))
        .collect();
    let strides = [
        (cols, 1),
        (cols + 1, 1),
        (1, height),
        (1, height + 1),
        (2 * cols, 2),
        (2, 2 * height),
        (0, 1),
        (1, 0),
    ];
    for (down, across) in strides {
        assert!((height - 1) * down + (cols - 1) * across < data.len());
        // SAFETY: the last element is within the data, as just asserted.
        let rows = unsafe {
            Rows::strided(
                data.as_ptr(),
                (height, cols),
                (down as isize, across as isize),
            )
        };
        let across = if cols > 1 { across } else { 1 };
        check(rows, |i, j| number(i * down + j * across));
    }
}

#[test]
fn every_layout_and_type() {
    for (height, cols) in [
        (1, 1),
        (3, 5),
        (16, 16),
        (17, 33),
        (31, 10),
        (70, 3),
        (5, 900),
        (700, 7),
    ] {
        every_layout::<f32>(height, cols);
        every_layout::<f64>(height, cols);
        every_layout::<F16>(height, cols);
        every_layout::<Bf16>(height, cols);
    }
}

fn back_and_forth<E: Element + PartialEq + std::fmt::Debug>(rows: usize, cols: usize) {
    // Exact in every type.
    let number = |k: usize| E::store(E::Acc::of((k % 251) as f64));
    let data: Vec<E> = (0..rows * cols).map(number).collect();
    let mut columns = Tile::new(cols);
    let view = Rows::contiguous(&data, rows, cols).unwrap();
    view.side_by_side(0..rows, &mut columns);
    let outside = E::store(E::Acc::of(-1.0));
    let mut out = vec![outside; (rows + 2) * cols];
    columns.put_back(&mut out, 1..rows + 1);
    assert_eq!(out[cols..(rows + 1) * cols], data);
    let around = out[..cols].iter().chain(&out[(rows + 1) * cols..]);
    assert!(around.into_iter().all(|&x| x == outside));
}

#[test]
fn columns_go_back_to_their_rows() {
    for rows in 1..=LANES {
        for cols in [1, 3, 4, 5, 8, 10, 35] {
            back_and_forth::<f32>(rows, cols);
            back_and_forth::<f64>(rows, cols);
            back_and_forth::<F16>(rows, cols);
            back_and_forth::<Bf16>(rows, cols);
        }
    }
}

//! The exponential moving average of a teacher: `t <- alpha t + (1 - alpha) s`, in place, over all
//! parameters of a model in one sweep.

use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::parallel::{run, split};
use super::real::Real;
use std::num::NonZeroUsize;
use std::ops::Range;

/// One parameter: the teacher's memory, written, and the student's, read. The element types are
/// erased into a function pointer, so that a model of mixed types is one plain list.
#[derive(Clone, Copy)]
pub struct Pair {
    teacher: *mut u8,
    student: *const u8,
    len: usize,
    blend: unsafe fn(Pair, Range<usize>, f64),
}

// SAFETY: the constructor's contract makes it an exclusive borrow of the teacher's memory and a
// shared borrow of the student's, both of plain numbers.
unsafe impl Send for Pair {}
// SAFETY: as above; shared copies are used for disjoint ranges only, in `blend_all`.
unsafe impl Sync for Pair {}

impl Pair {
    /// # Safety
    /// For as long as the pair and its copies live, `teacher` must be valid for reads and writes of
    /// `len` elements that nothing else writes, and `student` for reads of `len` elements. They may
    /// be the same memory, but may not overlap partly.
    pub unsafe fn new<T: Element, S: Element>(
        teacher: *mut T,
        student: *const S,
        len: usize,
    ) -> Self {
        Self {
            teacher: teacher.cast(),
            student: student.cast(),
            len,
            blend: blend::<T, S>,
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// # Safety
/// `pair` was made for `T` and `S`; `range` is within it, and no other thread has it.
unsafe fn blend<T: Element, S: Element>(pair: Pair, range: Range<usize>, alpha: f64) {
    dispatch(Blend {
        teacher: pair.teacher.cast::<T>().wrapping_add(range.start),
        student: pair.student.cast::<S>().wrapping_add(range.start),
        len: range.len(),
        alpha,
    });
}

struct Blend<T, S> {
    teacher: *mut T,
    student: *const S,
    len: usize,
    alpha: f64,
}

impl<T: Element, S: Element> Kernel for Blend<T, S> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        // Rounded as torch rounds Python scalars: each to the computing type, on its own.
        let (keep, take) = (T::Acc::of(self.alpha), T::Acc::of(1.0 - self.alpha));
        for k in 0..self.len {
            // SAFETY: `k < len`, and both pointers are valid for `len` elements.
            unsafe {
                let s = T::Acc::of((*self.student.add(k)).load().to_f64());
                let t = self.teacher.add(k);
                *t = T::store(keep * (*t).load() + take * s);
            }
        }
    }
}

/// Updates all pairs, on `threads` threads that get equally many elements each, whatever the sizes
/// of the tensors.
pub fn blend_all(pairs: &[Pair], alpha: f64, threads: NonZeroUsize) {
    let total = pairs.iter().map(Pair::len).sum();
    let jobs = split(total, threads)
        .into_iter()
        .map(|range| move || blend_range(pairs, range, alpha))
        .collect();
    run(jobs);
}

/// Updates the elements of `range`, numbered consecutively over all pairs.
fn blend_range(pairs: &[Pair], range: Range<usize>, alpha: f64) {
    let mut start = 0;
    for pair in pairs {
        let end = start + pair.len;
        let own = range.start.max(start)..range.end.min(end);
        if !own.is_empty() {
            // SAFETY: `blend` was made with the pair's types; the ranges of different jobs are
            // disjoint, so no other thread has these elements.
            unsafe { (pair.blend)(*pair, own.start - start..own.end - start, alpha) };
        }
        if end >= range.end {
            return;
        }
        start = end;
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::Bf16;
    use super::*;

    fn pair<T: Element, S: Element>(t: &mut [T], s: &[S]) -> Pair {
        assert_eq!(t.len(), s.len());
        // SAFETY: the slices outlive the pair in each test, and nothing else touches them.
        unsafe { Pair::new(t.as_mut_ptr(), s.as_ptr(), t.len()) }
    }

    #[test]
    fn all_sizes_on_any_number_of_threads() {
        for threads in 1..5 {
            let sizes = [1, 100, 0, 7, 33, 1000];
            let mut teachers: Vec<Vec<f32>> = sizes.iter().map(|&n| vec![2.0; n]).collect();
            let students: Vec<Vec<f32>> = sizes.iter().map(|&n| vec![4.0; n]).collect();
            let pairs: Vec<_> = teachers
                .iter_mut()
                .zip(&students)
                .map(|(t, s)| pair(t, s))
                .collect();
            blend_all(&pairs, 0.75, NonZeroUsize::new(threads).unwrap());
            assert!(teachers.iter().flatten().all(|&t| t == 2.5));
        }
    }

    #[test]
    fn mixed_types() {
        let (mut teacher, student) = ([1.0f32; 5], [Bf16::store(3.0); 5]);
        blend_all(&[pair(&mut teacher, &student)], 0.5, NonZeroUsize::MIN);
        assert_eq!(teacher, [2.0; 5]);
        let (mut teacher, student) = ([Bf16::store(1.0); 2], [3.0f64; 2]);
        blend_all(&[pair(&mut teacher, &student)], 0.0, NonZeroUsize::MIN);
        assert_eq!(teacher.map(Element::load), [3.0; 2]);
    }
}

//! The exponential moving average of a teacher: `t <- alpha t + (1 - alpha) s`, in place, over all
//! parameters of a model in one sweep.

use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::parallel::run;
use super::real::Real;
use std::num::NonZeroUsize;

/// One parameter: the teacher's memory, written, and the student's, read. Same length.
pub trait Pair: Send {
    /// The number of elements.
    fn len(&self) -> usize;
    /// Whether there is nothing to do.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The first `at` elements, and the rest.
    fn split(self: Box<Self>, at: usize) -> (Box<dyn Pair>, Box<dyn Pair>);
    /// The update.
    fn blend(&mut self, alpha: f64);
}

/// A [`Pair`] of raw slices, possibly of different types.
pub struct RawPair<T, S> {
    teacher: *mut T,
    student: *const S,
    len: usize,
}

// SAFETY: the constructor's contract makes it an exclusive borrow of the teacher's memory and a
// shared borrow of the student's, both of plain numbers.
unsafe impl<T: Element, S: Element> Send for RawPair<T, S> {}

impl<T: Element, S: Element<Acc = A>, A: Real> RawPair<T, S> {
    /// # Safety
    /// For as long as the pair lives, `teacher` must be valid for reads and writes of `len`
    /// elements that nothing else writes, and `student` for reads of `len` elements. They may be
    /// the same memory, but may not overlap partly.
    pub unsafe fn new(teacher: *mut T, student: *const S, len: usize) -> Self {
        Self {
            teacher,
            student,
            len,
        }
    }
}

impl<T: Element, S: Element> Pair for RawPair<T, S> {
    fn len(&self) -> usize {
        self.len
    }

    fn split(self: Box<Self>, at: usize) -> (Box<dyn Pair>, Box<dyn Pair>) {
        let at = at.min(self.len);
        let tail = Self {
            teacher: self.teacher.wrapping_add(at),
            student: self.student.wrapping_add(at),
            len: self.len - at,
        };
        (Box::new(Self { len: at, ..*self }), Box::new(tail))
    }

    fn blend(&mut self, alpha: f64) {
        dispatch(Blend { pair: self, alpha });
    }
}

struct Blend<'a, T, S> {
    pair: &'a mut RawPair<T, S>,
    alpha: f64,
}

impl<T: Element, S: Element> Kernel for Blend<'_, T, S> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        // Rounded as torch rounds Python scalars: each to the computing type, on its own.
        let (keep, take) = (T::Acc::of(self.alpha), T::Acc::of(1.0 - self.alpha));
        for k in 0..self.pair.len {
            // SAFETY: `k < len`, and both pointers are valid for `len` elements.
            unsafe {
                let s = T::Acc::of((*self.pair.student.add(k)).load().to_f64());
                let t = self.pair.teacher.add(k);
                *t = T::store(keep * (*t).load() + take * s);
            }
        }
    }
}

/// Updates all pairs, on `threads` threads that get equally many elements each, whatever the sizes
/// of the tensors.
pub fn blend_all(pairs: Vec<Box<dyn Pair>>, alpha: f64, threads: NonZeroUsize) {
    let total: usize = pairs.iter().map(|p| p.len()).sum();
    let share = total.div_ceil(threads.get()).max(1);
    let mut jobs = Vec::with_capacity(threads.get());
    let (mut job, mut room) = (Vec::new(), share);
    for mut pair in pairs {
        while pair.len() > room {
            let (head, tail) = pair.split(room);
            job.push(head);
            jobs.push(std::mem::take(&mut job));
            (pair, room) = (tail, share);
        }
        room -= pair.len();
        job.push(pair);
    }
    jobs.push(job);
    let jobs: Vec<_> = jobs
        .into_iter()
        .map(|job| move || job.into_iter().for_each(|mut pair| pair.blend(alpha)))
        .collect();
    run(jobs);
}

#[cfg(test)]
mod tests {
    use super::super::element::Bf16;
    use super::*;

    fn pair<T: Element, S: Element>(t: &mut [T], s: &[S]) -> Box<dyn Pair> {
        assert_eq!(t.len(), s.len());
        // SAFETY: the slices outlive the pair in each test, and nothing else touches them.
        unsafe { Box::new(RawPair::new(t.as_mut_ptr(), s.as_ptr(), t.len())) }
    }

    #[test]
    fn all_sizes_on_any_number_of_threads() {
        for threads in 1..5 {
            let sizes = [1, 100, 0, 7, 33, 1000];
            let mut teachers: Vec<Vec<f32>> = sizes.iter().map(|&n| vec![2.0; n]).collect();
            let students: Vec<Vec<f32>> = sizes.iter().map(|&n| vec![4.0; n]).collect();
            let pairs = teachers
                .iter_mut()
                .zip(&students)
                .map(|(t, s)| pair(t, s))
                .collect();
            blend_all(pairs, 0.75, NonZeroUsize::new(threads).unwrap());
            assert!(teachers.iter().flatten().all(|&t| t == 2.5));
        }
    }

    #[test]
    fn mixed_types() {
        let (mut teacher, student) = ([1.0f32; 5], [Bf16::store(3.0); 5]);
        blend_all(vec![pair(&mut teacher, &student)], 0.5, NonZeroUsize::MIN);
        assert_eq!(teacher, [2.0; 5]);
        let (mut teacher, student) = ([Bf16::store(1.0); 2], [3.0f64; 2]);
        blend_all(vec![pair(&mut teacher, &student)], 0.0, NonZeroUsize::MIN);
        assert_eq!(teacher.map(Element::load), [3.0; 2]);
    }
}

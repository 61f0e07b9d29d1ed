//! The teacher's moving average on tensors. The sweep is in [`crate::kernels::mean_teacher`].

use crate::error::{Error, Result};
use crate::kernels::mean_teacher::{Pair, RawPair, blend_all};
use crate::kernels::parallel::threads_for;
use crate::torch::input::Input;
use crate::torch::{bump_version, by_dtype, max_threads};
use tch::Tensor;

const CLASS: &str = "EMATeacher";
/// Elements that one thread averages in the time that makes another thread worth starting.
const GRAIN: usize = 1 << 18;

/// `ValueError` for a decay factor outside [0, 1].
pub fn check_alpha(alpha: f64) -> Result<()> {
    if (0.0..=1.0).contains(&alpha) {
        return Ok(());
    }
    Err(Error::Value(format!(
        "{CLASS}: alpha must be in [0, 1], got {alpha}"
    )))
}

/// `teacher <- alpha * teacher + (1 - alpha) * student` for all pairs, in place.
///
/// Everything is checked before anything is written. Pairs of dense CPU tensors of one memory
/// layout go through the kernel in one sweep; the others through libtorch, one by one.
pub fn update(teachers: &[Tensor], students: &[Tensor], alpha: f64) -> Result<()> {
    check_alpha(alpha)?;
    if teachers.len() != students.len() {
        return Err(Error::Value(format!(
            "{CLASS}: teacher and student must have the same parameters, got {} and {}",
            teachers.len(),
            students.len()
        )));
    }
    let inputs = teachers
        .iter()
        .zip(students)
        .map(|(t, s)| {
            let pair = (
                Input::new(CLASS, "teacher parameter", t)?,
                Input::new(CLASS, "student parameter", s)?,
            );
            check_pair(&pair.0, &pair.1)?;
            Ok(pair)
        })
        .collect::<Result<Vec<_>>>()?;

    let apart = !overlap(&inputs);
    let mut pairs: Vec<Box<dyn Pair>> = Vec::with_capacity(inputs.len());
    let mut others = Vec::new();
    for (teacher, student) in &inputs {
        match if apart {
            kernel_pair(teacher, student)
        } else {
            None
        } {
            Some(pair) => pairs.push(pair),
            None => others.push((teacher.tensor, student.tensor)),
        }
    }
    let work = pairs.iter().map(|p| p.len()).sum();
    blend_all(pairs, alpha, threads_for(work, GRAIN, max_threads()));
    inputs
        .iter()
        .filter(|(t, _)| apart && t.on_cpu())
        .for_each(|(t, _)| bump_version(t.tensor));
    tch::no_grad(|| {
        others
            .into_iter()
            .try_for_each(|(t, s)| composite(t, s, alpha))
    })
}

fn check_pair(teacher: &Input<'_>, student: &Input<'_>) -> Result<()> {
    if teacher.shape() != student.shape() {
        return Err(teacher.wrong(&format!("have the student's shape {:?}", student.shape())));
    }
    if student.is_meta() && !teacher.is_meta() {
        return Err(Error::Device(format!(
            "{CLASS}: student parameter must hold values, got one on the meta device"
        )));
    }
    let repeats = teacher
        .strides()
        .iter()
        .zip(teacher.shape())
        .any(|(&s, &n)| s == 0 && n > 1);
    if repeats {
        return Err(teacher.wrong("not be expanded: its elements share memory"));
    }
    let floating = |i: &Input<'_>| {
        let known = i.dtype().is_some();
        // Complex parameters have no kernel, but an average.
        if known || i.tensor.f_is_complex()? {
            Ok(())
        } else {
            i.floating().map(|_| ())
        }
    };
    floating(teacher)?;
    floating(student)
}

/// A pair for the sweep, or `None` where the memory layouts differ or have gaps.
fn kernel_pair(teacher: &Input<'_>, student: &Input<'_>) -> Option<Box<dyn Pair>> {
    let (t, s) = (teacher.dtype()?, student.dtype()?);
    let same = teacher.strides() == student.strides() && dense(teacher);
    if !(teacher.on_cpu() && student.on_cpu() && same) {
        return None;
    }
    let len = teacher.numel();
    by_dtype!(t, T => by_dtype!(s, S => {
        let (t, s) = (teacher.data().cast::<T>(), student.data().cast_const().cast::<S>());
        // SAFETY: both are dense CPU tensors of `len` elements of these types, which the caller
        // keeps alive; `overlap` found no shared memory beyond tensors that are one and the same.
        Some(Box::new(unsafe { RawPair::new(t, s, len) }) as Box<dyn Pair>)
    }))
}

/// Whether the elements fill one block of memory, in whatever order of dimensions.
fn dense(input: &Input<'_>) -> bool {
    let mut dims: Vec<_> = input
        .strides()
        .iter()
        .zip(input.shape())
        .filter(|&(_, &n)| n != 1)
        .collect();
    dims.sort_unstable();
    let mut expected = 1;
    dims.into_iter().all(|(&stride, &n)| {
        let fits = stride == expected;
        expected *= n;
        fits
    }) || input.numel() == 0
}

/// Whether a teacher's memory overlaps anything else. The same tensor twice, as its own student,
/// does not count: it is read where it is written.
fn overlap(inputs: &[(Input<'_>, Input<'_>)]) -> bool {
    let span = |i: &Input<'_>| {
        let start = i.data() as usize;
        let last: i64 = i
            .strides()
            .iter()
            .zip(i.shape())
            .map(|(s, n)| s * (n - 1).max(0))
            .sum();
        // 8 bytes is the widest element: a span may be judged too long, never too short.
        let width = match i.dtype() {
            Some(d) => by_dtype!(d, E => size_of::<E>()),
            None => 16,
        };
        (start, start + (last as usize + 1) * width)
    };
    let mut spans = Vec::with_capacity(2 * inputs.len());
    for (teacher, student) in inputs {
        let own = teacher.on_cpu() && teacher.numel() > 0;
        if own {
            spans.push((span(teacher), true));
        }
        if student.on_cpu() && student.numel() > 0 && !(own && span(student) == span(teacher)) {
            spans.push((span(student), false));
        }
    }
    spans.sort_unstable();
    let mut written = 0;
    let mut read = 0;
    for ((start, end), writes) in spans {
        if start < written || (writes && start < read) {
            return true;
        }
        if writes {
            written = written.max(end);
        } else {
            read = read.max(end);
        }
    }
    false
}

/// The update in libtorch operations, in place.
fn composite(teacher: &Tensor, student: &Tensor, alpha: f64) -> Result<()> {
    let student = student
        .f_detach()?
        .f_to_device(teacher.device())?
        .f_to_kind(teacher.f_kind()?)?;
    let mut target = teacher.f_detach()?;
    let _ = target.f_mul_scalar_(alpha)?;
    let _ = target.f_add_(&student.f_mul_scalar(1.0 - alpha)?)?;
    Ok(())
}

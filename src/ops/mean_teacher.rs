//! The teacher's moving average on tensors. The sweep is in [`crate::kernels::mean_teacher`].

use super::fraction;
use crate::cuda;
use crate::error::{Error, Result};
use crate::kernels::mean_teacher::{Pair, blend_all};
use crate::kernels::parallel::threads_for;
use crate::torch::facts::{Borrowed, Facts};
use crate::torch::input::sparse;
use crate::torch::{Dtype, average, beside, by_dtype, max_threads, no_grad};
use tch::{Device, Kind, Tensor};

/// The class, for messages.
pub const CLASS: &str = "EMATeacher";
/// Elements that one thread averages in the time that makes another thread worth starting.
const GRAIN: usize = 1 << 18;

/// `ValueError` for a decay factor outside [0, 1].
pub fn check_alpha(alpha: f64) -> Result<()> {
    fraction(CLASS, "alpha", alpha)
}

/// `teacher <- alpha * teacher + (1 - alpha) * student` for all pairs, in place.
///
/// Everything is checked before anything is written. Pairs of dense tensors of one memory layout go
/// through the kernel of their device in one sweep or, if it has none, through libtorch's foreach operations;
/// the others one by one.
pub fn update(teachers: &[Borrowed], students: &[Borrowed], alpha: f64) -> Result<()> {
    check_alpha(alpha)?;
    if teachers.len() != students.len() {
        return Err(Error::Value(format!(
            "{CLASS}: teacher and student must have the same parameters, got {} and {}",
            teachers.len(),
            students.len()
        )));
    }
    // With grad mode off, a thousand parameters need not be asked whether they require a gradient.
    let facts =
        no_grad(|| Ok::<_, Error>((Borrowed::facts(teachers)?, Borrowed::facts(students)?)))?;
    for (k, (teacher, student)) in facts.0.iter().zip(&facts.1).enumerate() {
        check_pair((teacher, teachers[k]), (student, students[k]))?;
    }

    let apart = !overlap(&facts.0, &facts.1);
    let mut sweeps = Sweeps::default();
    let (mut swept, mut others) = (Vec::new(), Vec::new());
    for (k, (teacher, student)) in facts.0.iter().zip(&facts.1).enumerate() {
        // The average of a parameter that both networks have is itself: written, it would spoil a backward pass that
        // needs it.
        let one = !teacher.data().is_null() && teacher.same(student);
        if one || teacher.is_meta() {
            continue;
        }
        // SAFETY: the caller keeps both alive, and if all are `apart` no memory is shared except by
        // tensors that are one and the same.
        let taken = apart
            && (unsafe { sweeps.take(teacher, student) }
                || sweeps.list((teacher, teachers[k]), (student, students[k])));
        if taken {
            swept.push(teachers[k]);
        } else {
            others.push((teachers[k].tensor(), students[k].tensor()));
        }
    }
    let done = sweeps.run(alpha);
    // After a failure too: some may have been written.
    swept.into_iter().for_each(Borrowed::bump_version);
    done?;
    no_grad(|| others.iter().try_for_each(|(t, s)| composite(t, s, alpha)))
}

/// The pairs that are averaged together.
#[derive(Default)]
struct Sweeps {
    cpu: Vec<Pair>,
    /// A model may be spread over several.
    devices: Vec<(Device, Vec<cuda::mean_teacher::Pair>)>,
    lists: Vec<Lists>,
}

/// Pairs for libtorch: on one device, all teachers of one dtype and all students of one.
struct Lists {
    device: Device,
    dtypes: (Dtype, Dtype),
    teachers: Vec<Borrowed>,
    students: Vec<Borrowed>,
}

impl Sweeps {
    /// Adds a pair, or returns false if no kernel serves it, as when the memory layouts differ or have gaps.
    ///
    /// # Safety
    /// Until [`Sweeps::run`] has returned, both are alive, and no other tensor in these sweeps shares memory
    /// with the teacher, except for the student if it is the same tensor.
    unsafe fn take(&mut self, teacher: &Facts, student: &Facts) -> bool {
        if !alike(teacher, student) || teacher.device() != student.device() {
            return false;
        }
        if cuda::serves(&[&teacher, &student]) {
            let Some(pair) = cuda::mean_teacher::Pair::new(teacher, student) else {
                return false;
            };
            let device = teacher.device();
            match self.devices.iter_mut().find(|(known, _)| *known == device) {
                Some((_, pairs)) => pairs.push(pair),
                None => self.devices.push((device, vec![pair])),
            }
            return true;
        }
        // SAFETY: as above.
        let pair = unsafe { cpu_pair(teacher, student) };
        self.cpu.extend(pair);
        pair.is_some()
    }

    /// Adds a pair for libtorch, or returns false if the two have to be averaged on their own: libtorch scales
    /// all teachers before it reads a student, and its foreach operations take dense tensors on one device.
    fn list(
        &mut self,
        (teacher, target): (&Facts, Borrowed),
        (student, source): (&Facts, Borrowed),
    ) -> bool {
        let (Some(t), Some(s)) = (teacher.dtype(), student.dtype()) else {
            return false;
        };
        // On the CPU they would round the factors to half precision.
        let exact = !teacher.is_cpu() || matches!(t, Dtype::F32 | Dtype::F64);
        let lists = exact && teacher.plain() && student.plain() && alike(teacher, student);
        let device = teacher.device();
        if !lists || device != student.device() || teacher.data() == student.data() {
            return false;
        }
        let known = |lists: &&mut Lists| lists.device == device && lists.dtypes == (t, s);
        if let Some(lists) = self.lists.iter_mut().find(known) {
            lists.teachers.push(target);
            lists.students.push(source);
        } else {
            self.lists.push(Lists {
                device,
                dtypes: (t, s),
                teachers: vec![target],
                students: vec![source],
            });
        }
        true
    }

    /// What can fail comes first.
    fn run(&self, alpha: f64) -> Result<()> {
        self.devices.iter().try_for_each(|(device, pairs)| {
            // SAFETY: by the contract of `take`.
            unsafe { cuda::mean_teacher::blend_all(*device, pairs, alpha) }
        })?;
        self.lists
            .iter()
            .try_for_each(|list| average(&list.teachers, &list.students, alpha, 1.0 - alpha))?;
        let work = self.cpu.iter().map(Pair::len).sum();
        blend_all(&self.cpu, alpha, threads_for(work, GRAIN, max_threads()));
        Ok(())
    }
}

fn check_pair(
    (teacher, own): (&Facts, Borrowed),
    (student, other): (&Facts, Borrowed),
) -> Result<()> {
    for (facts, tensor, name) in [
        (teacher, own, "teacher parameter"),
        (student, other, "student parameter"),
    ] {
        if !facts.strided() {
            return Err(sparse(CLASS, name));
        }
        // Complex parameters have no kernel, but can be averaged.
        if facts.dtype().is_none() && !tensor.tensor().f_is_complex()? {
            return Err(Error::Type(format!(
                "{CLASS}: {name} must be float32, float64, float16 or bfloat16, got {}",
                facts.dtype_name()
            )));
        }
    }
    let wrong = |expected: &str| {
        Err(Error::Value(format!(
            "{CLASS}: teacher parameter must {expected}, got shape {:?}",
            teacher.shape()
        )))
    };
    if teacher.shape() != student.shape() {
        return wrong(&format!("have the student's shape {:?}", student.shape()));
    }
    if student.is_meta() && !teacher.is_meta() {
        return Err(Error::Device(format!(
            "{CLASS}: student parameter must hold values, got one on the meta device"
        )));
    }
    let repeats = || {
        let mut dims = teacher.strides().iter().zip(teacher.shape());
        dims.any(|(&s, &n)| s == 0 && n > 1)
    };
    if !teacher.contiguous() && repeats() {
        return wrong("not be expanded: its elements share memory");
    }
    Ok(())
}

/// Whether the elements of each fill one block of memory, in the same order.
fn alike(teacher: &Facts, student: &Facts) -> bool {
    teacher.contiguous() && student.contiguous()
        || teacher.strides() == student.strides() && dense(teacher)
}

/// A pair for the sweep on the CPU, if the kernel serves it.
///
/// # Safety
/// As for [`Pair::new`]; both are [`alike`].
unsafe fn cpu_pair(teacher: &Facts, student: &Facts) -> Option<Pair> {
    let (t, s) = (teacher.dtype()?, student.dtype()?);
    // Inside a transform of `torch.func` libtorch's operations would return wrappers.
    let kernels =
        |facts: &Facts| facts.is_cpu() && facts.unobserved() && (facts.on_cpu() || !facts.plain());
    if !(kernels(teacher) && kernels(student)) {
        return None;
    }
    let len = teacher.numel();
    by_dtype!(t, T => by_dtype!(s, S => {
        let (t, s) = (teacher.data().cast::<T>(), student.data().cast_const().cast::<S>());
        // SAFETY: both have `len` elements of these types; the rest is the caller's.
        Some(unsafe { Pair::new(t, s, len) })
    }))
}

/// Whether the elements fill one block of memory, in whatever order of dimensions.
fn dense(input: &Facts) -> bool {
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

/// Whether a teacher's memory overlaps anything else. A tensor that is its own student does not
/// count: each element is read where it is written.
fn overlap(teachers: &[Facts], students: &[Facts]) -> bool {
    let mut spans = Vec::with_capacity(2 * teachers.len());
    for (teacher, student) in teachers.iter().zip(students) {
        let own = span(teacher).map(|span| Span {
            writes: true,
            ..span
        });
        let other =
            span(student).filter(|s| own.is_none_or(|t| (t.start, t.end) != (s.start, s.end)));
        spans.extend(own);
        spans.extend(other);
    }
    spans.sort_unstable_by_key(|span| span.start);
    let (mut written, mut read) = (0, 0);
    spans.into_iter().any(|span| {
        let meets = span.start < written || (span.writes && span.start < read);
        let furthest = if span.writes { &mut written } else { &mut read };
        *furthest = span.end.max(*furthest);
        meets
    })
}

/// Addresses from the first byte of a tensor to just past its last. No two devices share addresses.
#[derive(Clone, Copy)]
struct Span {
    start: usize,
    end: usize,
    writes: bool,
}

/// `None` for a tensor without memory that can be read.
fn span(input: &Facts) -> Option<Span> {
    let len = input.numel();
    if !input.readable() || len == 0 {
        return None;
    }
    let last = if input.contiguous() {
        len - 1
    } else {
        let dims = input.strides().iter().zip(input.shape());
        dims.map(|(s, n)| (s * (n - 1)) as usize).sum()
    };
    let width = match input.dtype() {
        Some(dtype) => by_dtype!(dtype, E => size_of::<E>()),
        // The largest complex element: a span may be judged too long, never too short.
        None => 16,
    };
    let start = input.data() as usize;
    Some(Span {
        start,
        end: start + (last + 1) * width,
        writes: false,
    })
}

/// The update in libtorch operations, in place. The student may share the teacher's memory: it is read first.
/// Half precision is averaged in float32: on the CPU libtorch would round `alpha` as well, and a teacher would
/// drift away from a student that does not change.
fn composite(teacher: &Tensor, student: &Tensor, alpha: f64) -> Result<()> {
    let kind = teacher.f_kind()?;
    let wide = match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        _ => kind,
    };
    let step = beside(&student.f_detach()?, wide, teacher)?.f_mul_scalar(1.0 - alpha)?;
    let mut target = teacher.f_detach()?;
    if wide == kind {
        let _ = target.f_mul_scalar_(alpha)?.f_add_(&step)?;
    } else {
        let average = target.f_to_kind(wide)?.f_mul_scalar(alpha)?.f_add(&step)?;
        target.f_copy_(&average)?;
    }
    Ok(())
}

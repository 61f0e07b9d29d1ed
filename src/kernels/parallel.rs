//! Threads, only where they pay.
//!
//! Kernels use the embedding program's threads, if it lends them ([`borrow_team`]); otherwise scoped threads,
//! spawned for one call: no pool persists, so a forked child cannot inherit one whose threads exist only in
//! the parent. Several threads may call at once.

use std::any::Any;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Calls its argument, which does not unwind, on threads of its choice, this one among them, and returns
/// true when all calls are done. Returns false, without calling it, if no threads are available.
pub type Team = fn(&(dyn Fn() + Sync)) -> bool;

static TEAM: OnceLock<Team> = OnceLock::new();

/// Lends a team to all kernels. Only the first call has an effect.
pub fn borrow_team(team: Team) {
    TEAM.get_or_init(|| team);
}

/// How many threads `work` units deserve when one thread should get at least `grain` of them.
pub fn threads_for(work: usize, grain: usize, limit: usize) -> NonZeroUsize {
    NonZeroUsize::new((work / grain.max(1)).min(limit)).unwrap_or(NonZeroUsize::MIN)
}

/// Classes that make another thread worthwhile for what is done once for each, after the rows.
const CLASSES: usize = 1 << 13;

/// Splits `0..count` classes over as many threads as they deserve, at most `limit`.
pub fn split_classes(count: usize, limit: usize) -> Vec<Range<usize>> {
    split(count, threads_for(count, CLASSES, limit))
}

/// Splits `0..n` into at most `parts` ranges of nearly equal length, none empty (unless `n` is 0).
pub fn split(n: usize, parts: NonZeroUsize) -> Vec<Range<usize>> {
    let parts = parts.get().min(n.max(1));
    (0..parts)
        .map(|k| n * k / parts..n * (k + 1) / parts)
        .collect()
}

/// Runs all jobs and returns their results in order. This thread takes part, and finishes alone
/// if no threads can be spawned.
pub fn run<J, T>(jobs: Vec<J>) -> Vec<T>
where
    J: FnOnce() -> T + Send,
    T: Send,
{
    run_on(NonZeroUsize::MAX, jobs)
}

/// The same for more jobs than threads: no more than `threads` are started, where none are lent.
pub fn run_on<J, T>(threads: NonZeroUsize, jobs: Vec<J>) -> Vec<T>
where
    J: FnOnce() -> T + Send,
    T: Send,
{
    if threads.get() == 1 || jobs.len() <= 1 {
        return jobs.into_iter().map(|job| job()).collect();
    }
    let count = jobs.len();
    let queue = Mutex::new(jobs.into_iter().enumerate());
    let done = Mutex::new(Vec::with_capacity(count));
    let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
    let work = || {
        // The inner block releases the queue's lock before the job runs.
        while let Some((k, job)) = { lock(&queue).next() } {
            match catch_unwind(AssertUnwindSafe(job)) {
                Ok(result) => lock(&done).push((k, result)),
                Err(payload) => *lock(&panic) = Some(payload),
            }
        }
    };
    if !TEAM.get().is_some_and(|team| team(&work)) {
        scoped(threads.get().min(count) - 1, &work);
    }
    if let Some(payload) = lock(&panic).take() {
        resume_unwind(payload);
    }
    let mut results = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_unstable_by_key(|&(k, _)| k);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Nothing panics while it holds one of these locks, so that no state is ever half-written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A team of this thread and at most `helpers` new ones.
fn scoped(helpers: usize, work: &(dyn Fn() + Sync)) {
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            if std::thread::Builder::new()
                .spawn_scoped(scope, work)
                .is_err()
            {
                break;
            }
        }
        work();
    });
}

/// Cuts `slice` at the row boundaries of `ranges` (which start at 0 and follow each other).
pub fn cut<'a, T>(slice: &'a mut [T], ranges: &[Range<usize>], width: usize) -> Vec<&'a mut [T]> {
    let mut rest = slice;
    ranges
        .iter()
        .map(|range| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(range.len() * width);
            rest = tail;
            head
        })
        .collect()
}

/// As [`cut`], or as many `None` where there is nothing to cut.
pub fn cut_optional<'a, T>(
    slice: Option<&'a mut [T]>,
    ranges: &[Range<usize>],
    width: usize,
) -> Vec<Option<&'a mut [T]>> {
    match slice {
        Some(slice) => cut(slice, ranges, width).into_iter().map(Some).collect(),
        None => ranges.iter().map(|_| None).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_cover_everything_once() {
        for n in [0, 1, 2, 7, 100] {
            for parts in 1..9 {
                let ranges = split(n, NonZeroUsize::new(parts).unwrap());
                assert_eq!(ranges.iter().map(Range::len).sum::<usize>(), n);
                assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
                assert!(n == 0 || ranges.iter().all(|r| !r.is_empty()));
            }
        }
    }

    #[test]
    fn small_work_gets_one_thread() {
        assert_eq!(threads_for(10, 100, 8).get(), 1);
        assert_eq!(threads_for(250, 100, 8).get(), 2);
        assert_eq!(threads_for(10_000, 100, 8).get(), 8);
    }

    #[test]
    fn many_jobs_share_few_threads() {
        for threads in [1, 3] {
            let job = || {
                std::thread::sleep(std::time::Duration::from_millis(1));
                std::thread::current().id()
            };
            let ids = run_on(NonZeroUsize::new(threads).unwrap(), vec![job; 50]);
            let different: std::collections::HashSet<_> = ids.into_iter().collect();
            assert!(different.len() <= threads, "{different:?}");
        }
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let jobs: Vec<_> = (0..4).map(|k| move || assert!(k != 2, "job {k}")).collect();
        let payload = catch_unwind(|| run(jobs)).unwrap_err();
        assert_eq!(payload.downcast_ref::<String>().unwrap(), "job 2");
    }

    #[test]
    fn results_come_back_in_order() {
        let jobs: Vec<_> = (0..5).map(|k| move || k * k).collect();
        assert_eq!(run(jobs), vec![0, 1, 4, 9, 16]);
        let mut data = vec![0; 10];
        let ranges = split(5, NonZeroUsize::new(3).unwrap());
        let pieces = cut(&mut data, &ranges, 2);
        let jobs: Vec<_> = pieces
            .into_iter()
            .map(|p| move || p.fill(p.len()))
            .collect();
        run(jobs);
        assert_eq!(data, [2, 2, 4, 4, 4, 4, 4, 4, 4, 4]);
    }
}

//! Torch's threads for our kernels: they are warm after every operation of torch, and each core has one of
//! them to run instead of threads of two pools.

use crate::kernels::parallel::borrow_team;
use std::ffi::c_void;

unsafe extern "C" {
    fn tllib_team_ready() -> bool;
    fn tllib_team(work: extern "C" fn(*mut c_void), data: *mut c_void) -> bool;
}

/// From now on kernels run on torch's threads, where torch has threads to lend.
pub fn install() {
    // SAFETY: it looks for a symbol and registers a handler that sets a flag.
    if unsafe { tllib_team_ready() } {
        borrow_team(run);
    }
}

fn run(work: &(dyn Fn() + Sync)) -> bool {
    extern "C" fn call(data: *mut c_void) {
        // SAFETY: `data` points to the reference `work` below, which outlives the call of `tllib_team`, and
        // what it refers to may be used from several threads.
        let work = unsafe { *data.cast::<&(dyn Fn() + Sync)>() };
        work();
    }
    // SAFETY: `install` found the team. This returns only after all calls have, so that `work` is not used
    // after its lifetime; `work` does not unwind (`Team` requires that).
    unsafe { tllib_team(call, (&raw const work).cast_mut().cast()) }
}

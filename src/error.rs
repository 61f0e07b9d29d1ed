//! The one error type. `src/python/mod.rs` maps it to Python exceptions, variant by variant.

use std::any::Any;
use thiserror::Error;

/// Everything that can go wrong in an operation. Messages name the class, what was expected and
/// what came.
#[derive(Debug, Error)]
pub enum Error {
    /// Not a tensor, or a dtype that is not supported: Python's `TypeError`.
    #[error("{0}")]
    Type(String),
    /// A shape, a value or a hyper-parameter: `ValueError`.
    #[error("{0}")]
    Value(String),
    /// An index or label out of range: `IndexError`.
    #[error("{0}")]
    Index(String),
    /// Devices that differ: `RuntimeError`.
    #[error("{0}")]
    Device(String),
    /// So many bytes of memory cannot be had: `RuntimeError`, as from torch's allocator.
    #[error("not enough memory: {0} bytes cannot be allocated")]
    Memory(usize),
    /// A class whose object is called from within a call to it: `RuntimeError`.
    #[error(
        "{0}: called by code, such as a dispatch mode, that runs within a call to the same object"
    )]
    Reentered(&'static str),
    /// libtorch refused: `RuntimeError`, with its first line.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[from] tch::TchError),
    /// A CUDA kernel could not be compiled or launched: `RuntimeError`.
    #[error("tllib_rs on CUDA: {0}")]
    Cuda(String),
    /// The C++ bridge refused: `RuntimeError`.
    #[error("libtorch: {0}")]
    Bridge(String),
}

/// The result of an operation.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The error of a caught panic. tch panics in the few calls without a fallible form, and whenever a call that
    /// takes a number fails: it drops the number before it reads the error.
    pub fn panicked(payload: &(dyn Any + Send)) -> Self {
        let said = libtorchs(payload).and_then(|said| said.split("\\n").next());
        Self::Bridge(
            said.unwrap_or("a call failed; the lines above say which")
                .to_owned(),
        )
    }
}

/// The libtorch message in a panic of tch. `None` for any other panic.
fn libtorchs(payload: &(dyn Any + Send)) -> Option<&str> {
    let text = payload.downcast_ref::<String>()?;
    text.split_once("Torch(\"").map(|(_, said)| said)
}

/// Stops printing those panics of tch that report a libtorch exception: [`Error::panicked`] reports them.
pub fn silence_libtorchs_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if libtorchs(panic.payload()).is_none() {
            print(panic);
        }
    }));
}

fn first_line(error: &tch::TchError) -> String {
    error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

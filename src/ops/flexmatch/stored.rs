//! The integer types that `net_outputs` is stored in.

use super::CLASS;
use crate::error::{Error, Result};
use crate::torch::ScalarType;
use crate::torch::input::Input;
use tch::Kind;

/// The type of a stored label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// torch.int8
    I8,
    /// torch.int16
    I16,
    /// torch.int32
    I32,
    /// torch.int64
    I64,
}

impl Stored {
    /// From torch's name for it, as in `int8`.
    pub fn named(name: &str) -> Result<Self> {
        match name.trim_start_matches("torch.") {
            "int8" => Ok(Self::I8),
            "int16" => Ok(Self::I16),
            "int32" => Ok(Self::I32),
            "int64" => Ok(Self::I64),
            _ => Err(Error::Type(format!(
                "{CLASS}: dtype must be torch.int8, int16, int32 or int64, got {name}"
            ))),
        }
    }

    /// The type of a tensor of labels.
    pub fn of(labels: &Input<'_>) -> Result<Self> {
        [Self::I8, Self::I16, Self::I32, Self::I64]
            .into_iter()
            .find(|stored| labels.of_type(stored.scalar_type()).is_ok())
            .ok_or_else(|| labels.unsupported("int8, int16, int32 or int64"))
    }

    /// tch's name for it.
    pub fn kind(self) -> Kind {
        match self {
            Self::I8 => Kind::Int8,
            Self::I16 => Kind::Int16,
            Self::I32 => Kind::Int,
            Self::I64 => Kind::Int64,
        }
    }

    /// torch's number of it.
    pub fn scalar_type(self) -> ScalarType {
        match self {
            Self::I8 => ScalarType::INT8,
            Self::I16 => ScalarType::INT16,
            Self::I32 => ScalarType::INT32,
            Self::I64 => ScalarType::INT64,
        }
    }

    /// `ValueError` unless the labels of `classes` classes fit.
    pub fn holds(self, classes: usize) -> Result<()> {
        let (name, most) = match self {
            Self::I8 => ("int8", 1 << 7),
            Self::I16 => ("int16", 1 << 15),
            Self::I32 => ("int32", 1 << 31),
            Self::I64 => return Ok(()),
        };
        if classes <= most {
            return Ok(());
        }
        Err(Error::Value(format!(
            "{CLASS}: dtype torch.{name} holds the labels of at most {most} classes, got \
             num_classes = {classes}"
        )))
    }
}

/// Names the [`crate::kernels::flexmatch::Label`] of a [`Stored`]: `by_label!(stored, L => body)`.
macro_rules! by_label {
    ($stored:expr, $l:ident => $body:expr) => {
        match $stored {
            $crate::ops::flexmatch::Stored::I8 => {
                type $l = i8;
                $body
            }
            $crate::ops::flexmatch::Stored::I16 => {
                type $l = i16;
                $body
            }
            $crate::ops::flexmatch::Stored::I32 => {
                type $l = i32;
                $body
            }
            $crate::ops::flexmatch::Stored::I64 => {
                type $l = i64;
                $body
            }
        }
    };
}
pub(super) use by_label;

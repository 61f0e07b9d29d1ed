//! Dtypes: torch's number, those that have kernels, and their Rust types.

use super::tllib_default_dtype;
use crate::kernels::element::{Bf16, F16};
use tch::Kind;

/// A dtype as torch numbers it: `c10::ScalarType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct ScalarType(i32);

impl ScalarType {
    pub const UINT8: Self = Self(0);
    pub const INT8: Self = Self(1);
    pub const INT16: Self = Self(2);
    pub const INT32: Self = Self(3);
    pub const INT64: Self = Self(4);
    pub const FLOAT16: Self = Self(5);
    pub const FLOAT32: Self = Self(6);
    pub const FLOAT64: Self = Self(7);
    pub const BOOL: Self = Self(11);
    pub const BFLOAT16: Self = Self(15);

    /// As torch spells it. (tch panics for the dtypes it does not know.)
    pub fn name(self) -> &'static str {
        match self {
            Self::UINT8 => "uint8",
            Self::INT8 => "int8",
            Self::INT16 => "int16",
            Self::INT32 => "int32",
            Self::INT64 => "int64",
            Self::FLOAT16 => "float16",
            Self::FLOAT32 => "float32",
            Self::FLOAT64 => "float64",
            Self::BOOL => "bool",
            Self::BFLOAT16 => "bfloat16",
            Self(8..=10) => "a complex dtype",
            Self(12..=14 | 16 | 17) => "a quantized dtype",
            _ => "an unsupported dtype",
        }
    }

    /// Whether it is of integers that fit into 64 bits, or of booleans.
    pub fn integral(self) -> bool {
        matches!(
            self,
            Self::UINT8 | Self::INT8 | Self::INT16 | Self::INT32 | Self::INT64 | Self::BOOL
        )
    }

    /// Whether it is [`ScalarType::integral`] or has kernels.
    pub fn real(self) -> bool {
        self.integral() || Dtype::of(self).is_some()
    }
}

/// The element types that have kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// torch.float32
    F32,
    /// torch.float64
    F64,
    /// torch.float16
    F16,
    /// torch.bfloat16
    Bf16,
}

impl Dtype {
    /// From torch's number.
    pub fn of(scalar_type: ScalarType) -> Option<Self> {
        match scalar_type {
            ScalarType::FLOAT16 => Some(Self::F16),
            ScalarType::FLOAT32 => Some(Self::F32),
            ScalarType::FLOAT64 => Some(Self::F64),
            ScalarType::BFLOAT16 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// tch's name for it.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::F64 => Kind::Double,
            Self::F16 => Kind::Half,
            Self::Bf16 => Kind::BFloat16,
        }
    }

    /// `torch.get_default_dtype()`.
    pub fn default() -> Self {
        // SAFETY: reads one global.
        Self::of(unsafe { tllib_default_dtype() }).unwrap_or(Self::F32)
    }

    /// What torch promotes a pair to.
    pub fn promote(self, other: Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            (Self::F64, _) | (_, Self::F64) => Self::F64,
            _ => Self::F32,
        }
    }

    /// What a float32 tensor promotes it to.
    pub fn at_least_f32(self) -> Self {
        if self == Self::F64 { self } else { Self::F32 }
    }
}

/// Names the [`Element`] of a [`Dtype`]: `by_dtype!(dtype, E => body)`.
macro_rules! by_dtype {
    ($dtype:expr, $e:ident => $body:expr) => {
        match $dtype {
            $crate::torch::Dtype::F32 => {
                type $e = f32;
                $body
            }
            $crate::torch::Dtype::F64 => {
                type $e = f64;
                $body
            }
            $crate::torch::Dtype::F16 => {
                type $e = $crate::kernels::element::F16;
                $body
            }
            $crate::torch::Dtype::Bf16 => {
                type $e = $crate::kernels::element::Bf16;
                $body
            }
        }
    };
}
pub(crate) use by_dtype;

/// Types that an [`super::Owned`] tensor can hold.
pub trait Stored: Copy {
    /// tch's name for the type.
    const KIND: Kind;
}
impl Stored for f32 {
    const KIND: Kind = Kind::Float;
}
impl Stored for f64 {
    const KIND: Kind = Kind::Double;
}
impl Stored for F16 {
    const KIND: Kind = Kind::Half;
}
impl Stored for Bf16 {
    const KIND: Kind = Kind::BFloat16;
}
impl Stored for i64 {
    const KIND: Kind = Kind::Int64;
}

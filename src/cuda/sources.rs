//! The CUDA sources, as text in the extension.

/// One method's kernels.
#[derive(Clone, Copy)]
pub struct Source {
    /// The method.
    pub stem: &'static str,
    own: &'static str,
}

const COMMON: &str = include_str!("common.cuh");
const SOFTMAX: &str = include_str!("softmax.cuh");

macro_rules! sources {
    ($($stem:literal,)*) => {
        [$(Source { stem: $stem, own: include_str!(concat!($stem, ".cu")) }),*]
    };
}

/// All of them.
pub const SOURCES: &[Source] = &sources![
    "cross_entropy",
    "dst",
    "entropy",
    "flexmatch",
    "hardest",
    "mcc",
    "mean_teacher",
    "pi_model",
    "pseudo_label",
    "scale",
    "self_ensemble",
    "self_tuning",
    "triplet",
    "triplet_gradient",
    "uda",
];

impl Source {
    /// The source of a method.
    pub fn of(stem: &str) -> Option<Self> {
        SOURCES.iter().copied().find(|source| source.stem == stem)
    }

    /// What is compiled.
    pub fn text(&self) -> String {
        format!(
            "#line 1 \"common.cuh\"\n{COMMON}\n#line 1 \"softmax.cuh\"\n{SOFTMAX}\n#line 1 \"{}.cu\"\n{}",
            self.stem, self.own
        )
    }
}

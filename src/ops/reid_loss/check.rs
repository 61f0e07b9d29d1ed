//! The checks of the triplet losses' arguments.

use super::triplet::{Arguments, Objective};
use crate::error::{Error, Result};
use crate::kernels::reid_loss::mining::Identities;
use crate::ops::finite;
use crate::torch::Dtype;
use crate::torch::facts::Facts;
use crate::torch::input::Input;

/// `ValueError` unless the margin is finite.
pub fn check_margin(class: &str, margin: f64) -> Result<()> {
    finite(class, "margin", margin)
}

/// The arguments, checked.
pub struct Inputs<'a> {
    pub features: Input<'a>,
    pub labels: Input<'a>,
    /// The memory and its labels.
    pub memory: Option<(Input<'a>, Input<'a>)>,
    pub teacher: Option<Input<'a>>,
    /// The dtype of features and memory.
    pub dtype: Dtype,
    /// The dtype of the loss.
    pub out: Dtype,
}

impl<'a> Inputs<'a> {
    pub fn check(call: &Arguments<'a>) -> Result<Self> {
        let new = |(name, tensor)| Input::new(call.class, name, tensor);
        if let Objective::Hinge(margin) | Objective::Margin(margin) = call.objective {
            check_margin(call.class, margin)?;
        }
        let features = new(call.features)?;
        let dtype = features.floating()?;
        let (rows, dim) = matrix(&features)?;
        let labels = new(call.labels)?;
        identities_of(&labels, &features, call.features.0)?;
        let memory = match call.memory {
            None => None,
            Some((memory, memory_labels)) => {
                let (memory, memory_labels) =
                    (new(("xbm_f", memory))?, new(("xbm_labels", memory_labels))?);
                let own = memory.floating()?;
                memory.same_device(&features)?;
                let (_, memory_dim) = matrix(&memory)?;
                if memory_dim != dim {
                    return Err(
                        memory.wrong(&format!("have {dim} columns as {} has", call.features.0))
                    );
                }
                if own != dtype {
                    return Err(Error::Type(format!(
                        "{}: xbm_f must have the dtype of {}, {}, got {}",
                        call.class,
                        call.features.0,
                        features.dtype_name(),
                        memory.dtype_name()
                    )));
                }
                identities_of(&memory_labels, &memory, "xbm_f")?;
                Some((memory, memory_labels))
            }
        };
        let teacher = call.teacher.map(|t| new(("features_2", t))).transpose()?;
        let mut out = dtype.at_least_f32();
        if let Some(teacher) = &teacher {
            out = out.promote(teacher.floating()?.at_least_f32());
            teacher.same_device(&features)?;
            if matrix(teacher)?.0 != rows {
                return Err(teacher.wrong(&format!("have {rows} rows as {} has", call.features.0)));
            }
        }
        Ok(Self {
            features,
            labels,
            memory,
            teacher,
            dtype,
            out,
        })
    }

    /// `ValueError` if there is nothing to find pairs in.
    pub fn candidates(&self) -> Result<()> {
        let memory = self.memory.as_ref();
        let candidates = memory.map_or(&self.features, |(memory, _)| memory);
        if candidates.shape().first() == Some(&0) {
            return Err(candidates.wrong("hold at least one row to find pairs in"));
        }
        Ok(())
    }

    /// Who the anchors and the candidates are.
    pub fn identities(&self) -> Result<Identities> {
        let memory = match &self.memory {
            None => None,
            Some((_, labels)) => Some(labels.integers()?),
        };
        Ok(Identities::new(&self.labels.integers()?, memory.as_deref()))
    }

    /// Whether the kernels of the CPU may read everything.
    pub fn fusible(&self) -> bool {
        let labels = [Some(&self.labels), self.memory.as_ref().map(|(_, l)| l)];
        self.all(Facts::on_cpu) && labels.into_iter().flatten().all(|labels| labels.integral())
    }

    /// Whether `is` holds for every argument.
    pub fn all(&self, is: fn(&Facts) -> bool) -> bool {
        let memory = self.memory.as_ref();
        is(&self.features)
            && is(&self.labels)
            && memory.is_none_or(|(features, labels)| is(features) && is(labels))
            && self.teacher.as_ref().is_none_or(|teacher| is(teacher))
    }
}

/// (minibatch, F) with F > 0.
fn matrix(input: &Input<'_>) -> Result<(i64, i64)> {
    match *input.shape() {
        [rows, dim] if dim > 0 => Ok((rows, dim)),
        _ => Err(input.wrong("have shape (minibatch, F) with F > 0")),
    }
}

/// One label for each row of the features that are called `name`.
fn identities_of(labels: &Input<'_>, features: &Input<'_>, name: &str) -> Result<()> {
    labels.same_device(features)?;
    let rows = &features.shape()[..1];
    if labels.shape() != rows {
        return Err(labels.wrong(&format!(
            "have shape ({},), one label for each row of {name}",
            rows[0]
        )));
    }
    Ok(())
}

/// Raises for what [`triplet`] does not take, but accepts a part of a batch that has no rows.
pub fn check_triplet(call: &Arguments<'_>) -> Result<()> {
    Inputs::check(call).map(|_| ())
}

use super::{elements, integer, number, tensor, without_gil};
use crate::ops::reid_loss::{self as ops, Arguments, Objective};
use pyo3::prelude::*;
use pyo3_tch::PyTensor;
use tch::Tensor;

const TRIPLET: &str = "TripletLoss";
const XBM: &str = "TripletLossXBM";
const SOFT: &str = "SoftTripletLoss";

/// The work of a product of the rows of `x` with those of `y`, as far as it matters for the GIL.
fn product_work(x: &Tensor, y: &Tensor) -> usize {
    let (of_x, of_y) = (elements(x), elements(y));
    if of_x == 0 || of_y == 0 {
        // A tensor that is not dense may have no size to ask for.
        return 0;
    }
    let rows = y.size().first().copied().unwrap_or(0).unsigned_abs() as usize;
    of_x.saturating_mul(rows)
}

/// The batch-hard triplet loss of `f` (N, F) with identities `labels` (N).
#[pyfunction]
pub fn triplet(
    py: Python<'_>,
    f: &Bound<'_, PyAny>,
    labels: &Bound<'_, PyAny>,
    margin: &Bound<'_, PyAny>,
    normalize_feature: bool,
) -> PyResult<PyTensor> {
    let (f, labels) = (tensor(TRIPLET, "f", f)?, tensor(TRIPLET, "labels", labels)?);
    let margin = number(TRIPLET, "margin", margin)?;
    without_gil(py, product_work(&f, &f), move || {
        ops::triplet(&Arguments {
            class: TRIPLET,
            features: ("f", &f),
            labels: ("labels", &labels),
            memory: None,
            teacher: None,
            objective: Objective::Hinge(margin),
            normalize: normalize_feature,
        })
    })
    .map(PyTensor)
}

/// The same with pairs from `xbm_f` (M, F) with identities `xbm_labels` (M).
#[pyfunction]
#[allow(
    clippy::too_many_arguments,
    reason = "tllib's signature and its two settings"
)]
pub fn triplet_xbm(
    py: Python<'_>,
    f: &Bound<'_, PyAny>,
    xbm_f: &Bound<'_, PyAny>,
    labels: &Bound<'_, PyAny>,
    xbm_labels: &Bound<'_, PyAny>,
    margin: &Bound<'_, PyAny>,
    normalize_feature: bool,
) -> PyResult<PyTensor> {
    let (f, labels) = (tensor(XBM, "f", f)?, tensor(XBM, "labels", labels)?);
    let (xbm_f, xbm_labels) = (
        tensor(XBM, "xbm_f", xbm_f)?,
        tensor(XBM, "xbm_labels", xbm_labels)?,
    );
    let margin = number(XBM, "margin", margin)?;
    without_gil(py, product_work(&f, &xbm_f), move || {
        ops::triplet(&Arguments {
            class: XBM,
            features: ("f", &f),
            labels: ("labels", &labels),
            memory: Some((&xbm_f, &xbm_labels)),
            teacher: None,
            objective: Objective::Hinge(margin),
            normalize: normalize_feature,
        })
    })
    .map(PyTensor)
}

/// The arguments of the soft triplet loss; the teacher's features are used only if `margin` is `None`.
struct Soft {
    features: Tensor,
    labels: Tensor,
    objective: Objective,
    teacher: Option<Tensor>,
}

impl Soft {
    fn new(
        features_1: &Bound<'_, PyAny>,
        features_2: &Bound<'_, PyAny>,
        labels: &Bound<'_, PyAny>,
        margin: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let (features, labels) = (
            tensor(SOFT, "features_1", features_1)?,
            tensor(SOFT, "labels", labels)?,
        );
        let (objective, teacher) = match margin {
            Some(margin) => (Objective::Margin(number(SOFT, "margin", margin)?), None),
            None => (
                Objective::Taught,
                Some(tensor(SOFT, "features_2", features_2)?),
            ),
        };
        Ok(Self {
            features,
            labels,
            objective,
            teacher,
        })
    }

    fn arguments(&self, normalize: bool) -> Arguments<'_> {
        Arguments {
            class: SOFT,
            features: ("features_1", &self.features),
            labels: ("labels", &self.labels),
            memory: None,
            teacher: self.teacher.as_ref(),
            objective: self.objective,
            normalize,
        }
    }
}

/// The soft triplet loss; the teacher's features are used only if `margin` is `None`.
#[pyfunction]
pub fn soft_triplet(
    py: Python<'_>,
    features_1: &Bound<'_, PyAny>,
    features_2: &Bound<'_, PyAny>,
    labels: &Bound<'_, PyAny>,
    margin: Option<&Bound<'_, PyAny>>,
    normalize_feature: bool,
) -> PyResult<PyTensor> {
    let call = Soft::new(features_1, features_2, labels, margin)?;
    without_gil(
        py,
        product_work(&call.features, &call.features),
        move || ops::triplet(&call.arguments(normalize_feature)),
    )
    .map(PyTensor)
}

/// Raises for arguments that `soft_triplet` does not take, but accepts features without rows.
#[pyfunction]
pub fn check_soft_triplet(
    features_1: &Bound<'_, PyAny>,
    features_2: &Bound<'_, PyAny>,
    labels: &Bound<'_, PyAny>,
    margin: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let call = Soft::new(features_1, features_2, labels, margin)?;
    Ok(ops::check_triplet(&call.arguments(false))?)
}

const DISTANCES: &str = "pairwise_euclidean_distance";

/// The distances between all rows of `x` (N, F) and `y` (M, F), (N, M), in float64 or float32.
#[pyfunction]
pub fn distances(py: Python<'_>, x: &Bound<'_, PyAny>, y: &Bound<'_, PyAny>) -> PyResult<PyTensor> {
    let (x, y) = (tensor(DISTANCES, "x", x)?, tensor(DISTANCES, "y", y)?);
    without_gil(py, product_work(&x, &y), move || ops::distances(&x, &y)).map(PyTensor)
}

/// The gradients of `x` and `y`, if wanted, from `incoming`, that of their distances `out`.
#[pyfunction]
pub fn distances_backward(
    py: Python<'_>,
    incoming: &Bound<'_, PyAny>,
    x: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    wanted: [bool; 2],
) -> PyResult<[Option<PyTensor>; 2]> {
    let (x, y) = (tensor(DISTANCES, "x", x)?, tensor(DISTANCES, "y", y)?);
    let (incoming, out) = (
        tensor(DISTANCES, "grad_output", incoming)?,
        tensor(DISTANCES, "distances", out)?,
    );
    let grads = without_gil(py, product_work(&x, &y), move || {
        ops::distances_backward(&incoming, &x, &y, &out, wanted)
    })?;
    Ok(grads.map(|grad| grad.map(PyTensor)))
}

/// Indices of the hardest positive and negative of each row of a matrix of distances.
#[pyfunction]
pub fn hardest(
    py: Python<'_>,
    dist_mat: &Bound<'_, PyAny>,
    identity_mat: &Bound<'_, PyAny>,
) -> PyResult<(PyTensor, PyTensor)> {
    const NAME: &str = "hard_examples_mining";
    let (d, s) = (
        tensor(NAME, "dist_mat", dist_mat)?,
        tensor(NAME, "identity_mat", identity_mat)?,
    );
    let (positive, negative) = without_gil(py, elements(&d), move || ops::hardest(&d, &s))?;
    Ok((PyTensor(positive), PyTensor(negative)))
}

/// The cross entropy of `y` with the softmax of `labels`, both logits (N, C, ...).
#[pyfunction]
pub fn soft_cross_entropy(
    py: Python<'_>,
    y: &Bound<'_, PyAny>,
    labels: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    const NAME: &str = "CrossEntropyLoss";
    let (y, labels) = (tensor(NAME, "y", y)?, tensor(NAME, "labels", labels)?);
    without_gil(py, 2 * elements(&y), move || {
        ops::cross_entropy(&y, &labels)
    })
    .map(PyTensor)
}

const SMOOTH: &str = "CrossEntropyLossWithLabelSmooth";

/// The cross entropy of the logits `y` (N, C) with smoothed `labels` (N).
#[pyfunction]
pub fn label_smooth(
    py: Python<'_>,
    y: &Bound<'_, PyAny>,
    labels: &Bound<'_, PyAny>,
    num_classes: &Bound<'_, PyAny>,
    epsilon: &Bound<'_, PyAny>,
) -> PyResult<PyTensor> {
    let (y, labels) = (tensor(SMOOTH, "y", y)?, tensor(SMOOTH, "labels", labels)?);
    let (classes, epsilon) = (
        integer(SMOOTH, "num_classes", num_classes)?,
        number(SMOOTH, "epsilon", epsilon)?,
    );
    without_gil(py, elements(&y), move || {
        ops::label_smooth(&y, &labels, classes, epsilon)
    })
    .map(PyTensor)
}

/// Raises unless `margin` is one that `class` accepts.
#[pyfunction]
pub fn check_margin(class: &str, margin: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(ops::check_margin(class, number(class, "margin", margin)?)?)
}

/// Raises unless the class accepts these arguments.
#[pyfunction]
pub fn check_smoothing(num_classes: &Bound<'_, PyAny>, epsilon: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(ops::check_smoothing(
        integer(SMOOTH, "num_classes", num_classes)?,
        number(SMOOTH, "epsilon", epsilon)?,
    )?)
}

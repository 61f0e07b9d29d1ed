"""The losses of re-identification: two cross entropies over logits, two triplet losses over features."""

from collections.abc import Callable, Mapping

import torch

from benches._case import (
    COMPILED,
    LIMIT,
    OURS,
    PLAIN,
    TLLIB,
    Case,
    Footprint,
    Method,
    Provider,
    faster,
    seeded,
    within,
)
from benches._families import Family, family
from benches._losses import footprint, logits, loss_cases, step_of
from benches._providers import compiled, original, package
from tests.plain import reid_loss as plain
from tllib_rs.vision.models.reid import loss as ours

MODULE = "vision.models.reid.loss"
SOFT_CROSS, SMOOTH, SOFT_TRIPLET, TRIPLET, MEMORY_TRIPLET, DISTANCES, OWN_DISTANCES = (
    "soft cross entropy",
    "label smooth",
    "soft triplet",
    "triplet",
    "triplet with a memory",
    "pairwise distance",
    "pairwise distance from itself",
)
EPSILON, MARGIN = 0.1, 0.3
#: Two softmaxes.
SOFT_BAR = 1.3

#: Rows and features of the triplet losses, and images of each person in a batch.
BATCHES = [(64, 2048), (256, 2048), (1024, 256), (4096, 512)]
#: The same for those with a memory, and its rows.
MEMORIES = [(64, 512, 8192), (64, 128, 65_536)]
COMPILED_SHAPE = (256, 2048)
LARGE, SAME = (4096, 2048), 4
#: Of settings drawn at random: the most rows and features, their product, and the rows of a memory.
MOST, ELEMENTS, MEMORY = (1024, 4096), 1 << 20, 2048
PLAIN_BAR, PRODUCT_BAR = 4.0, 2.5
PRODUCT_SHAPES = BATCHES[:2]


def _soft_cross_entropy(_):
    tllib = original(MODULE, "CrossEntropyLoss")
    return {OURS: ours.CrossEntropyLoss(), PLAIN: plain.cross_entropy, TLLIB: tllib and tllib()}


def _label_smooth(classes):
    tllib = original(MODULE, "CrossEntropyLossWithLabelSmooth")
    return {
        OURS: ours.CrossEntropyLossWithLabelSmooth(classes, EPSILON),
        PLAIN: lambda y, labels: plain.label_smooth(y, labels, classes, EPSILON),
        TLLIB: tllib and tllib(classes, EPSILON),
    }


def _labelled(generator, rows, classes):
    return *logits(1)(generator, rows, classes), torch.randint(classes, (rows,), generator=generator)


def _soft_triplet(margin: float | None = None, normalize: bool = False) -> Mapping[str, Callable | None]:
    tllib = original(MODULE, "SoftTripletLoss")
    return {
        OURS: ours.SoftTripletLoss(margin, normalize),
        PLAIN: lambda f, teacher, labels: plain.soft_triplet(f, teacher, labels, margin, normalize),
        TLLIB: tllib and tllib(margin, normalize),
    }


def _triplet(normalize: bool = False) -> Mapping[str, Callable | None]:
    tllib = original(MODULE, "TripletLoss")
    return {
        OURS: ours.TripletLoss(MARGIN, normalize),
        PLAIN: lambda f, labels: plain.triplet(f, labels, MARGIN, normalize),
        TLLIB: tllib and tllib(MARGIN, normalize),
        "pytorch_metric_learning": None if normalize else _metric_learning(),
    }


def _memory_triplet(normalize: bool = False) -> Mapping[str, Callable | None]:
    tllib = original(MODULE, "TripletLossXBM")
    return {
        OURS: ours.TripletLossXBM(MARGIN, normalize),
        PLAIN: lambda *inputs: plain.triplet_xbm(*inputs, MARGIN, normalize),
        TLLIB: tllib and tllib(MARGIN, normalize),
    }


def _metric_learning() -> Callable | None:
    """Batch-hard triplets as that package's users build them, without the normalization it begins with."""
    losses = package("pytorch_metric_learning.losses")
    if losses is None:
        return None
    distance = package("pytorch_metric_learning.distances").LpDistance(normalize_embeddings=False)
    reducer = package("pytorch_metric_learning.reducers").MeanReducer()
    miner = package("pytorch_metric_learning.miners").BatchHardMiner(distance=distance)
    loss = losses.TripletMarginLoss(MARGIN, distance=distance, reducer=reducer)
    return lambda f, labels: loss(f, labels, miner(f, labels))


def _distances(reduced: Callable[[Callable], Callable]) -> Mapping[str, Callable | None]:
    name = "pairwise_euclidean_distance"
    functions = {OURS: getattr(ours, name), PLAIN: plain.distances, TLLIB: original(MODULE, name)}
    return {key: f and reduced(f) for key, f in functions.items()}


def _summed(distances: Callable) -> Callable:
    return lambda x, y: distances(x, y).sum()


def _weighted(distances: Callable) -> Callable:
    """Of a matrix with itself; the weights are 0 on the diagonal, where a distance is rounding noise."""
    return lambda x, weights: (distances(x, x) * weights).sum()


def _feature_case(
    loss: str, losses: Mapping[str, Callable | None], rows: int, features: int, memory: int = 0
) -> Case:
    """Features of ``rows / SAME`` persons; the limit is their product with themselves, or with the memory."""

    shape = (rows, features, memory) if memory else (rows, features)

    def set_up():
        inputs = _features(loss, seeded(), rows, features, memory)
        there = {name: function for name, function in losses.items() if function is not None}
        if shape == COMPILED_SHAPE:
            there[COMPILED] = compiled(there[PLAIN])
        providers = {name: step_of(function, inputs, [0]) for name, function in there.items()}
        own = inputs[0].clone()
        other = inputs[2] if memory else own
        return providers | {LIMIT: Provider(lambda: own @ other.T, None)}

    bars = [faster(PLAIN, 1.0)] if loss in (MEMORY_TRIPLET, DISTANCES, OWN_DISTANCES) else []
    if loss == SOFT_TRIPLET:
        bars = [faster(PLAIN, PLAIN_BAR)]
        bars += [within(LIMIT, PRODUCT_BAR)] if shape in PRODUCT_SHAPES else []
    return Case(
        f"{loss} {shape}",
        set_up,
        bars,
        quick=max(rows, memory) * features < 1 << 18,
        small=rows == 64 and not memory,
        loss=loss,
        sizes={"N": rows, "F": features} | ({"M": memory} if memory else {}),
    )


def _features(
    loss: str, generator: torch.Generator, rows: int, features: int, memory: int
) -> list[torch.Tensor]:
    """The inputs of a loss."""
    labels = torch.arange(rows) // SAME
    f, teacher = torch.randn(2, rows, features, generator=generator)
    if loss == MEMORY_TRIPLET:
        return [f, labels, torch.randn(memory, features, generator=generator), torch.arange(memory) // SAME]
    return {
        SOFT_TRIPLET: [f, teacher, labels],
        TRIPLET: [f, labels],
        DISTANCES: [f, teacher],
        OWN_DISTANCES: [f, torch.ones(rows, rows).fill_diagonal_(0)],
    }[loss]


def _feature_family(loss: str, losses: Mapping[str, Callable | None], called: str = "") -> Family:
    memory = MEMORY if loss == MEMORY_TRIPLET else 0

    def inputs(*size):
        return _features(loss, *size, memory)

    return family(lambda _: losses, inputs, loss=called or loss, largest=MOST, elements=ELEMENTS)


def _feature_footprint(loss: str, losses: Mapping[str, Callable | None]) -> Footprint:
    rows, features = LARGE
    case = _feature_case(loss, losses, rows, features)
    return Footprint(case, 4 * rows * (features + rows), "one gradient and the product")


METHOD = Method(
    "reid_loss",
    [
        *loss_cases(_soft_cross_entropy, logits(2), loss=SOFT_CROSS, limit=SOFT_BAR),
        *loss_cases(_label_smooth, _labelled, loss=SMOOTH, limit=1.0),
        *(_feature_case(SOFT_TRIPLET, _soft_triplet(), *shape) for shape in BATCHES),
        *(_feature_case(TRIPLET, _triplet(), *shape) for shape in BATCHES),
        *(_feature_case(MEMORY_TRIPLET, _memory_triplet(), *shape) for shape in MEMORIES),
        *(_feature_case(DISTANCES, _distances(_summed), *shape) for shape in BATCHES[:3]),
        *(_feature_case(OWN_DISTANCES, _distances(_weighted), *shape) for shape in BATCHES[:3]),
    ],
    footprints=[
        footprint(_soft_cross_entropy, logits(2), loss=SOFT_CROSS),
        footprint(_label_smooth, _labelled, loss=SMOOTH),
        _feature_footprint(SOFT_TRIPLET, _soft_triplet()),
        _feature_footprint(TRIPLET, _triplet()),
    ],
    families=[
        family(_soft_cross_entropy, logits(2), loss=SOFT_CROSS),
        family(_label_smooth, _labelled, loss=SMOOTH),
        _feature_family(SOFT_TRIPLET, _soft_triplet()),
        _feature_family(TRIPLET, _triplet()),
        _feature_family(MEMORY_TRIPLET, _memory_triplet()),
        _feature_family(SOFT_TRIPLET, _soft_triplet(0.5, normalize=True), f"{SOFT_TRIPLET}, normalized"),
        _feature_family(TRIPLET, _triplet(normalize=True), f"{TRIPLET}, normalized"),
        _feature_family(MEMORY_TRIPLET, _memory_triplet(normalize=True), f"{MEMORY_TRIPLET}, normalized"),
        _feature_family(DISTANCES, _distances(_summed)),
        _feature_family(OWN_DISTANCES, _distances(_weighted)),
    ],
)

"""The benchmark harness: it runs, keeps its results, and refuses to time what computes something else."""

import dataclasses
import json

import pytest
import torch

from benches import mean_teacher
from benches.__main__ import main
from benches._case import OURS, PLAIN, Disagreement, Provider, check, methods
from benches._losses import loss_case
from benches._providers import prepare


def test_quick_run_keeps_its_results(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert main(["pseudo_label", "--quick", "--save", "--output", str(path)]) == 0
    assert main(["flexmatch", "--quick", "--save", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "threads" in printed
    assert "/ours" in printed
    runs = json.loads(path.read_text())
    assert list(runs) == ["flexmatch", "pseudo_label"]
    run = runs["pseudo_label"]
    assert run.keys() == {"date", "commit", "environment", "quick", "cases", "verdicts"}
    assert run["environment"]["torch"].startswith(torch.__version__)
    assert [case["setting"] for case in run["cases"]][:2] == ["(32, 31)", "(64, 100)"]
    for case in run["cases"]:
        assert {"ours", "plain", "limit"} <= case["providers"].keys()
        assert case["ratios"].keys() == case["providers"].keys() - {"ours"}
        for figures in case["providers"].values():
            assert figures.keys() == {"p20", "p50", "p80", "iqr", "blocks", "memory"}
            assert 0 < figures["p20"] <= figures["p50"] <= figures["p80"]
            assert figures["blocks"] >= 3
    assert all(verdict.keys() == {"text", "met"} for verdict in run["verdicts"])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda z: 1.001 * (z * z).sum(),
        lambda z: (z * z).sum().detach() + 0 * z.sum(),
        lambda z: (z * z).sum() * float("nan"),
        lambda z: (z * z).sum(dim=1).sum().reshape(1)[0:1].sum() + 1,
    ],
    ids=["value", "gradient", "nan", "offset"],
)
def test_a_wrong_provider_is_not_timed(wrong):
    def plain(z):
        return (z * z).sum()

    right = loss_case(3, 4, {OURS: lambda z: z.square().sum(), PLAIN: plain})
    check(right, right.set_up())
    case = loss_case(3, 4, {OURS: wrong, PLAIN: plain})
    with pytest.raises(Disagreement, match=r"\(3, 4\): result \d of ours is off by"):
        check(case, case.set_up())


@pytest.mark.parametrize("stem", methods())
def test_a_disturbed_result_is_caught_in_every_method(stem):
    case = methods()[stem].cases[-1 if stem == "mean_teacher" else 0]
    providers, _ = prepare(case, thorough=False)
    ours = providers[OURS]

    def disturbed():
        first, *others = ours.result()
        return [1.01 * first, *others]

    providers[OURS] = dataclasses.replace(ours, result=disturbed)
    with pytest.raises(Disagreement):
        check(case, providers)


def test_results_of_another_number_or_shape_are_caught():
    case = loss_case(3, 4, {})

    def provider(*tensors):
        return Provider(lambda: None, lambda: list(tensors))

    one = torch.ones(3)
    with pytest.raises(Disagreement, match="ours has 2 results, plain 1"):
        check(case, {OURS: provider(one, one), PLAIN: provider(one)})
    with pytest.raises(Disagreement, match=r"has shape \(1, 3\)"):
        check(case, {OURS: provider(one[None]), PLAIN: provider(one)})


def test_unknown_method_and_list(capsys):
    assert main(["no_such_method"]) == 2
    assert main(["--list"]) == 0
    assert "N = 10,000,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "tensors", "numbers"),
    [
        (mean_teacher.resnet50, 161, 25_557_032),
        (mean_teacher.mobilenet_v2, 158, 3_504_872),
        (mean_teacher.tiny, 1000, 36_000),
    ],
)
def test_models_have_the_parameters_of_their_namesakes(model, tensors, numbers):
    with torch.device("meta"):
        parameters = list(model().parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (tensors, numbers)

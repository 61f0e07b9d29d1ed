"""The benchmark harness: it runs, keeps its results, and refuses to time what computes other results."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.benchmark import Measurement, TaskSpec

import tllib_rs
from benches import (
    _draw,
    _families,
    _memory,
    _pages,
    _providers,
    _random,
    _results,
    mean_teacher,
    self_ensemble,
)
from benches.__main__ import main
from benches._case import (
    COMPILED,
    LIMIT,
    OURS,
    PLAIN,
    TLLIB,
    Case,
    Disagreement,
    Method,
    Provider,
    check,
    faster,
    methods,
    within,
)
from benches._losses import loss_case
from benches._measure import QUICK, Result, run_case
from benches._providers import prepare
from tests.threads import threads_of

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture
def one_thread():
    """For whole runs: threads that wait for each other take minutes on a busy machine."""
    with threads_of(1):
        yield


@pytest.mark.usefixtures("one_thread")
def test_device_run(capsys):
    """On the CPU, which has neither events nor launches to count."""
    assert main(["entropy", "--quick", "--device", "cpu"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("entropy")]
    assert {"ours", "plain", "copy"} & {word for row in rows for word in row.split()} == {"ours", "plain"}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("tried to\nallocate"), Disagreement("off by 1"), AssertionError("no")]
)
@pytest.mark.parametrize("way", ["--device=cpu", "--share"])
def test_a_case_that_cannot_be_measured_leaves_the_others(error, way, monkeypatch, capsys):
    """And does not count as having met its bars."""

    def fail():
        raise error

    first, *others = self_ensemble.METHOD.cases
    cases = [dataclasses.replace(first, setting="x (64, 100)", set_up=fail), *others]
    method = dataclasses.replace(self_ensemble.METHOD, cases=cases)
    monkeypatch.setattr("benches.__main__.methods", lambda: {"self_ensemble": method})
    status = main(["--quick", "--check", way])
    printed = capsys.readouterr().out
    assert f"MISSED  x (64, 100): not measured: {type(error).__name__}: {str(error)[:8]}\n" in printed
    # Of each provider, of which the original tllib may be one, or of ours alone.
    rows = 1 if way == "--share" else len(next(c for c in others if c.setting == "(64, 100)").set_up())
    assert sum(line.startswith("self_ensemble  (64, 100)  ") for line in printed.splitlines()) == rows
    assert status == 1 or way == "--share"


@pytest.mark.usefixtures("one_thread")
def test_share_of_a_step(capsys):
    assert main(["flexmatch", "--quick", "--share"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("flexmatch")]
    assert row.count("%") == 2


@pytest.mark.usefixtures("one_thread")
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
        # Variants of a setting have no sizes, and no limit.
        assert {"ours", "plain"} | ({"limit"} if case["sizes"] else set()) <= case["providers"].keys()
        assert case["ratios"].keys() == case["providers"].keys() - {"ours"}
        for figures in case["providers"].values():
            assert figures.keys() == {"p20", "p50", "p80", "iqr", "blocks", "memory"}
            assert 0 < figures["p20"] <= figures["p50"] <= figures["p80"]
            assert figures["blocks"] >= 3
    assert all(verdict.keys() == {"text", "met"} for verdict in run["verdicts"])

    pictures = _draw.draw(runs, tmp_path)
    assert all(path.stat().st_size > 10_000 for path in pictures)
    page = "before\n<!-- benches: pseudo_label -->\nstale\n<!-- end -->\nafter\n"
    written = _pages.rewritten(page, runs)
    assert written.startswith("before\n")
    assert written.endswith("\nafter\n")
    assert "stale" not in written
    assert written.count("| (64, 100) |") == 1
    assert _pages.rewritten(written, runs) == written


def test_scaling_measures_and_projects(capsys):
    assert main(["--scaling", "--quick"]) == 0
    printed = capsys.readouterr().out
    for line in ("N = 2,000,000", "int16: ", "times its bytes", "a step costs", "1e10  1,024    sharded"):
        assert line in printed


@pytest.mark.usefixtures("one_thread")
def test_random_settings(capsys):
    """The same ones for the same seed, of all kinds."""
    families = [(method.stem, family) for method in methods().values() for family in method.families]
    assert len(families) > 15
    drawn = [
        [
            f"{stem}: {found.case.setting}"
            for stem, found in itertools.islice(_random._drawn(families, seed), 200)
        ]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {stem for stem, _ in families} == {setting.partition(":")[0] for setting in drawn[0]}
    for part in ("bfloat16", "float64", "transposed", "slice of columns", "no gradient", "(2, "):
        assert any(part in setting for setting in drawn[0]), part

    assert main(["entropy", "--random", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^entropy: .*\(\d+, \d+\)", printed, re.MULTILINE)
    assert "slower than plain in " in printed
    for wrong in (["semilearn"], ["entropy", "--case", "x"], ["entropy", "--quick"]):
        assert main([*wrong, "--random", "1"]) == 2


@pytest.mark.usefixtures("one_thread")
def test_a_random_setting_that_is_wrong_is_no_gain(capsys):
    family = _families.family(
        lambda _: {OURS: lambda p: 0 * p.sum(), PLAIN: lambda p: (p * p).sum()},
        largest=(9, 9),
        dtypes=[torch.float32],
    )
    verdicts = _random.run([Method("broken", [], families=[family])], 0.5, 0)
    assert len(verdicts) > 1
    assert not any(verdict.met for verdict in verdicts)
    assert "MISSED  broken: (" in capsys.readouterr().out


def test_random_settings_in_which_ours_is_slower_are_counted(capsys):
    (verdict,) = _random._reported([(0.5, "x (1, 2)", 1e-3), (2.0, "y", 1e-6), (3.0, "z", 1e-6)])
    assert not verdict.met
    assert verdict.text.startswith(
        "slower than plain in 1 of 3 settings (at most 0); in half of them at least 2 "
    )
    assert "x (1, 2)  1 ms    0.5" in capsys.readouterr().out
    (verdict,) = _random._reported([(1.0, "x", 1e-3)])
    assert verdict.met
    assert not _random._reported([])[0].met


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


# A method has no cases only if it is semilearn and that is not installed.
@pytest.mark.parametrize("stem", [stem for stem, method in methods().items() if method.cases])
def test_a_disturbed_result_is_caught_in_every_method(stem):
    case = methods()[stem].cases[-1 if stem == "mean_teacher" else 0]
    providers, _ = prepare(case, compiled=False)
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
    assert main(["--list", "--case", "no such setting"]) == 2
    assert main(["uda", "--save", "--no-compiled"]) == 2
    capsys.readouterr()
    assert main(["--list", "--case", "(8, 100000)"]) == 0
    listed = capsys.readouterr().out
    assert "mcc\n" in listed
    assert "flexmatch" not in listed
    assert all("(8, 100000)" in line for line in listed.splitlines() if line.startswith(" "))


@pytest.mark.usefixtures("one_thread")
def test_single_settings_without_the_compiler(capsys):
    assert main(["uda", "--case", "(32, 31)", "--no-compiled"]) == 0
    printed = capsys.readouterr().out
    assert "(32, 31)" in printed
    assert "(64, 100)" not in printed
    assert "compiled  left out: it takes seconds" in printed


@pytest.mark.parametrize(
    ("model", "tensors", "numbers"),
    [
        (mean_teacher.resnet50, 161, 25_557_032),
        (mean_teacher.mobilenet_v2, 158, 3_504_872),
        (mean_teacher.VisionTransformer, 152, 86_567_656),
        (mean_teacher.vit_l, 296, 304_326_632),
        (mean_teacher.tiny, 1000, 36_000),
    ],
)
def test_models_have_the_parameters_of_their_namesakes(model, tensors, numbers):
    with torch.device("meta"):
        parameters = list(model().parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (tensors, numbers)


def test_every_method_has_its_figures_on_one_page():
    marked = [stem for page in PAGES for stem in _pages.MARKS.findall(page.read_text())]
    assert sorted(marked) == list(methods())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_figures_on_the_pages_are_those_that_are_kept(page):
    text = page.read_text()
    assert text == _pages.rewritten(text, _results.latest()), "python -m benches --pages rewrites the page"


def _result(bars, left_out=(), **times):
    case = Case("setting", dict, bars)
    measured = {name: Measurement(1, list(ts), TaskSpec("step()", "")) for name, ts in times.items()}
    return Result(case, measured, left_out=dict.fromkeys(left_out, "why"))


def test_bars_compare_blocks_of_the_same_round():
    bars = [
        faster(PLAIN, 2.0),
        faster(PLAIN, 2.5),
        within(LIMIT, 2.0),
        within(LIMIT, 1.9),
    ]
    result = _result(bars, ours=[1.0, 10.0, 1.0], plain=[2.0, 20.0, 2.0], limit=[0.5, 5.0, 0.5])
    found = list(result.verdicts())
    assert [verdict.met for verdict in found] == [True, False, True, False]
    assert found[0].text == "setting: 2 times as fast as plain (at least 2)"
    assert found[3].text == "setting: 2 times the limit (at most 1.9)"


def test_a_bar_whose_provider_is_missing_is_missed():
    times = {"ours": [1.0], "plain": [2.0]}
    (found, _) = _result([faster(TLLIB, 1)], **times).verdicts()
    assert (found.text, found.met) == ("setting: tllib was not measured", False)
    # The table says why.
    assert len(list(_result([faster(TLLIB, 1)], left_out=[TLLIB], **times).verdicts())) == 1


def test_ours_is_never_to_be_slower_than_what_it_replaces():
    result = _result([faster(PLAIN, 3)], ours=[1.0], plain=[4.0], tllib=[0.9], compiled=[1.1], limit=[0.1])
    verdicts = {verdict.text.split()[-4]: verdict.met for verdict in result.verdicts()}
    assert verdicts == {"plain": True, "tllib": False, "compiled": True}


@pytest.mark.usefixtures("one_thread")
def test_a_missed_bar_fails_the_check(monkeypatch, capsys):
    case = dataclasses.replace(self_ensemble.METHOD.cases[0], bars=[within(LIMIT, 1e-9)])
    method = dataclasses.replace(self_ensemble.METHOD, cases=[case])
    monkeypatch.setattr("benches.__main__.methods", lambda: {"self_ensemble": method})
    assert main(["--quick"]) == 0
    assert main(["--quick", "--check"]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_what_inductor_does_not_take_is_left_out():
    def refuse():
        raise NotImplementedError("no such operator\nand more")

    def set_up():
        fine = Provider(lambda: None, lambda: [torch.ones(1)])
        return {OURS: fine, PLAIN: fine, COMPILED: Provider(refuse, refuse)}

    case = Case("setting", set_up)
    providers, left_out = prepare(case, compiled=True)
    assert list(providers) == [OURS, PLAIN]
    assert left_out == {COMPILED: "NotImplementedError: no such operator"}
    assert list(run_case("method", case, QUICK).measurements) == [OURS, PLAIN]


def test_a_missing_package_is_left_out_with_one_line(capsys):
    for _ in range(2):
        assert _providers.package("no_such_package") is None
    assert capsys.readouterr().out.count("\n") == 1


def test_the_original_is_compared_where_there_is_one():
    environment = os.environ | {"TLLIB_DIR": str(ROOT / "tests/standin")}
    environment["PYTHONPATH"] = str(pathlib.Path(tllib_rs.__file__).parent.parent)
    code = (
        "from benches._case import methods; from benches._providers import prepare\n"
        "for m in methods().values():\n"
        "    if m.stem != 'semilearn': print(m.stem, *prepare(m.cases[-1 if m.stem == 'mean_teacher' else 0], compiled=False)[0])"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = [
        line.split()
        for line in run.stdout.splitlines()
        if line.split()[0] in methods() and "left out" not in line
    ]
    # What semilearn's hook is compared with is not tllib.
    assert [line[0] for line in lines] == [m for m in methods() if m != "semilearn"]
    assert all("tllib" in line for line in lines)


def test_peak_counts_what_lives_at_once():
    kept = []

    def step():
        kept.clear()
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        kept.append(torch.empty(3000, dtype=torch.uint8))
        second = torch.empty(500, dtype=torch.uint8)
        del second

    assert _memory.peak(step) == 3500


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@threads_of(2)  # some kernels count the memory of each processor, and are off by as many pages
def test_memory_beyond_the_gradient_misses_its_bar(monkeypatch):
    (verdict,) = _memory.verdicts(self_ensemble.METHOD)
    assert verdict.met, verdict.text
    monkeypatch.setattr(_memory, "SLACK", 0.5)
    (verdict,) = _memory.verdicts(self_ensemble.METHOD)
    assert not verdict.met


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_the_process_grows_by_includes_other_allocators():
    code = (
        "import numpy, sys\n"
        "from benches import _memory\n"
        "from benches._case import Case, Footprint, OURS, Provider\n"
        "step = lambda: numpy.ones((1024, 4096), dtype=numpy.float32).sum()\n"
        "print(_memory.resident(Footprint(Case('', lambda: {OURS: Provider(step, None)}), 1)))"
    )
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = str(pathlib.Path(tllib_rs.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == pytest.approx(4 * 1024 * 4096, rel=0.05)

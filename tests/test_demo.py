"""The demo, in its quick form: does it run, and are its table and picture there?"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
image = pytest.importorskip("matplotlib.image")
pytest.importorskip("tqdm")
pytest.importorskip("tabulate")

ROOT = Path(__file__).parents[1]


def test_quick_demo(tmp_path):
    environment = os.environ | {"MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    script = ROOT / "examples" / "digits_flexmatch.py"
    run = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    report = (tmp_path / "out" / "digits_flexmatch.txt").read_text(encoding="utf-8")
    assert report in run.stdout
    for method in ("supervised only", "FlexMatch"):
        accuracy, mean = map(float, re.search(rf"^{method} +([\d.]+) +([\d.]+) ±", report, re.M).groups())
        assert accuracy == mean  # one seed
        assert 50 < accuracy <= 100  # chance is 10, the quick form reaches about 80
    ratio = float(re.search(r"supervised only: ([\d.]+)$", report, re.M).group(1))
    assert 0 < ratio < 2
    picture = image.imread(tmp_path / "out" / "digits_flexmatch.png")
    height, width, _ = picture.shape
    assert (width, height) == (1700, 560)
    for panel in np.array_split(picture[..., :3], 3, axis=1):
        assert (np.ptp(panel, axis=2) > 0.3).sum() > 200  # each panel has colored curves

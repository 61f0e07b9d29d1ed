"""The figures on the pages of docs/: between two marks, from the kept results, never by hand."""

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from benches._case import LIMIT, OURS, PLAIN
from benches._report import digits, seconds, size

DOCS = pathlib.Path(__file__).parent.parent / "docs"
#: What is not between the marks is left alone.
MARKS = re.compile(r"<!-- benches: (\w+) -->\n(?:.*?\n)?<!-- end -->\n", re.DOTALL)


def rewritten(text: str, runs: Mapping[str, Any]) -> str:
    """A page with the figures of ``runs`` between its marks."""

    def block(match: re.Match) -> str:
        stem = match[1]
        lines = _block(runs[stem]) if stem in runs else ["No results are kept yet."]
        return "\n".join([f"<!-- benches: {stem} -->", "", *lines, "", "<!-- end -->", ""])

    return MARKS.sub(block, text)


def rewrite(runs: Mapping[str, Any], docs: pathlib.Path = DOCS) -> list[pathlib.Path]:
    """Rewrite all pages; return those that changed."""
    changed = []
    for page in sorted(docs.rglob("*.md")):
        text = page.read_text()
        if (new := rewritten(text, runs)) != text:
            page.write_text(new)
            changed.append(page)
    return changed


def _block(run: Mapping[str, Any]) -> Iterable[str]:
    names = dict.fromkeys(name for case in run["cases"] for name in case["ratios"])
    # The limit last.
    others = sorted(names, key=lambda name: name == LIMIT)
    yield machine(run)
    yield ""
    yield "| | ours | " + " | ".join(f"{name} / ours" for name in others) + " | memory | of plain |"
    yield "|---" + "|--:" * (len(others) + 3) + "|"
    for case in run["cases"]:
        ratios = [digits(case["ratios"][name]) if name in case["ratios"] else "" for name in others]
        providers = case["providers"]
        memory = [_memory(providers.get(name, {})) for name in (OURS, PLAIN)]
        cells = [case["setting"], seconds(providers[OURS]["p50"]), *ratios, *memory]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield from _bars(run["verdicts"])


def machine(run: Mapping[str, Any]) -> str:
    """One line about where and when a run was made."""
    environment = run["environment"]
    return (
        f"Medians on {environment['processor']}, {environment['threads']}, "
        f"torch {environment['torch'].partition(' ')[0]}, {run['date'][:10]}, commit {run['commit']}"
        f"{', quick' if run['quick'] else ''}."
    )


def _memory(figures: Mapping[str, Any]) -> str:
    return "" if figures.get("memory") is None else size(figures["memory"])


def _bars(verdicts: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    found = list(verdicts)
    missed = [verdict["text"] for verdict in found if not verdict["met"]]
    if found:
        yield f"{len(found) - len(missed)} of {len(found)} bars are met{', missed:' if missed else '.'}"
    if missed:
        yield ""
        yield from (f"- {text}" for text in missed)

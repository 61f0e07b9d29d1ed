"""``python -m benches [METHOD ...] [--case TEXT] [--quick] [--no-compiled] [--save] [--check] [--list]
[--loaded] [--scaling] [--random SECONDS [--seed N]] [--device cuda] [--share]``,
``python -m benches [--draw] [--pages]`` from what was kept."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import torch

from benches import _device, _loaded, _memory, _pages, _random, _report, _results, _scaling, _share
from benches._case import Method, Verdict, methods
from benches._measure import FULL, QUICK, Effort, run_case


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the harness; the exit status."""
    known = methods()
    options = _parser(known).parse_args(arguments)
    if unknown := sorted(set(options.methods) - known.keys()):
        print(f"no such method: {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    # One without cases lacks the package that it is about.
    chosen = [m for stem, m in known.items() if m.cases and (stem in options.methods or not options.methods)]
    if options.case:
        chosen = [m for m in (_only(method, options.case) for method in chosen) if m.cases]
        if not chosen:
            print(f"no setting contains {options.case!r}; --list prints them", file=sys.stderr)
            return 2
    if options.save and not options.output and (options.case or options.no_compiled):
        print("--save keeps whole runs: --case and --no-compiled need --output", file=sys.stderr)
        return 2
    if options.random is not None and (options.case or options.device or options.save or options.quick):
        print("--random draws its settings: not with --case, --device, --save or --quick", file=sys.stderr)
        return 2
    if options.random is not None and not any(method.families for method in chosen):
        print("nothing of these methods is drawn at random", file=sys.stderr)
        return 2
    if options.list:
        for method in chosen:
            print(method.stem, *(f"  {case.setting}" for case in method.cases), sep="\n")
        return 0
    if options.draw or options.pages:
        return _show(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    _report.print_environment()
    effort = QUICK if options.quick else FULL
    effort = dataclasses.replace(effort, compiled=effort.compiled and not options.no_compiled)
    if options.scaling:
        verdicts = _scaling.run(options.quick)
    elif options.random is not None:
        verdicts = _random.run(chosen, options.random, options.seed)
    elif options.share:
        _share.run(chosen, effort, options.device or "cpu")
        verdicts = []
    elif options.device:
        verdicts = _device.run(chosen, effort, options.device)
    elif options.loaded:
        verdicts = _loaded.run(chosen, effort)
    else:
        verdicts = _run(chosen, effort, options)
    return int(options.check and not all(verdict.met for verdict in verdicts))


def _only(method: Method, part: str) -> Method:
    """Without what is judged from all cases together."""
    cases = [case for case in method.cases if part in case.setting]
    return dataclasses.replace(method, cases=cases, verdicts=lambda results: (), footprints=())


def _run(chosen: Sequence[Method], effort: Effort, options: argparse.Namespace) -> list[Verdict]:
    verdicts = []
    for method in chosen:
        here = [case for case in method.cases if not case.on_device]
        cases = [case for case in here if case.quick or not options.quick]
        results = [run_case(method.stem, case, effort) for case in cases]
        found = [verdict for result in results for verdict in result.verdicts()]
        found += method.verdicts({result.case.setting: result for result in results})
        if effort.thorough:
            found += _memory.verdicts(method)
        _report.print_method(method.stem, results, found)
        verdicts += found
        if options.save:
            run = _results.record(results, found, options.quick)
            print(f"  saved to {_results.save(method.stem, run, options.output)}")
    return verdicts


def _show(options: argparse.Namespace) -> int:
    runs = _results.latest()
    if not runs:
        print("no results are kept; --save keeps them", file=sys.stderr)
        return 1
    if options.draw:
        # matplotlib takes a second to load, and its threads would be in the way of a measurement.
        from benches import _draw

        print("drawn:", *_draw.draw(runs))
    if options.pages:
        print("rewritten:", *(_pages.rewrite(runs) or ["nothing to change"]))
    return 0


def _parser(known: dict[str, Method]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches", description="How fast the methods are.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small settings, few rounds")
    parser.add_argument("--list", action="store_true", help="print methods and settings, run nothing")
    parser.add_argument("--case", metavar="TEXT", help="only settings that contain this")
    parser.add_argument("--no-compiled", action="store_true", help="without torch.compile, which takes long")
    parser.add_argument("--save", action="store_true", help="keep the results, in benches/results")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="where --save puts them instead")
    parser.add_argument("--check", action="store_true", help="fail where a bar is missed")
    parser.add_argument("--draw", action="store_true", help="draw what was kept, run nothing")
    parser.add_argument("--pages", action="store_true", help="put what was kept on the pages, run nothing")
    parser.add_argument("--loaded", action="store_true", help="small losses, quiet and with every core busy")
    parser.add_argument("--scaling", action="store_true", help="FlexMatch at 10^8 samples, and projected on")
    parser.add_argument("--random", type=float, metavar="SECONDS", help="settings at random, for so long")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which of them (default: 0)")
    parser.add_argument("--device", metavar="cuda", help="on a device: also launches, and the host's time")
    parser.add_argument("--share", action="store_true", help="a method's share of a whole training step")
    parser.add_argument("--threads", type=int, metavar="N", help="torch.set_num_threads(N)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

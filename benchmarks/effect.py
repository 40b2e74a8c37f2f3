"""The bench: every setting of a memory and every rival of it, on the same reference tokens and the same held-out text.

    python benchmarks/effect.py                                             # everything, then the tables and plots
    python benchmarks/effect.py --labs olmoe --kinds topics --seeds 0 --groups confidence
    python benchmarks/effect.py --report                                    # tables and plots of what was measured

What is measured where is data in `benchmarks/settings.py`. Each setting is written as soon as it is measured, and a
second run skips it, so the bench may be interrupted. Every constant is the library's default, which was chosen
elsewhere, on validation text.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it knows only its own folder

import torch

from benchmarks.cells import Cell, Lab
from benchmarks.plots import write_plots
from benchmarks.report import write_report
from benchmarks.results import FOLDER
from benchmarks.settings import GROUPS, SEEDS_OF, Setting, grid, planned
from benchmarks.texts import IN_DOMAIN, TEST
from knnmoe_hf.lab import LAB_MODELS


def chosen(options: argparse.Namespace, kind: str, seed: int) -> list[Setting]:
    """The settings that are planned for a cell, or all of them, as far as they were asked for."""
    found = grid() if options.grid else planned(kind, seed)
    groups, names = set(options.groups or ()), set(options.settings or ())
    return [s for s in found if not (groups or names) or s.group in groups or s.name in names]


def measure(options: argparse.Namespace, lab: str, kind: str) -> None:
    """Everything that was asked for with references of one kind, seed by seed."""
    if options.jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    bench = None
    for seed in options.seeds if options.seeds is not None else SEEDS_OF[kind]:
        settings = chosen(options, kind, seed)
        if not settings:
            continue
        bench = bench or Lab(lab, options.results / "effect", options.test_windows)
        most = max(setting.references for setting in settings)
        cell = Cell(bench, kind, seed, most, options.references, options.fresh)
        settings = [setting for setting in settings if cell.is_another(setting)]
        for index, setting in enumerate(settings, 1):
            if cell.has(setting):
                continue
            if _is_orphan():
                return
            began = time.perf_counter()
            nll = cell.entry(setting)["changes"]
            off = " ".join(f"{text} {found['nll'][0]:+.4f}" for text, found in nll.items())
            where = f"{lab}-{kind}-{seed} {index}/{len(settings)}"
            print(f"{where} {setting.name}: {off} ({time.perf_counter() - began:.0f} s)", flush=True)


def _is_orphan() -> bool:
    """Whether this process works for one that was ended."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


def run(options: argparse.Namespace) -> None:
    """All that was asked for; kinds of each lab are measured side by side."""
    units = [(lab, kind) for kind in options.kinds for lab in options.labs]
    if options.jobs == 1:
        for unit in units:
            measure(options, *unit)
        return
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(measure, options, *unit) for unit in units]:
            done.result()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labs", nargs="+", choices=LAB_MODELS, default=list(LAB_MODELS))
    parser.add_argument("--kinds", nargs="+", choices=IN_DOMAIN, default=list(IN_DOMAIN))
    parser.add_argument("--seeds", nargs="+", type=int, help="by default, those that are planned for each kind")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="only these groups of settings")
    parser.add_argument("--settings", nargs="+", help="only these settings, and those of --groups")
    parser.add_argument("--grid", action="store_true", help="also where a setting is not planned")
    parser.add_argument("--references", type=int, help="at most so many windows of reference text, to try things")
    parser.add_argument("--test-windows", type=int, default=TEST, help="windows of each test text, to try things")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--jobs", type=int, default=2, help="processes; each has its share of the cores")
    parser.add_argument("--results", type=Path, default=FOLDER, help="where everything is written")
    options = parser.parse_args(argv)
    known = {setting.name for setting in grid()}
    if unknown := sorted(set(options.settings or ()) - known):
        parser.error(f"{unknown[0]!r} is no setting: choose among {', '.join(sorted(known))}.")
    if options.results == FOLDER and (options.references is not None or options.test_windows != TEST):
        parser.error("--references and --test-windows are for trials: say with --results where to put them.")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if not options.report:
        run(options)
    write_report(options.results)
    write_plots(options.results)


if __name__ == "__main__":
    main()

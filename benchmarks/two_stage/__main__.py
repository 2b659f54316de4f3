"""The two-stage benchmark's command: ``python -m benchmarks.two_stage COMMAND``.

    list                    settings and methods
    train SETTING ...       make the bank of settings, by retraining; goes on where it stopped
    choose SETTING ...      choose what methods leave open, on seeds that are not reported; writes
                            results/two_stage/choices/SETTING.json
    judge SETTING ...       judge every registered method, or --methods; writes
                            results/two_stage/SETTING.json and goes on where it stopped
    smoothness              what makes training smoother; writes results/two_stage/smoothness.json
    score FILE [SETTING ..] judge scores in FILE.npz, or the methods that FILE.py registers

``score FILE.npz`` trains nothing: the file holds, under the name ``<setting>-<seed>``, an array
``(m, T)`` of dq/dw_i. See README.md of this folder.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import torch

# Importing them registers their methods.
from benchmarks.two_stage import bank, baselines, budget, choices, exact, implicit, judge  # noqa: F401
from benchmarks.two_stage.methods import METHODS
from benchmarks.two_stage.settings import SETTINGS


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.two_stage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("smoothness")
    train, choosing, judged, scored = (
        commands.add_parser(name) for name in ("train", "choose", "judge", "score")
    )
    scored.add_argument("file", type=Path)
    for command in (train, choosing, judged, scored):
        command.add_argument("settings", nargs="*", metavar="SETTING", help="by default all")
    train.add_argument("--jobs", type=int, default=None, help="processes")
    judged.add_argument("--methods", nargs="+", choices=METHODS)
    options = parser.parse_args(arguments)
    unknown = set(getattr(options, "settings", ())) - set(SETTINGS)
    if unknown:
        parser.error(f"there is no setting {min(unknown)!r}; there are {', '.join(SETTINGS)}")
    torch.set_num_threads(1)
    if options.command == "list":
        for setting in SETTINGS.values():
            done = len(bank.seeds_of(setting.name))
            print(f"{setting.name:16} {done} of {setting.seeds} seeds  {setting.says}")
        print(*METHODS, sep="\n")
        return
    if options.command == "smoothness":
        print(judge.write_smoothness())
        return
    chosen = options.settings or list(SETTINGS)
    if options.command == "train":
        for name in chosen:
            for path in bank.make(name, range(SETTINGS[name].seeds), jobs=options.jobs):
                print(path)
    elif options.command == "choose":
        for name in chosen:
            print(choices.write(name, list(METHODS.values())))
    elif options.command == "judge":
        for name in chosen:
            asked = options.methods or list(METHODS)
            print(judge.write(name, [METHODS[one] for one in asked]))
    else:
        print(judge.table(_scored(options.file, chosen)))


def _scored(file: Path, settings: list[str]) -> list[dict]:
    """The rows of a file of scores, or of the methods that a file of Python registers."""
    if file.suffix == ".npz":
        return [row for row in judge.score(file) if row["setting"] in settings]
    known = set(METHODS)
    runpy.run_path(str(file))
    new, rows = [method for name, method in METHODS.items() if name not in known], []
    for name in settings:
        seeds = bank.seeds_of(name)
        if seeds:
            said = {"setting": name, "seeds": f"{len(seeds)} of {SETTINGS[name].seeds}"}
            values = {one["method"]: one["chosen"] for one in choices.choose(name, new)}
            bench = judge.Bench(name, seeds, values)
            rows += [{**said, **row} for method in new for row in bench.rows(method)]
    return rows


if __name__ == "__main__":
    main()

"""Measure speed and memory, next to what one would use instead: ``python tests/benchmarks/run.py``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measuring import Session, say
from report import Row, summary, table

BENCHMARKS = (
    "load",
    "dtype",
    "memory",
    "sparse",
    "experts",
    "threads",
    "generation",
    "spawn",
    "startup",
    "manager",
    "strategies",
    "saving",
    "hosts",
    "chains",
    "actors",
    "training",
    "wires",
    "simulation",
    "machines",
)
_PACKAGES = (
    "splitlearn-core",
    "torch",
    "transformers",
    "safetensors",
    "accelerate",
    "fastsafetensors",
    "runai-model-streamer",
)
_RUNS, _QUICK_RUNS = 3, 2
#: Minutes that many sessions run at once: in an ordinary run, with --quick, and with --minutes alone.
_MINUTES, _QUICK_MINUTES, _FULL_MINUTES = 0.5, 0.05, 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    # Unwinds the stack, so that gigabytes do not stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    runs = options.runs or (_QUICK_RUNS if options.quick else _RUNS)
    with tempfile.TemporaryDirectory(prefix="splitlearn-benchmarks-") as temporary:
        minutes = options.minutes or (_QUICK_MINUTES if options.quick else _MINUTES)
        session = Session(runs, options.quick, options.cache_dir or Path(temporary), minutes)
        session.cache_dir.mkdir(parents=True, exist_ok=True)
        for name in options.only or BENCHMARKS:
            say(f"{name}:")
            started = time.monotonic()
            importlib.import_module(name).run(session)
            say(table([row for row in session.rows if row.benchmark == name]))
            say(f"{name} took {time.monotonic() - started:.0f} s\n")
    machine = _machine(runs, quick=options.quick)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), table(session.rows), sep="\n\n")
    print("\n" + ("targets are for real sizes: run without --quick" if options.quick else summary(session.rows)))
    if options.json:
        _write(options.json, machine, session.rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that everything runs, says nothing")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument(
        "--runs", type=int, help=f"measurements of each thing (default: {_RUNS}; {_QUICK_RUNS} with --quick)"
    )
    parser.add_argument("--cache-dir", type=Path, help="keep checkpoints here, 10 GB (default: a temporary folder)")
    parser.add_argument(
        "--minutes",
        type=float,
        nargs="?",
        const=_FULL_MINUTES,
        metavar="N",
        help=f"how long many sessions run at once (default: {_MINUTES:g}; {_FULL_MINUTES:g} without a number)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measured values here as well")
    return parser


def _machine(runs: int, *, quick: bool) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    return {
        "machine": f"{os.cpu_count()} CPUs, {memory / 1e9:.0f} GB, {platform.platform()}",
        "python": f"{platform.python_version()}, {packages}",
        "runs": f"{runs}; medians, and the least and the most in brackets{'; tiny models' if quick else ''}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _write(path: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    path.write_text(json.dumps({**machine, "rows": [row.to_dict() for row in rows]}, indent=2))


if __name__ == "__main__":
    main()

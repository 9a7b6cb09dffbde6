"""What every benchmark says beside its figures, how it prints them, and where it puts them.

A report is JSON: what was asked for, the machine, versions, who was absent and why, raw values of
every round, and the table that was printed. `python benchmarks/report.py FILE...` makes one page of
several reports.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import cache_folder

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "docs" / "benchmarks"

__all__ = ["Report", "arguments", "middle", "ratio", "require_memory", "spread", "table"]


# ---- statistics ----------------------------------------------------------------------------------


def middle(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Half the distance of the extremes, relative to the median."""
    return (max(values) - min(values)) / 2 / middle(values)


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """Median over rounds of this / that: what both met in a round (other work, heat) cancels."""
    return middle([a / b for a, b in zip(these, those, strict=True)])


# ---- options -------------------------------------------------------------------------------------


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="smaller and shorter: a check that all runs, not figures",
    )
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every peer")
    add("--rounds", type=int, default=None, help="how often each peer is measured, in turns")
    add("--cache", type=Path, default=cache_folder(), help="where checkpoints are kept")
    add("--torch-python", help="interpreter that has torch and transformers (this one)")
    add(
        "--llama-python",
        default=os.environ.get("MAMBAINLLAMA_BENCH_LLAMA_PYTHON"),
        help="interpreter that has llama-cpp-python and gguf (this one)",
    )
    add("--no-peers", action="store_true", help="this project and the limit alone")
    add(
        "--save", action="store_true", help="publish in docs/benchmarks instead of build/benchmarks"
    )
    return parser


# ---- the machine ---------------------------------------------------------------------------------


def machine(threads: int) -> dict[str, Any]:
    """Where and when it ran, and what else the machine was doing."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    flags = set(facts.get("flags", "").split())
    vectors = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "family": " ".join(facts.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "vectors": vectors,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def load_average() -> float:
    return round(os.getloadavg()[0], 2)


BUSY = "The machine was busy with other work: ratios mean something, speeds do not."


def is_busy(load: float, cores: int) -> bool:
    """Whether others use the machine, from the load average before a benchmark."""
    return load > 0.5 * cores


def require_memory(size: int) -> None:
    """Ends the benchmark where `size` bytes are not free: it would measure swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < size:
        raise SystemExit(
            f"this needs {size / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are available; "
            "ARGS=--no-peers or ARGS=--quick need less"
        )


def commit() -> str:
    """The commit, with a + where files differ from it."""
    try:
        name = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return name.stdout.strip() or "unknown"


# ---- reports -------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table that is also aligned; the first column is text, the others are figures."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


class Report:
    """Collects one benchmark's figures; `finish` prints and writes them."""

    def __init__(self, name: str, title: str, options: argparse.Namespace):
        self.options, self.name = options, name
        folders = ("cache", "llama_python", "torch_python")  # of this machine only
        asked = {k: v for k, v in vars(options).items() if k not in (*folders, "save")}
        self.content: dict[str, Any] = {
            "benchmark": name,
            "title": title,
            "command": shlex.join(["make", "bench", f"BENCH={name}", *given_arguments()]),
            "options": asked,
            "machine": machine(options.threads),
            "load_before": load_average(),
            "commit": commit(),
            "versions": {},
            "absent": {},
            "sections": [],
        }
        here = self.content["machine"]
        print(f"{title}\n{here['cpu']}, {here['cores']} cores, {options.threads} threads, ", end="")
        print(f"load average {self.content['load_before']}", flush=True)
        if is_busy(self.content["load_before"], here["cores"]):
            print(BUSY, flush=True)

    @property
    def absent(self) -> dict[str, str]:
        return self.content["absent"]

    def heard(self, peers: dict[str, Any]) -> None:
        """Notes the versions of peers that take part."""
        for peer in peers.values():
            self.content["versions"].update(peer.versions)

    def section(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **raw: Any
    ):
        """Prints one table and keeps it with its raw values."""
        text = table(columns, rows)
        print(f"\n{title}\n\n{text}", flush=True)
        self.content["sections"].append({"title": title, "table": text, **raw})

    def finish(self) -> None:
        content = self.content
        content["load_after"] = load_average()
        versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        print(f"\n{versions}\nload average {content['load_before']} before, ", end="")
        print(f"{content['load_after']} after")
        for peer, reason in content["absent"].items():
            print(f"absent: {peer}: {reason}")
        folder = PUBLISHED if self.options.save else ROOT / "build" / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {path.relative_to(ROOT)}")
        if self.options.save:
            write_page(folder)


def given_arguments() -> list[str]:
    """The command line without what depends on this machine's folders."""
    given, skip = [], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word in ("--cache", "--llama-python", "--torch-python"):
            skip = True
        elif not word.startswith(("--cache=", "--llama-python=", "--torch-python=", "--save")):
            given.append(word)
    return [f"ARGS={' '.join(given)}"] if given else []


# ---- the page ------------------------------------------------------------------------------------


def page(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown of several reports."""
    parts = ["# Measured figures\n"]
    parts.append(
        "Written by `make bench ARGS=--save` from the JSON files beside this page, which hold the\n"
        "values of every round. Peers run in turns with this project, in the same minutes on the\n"
        "same machine; figures are medians, ± half the distance of the extremes; ratios, medians\n"
        "of each round's ratio. Load averages count the benchmark itself: about the number of\n"
        "threads after a run alone, more where others worked beside it.\n\n"
        "On GPUs: [H200](gpu-h200.md), [H100](gpu-h100.md).\n"
    )
    for report in reports:
        here = report["machine"]
        parts.append(f"## {report['title']}\n")
        versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
        parts.append(
            f"`{report['command']}` at {report['commit']}, {here['date']}. {here['cpu']} "
            f"(family {here['family']}; {', '.join(here['vectors'])}), {here['cores']} cores, "
            f"{here['threads']} threads, {here['memory_gib']} GiB; load average "
            f"{report['load_before']} before, {report['load_after']} after. {versions}.\n"
        )
        if is_busy(report["load_before"], here["cores"]):
            parts.append(f"{BUSY}\n")
        for section in report["sections"]:
            parts.append(f"{section['title']}\n\n{section['table']}\n")
            parts += [f"{note}\n" for note in section.get("notes", [])]
        for peer, reason in report["absent"].items():
            parts.append(f"Absent: {peer}: {reason}\n")
    return "\n".join(parts)


def write_page(folder: Path) -> None:
    order = {"decode": 0, "rows": 1, "prefill": 2, "training": 3}
    reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    reports = [r for r in reports if "sections" in r]
    reports.sort(key=lambda r: (order.get(r["benchmark"], 9), r["benchmark"], r["machine"]["date"]))
    (folder / "README.md").write_text(page(reports))


if __name__ == "__main__":
    print(page([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))

"""`make bench-gpu`: all that the GPU benchmarks measure, peers included, and one table of it.

    python benchmarks/gpu_all.py [--only rates,decode,ssd] [--save]
    python benchmarks/gpu_all.py --table docs/benchmarks/gpu-h100.json

Each section runs programs of this folder, ours and the peers' each in a process of its own, one
after the other on the same GPU, and collects their figures: one JSON line each. A file of figures
may come from several runs, in parts that fit the time that a GPU is to be had; each figure holds
its own date, commit and command, a later one takes the place of an earlier one, and the table is
made from all of them. A peer that could not run is in the table with its reason.

Figures go to build/benchmarks/gpu-<device>.json, with --save to docs/benchmarks beside the page
gpu-<device>.md, which gets the table (what stands outside the two marks stays as it is).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BEGIN = "<!-- begin: made by benchmarks/gpu_all.py -->"
END = "<!-- end -->"

MODELS = ("8b-mamba2", "8b-mamba1", "3b-mamba2", "1b-mamba2", "mamba-2.8b")
NAMES = {
    "8b-mamba2": "8B, half Mamba-2",
    "8b-mamba1": "8B, half Mamba-1",
    "3b-mamba2": "3B, half Mamba-2",
    "1b-mamba2": "1B, half Mamba-2",
    "mamba-2.8b": "Mamba 2.8B",
}
PEER, STRONGER = "torch + mamba-ssm", "torch + mamba-ssm + fla"
TRANSFORMERS = "transformers, static cache, CUDA graph"
SPECULATION = (
    (4, ("mamba-2.8b:mamba-130m", "mamba-2.8b:ngram", "8b-mamba2:mamba-130m", "8b-mamba2:ngram")),
    (8, ("mamba-2.8b:ngram",)),
)
BATCHES = ((32, 4096, 129), (256, 1024, 129))


# ---- figures -------------------------------------------------------------------------------------


class Figures(dict):
    """Key -> {"seconds": ..., ...}; keys read as a path: "decode/8b-mamba2/1/512/ours"."""

    def seconds(self, key: str) -> float | None:
        return self.get(key, {}).get("seconds")

    def of(self, key: str, field: str):
        return self.get(key, {}).get(field)


def key_of(line: dict) -> str:
    """Where a program's line belongs. Lines without `peer` are ours."""
    who = line.get("who") or line.get("peer") or "ours"
    kind = line["kind"]
    if kind in ("rates", "versions", "checkpoint"):
        return kind
    if kind in ("decode", "prefill"):
        if "weights" in line:
            who += f", {line['weights']}"
        if line.get("state_dtype") == "float32" and who != "ours":
            who += ", float32 states"
        return f"{kind}/{line['model']}/{line['batch']}/{line['context']}/{who}"
    if kind == "load":
        return f"load/{'cold' if line['cold'] else 'warm'}/{who}"
    who = "ours" if who == "ours" else re.split(r"[ ,]", who)[0]
    return "/".join([kind, *([str(line["shape"])] if "shape" in line else []), who])


class Collector:
    """Runs programs and keeps what they print as JSON lines, with where it came from."""

    def __init__(self, figures: Figures, commit: str, date: str | None = None):
        self.figures, self.commit = figures, commit
        self.date = date  # where it was not now

    def keep(self, line: dict, command: str) -> None:
        key = key_of(line)
        if key.startswith("load/") and self._slower(key, line):
            return
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        line["date"] = self.date or now
        line["commit"], line["command"] = self.commit, command
        self.figures[key] = line

    def _slower(self, key: str, line: dict) -> bool:
        """Loading is timed in several rounds of one run: the best one counts, for both."""
        before = self.figures.get(key, {})
        same_run = before.get("commit") == self.commit and "seconds" in before
        return same_run and line.get("seconds", float("inf")) >= before["seconds"]

    def run(self, *command: str, lines: Callable[[str], Iterator[dict]] | None = None) -> None:
        """`lines` turns what a program printed into figures; else it prints JSON lines, or writes
        them to the file that it gets as the last argument."""
        words = command[: command.index("--json")] if "--json" in command else command
        shown = " ".join(os.path.relpath(w, ROOT) if w.startswith("/") else w for w in words)
        print(f"\n$ {shown}", flush=True)
        if not (ROOT / command[0]).exists():
            print(f"{shown}: is not built (make bench-gpu builds it)", flush=True)
            return
        program = [sys.executable, *command] if command[0].endswith(".py") else list(command)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        with subprocess.Popen(
            program, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        ) as process:
            text = []
            for line in process.stdout:
                print(line, end="", flush=True)
                text.append(line)
                if lines is None and line.startswith('{"kind"'):
                    self.keep(json.loads(line), shown)
        if process.returncode != 0:
            print(f"ended with {process.returncode}", flush=True)
        for found in lines("".join(text)) if lines else ():
            self.keep(found, shown)

    def peers(self, *arguments: str) -> None:
        self.run(str(HERE / "gpu_peers.py"), *arguments)

    def ours(self, program: str, *arguments: str) -> None:
        """One of our programs that appends its rows to a file."""
        with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as file:
            self.run(str(HERE / program), *arguments, "--json", file.name, lines=lambda _: iter(()))
            for line in file:
                self.keep(json.loads(line), f"benchmarks/{program} {' '.join(arguments)}")


def lines_of(kind: str, pattern: str) -> Callable[[str], Iterator[dict]]:
    """Figures of a program in C: `pattern` finds batch, rows and microseconds."""

    def lines(text: str) -> Iterator[dict]:
        for batch, rows, us in re.findall(pattern, text):
            yield {"kind": kind, "shape": f"{batch} x {rows}", "seconds": float(us) * 1e-6}

    return lines


# ---- sections ------------------------------------------------------------------------------------


def decode(run: Collector) -> None:
    run.ours("gpu_decode.py", "--models", ",".join(MODELS))
    run.ours("gpu_decode.py", "--models", "8b-mamba2", "--weights", "float8")
    run.peers("decode", "--models", ",".join(MODELS))


def batch(run: Collector) -> None:
    lists = [",".join(str(row[i]) for row in BATCHES) for i in range(3)]
    sizes = ["--batch", lists[0], "--context", lists[1], "--tokens", lists[2]]
    run.ours("gpu_decode.py", "--models", "8b-mamba2", "--rounds", "2", *sizes)
    run.peers("decode", *sizes)
    run.peers("decode", *sizes, "--float32-states", "--variants", "mamba-ssm")


SSD_LINES = lines_of("ssd", r"issue +ssd +b (\d+) +rows (\d+) +tail \d+ +([\d.]+) us")
SCAN_LINES = lines_of("scan", r"issue +b (\d+) +rows (\d+) +tail \d+ +([\d.]+) us")


def ssd(run: Collector) -> None:
    run.run("build/gpu/bench_ssd", lines=SSD_LINES)
    run.peers("ssd", "--compile-first", "12")


def scan(run: Collector) -> None:
    run.run("build/gpu/bench_scan", lines=SCAN_LINES)
    run.peers("scan")


def prefill(run: Collector) -> None:
    run.ours(
        "gpu_decode.py", "--prefill", "--models", "8b-mamba2,8b-mamba1",
        "--batch", "8", "--context", "2048",
    )  # fmt: skip


def speculation_lines(text: str, drafts: int) -> Iterator[dict]:
    for found in json.loads(text)["results"] if text else ():
        yield {
            "kind": "speculation",
            "shape": f"{found['case']}, K = {drafts}, batch {found['batch']}",
            "seconds": found["fixed"]["ms_a_round"] * 1e-3,
            **found,
        }


def speculation(run: Collector) -> None:
    for drafts, cases in SPECULATION:
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:

            def lines(_: str, file=file, drafts=drafts) -> Iterator[dict]:
                return speculation_lines(file.read(), drafts)

            words = "--cases", ",".join(cases), "--draft-tokens", str(drafts), "--json", file.name
            run.run(str(HERE / "gpu_speculation.py"), *words, lines=lines)


def kernels(run: Collector) -> None:
    """What is only read by people: attention, sampling, products, the parts of a step."""
    for program in sorted((ROOT / "build" / "gpu").glob("bench_*")):
        if program.suffix == "" and program.name not in ("bench_ssd", "bench_scan"):
            run.run(str(program), lines=lambda text: iter(()))


SECTIONS: dict[str, Callable[[Collector], None]] = {
    "rates": lambda run: run.peers("rates"),
    "decode": decode,
    "batch": batch,
    "ssd": ssd,
    "scan": scan,
    "prefill": prefill,
    "load": lambda run: run.run(str(HERE / "gpu_load.py")),
    "transformers": lambda run: run.peers("transformers"),
    "speculation": speculation,
    "kernels": kernels,
}


# ---- the table -----------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table; `required` and `aim` are bounds on `ratio`, at least or at most."""

    work: str
    ours: str = "not run"
    beside: str = ""
    ratio: float | None = None
    unit: str = "x"
    required: float = 0.0
    aim: float = 0.0
    at_most: bool = False

    def bound(self, value: float) -> str:
        text = f"{value:.0f} %" if self.unit == "%" else f"{value:g} {self.unit}"
        return f"{'≤' if self.at_most else '≥'} {text}"

    def verdict(self) -> str:
        return "" if self.ratio is None else self._verdict_of(self.ratio)

    def _verdict_of(self, ratio: float) -> str:
        meets = [(ratio <= b) if self.at_most else (ratio >= b) for b in self._bounds()]
        return "aim" if meets[1] else "required" if meets[0] else "missed"

    def _shown(self) -> str:
        """The ratio, with as many digits as it takes that it does not belie the verdict."""
        digits = 0 if self.unit == "%" else 2
        while digits < 6 and self._verdict_of(round(self.ratio, digits)) != self.verdict():
            digits += 1
        return f"{self.ratio:.{digits}f}"

    def _bounds(self) -> tuple[float, float]:
        return self.required, self.aim

    def cells(self) -> list[str]:
        shown = "" if self.ratio is None else self._shown()
        return [
            self.work,
            self.ours,
            self.beside,
            f"{shown} {self.unit}".strip() if shown else "",
            self.bound(self.required),
            self.bound(self.aim),
            self.verdict(),
        ]


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "not run"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def speed_text(figure: dict) -> str:
    if "seconds" not in figure:
        return "not run"
    text = f"{time_text(figure['seconds'])}, {figure['tokens_per_second']:.0f} tokens/s"
    return f"{text} ({figure['note']})" if "note" in figure else text


def peer_text(figures: Figures, key: str, name: str) -> str:
    figure = figures.get(key, {})
    if "absent" in figure:
        return f"{name}: absent ({figure['absent']})"
    tried = figure.get("variants_tried")
    limited = f", {tried} variants of a kernel tried" if tried else ""
    return f"{name}: {time_text(figure.get('seconds'))}{limited}"


def decode_rows(figures: Figures) -> Iterator[Row]:
    bounds = {"8b-mamba2": (80, 88), "8b-mamba1": (80, 88), "3b-mamba2": (72, 82)}
    bounds |= {"1b-mamba2": (65, 80)}
    for name in MODELS:
        place = f"decode/{name}/1/512"
        ours = figures.get(f"{place}/ours", {})
        share = ours.get("of_limit")
        row = Row(f"{NAMES[name]}, one text, context 512", speed_text(ours))
        if name == "mamba-2.8b":
            row.beside, row.required, row.aim, row.at_most = "the byte limit", 1.3, 1.13, True
            row.ratio = share and 1 / share
        else:
            row.beside, row.unit, row.ratio = "the copy rate", "%", share and 100 * share
            row.required, row.aim = bounds[name]
        yield row
        if name.startswith("8b"):
            yield against(f"{NAMES[name]}, one text", figures, place, PEER, 1.35, 1.5)
    yield eight_bits(figures)
    for size, context, _ in BATCHES:
        work = f"8B, half Mamba-2, batch {size}, context {context}"
        yield against(work, figures, f"decode/8b-mamba2/{size}/{context}", PEER, 1.25, 1.4)


def eight_bits(figures: Figures) -> Row:
    place = "decode/8b-mamba2/1/512/ours"
    figure = figures.get(f"{place}, float8", {})
    row = Row(f"{NAMES['8b-mamba2']}, float8 weights, one text", speed_text(figure))
    plain = figures.seconds(place)
    row.beside = f"its bfloat16 weights: {time_text(plain)}"
    row.ratio = plain / figure["seconds"] if plain and "seconds" in figure else None
    row.required, row.aim = 1.5, 1.75
    return row


def against(work, figures, place, peer, required, aim, label=None) -> Row:
    """A row that compares our time with a peer's."""
    ours, theirs = figures.seconds(f"{place}/ours"), figures.seconds(f"{place}/{peer}")
    figure = figures.get(f"{place}/ours", {})
    row = Row(work, speed_text(figure) if "tokens_per_second" in figure else time_text(ours))
    row.beside = peer_text(figures, f"{place}/{peer}", label or peer)
    row.ratio = theirs / ours if ours and theirs else None
    row.required, row.aim = required, aim
    return row


def operator_rows(figures: Figures) -> Iterator[Row]:
    for shape in ("8 x 2048", "1 x 16384"):
        work = f"SSD forward, {shape} x 32 heads x 128 x 128"
        yield against(work, figures, f"ssd/{shape}", "mamba-ssm", 2, 3.5)
        yield against(work, figures, f"ssd/{shape}", "fla-core", 1, 2)
    work = "selective scan forward, 8 x 2048 x 4096 x 16"
    yield against(work, figures, "scan/8 x 2048", "mamba-ssm", 2, 3, "mamba-ssm (CUDA)")


def prefill_rows(figures: Figures) -> Iterator[Row]:
    for name in ("8b-mamba2", "8b-mamba1"):
        figure = figures.get(f"prefill/{name}/8/2048/ours", {})
        row = Row(f"prompts of {NAMES[name]}, 8 x 2048", unit="%", required=60, aim=75)
        row.beside = "the rate of a large product"
        if "seconds" in figure:
            rate = figure["flops"] / figure["seconds"] * 1e-12
            row.ours = f"{time_text(figure['seconds'])}, {rate:.0f} Tflop/s"
            row.ratio = 100 * figure["of_limit"]
        yield row


def speculation_rows(figures: Figures) -> Iterator[Row]:
    """Rows of a window cost what a round without a draft model takes, verdict and all."""
    for rows, required, aim in ((5, 1.12, 1.05), (9, 1.25, 1.12)):
        found = figures.get(f"speculation/mamba-2.8b:ngram, K = {rows - 1}, batch 1/ours", {})
        row = Row(f"Mamba 2.8B, {rows} rows", time_text(found.get("seconds")), at_most=True)
        row.required, row.aim = required, aim
        if "plain" in found:
            row.beside = f"one row: {found['plain']['ms_a_round']:.2f} ms"
            row.ratio = found["fixed"]["ms_a_round"] / found["plain"]["ms_a_round"]
        yield row
    for case, label, required, aim in (
        ("mamba-2.8b:mamba-130m", "Mamba 2.8B with a 130M draft", 1.5, 1.75),
        ("8b-mamba2:mamba-130m", "8B hybrid with a 130M draft", 1.75, 1.95),
        ("8b-mamba2:ngram", "8B hybrid with n-gram drafts", 1.95, 2.2),
    ):
        found = figures.get(f"speculation/{case}, K = 4, batch 1/ours", {})
        row = Row(f"speculation, 60 % a token, K = 4: {label}", required=required, aim=aim)
        row.beside = "our own plain decoding"
        if "ratio" in found:
            row.ratio = found["ratio"]
            row.ours = f"{found['fixed']['tokens_per_second']:.0f} tokens/s"
            row.beside += f": {found['plain']['tokens_per_second']:.0f} tokens/s"
        yield row


def load_rows(figures: Figures) -> Iterator[Row]:
    for state in ("warm", "cold"):
        ours = figures.seconds(f"load/{state}/ours")
        reference = figures.seconds(f"load/{state}/reference")
        if state == "cold" and not (ours and reference):
            continue
        row = Row(f"mil.load of 16 GB to the first token, page cache {state}", at_most=True)
        row.required, row.aim = 2, 1.3
        row.ours = f"{ours:.2f} s" if ours else "not run"
        row.beside = f"reading and copying: {reference:.2f} s" if reference else "not run"
        row.ratio = ours / reference if ours and reference else None
        yield row


def rows_of(figures: Figures) -> list[Row]:
    return [
        *decode_rows(figures),
        *speculation_rows(figures),
        *operator_rows(figures),
        *prefill_rows(figures),
        *load_rows(figures),
    ]


HEAD = ["work", "ours", "beside", "ratio", "required", "aim", ""]


def lines_of_table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    out = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
           for row in [head, *rows]]  # fmt: skip
    return [out[0], "| " + " | ".join("-" * w for w in widths) + " |", *out[1:]]


def other_peers(figures: Figures) -> list[list[str]]:
    """Every peer's decoding beside ours, also those that no row asks for."""
    rows = []
    for key, figure in figures.items():
        kind, *place = key.split("/")
        if kind != "decode" or place[-1].startswith("ours"):
            continue
        ours = figures.get(f"decode/{'/'.join(place[:3])}/ours", {})
        ratio = share = ""
        if "seconds" in figure and "seconds" in ours:
            faster = figure["seconds"] / ours["seconds"]
            ratio = f"{faster:.2f}"
            share = f"{100 * ours['of_limit'] / faster:.0f} %" if "of_limit" in ours else ""
        told = figure.get("absent") or speed_text(figure)
        label = f"{NAMES.get(place[0], place[0])}, batch {place[1]}, context {place[2]}"
        rows.append([label, place[3], told, share, ratio])
    return sorted(rows)


def page(device: dict, figures: Figures) -> str:
    """The part of the published page that is made from figures."""
    measured = [f for f in figures.values() if "date" in f]
    dates = sorted({f["date"][:10] for f in measured})
    commits = sorted({f["commit"] for f in measured})
    rates = figures.get("rates", {})
    found = figures.of("versions", "versions") or {}
    lines = [
        f"{device['name']}, driver {device['driver']}; {', '.join(dates)} (UTC), commits "
        f"{', '.join(commits)}. {', '.join(f'{k} {v}' for k, v in found.items())}".rstrip(),
        "",
    ]
    if "copy" in rates:
        told = f"Copy within the device: {rates['copy'] * 1e-12:.2f} TB/s (read and written)."
        if "gemm" in rates:
            rate = f"{rates['gemm'] * 1e-12:.0f} Tflop/s"
            told += f" Product of 8192 x 8192 x 8192 in bfloat16: {rate}."
        lines += [told, ""]
    lines += lines_of_table(HEAD, [row.cells() for row in rows_of(figures)])
    others = other_peers(figures)
    if others:
        lines += ["", "Peers that decode the same models (share: of the limit that ours has):", ""]
        head = ["work", "peer", "speed", "share", "ours is faster"]
        lines += lines_of_table(head, others)
    return "\n".join(lines)


def write_page(path: Path, device: dict, figures: Figures) -> None:
    made = f"{BEGIN}\n{page(device, figures)}\n{END}"
    text = path.read_text() if path.exists() else f"# {device['name']}\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text:
        head, _, rest = text.partition("\n")
        text = f"{head}\n\n{BEGIN}\n{END}\n{rest}"
    before, _, rest = text.partition(BEGIN)
    path.write_text(before + made + rest.partition(END)[2])


# ---- logs ----------------------------------------------------------------------------------------


def keep_log(run: Collector, text: str, command: str) -> None:
    """Figures of a log: JSON lines, and the lines of the programs in C."""
    for line in text.splitlines():
        if line.startswith('{"kind"'):
            run.keep(json.loads(line), command)
    for lines in (SSD_LINES, SCAN_LINES):
        for found in lines(text):
            run.keep(found, command)


# ---- program -------------------------------------------------------------------------------------


def device_facts() -> dict:
    query = "name,driver_version,memory.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"gpu_all: no GPU: nvidia-smi: {error}") from None
    name, driver, memory = done.stdout.splitlines()[0].split(", ")
    return {"name": name, "driver": driver, "memory": memory}


def slug(device: dict) -> str:
    words = re.sub(r"^NVIDIA +", "", device["name"]).split()
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", words[0].lower())


def commit_here() -> str:
    """The commit, with a plus where the tree differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD") or os.environ.get("MAMBAINLLAMA_COMMIT", "unknown")
    return commit + ("+" if git("status", "--porcelain", "-uno") else "")


def read(path: Path) -> tuple[dict, Figures]:
    if not path.exists():
        return {}, Figures()
    content = json.loads(path.read_text())
    return content["device"], Figures(content["figures"])


def write(path: Path, device: dict, figures: Figures) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": device, "figures": dict(sorted(figures.items()))}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"sections, of {','.join(SECTIONS)} (all)")
    parser.add_argument("--save", action="store_true", help="publish in docs/benchmarks")
    parser.add_argument("--into", type=Path, help="a file of figures to add to")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="more files of figures")
    parser.add_argument("--log", type=Path, nargs="*", default=[], help="logs of runs elsewhere")
    parser.add_argument("--commit", help="at which the logs were made")
    parser.add_argument("--date", help="when, as in 2026-11-22 03:48 UTC")
    parser.add_argument("--table", type=Path, help="print the table of a file and end")
    options = parser.parse_args()
    if options.table:
        device, figures = read(options.table)
        for other in options.add:
            figures.update(read(other)[1])
        collector = Collector(figures, options.commit or commit_here(), options.date)
        for log in options.log:
            keep_log(collector, log.read_text(errors="replace"), log.name)
        if options.add or options.log:
            write(options.table, device, figures)
        if options.save:
            write_page(options.table.with_suffix(".md"), device, figures)
        print(page(device, figures))
        return
    wanted = options.only.split(",") if options.only else list(SECTIONS)
    unknown = sorted(set(wanted) - set(SECTIONS))
    if unknown:
        raise SystemExit(f"gpu_all: no section {unknown[0]}; known are {', '.join(SECTIONS)}")
    device = device_facts()
    folder = ROOT / ("docs/benchmarks" if options.save else "build/benchmarks")
    path = options.into or folder / f"{slug(device)}.json"
    _, figures = read(path)
    collector = Collector(figures, commit_here())
    for section in wanted:
        SECTIONS[section](collector)
        write(path, device, figures)
    if options.save:
        write_page(path.with_suffix(".md"), device, figures)
    print(f"\n{page(device, figures)}\n\n{path}")


if __name__ == "__main__":
    main()

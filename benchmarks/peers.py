"""Peers: what a benchmark compares, each in a process of its own.

A process of its own, because two thread teams, two allocators or two copies of a BLAS in one
process measure each other. A peer's program (workers/<peer>.py) is a table of commands; this file
carries one command a line as JSON to its standard input and one answer a line back. So any
interpreter will do for a peer, also one with nothing but that peer installed.

    benchmark                               workers/llama_cpp.py
    peer = Peer("llama_cpp", threads=2)
    peer("load", folder="...")      --->    load(folder="...")
    peer("decode", count=32)        --->    decode(count=32), which measures the seconds

A peer that cannot run (not installed, not built for this, killed) raises Absent, and the benchmark
reports it by name and reason instead of leaving it out in silence.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["Absent", "Peer", "interleave", "serve", "start"]

WORKERS = Path(__file__).parent / "workers"


class Absent(Exception):
    """A peer cannot take part; the message says why, in one line."""


# ---- the benchmark's side ------------------------------------------------------------------------


class Peer:
    """One running peer. Calling it runs a command there and returns the answer.

    Parameters
    ----------
    worker
        Name of a file in workers/.
    threads
        Size of its thread team, through every variable by which such libraries are told.
    python
        Interpreter to run it with; this one if not given.
    """

    def __init__(self, worker: str, threads: int, python: str | None = None):
        self.worker = worker
        self._log = tempfile.TemporaryFile()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        for library in ("OMP", "MKL", "OPENBLAS", "GOTO", "NUMEXPR"):
            environment[f"{library}_NUM_THREADS"] = str(threads)
        for setting in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
            environment.pop(setting, None)  # how threads wait is each library's own choice
        try:
            self._process = subprocess.Popen(
                [python or sys.executable, str(WORKERS / f"{worker}.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                text=True,
            )
        except OSError as error:
            raise Absent(f"{python}: {error.strerror}") from None
        try:
            self.versions: dict[str, str] = self("start", threads=threads)
        except BaseException:
            self.close()
            raise

    def __call__(self, command: str, **arguments: Any) -> Any:
        try:
            print(json.dumps([command, arguments]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Absent(f"{self.worker} ended with {self._process.wait()}: {self._last_words()}")
        kind, value = json.loads(line)
        if kind != "answer":
            raise Absent(value)
        return value

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "no message"

    def close(self) -> None:
        """Ends the process and gives its memory back."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(OSError):
            self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(
    stack: contextlib.ExitStack,
    wanted: dict[str, tuple[str, dict[str, Any]]],
    threads: int,
    pythons: dict[str, str | None],
    absent: dict[str, str],
) -> dict[str, Peer]:
    """Starts and loads peers: label -> (worker, arguments of its `load`).

    Those that cannot take part go to `absent` with the reason.
    """
    peers = {}
    for label, (worker, arguments) in wanted.items():
        try:
            peer = stack.enter_context(Peer(worker, threads, pythons.get(worker)))
            peer("load", **arguments)
            peers[label] = peer
        except Absent as reason:
            absent[label] = str(reason)
            print(f"    absent: {label}: {reason}", flush=True)
    return peers


def interleave(labels: Iterable[str], rounds: int) -> Iterable[tuple[int, list[str]]]:
    """(round, labels in the order of that round): each goes first in turn, and every other round
    runs backwards, so that no peer always finds the machine as the same other one left it."""
    labels = list(labels)
    for i in range(rounds):
        first = i % len(labels)
        order = labels[first:] + labels[:first]
        yield i, order[::-1] if i % 2 else order


# ---- the peer's side -----------------------------------------------------------------------------


def serve(commands: dict[str, Callable[..., Any]]) -> None:
    """Answers commands until standard input ends. What else is printed goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = ["answer", commands[name](**arguments)]
        except ImportError as error:
            answer = ["absent", f"{error}; see benchmarks/README.md"]
        except Exception as error:
            import traceback

            traceback.print_exc()
            text = str(error).strip().splitlines() or [""]
            answer = ["failed", f"{name}: {type(error).__name__}: {text[0][:200]}"]
        print(json.dumps(answer), file=answers, flush=True)

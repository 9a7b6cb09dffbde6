"""The demo: a small teacher becomes two hybrids, distilled, measured and set to work. Offline.

    mambainllama demo --output demo-output

The teacher ships with the package (see benchmarks/train_teacher.py): a Llama of 1.05 M parameters
that has read Python's own documentation, and speaks like it.  Text to distil on comes from the
running Python's library (corpus.py); a share that the teacher has never seen is held out, and every
figure is about that share.  All figures are measured in the run that prints them.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from . import corpus
from .bench import speed
from .cli import size, table
from .convert import convert
from .data import read_documents, sample_rows
from .distill import DistillConfig, distill
from .evaluate import Comparison, compare
from .generate import generate
from .model import Model, load

__all__ = ["STUDENTS", "run", "teacher"]

STEPS = 300
LENGTHS = (128, 512, 2048, 8192)
MEMORY_AT = (2048, 16384)

# Name -> attention layers that stay.
STUDENTS = {"half": "half", "none": "none"}
WORDS = {"half": "half attention", "none": "no attention"}

PROMPTS = (
    "Return the",
    "This module provides",
    "If the optional argument",
    "Raise an exception if",
    "The return value is",
    "A class for",
)


def teacher() -> Model:
    """The packaged teacher, in float32.

    >>> teacher().config.num_layers
    4
    """
    return load(Path(__file__).parent / "packaged" / "teacher", dtype="float32")


def run(
    output: str = "demo-output", *, quick: bool = False, seed: int = 0, quiet: bool = False
) -> dict[str, Any]:
    """Runs the demo and returns its figures; same seed and machine give the same students.

    Parameters
    ----------
    output : folder for students, figures and results.json
    quick : a tenth of the training steps
    quiet : print nothing
    """
    return Demo(Path(output), STEPS // 10 if quick else STEPS, seed, quiet).run()


class Demo:
    def __init__(self, output: Path, steps: int, seed: int, quiet: bool):
        self.output, self.steps, self.seed, self.quiet = output, steps, seed, quiet
        self.begin = time.perf_counter()

    def say(self, text: str = "") -> None:
        if not self.quiet:
            print(text, flush=True)

    def chapter(self, text: str) -> None:
        self.say(f"\n[{time.perf_counter() - self.begin:4.0f} s] {text}")

    def run(self) -> dict[str, Any]:
        self.teacher = teacher()
        self.chapter("The teacher, and text that it has not seen")
        train, held = corpus.documents()
        vocab = self.teacher.config.vocab_size
        self.data, self.held = (
            read_documents([{"text": text} for text in texts], self.teacher.tokenizer, vocab=vocab)
            for texts in (train, held)
        )
        self.say(f"{self.teacher!r}")
        self.say(
            f"{len(self.data):,} documents of Python's library to distil on "
            f"({len(self.data.tokens):,} tokens), "
            f"{len(self.held)} held out ({len(self.held.tokens):,})"
        )
        students = {name: self.make(name) for name in STUDENTS}
        results: dict[str, Any] = {
            "comparisons": {name: found["comparisons"] for name, found in students.items()},
            "speed": self.measure({name: found["model"] for name, found in students.items()}),
            "speculation": self.speculate(students["none"]["model"]),
            "samples": self.samples({name: found["model"] for name, found in students.items()}),
        }
        self.figures({name: found["history"] for name, found in students.items()}, results["speed"])
        results["seconds"] = round(time.perf_counter() - self.begin, 1)
        (self.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        self.say(f"\nDone in {results['seconds']:.0f} s. Try:")
        self.say(f'  mambainllama generate {self.output / "none" / "model"} "Return the"')
        return results

    # -- students --

    def compare(self, model: Model) -> Comparison:
        return compare(model, self.teacher, self.held, sequence_length=256, batch_size=16)

    def make(self, name: str) -> dict[str, Any]:
        """Converts and distils one student; prints what became of it."""
        self.chapter(f"Student with {WORDS[name]}: convert, then distil for {self.steps} steps")
        student = convert(
            self.teacher,
            mixer="mamba2",
            attention_layers=STUDENTS[name],
            calibration=sample_rows(self.data, 128, 256, self.seed),
            seed=self.seed,
        )
        before = self.compare(student)
        config = DistillConfig(
            max_steps=self.steps,
            batch_size=8,
            sequence_length=256,
            learning_rate=4e-3,
            muon_learning_rate=1e-2,
            min_learning_rate=0.1,
            warmup_steps=min(20, self.steps // 4),
            align_fraction=0.125,
            hidden_weight=0.3,
            seed=self.seed,
            eval_every=max(1, self.steps // 6),
            eval_batches=12,
            save_every=None,
        )
        folder = self.output / name
        if (folder / "run.json").exists():
            shutil.rmtree(folder)  # an earlier demo's student
        begin = time.perf_counter()
        try:
            history = distill(
                student,
                self.teacher,
                self.data,
                config,
                folder,
                validation=self.held,
                progress=False if self.quiet else sys.stderr.isatty(),
            )
        except KeyboardInterrupt:  # it says how training goes on, which a demo does not
            raise KeyboardInterrupt("interrupted; the next demo starts anew") from None
        seconds = time.perf_counter() - begin
        after = self.compare(student)
        tokens = history.final["tokens"]
        self.say(
            f"{tokens:,} tokens in {seconds:.0f} s ({tokens / seconds:,.0f} tokens/s), saved in "
            f"{folder}"
        )
        self.say(
            table(
                [
                    ("teacher", "0", f"{after.teacher_perplexity:.1f}", "100 %"),
                    self.row("student before", before),
                    self.row("student after", after),
                ],
                ("held-out text", "KL (nats/token)", "perplexity", "same top token"),
            )
        )
        return {
            "model": student,
            "history": history,
            "comparisons": {"before": before.to_dict(), "after": after.to_dict(), "tokens": tokens},
        }

    @staticmethod
    def row(name: str, found: Comparison) -> tuple[str, ...]:
        return name, f"{found.kl:.3f}", f"{found.perplexity:.1f}", f"{100 * found.agreement:.1f} %"

    # -- speed and memory --

    def measure(self, students: dict[str, Model]) -> dict[str, Any]:
        self.chapter("Speed and memory of one sequence")
        models = {
            "teacher": self.teacher,
            **{WORDS[name]: model for name, model in students.items()},
        }
        tables = {name: speed(model, LENGTHS) for name, model in models.items()}
        rows = []
        for name, found in tables.items():
            rates = [f"{row['decode_tokens_per_second']:,.0f}" for row in found]
            memory = [size(models[name].core.state_bytes(length)) for length in MEMORY_AT]
            rows.append((name, *rates, *memory))
        header = (
            "decoding, tokens/s at",
            *map(str, LENGTHS),
            *(f"memory at {length}" for length in MEMORY_AT),
        )
        self.say(table(rows, header))
        return tables

    def speculate(self, draft: Model) -> list[dict[str, Any]]:
        """Greedy text of the teacher, plain and with drafts: the same tokens, other speeds."""
        self.chapter("Speculative decoding for the teacher (greedy, one prompt at a time)")
        ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "draft: the student without attention": {"draft": draft},
            "draft: n-grams": {"draft": "ngram"},
        }
        rows, found, wanted = [], [], None
        for name, options in ways.items():
            answers = [
                generate(self.teacher, p, max_new_tokens=96, stop=[], **options)[0] for p in PROMPTS
            ]
            tokens = [answer.token_ids for answer in answers]
            wanted = wanted or tokens
            stats = [answer.stats for answer in answers]
            drafted, accepted = (
                sum(getattr(s, key) for s in stats) for key in ("drafted", "accepted")
            )
            new = sum(s.new_tokens for s in stats)
            rate = new / sum(s.decode_seconds for s in stats)
            share = accepted / drafted if drafted else None
            found.append(
                {
                    "way": name,
                    "tokens_per_second": round(rate, 1),
                    "drafted": drafted,
                    "accepted": accepted,
                    "passes_per_token": round(sum(s.rounds for s in stats) / new, 3),
                    "same_tokens": tokens == wanted,
                }
            )
            rows.append(
                (
                    name,
                    f"{rate:,.0f}",
                    "" if share is None else f"{100 * share:.0f} % of {drafted}",
                    f"{found[-1]['passes_per_token']:.2f}",
                    "yes" if tokens == wanted else "NO",
                )
            )
        self.say(table(rows, ("", "tokens/s", "accepted", "teacher passes/token", "same tokens")))
        self.say(
            "(The student is as large as its teacher, so drafting with it costs what it saves.)"
        )
        return found

    # -- words and pictures --

    def samples(self, students: dict[str, Model]) -> dict[str, str]:
        self.chapter("What they write (temperature 0.6)")
        models = {
            "teacher": self.teacher,
            **{WORDS[name]: model for name, model in students.items()},
        }
        prompt = PROMPTS[0]
        found = {}
        for name, model in models.items():
            [answer] = generate(
                model, prompt, max_new_tokens=60, temperature=0.6, top_p=0.95, seed=self.seed + 1
            )
            found[name] = prompt + answer.text
            self.say(f"{name}:\n  " + found[name].strip().replace("\n", "\n  ") + "\n")
        return found

    def figures(self, histories: dict[str, Any], tables: dict[str, Any]) -> None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            self.say("(no figures: pip install 'mambainllama[plot]')")
            return
        from .plot import plot_history, plot_speed

        named = {WORDS[name]: history for name, history in histories.items()}
        plot_history(named, self.output / "loss.png")
        plot_speed(tables, self.output / "speed.png")
        self.say(f"figures: {self.output / 'loss.png'}, {self.output / 'speed.png'}")

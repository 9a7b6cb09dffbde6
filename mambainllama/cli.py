"""The command line: ``mambainllama COMMAND``, the same words as the library's functions.

Every command prints what a reader wants, or with ``--json`` one JSON value on standard output and
nothing else there.  A mistake of the user's is one line on standard error and exit status 2;
``--debug`` shows where it came from.  Ctrl-C ends a command with status 130.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _core
from ._version import __version__
from .convert import INITS, MIXERS
from .errors import ArgumentError, Error, shorten

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    accept_any_text()
    options, rest = make_parser().parse_known_args(arguments)
    # argparse takes no list of words that options stand between: those behind them are left over.
    if rest:
        prompts, behind = split_at_dashes(rest)
        if options.command != "generate" or any(word.startswith("-") for word in prompts):
            options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.prompts += prompts + behind
    try:
        if options.threads is not None:
            _core.set_threads(options.threads)
        return options.run(options) or 0
    except Error as error:
        if options.debug:
            raise
        # The core names its function first, which here is often the command.
        words = one_line(error).removeprefix(f"{options.command}: ")
        print(f"mambainllama {options.command}: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if options.debug:
            raise
        # A training run says what it saved.
        print(
            f"\nmambainllama {options.command}: {one_line(stop) or 'interrupted'}", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        # Whoever read our output (head, less) has gone: not an error.
        close_output()
        return 0
    except OSError as error:
        if options.debug:
            raise
        close_output()
        print(f"mambainllama {options.command}: {one_line(error)}", file=sys.stderr)
        return 2
    except MemoryError:
        if options.debug:
            raise
        print(f"mambainllama {options.command}: out of memory", file=sys.stderr)
        return 2


def accept_any_text() -> None:
    """Bytes that are no text, and characters that the terminal has not, end no command."""
    if sys.stdin is None:  # closed by whoever started us
        sys.stdin = open(os.devnull, encoding="utf-8")
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # it was read from already
                stream.reconfigure(errors=errors)


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before and behind "--"."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def close_output() -> None:
    """Python must not flush into standard output again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ---- options -----------------------------------------------------------------------------------


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps examples' lines; adds the default of an option where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        hidden = default in (None, [], argparse.SUPPRESS) or default is False
        shown = action.option_strings and not hidden
        return super()._get_help_string(action) if shown else action.help


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mambainllama",
        description="Turn Llama-family Transformers into hybrid Mamba models, distil them, "
        "and run them fast.",
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"mambainllama {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = common_options()
    for add in (
        add_info,
        add_convert,
        add_layers,
        add_label,
        add_distill,
        add_sft,
        add_dpo,
        add_generate,
        add_chat,
        add_eval,
        add_bench,
        add_demo,
    ):
        add(commands, common)
    return parser


def common_options(seed: int | None = 0) -> argparse.ArgumentParser:
    """What every command takes. A seed of None is another's to choose: a recipe's."""
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("common options")
    group.add_argument(
        "--device", default="auto", help="where to compute: cpu, cuda or cuda:1; auto is cpu"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        help="of the matrices: auto (as stored), float32, bfloat16, float16",
    )
    recipes = " (default: the recipe's)" if seed is None else ""
    group.add_argument("--seed", type=int, default=seed, help=f"of everything random{recipes}")
    group.add_argument(
        "--threads", type=int, help="threads to compute with (default: all usable cores)"
    )
    group.add_argument("--json", action="store_true", help="print one JSON value instead of text")
    group.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return common


def add_command(commands: Any, common: Any, name: str, run: Any, words: str, example: str) -> Any:
    parser = commands.add_parser(
        name,
        parents=[common],
        help=words,
        description=words[0].upper() + words[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=Formatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def load_model(options: argparse.Namespace, path: str, *, exact: bool = False) -> Any:
    """A model as the options say; `exact`: its weights as they are stored."""
    from .model import load

    weights = None if exact else getattr(options, "weights", None)
    mmap = not getattr(options, "no_mmap", False)
    return load(path, device=options.device, dtype=options.dtype, weights=weights, mmap=mmap)


def add_weights(parser: Any) -> None:
    parser.add_argument(
        "--weights",
        choices=("float8", "int8"),
        help="on a GPU hold the matrices in 8 bits: half the memory, faster, a small loss",
    )


def add_no_mmap(parser: Any) -> None:
    parser.add_argument(
        "--no-mmap",
        action="store_true",
        help="read the weights into memory instead of mapping their files: a second copy beside "
        "the system's own, from which some CPUs generate faster",
    )


def say(options: argparse.Namespace, text: str) -> None:
    """Words beside the result: on standard error, so that standard output stays the result's."""
    if not options.json:
        print(text, file=sys.stderr)


def show(options: argparse.Namespace, value: Any, text: str) -> None:
    """The result: JSON where asked for, else the text."""
    print(as_json(value) if options.json else text, flush=True)


def as_json(value: Any) -> str:
    """One line; characters as they are where standard output can show them all."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return json.dumps(finite(value), ensure_ascii=not encoding.lower().startswith("utf"))


def finite(value: Any) -> Any:
    """null in place of numbers that are not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Columns of text; the first left-aligned, the others right-aligned."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    return ""


def comma_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers with commas between them"
        ) from None


def layer_choice(text: str) -> Any:
    """Numbers, a share between 0 and 1, or a word that mil.convert knows."""
    if "." in text:
        try:
            return float(text)
        except ValueError:
            return text
    return comma_list(text) if text.replace(",", "").isdigit() else text


# ---- info --------------------------------------------------------------------------------------


def add_info(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "info",
        run_info,
        "say what a model is and what memory a sequence needs",
        "mambainllama info my-model --device cuda --batch 32 --context 4096",
    )
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--batch", type=int, help="texts at once: show the memory that they need")
    parser.add_argument("--context", type=int, help="tokens of each of them (default: 4096)")
    parser.add_argument("--draft", help='folder of a draft model, or "ngram", to plan for')
    add_weights(parser)


def run_info(options: argparse.Namespace) -> None:
    from .memory import memory_plan
    from .model import load

    plan = None
    asked = (options.batch, options.context, options.draft, options.weights)
    if any(value is not None for value in asked) or options.device not in ("auto", "cpu"):
        plan = memory_plan(  # from the headers alone: it need not fit
            options.model,
            batch=1 if options.batch is None else options.batch,
            context=options.context,
            draft=options.draft,
            device=options.device,
            dtype=options.dtype,
            weights=options.weights,
        )
    model = load(options.model, device="cpu", dtype=options.dtype)
    config = model.config
    lengths = (2048, 16384)
    facts = {
        "model": options.model,
        "model_type": config.model_type,
        "parameters": model.num_parameters,
        "layers": config.num_layers,
        "attention_layers": list(config.attention_layers),
        "mixer": config.mixer,
        "hidden_size": config.hidden_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        "tied": config.tied,
        "dtype": config.dtype,
        "device": model.device if plan is None else plan.device,
        "tokenizer": model.tokenizer is not None,
        "chat_template": model.tokenizer is not None and model.tokenizer.chat_template is not None,
        "state_bytes": {length: model.core.state_bytes(length) for length in lengths},
    }
    rows = [(name, fact_words(value)) for name, value in facts.items() if name != "state_bytes"]
    rows += [(f"state at {length} tokens", size(n)) for length, n in facts["state_bytes"].items()]
    width = max(len(name) for name, _ in rows)
    text = "\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in rows)
    if plan is not None:
        facts["memory"] = plan.to_dict()
        text += f"\n\n{plan}"
    show(options, facts, text)


def fact_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value or "none")


# ---- convert -----------------------------------------------------------------------------------


def add_convert(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "convert",
        run_convert,
        "replace attention layers by Mamba mixers",
        "mambainllama convert my-llama my-hybrid --attention-layers half --calibration texts.jsonl",
    )
    parser.add_argument("model", help="folder or Hub id of a Transformer")
    parser.add_argument("output", help="folder to write the student to")
    add_mixer(parser)
    parser.add_argument(
        "--attention-layers",
        type=layer_choice,
        default="half",
        help="layers that stay attention: 1,3, a share such as 0.25, half, quarter, eighth, none; "
        "auto:4 or auto:half: as many, chosen by measurement",
    )
    parser.add_argument(
        "--init",
        choices=INITS,
        default="auto",
        help="start of the new parameters; auto is fitted where --calibration is given",
    )
    parser.add_argument(
        "--calibration", nargs="+", metavar="FILE", help="text or token files that the model reads"
    )
    parser.add_argument("--calibration-rows", type=int, default=128, help="sequences read of them")
    parser.add_argument("--calibration-length", type=int, default=256, help="tokens in each")


def add_mixer(parser: Any) -> None:
    parser.add_argument(
        "--mixer",
        choices=MIXERS,
        default="mamba2",
        help="the layers that take attention's place",
    )


def run_convert(options: argparse.Namespace) -> None:
    from .convert import convert

    places = [os.path.realpath(place) for place in (options.model, options.output)]
    if os.path.isdir(options.model) and places[0] == places[1]:
        raise ArgumentError(f"{options.output}: is the model itself; write to another folder")
    model = load_model(options, options.model)
    begin = time.perf_counter()
    calibration = calibration_tokens(
        model,
        options.calibration,
        options.calibration_rows,
        options.calibration_length,
        options.seed,
    )
    student = convert(
        model,
        mixer=options.mixer,
        attention_layers=options.attention_layers,
        # Asked for on a terminal without calibration, "auto" needs no warning: the start is
        # printed.
        init="paper" if options.init == "auto" and calibration is None else options.init,
        calibration=calibration,
        seed=options.seed,
    )
    folder = student.save(options.output)
    start = options.init
    if start == "auto":
        start = "paper" if calibration is None else "fitted"
    kept = list(student.config.attention_layers)
    facts = {
        "output": str(folder),
        "mixer": options.mixer,
        "attention_layers": kept,
        "start": start,
        "parameters": student.num_parameters,
        "seconds": round(time.perf_counter() - begin, 2),
    }
    show(
        options,
        facts,
        f"{folder}: {student.config.num_layers - len(kept)} of {student.config.num_layers} layers "
        "are "
        f"{options.mixer} now (start: {start}), {student.num_parameters:,} parameters",
    )


def add_layers(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "layers",
        run_layers,
        "measure which layers should stay attention",
        "mambainllama layers my-llama --calibration texts.jsonl --keep half --method greedy",
    )
    parser.add_argument("model", help="folder or Hub id of a Transformer")
    add_mixer(parser)
    parser.add_argument(
        "--keep", type=layer_count, default="half", help="how many stay: 4, or half, quarter, 0.25"
    )
    parser.add_argument(
        "--method",
        choices=("replace", "restore", "greedy"),
        default="replace",
        help="replace each layer's attention alone, put each back alone, or restore one by one",
    )
    parser.add_argument(
        "--calibration", nargs="+", required=True, metavar="FILE", help="text or token files"
    )
    parser.add_argument("--calibration-rows", type=int, default=128, help="sequences read of them")
    parser.add_argument("--calibration-length", type=int, default=256, help="tokens in each")
    parser.add_argument("--plot", metavar="FILE", help="write a figure of the scores (PNG)")


def given(options: argparse.Namespace, *names: str) -> str:
    """Those of the options that are not what they are by default, as they are typed."""
    words = [
        f" --{name.replace('_', '-')} {shlex.quote(str(getattr(options, name)))}"
        for name in names
        if getattr(options, name) != options.parser.get_default(name)
    ]
    return "".join(words)


def layer_count(text: str) -> Any:
    """A number of layers, a share between 0 and 1, or a word."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run_layers(options: argparse.Namespace) -> None:
    from .choose import choose_layers

    model = load_model(options, options.model)
    tokens = calibration_tokens(
        model,
        options.calibration,
        options.calibration_rows,
        options.calibration_length,
        options.seed,
    )
    choice = choose_layers(
        model, tokens, options.keep, options.mixer, options.method, seed=options.seed
    )
    rows = [
        (f"{layer}", f"{score:.4f}", "attention" if layer in choice.layers else choice.mixer)
        for layer, score in choice.scores.items()
    ]
    kept = ",".join(map(str, choice.layers)) or "none"
    words = table(rows, ("layer", "KL", "stays"))
    show(
        options,
        choice.to_dict(),
        f"{words}\n\nattention in {kept}: KL {choice.kl:.4g}; evenly spread: {choice.evenly:.4g}\n"
        f"mambainllama convert {shlex.quote(options.model)} OUTPUT --attention-layers {kept} "
        f"--mixer {choice.mixer} --calibration {shlex.join(options.calibration)}"
        + given(options, "calibration_rows", "calibration_length", "seed", "dtype", "device"),
    )
    if options.plot:
        choice.plot(options.plot)
        say(options, f"figure: {options.plot}")


def calibration_tokens(model: Any, files: Any, rows: int, length: int, seed: int) -> Any:
    """Token windows of files for a calibrated or fitted start, or None."""
    from .data import read_documents, sample_rows

    if not files:
        return None
    documents = read_documents(
        list(files), model.tokenizer, vocab=model.config.vocab_size, skip_bad=True
    )
    return sample_rows(documents, rows, length, seed)


# ---- distill -----------------------------------------------------------------------------------


def add_distill(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common_options(seed=None),
        "distill",
        run_distill,
        "make a student as a recipe says, through all its stages",
        "mambainllama distill recipe.toml --set distill.epochs=2",
    )
    parser.add_argument("recipe", help="TOML file; see recipes/ and mambainllama/recipe.py")
    parser.add_argument(
        "--output", metavar="FOLDER", help="instead of the recipe's [output] folder"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on at the stage and step where the run in the output folder stopped",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one setting of the recipe",
    )
    parser.add_argument(
        "--check", action="store_true", help="say what the recipe would do, then stop"
    )
    add_skip_bad(parser)


def add_skip_bad(parser: Any) -> None:
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out bad records of the data and count them, instead of stopping at the first",
    )


def add_run_options(parser: Any, config: str) -> None:
    """Where one stage's run goes, and its settings: those of `config`."""
    parser.add_argument("--output", default="run", help="folder of metrics, checkpoints and model")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"a setting of mil.{config}"
    )
    add_skip_bad(parser)


def run_distill(options: argparse.Namespace) -> None:
    from .pipeline import MADE, check_recipe, run_recipe
    from .recipe import read_recipe

    overrides = list(options.set)
    if options.skip_bad:
        overrides.append("training.skip_bad=true")
    recipe = read_recipe(options.recipe, overrides, options.seed)
    if options.check:
        facts = check_recipe(recipe, options.device, options.dtype, options.output, options.resume)
        show(options, facts, plan_words(facts))
        return
    results = run_recipe(
        recipe,
        options.output,
        options.resume,
        device=options.device,
        dtype=options.dtype,
        progress=False if options.json else None,
        say=lambda text: say(options, text),
    )
    folder = Path(results["output"])
    for row in results["stages"]:
        say_skipped(options, row.get("final", {}))
    facts = {"output": results["output"], "stages": [stage_facts(r) for r in results["stages"]]}
    made = f"trained model: {folder / 'model'}"
    if not (folder / "model").exists():  # the stages only asked the teacher
        paths = [folder / row["stage"] / name for row in results["stages"] for name in MADE]
        made = f"made: {', '.join(str(path) for path in paths if path.exists())}"
    show(
        options,
        {**facts, **results["stages"][-1].get("final", {})},
        f"{made}\nreport: {folder / 'report.html'}",
    )


def stage_facts(row: dict[str, Any]) -> dict[str, Any]:
    """A stage's figures; what it said and was told stands in results.json."""
    names = ("stage", "steps", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes")
    facts = {name: row[name] for name in names if name in row}
    if "kept" in row:
        facts["kept"] = {name: row["kept"][name] for name in ("likelihood", "generation")}
    return facts


def plan_words(facts: dict[str, Any]) -> str:
    """What a recipe would do."""
    lines = [f"{facts['recipe']}: fine", f"stages: {', '.join(facts['stages'])}"]
    if facts["student"]:
        lines.append(f"student: {facts['student']}")
    lines.append(f"output: {facts['output']}")
    if facts["missing"]:
        lines.append(f"not here yet: {', '.join(facts['missing'])}")
    return "\n".join(lines)


# ---- label and sft -----------------------------------------------------------------------------


def add_label(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "label",
        run_label,
        "let a teacher answer prompts, as training data",
        "mambainllama label my-llama prompts.jsonl answers.jsonl --temperature 0.7",
    )
    parser.add_argument("model", help="folder or Hub id of the teacher")
    parser.add_argument("prompts", help=".jsonl(.gz) of {prompt}, {messages} or {text}")
    parser.add_argument("output", help=".jsonl file to write; with --as-is a folder")
    parser.add_argument("--resume", action="store_true", help="go on behind what OUTPUT holds")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="length of an answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    add_top_p(parser)
    parser.add_argument(
        "--max-batch", type=int, help="prompts that run at once (default: up to 16, as fit)"
    )
    parser.add_argument(
        "--top-logprobs",
        type=int,
        default=0,
        metavar="K",
        help="store the K likeliest tokens at each answered token, to distil without the teacher",
    )
    parser.add_argument(
        "--as-is",
        action="store_true",
        help="answer nothing: store the K likeliest tokens (default 32) for PROMPTS as they are",
    )
    parser.add_argument("--sequence-length", type=int, default=2048, help="longer texts are cut")
    add_no_mmap(parser)


def run_label(options: argparse.Namespace) -> None:
    from .label import label
    from .soft_labels import soft_labels

    if options.as_is:
        senseless = given(options, "max_new_tokens", "temperature", "top_p", "seed")
        if senseless:
            raise ArgumentError(f"--as-is answers nothing: leave{senseless} away")
        top = options.top_logprobs or 32
        folder = soft_labels(
            load_model(options, options.model),
            options.prompts,
            options.output,
            top=top,
            sequence_length=options.sequence_length,
            resume=options.resume,
            max_batch=16 if options.max_batch is None else options.max_batch,
            progress=not options.json and sys.stderr.isatty(),
        )
        facts = {"output": str(folder), "top_logprobs": top}
        show(options, facts, f"{folder}: {top} likeliest tokens at every token")
        return
    rows = label(
        load_model(options, options.model),
        options.prompts,
        options.output,
        resume=options.resume,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        max_batch=options.max_batch,
        top_logprobs=options.top_logprobs,
        sequence_length=options.sequence_length,
        progress=not options.json and sys.stderr.isatty(),
    )
    facts = {"output": options.output, "answers": len(rows)}
    show(options, facts, f"{len(rows)} answers written to {options.output}")


def add_sft(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "sft",
        run_sft,
        "fine-tune a model on chats or text",
        "mambainllama sft my-hybrid --data answers.jsonl --output run --set learning_rate=2e-5",
    )
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="training files")
    parser.add_argument("--validation", metavar="FILE", help="held-out file, or a share: 0.02")
    add_run_options(parser, "SftConfig")


def run_sft(options: argparse.Namespace) -> None:
    from .distill import SftConfig, sft

    config = settings_of(options, SftConfig)
    history = sft(
        load_model(options, options.model),
        options.data,
        config,
        options.output,
        options.resume,
        validation=share_or_file(options.validation),
        progress=False if options.json else None,
    )
    show_run(options, history)


def settings_of(options: argparse.Namespace, kind: Any) -> Any:
    """A configuration of class `kind` from --seed and --set KEY=VALUE."""
    from dataclasses import fields

    from .recipe import closest, parse_override

    known = [field.name for field in fields(kind)]
    settings: dict[str, Any] = {"seed": options.seed}
    for text in options.set:
        if "=" not in text:
            raise ArgumentError(f"--set {shorten(text)}: expected key=value, as in epochs=2")
        _, key, value = parse_override(f"{options.command}.{text}")
        if key not in known:
            raise ArgumentError(f"--set: unknown setting {key!r}{closest(key, known)}")
        settings[key] = value
    if options.skip_bad:
        settings["skip_bad"] = True
    return kind(**settings)


def say_skipped(options: argparse.Namespace, final: dict[str, Any]) -> None:
    """How many bad records were left out, and which was the first."""
    if final.get("skipped_records"):
        say(
            options,
            f"{final['skipped_records']} bad records were left out, the first: "
            f"{final['first_skipped_record']}",
        )


def show_run(options: argparse.Namespace, history: Any) -> None:
    say_skipped(options, history.final)
    facts = {"output": options.output, **history.final}
    show(options, facts, f"{history!r}\ntrained model: {Path(options.output) / 'model'}")


def add_dpo(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "dpo",
        run_dpo,
        "train a model on pairs of a chosen and a rejected answer",
        "mambainllama dpo my-hybrid --data pairs.jsonl.gz --output run --set beta=0.1",
    )
    parser.add_argument("model", help="folder or Hub id, after supervised fine-tuning")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="{prompt, chosen, rejected} files"
    )
    parser.add_argument("--validation", metavar="FILE", help="held-out pairs, or a share: 0.02")
    parser.add_argument(
        "--reference", help="compare with this model (default: the model as it is at the start)"
    )
    add_run_options(parser, "DPOConfig")


def run_dpo(options: argparse.Namespace) -> None:
    from .preference import DPOConfig, dpo

    config = settings_of(options, DPOConfig)
    history = dpo(
        load_model(options, options.model),
        options.data,
        config,
        options.output,
        options.resume,
        reference=None if options.reference is None else load_model(options, options.reference),
        validation=share_or_file(options.validation),
        progress=False if options.json else None,
    )
    show_run(options, history)


def share_or_file(text: str | None) -> Any:
    """Validation data: a number between 0 and 1 is a share of the data."""
    try:
        share = float(text or "")
    except ValueError:
        return text
    return share if 0 < share < 1 else text


# ---- generate and chat -------------------------------------------------------------------------


def add_sampling(parser: Any, tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=tokens, help="length of the answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample among so many likeliest tokens; 0: all"
    )
    add_top_p(parser)
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="sample among those with this share of the likeliest one's probability; 0: all",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1 makes tokens that were there before less likely",
    )
    parser.add_argument("--draft", help='speculate with this model, or with "ngram"')
    parser.add_argument(
        "--draft-tokens", type=int, default=4, help="tokens drafted at a time, at most"
    )
    add_weights(parser)
    add_no_mmap(parser)


def add_top_p(parser: Any) -> None:
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample among the likeliest of this much probability; 1: all",
    )


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    draft = options.draft
    if draft not in (None, "ngram"):
        draft = load_model(options, draft)
    return {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": options.seed,
        "draft": draft,
        "draft_tokens": options.draft_tokens,
    }


def add_generate(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "generate",
        run_generate,
        "continue one or several prompts",
        'mambainllama generate my-model "Once upon a time" --max-new-tokens 64',
    )
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="text; without any, standard input is one prompt",
    )
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message of a chat"
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end where this text comes; may be given several times",
    )
    parser.add_argument(
        "--stats", action="store_true", help="print speed and acceptance on standard error"
    )
    add_sampling(parser, 128)


def run_generate(options: argparse.Namespace) -> None:
    from .generate import generate

    model = load_model(options, options.model)
    prompts: list[Any] = list(options.prompts) or [sys.stdin.read()]
    if options.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    settings = sampling(options)
    stream = not options.json and len(prompts) == 1
    printer = Printer() if stream else None
    results = generate(model, prompts, stop=options.stop, on_text=printer, **settings)
    if options.json:
        rows = [
            {
                "prompt": prompt,
                "text": r.text,
                "token_ids": list(map(int, r.token_ids)),
                "finish_reason": r.finish_reason,
                "stats": stats_dict(r.stats),
            }
            for prompt, r in zip(prompts, results, strict=True)
        ]
        show(options, rows, "")
    elif stream:
        print(flush=True)
    else:
        for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            words = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            print(f"{'' if index == 0 else chr(10)}== {words}\n{result.text}", flush=True)
    if options.stats and not options.json:
        for result in results:
            print(stats_line(result.stats), file=sys.stderr)


class Printer:
    """Prints the pieces of a text as they come."""

    def __call__(self, index: int, text: str) -> None:
        print(text, end="", flush=True)


def stats_dict(stats: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(stats)


def stats_line(stats: Any) -> str:
    found = stats_dict(stats)
    rate = found["new_tokens"] / max(found["decode_seconds"], 1e-9)
    line = f"{found['new_tokens']} tokens, {rate:.0f} tokens/s"
    if found.get("drafted"):
        line += f", {found['accepted']} of {found['drafted']} drafts accepted"
    return line


def add_chat(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "chat",
        run_chat,
        "talk with a model on the terminal",
        "mambainllama chat my-model --temperature 0.7",
    )
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--system", help="system message")
    add_sampling(parser, 512)


def run_chat(options: argparse.Namespace) -> None:
    from .conversation import Conversation

    model = load_model(options, options.model)
    conversation = Conversation(model, system=options.system, **sampling(options))
    terminal = sys.stdin.isatty()
    if terminal and not options.json:
        say(
            options,
            "/reset starts over, /stats tells the last answer's speed, /exit or Ctrl-D leaves.",
        )
    while True:
        try:
            line = input("> " if terminal and not options.json else "")
        except EOFError:
            break
        if line.strip() in ("/exit", "/quit"):
            break
        if line.strip() == "/reset":
            conversation.reset()
            continue
        if line.strip() == "/stats":
            say(
                options,
                stats_line(conversation.stats) if conversation.stats else "nothing was said yet",
            )
            continue
        if not line.strip():
            continue
        try:
            text = conversation.ask(line, on_text=None if options.json else Printer())
        except KeyboardInterrupt:
            # The answer so far stays a part of the chat; a second Ctrl-C at the prompt leaves.
            print(flush=True)
            continue
        if options.json:
            print(as_json({"role": "assistant", "content": text}), flush=True)
        else:
            print(flush=True)
    if terminal and not options.json:
        print()


# ---- eval, bench, demo -------------------------------------------------------------------------


def add_eval(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "eval",
        run_eval,
        "measure perplexity and closeness to a teacher on held-out data",
        "mambainllama eval my-hybrid --teacher my-llama --data held-out.jsonl",
    )
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="text or token files"
    )
    parser.add_argument("--teacher", help="compare with this model: KL and top-1 agreement")
    parser.add_argument("--sequence-length", type=int, default=2048, help="longer texts are cut")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at once")
    parser.add_argument("--max-batches", type=int, help="stop after so many batches")
    add_weights(parser)
    add_no_mmap(parser)


def run_eval(options: argparse.Namespace) -> None:
    from .evaluate import compare, perplexity

    model = load_model(options, options.model)
    settings = {
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "max_batches": options.max_batches,
    }
    if options.teacher is None:
        value = perplexity(model, options.data, **settings)
        show(options, {"perplexity": value}, f"perplexity {value:.4g}")
        return
    teacher = load_model(options, options.teacher, exact=True)
    found = compare(model, teacher, options.data, **settings)
    show(
        options,
        found.to_dict(),
        f"KL {found.kl:.4g} nats/token, perplexity {found.perplexity:.4g} (teacher "
        f"{found.teacher_perplexity:.4g}), top-1 agreement {100 * found.agreement:.1f} %, "
        f"{found.tokens:,} tokens",
    )


def add_bench(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "bench",
        run_bench,
        "measure speed and memory at several lengths of context",
        "mambainllama bench my-hybrid my-llama --lengths 512,4096 --plot speed.png",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or Hub ids")
    parser.add_argument(
        "--lengths", type=comma_list, default="128,512,2048,8192", help="tokens in the sequence"
    )
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded for one figure")
    parser.add_argument("--repeats", type=int, default=3, help="times; the median is shown")
    parser.add_argument("--plot", metavar="PNG", help="draw the figures")
    add_weights(parser)
    add_no_mmap(parser)


def run_bench(options: argparse.Namespace) -> None:
    from .bench import speed

    tables = {}
    for path in options.models:
        tables[path] = speed(
            load_model(options, path),
            options.lengths,
            options.tokens,
            options.repeats,
            options.seed,
        )
    rows = [
        (
            path,
            f"{row['length']:,}",
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
            f"{100 * row['decode_spread']:.0f} %",
            size(row["state_bytes"]),
        )
        for path, table_rows in tables.items()
        for row in table_rows
    ]
    header = ("model", "length", "prefill tokens/s", "decode tokens/s", "spread", "state")
    show(options, tables, table(rows, header))
    if options.plot:
        from .plot import plot_speed

        plot_speed(tables, options.plot)
        say(options, f"figure: {options.plot}")


def add_demo(commands: Any, common: Any) -> None:
    parser = add_command(
        commands,
        common,
        "demo",
        run_demo,
        "convert, distil, compare and generate, offline",
        "mambainllama demo --output demo-output",
    )
    parser.add_argument("--output", default="demo-output", help="folder for students and figures")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the training: shows that it works, not how well",
    )


def run_demo(options: argparse.Namespace) -> None:
    from .demo import run

    if options.device not in ("auto", "cpu") or options.dtype not in ("auto", "float32"):
        raise ArgumentError("trains on the CPU in float32: leave --device and --dtype away")
    found = run(options.output, quick=options.quick, seed=options.seed, quiet=options.json)
    if options.json:
        show(options, found, "")

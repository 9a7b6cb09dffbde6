"""A small chat teacher, trained here, and what students keep of it: SFT, then KL, then DPO.

    python benchmarks/chat.py --output chat-run --threads 1

The packaged teacher (1.05 M parameters, which has read Python's documentation) learns to chat on
data/chat/sft.jsonl.gz of the shared data: short chats, one prompt in eight kept back with all its
answers and pairs.  Then recipes/small/chat.toml makes a student of it and measures, after each
stage, what is kept on the prompts that neither has seen.  Both parts go on where they stopped when
the command is given again.

The teacher answers in English that is often beside the point: it has a million parameters and read
a million tokens.  What is measured is how closely a student follows it, not how good it is.
"""

import argparse
import gzip
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import mambainllama as mil
from mambainllama import _core

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "small" / "chat.toml"

# A turn begins with <|begin|>; an answer ends with <|end|>, as every text of this teacher does.
TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>{% endif %}"
)
LONGEST = 900  # characters of a chat
ANSWERS = 2  # of each held-out prompt
HELD_OUT = 8  # one prompt in so many


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("chat-run"))
    add("--shared", type=Path, help="folder of the shared data (MAMBAINLLAMA_SHARED, ../shared)")
    add("--steps", type=int, default=1200, help="of the teacher, 2,304 tokens each at most")
    add("--attention", default="half", help="layers of the student that stay: half, none, 1,3, ...")
    add("--mixer", choices=("mamba1", "mamba2"), default="mamba2")
    add("--set", action="append", default=[], help="another setting of recipes/small/chat.toml")
    add("--seed", type=int, default=0)
    add("--threads", type=int)
    return parser.parse_args()


def is_held_out(prompt):
    return int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def words(value):
    return value if isinstance(value, str) else value[-1]["content"]


def read(path):
    if not path.exists():
        sys.exit(f"chat.py: no {path}: give --shared, or set MAMBAINLLAMA_SHARED")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_data(shared, output):
    """train.jsonl, held.jsonl and pairs.jsonl; no prompt is in two of train and held."""
    train, held, count = [], [], {}
    for row in read(shared / "data" / "chat" / "sft.jsonl.gz"):
        messages = row["messages"]
        if sum(len(m["content"]) for m in messages) > LONGEST or not messages[-1]["content"]:
            continue
        prompt = messages[0]["content"]
        if not is_held_out(prompt):
            train.append({"messages": messages})
        elif count.setdefault(prompt, 0) < ANSWERS:
            count[prompt] += 1
            held.append({"messages": messages})
    pairs = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")}
        for row in read(shared / "data" / "chat" / "preferences.jsonl.gz")
        if not is_held_out(words(row["prompt"]))
        and len(words(row["prompt"])) + max(len(words(row[k])) for k in ("chosen", "rejected"))
        <= LONGEST
        and words(row["chosen"]).strip()
        and words(row["rejected"]).strip()
    ]
    for name, rows in (("train", train), ("held", held), ("pairs", pairs)):
        write(output / f"{name}.jsonl", rows)
    print(
        f"{len(train)} chats to train on, {len(held)} of {len(count)} other prompts held out, "
        f"{len(pairs)} pairs",
        file=sys.stderr,
    )


def make_teacher(options):
    """Fine-tunes the packaged teacher on all words of the chats."""
    folder = options.output / "teacher"
    if (folder / "training.json").exists():
        return
    start = options.output / "start"
    mil.demo.teacher().save(start)
    settings = json.loads((start / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (start / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    model = mil.load(start)
    config = mil.SftConfig(
        loss_on="all",
        max_steps=options.steps,
        batch_size=6,
        sequence_length=384,
        learning_rate=2e-3,
        muon_learning_rate=1e-2,
        min_learning_rate=0.05,
        warmup_steps=20,
        weight_decay=0.1,
        seed=options.seed,
        log_every=10,
        eval_every=160,
        save_every=80,
        keep_last=1,
    )
    began = time.process_time()
    run = options.output / "teacher-run"
    history = mil.sft(
        model,
        options.output / "train.jsonl",
        config,
        run,
        resume=True,
        validation=options.output / "held.jsonl",
    )
    mil.load(run / "model").save(folder)
    record = {
        "tokens": history.final["tokens"],
        "held_out_perplexity": history.final["eval_perplexity"],
        "cpu_seconds_of_last_start": round(time.process_time() - began, 1),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"teacher: {record}", file=sys.stderr)


def make_student(options):
    name = f"student-{options.mixer}-{options.attention}"
    layers = options.attention
    if layers.replace(",", "").isdigit():
        layers = json.dumps([int(number) for number in layers.split(",")])
    folder = options.output.resolve()
    overrides = [
        f"teacher.model={folder / 'teacher'}",
        f"data.files={folder / 'train.jsonl'}",
        f"data.validation={folder / 'held.jsonl'}",
        f"dpo.files={folder / 'pairs.jsonl'}",
        f"student.mixer={options.mixer}",
        f"student.attention_layers={layers}",
        f"training.seed={options.seed}",
        *options.set,
    ]
    return mil.run_recipe(
        RECIPE,
        folder / name,
        resume=True,
        overrides=overrides,
        say=lambda text: print(text, file=sys.stderr),
    )


def table(results):
    """What is kept after each stage, as a Markdown table."""
    lines = [
        "| after | tokens | kept by likelihood | KL | same top | perplexity | kept by generation "
        "| same start | same words |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["stages"]:
        if "kept" not in row:
            continue
        likelihood, generation = row["kept"]["likelihood"], row["kept"]["generation"]
        tokens = f"{row['tokens'] / 1e6:.2f} M" if "tokens" in row else ""
        lines.append(
            f"| {row['stage']} | {tokens} | {100 * likelihood['kept']:.1f} % | "
            f"{likelihood['kl']:.3f} | {100 * likelihood['same_top']:.1f} % | "
            f"{likelihood['perplexity']:.1f} | {100 * generation['kept']:.1f} % | "
            f"{100 * generation['same_start']:.1f} % | {100 * generation['same_words']:.1f} % |"
        )
    last = results["stages"][-1]["kept"]
    lines.append(
        f"| the teacher | | 100 % | 0 | 100 % | {last['likelihood']['teacher_perplexity']:.1f} | "
        "100 % | 100 % | 100 % |"
    )
    return "\n".join(lines)


def main():
    options = parse()
    if options.threads:
        _core.set_threads(options.threads)
    shared = options.shared or Path(os.environ.get("MAMBAINLLAMA_SHARED") or ROOT.parent / "shared")
    options.output.mkdir(parents=True, exist_ok=True)
    write_data(shared, options.output)
    make_teacher(options)
    results = make_student(options)
    print(table(results))
    print(f"report: {Path(results['output']) / 'report.html'}", file=sys.stderr)


if __name__ == "__main__":
    main()

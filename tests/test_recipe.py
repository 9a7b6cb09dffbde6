"""Recipes: what they say is checked, all stages run and go on, and the report stands alone."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_llama

import mambainllama as mil
from mambainllama import kept, pipeline
from mambainllama.data import read_documents
from mambainllama.recipe import KEYS, read_recipe
from mambainllama.stages import STAGES

RECIPES = Path(mil.__file__).parents[1] / "recipes"
SHIPPED = sorted(
    path for path in RECIPES.rglob("*.toml") if not any("run" in p for p in path.parts[-2:-1])
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("recipe") / "llama", layers=4, scale=2.0)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tokens.npy"
    np.save(path, np.random.default_rng(3).integers(0, 264, (24, 16), dtype=np.uint16))
    return path


def chat(n):
    return [
        {"role": "user", "content": f"{n} and {n}"},
        {"role": "assistant", "content": f"make {2 * n}"},
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of chats, prompts and preference pairs."""
    folder = tmp_path_factory.mktemp("data")
    lines = {
        "chats": [{"messages": chat(n)} for n in range(30)],
        "prompts": [{"prompt": f"{n} and {n}"} for n in range(12)],
        "pairs": [
            {"prompt": f"{n} and {n}", "chosen": f"make {2 * n}", "rejected": "what?"}
            for n in range(12)
        ],
    }
    for name, rows in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def write(path, text):
    path.write_text(text)
    return path


EVERYTHING = """
title = "Every stage <at once>"
[teacher]
model = "{teacher}"
[student]
attention_layers = "quarter"
calibration_length = 16
[data]
files = "{data}/chats.jsonl"
validation = 0.2
[training]
max_steps = 4
batch_size = 4
sequence_length = 64
learning_rate = 2e-3
save_every = 1
[label]
prompts = "{data}/prompts.jsonl"
max_new_tokens = 6
[stepwise]
parts = 2
max_steps = 2
[align]
align_fraction = 0.5
[distill]
files = "{data}/chats.jsonl"
eval_every = 2
[sft]
[dpo]
files = "{data}/pairs.jsonl"
prompt_length = 32
[report]
prompts = 5
samples = 2
max_new_tokens = 8
[output]
folder = "out"
"""


@pytest.fixture(scope="module")
def everything(teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    text = EVERYTHING.format(teacher=teacher, data=data)
    recipe = write(folder / "all.toml", text)
    return recipe, pipeline.run_recipe(recipe, progress=False)


def outcome(run):
    """Weights, and figures that do not tell the time."""

    def untimed(value):
        if isinstance(value, dict):
            return {
                k: untimed(v)
                for k, v in value.items()
                if not re.search("seconds|memory|second|begun|written|output", k)
            }
        return [untimed(v) for v in value] if isinstance(value, list) else value

    weights = {n: a.copy() for n, a in mil.load(run / "model").parameters().items()}
    return weights, untimed(json.loads((run / "results.json").read_text()))


def assert_same(a, b):
    assert a[1] == b[1]
    for name, array in a[0].items():
        assert np.array_equal(array, b[0][name]), name


# ---- running


def test_all_stages_run_in_order(everything):
    recipe, results = everything
    names = [row["stage"] for row in results["stages"]]
    assert names == ["label", "stepwise", "align", "distill", "sft", "dpo"]
    run = recipe.parent / "out"
    answers = [json.loads(x) for x in (run / "label" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 12 and answers[0]["messages"][-1]["role"] == "assistant"
    # Stepwise, align and sft read the teacher's answers; distill and dpo read what they name.
    fingerprints = {}
    for name in ("stepwise", "align", "distill", "sft"):
        fingerprints[name] = json.loads((run / name / "run.json").read_text())["data"]
    assert fingerprints["stepwise"] == fingerprints["align"]
    assert len(set(fingerprints.values())) == 3  # sft marks answers
    for row in results["stages"][1:]:
        assert row["tokens"] > 0 and row["training_seconds"] > 0 and row["peak_memory_bytes"] > 0
        assert 0 < row["kept"]["likelihood"]["kept"] <= 1
        assert 0 < row["kept"]["generation"]["kept"] <= 1
        assert row["kept"]["attention_layers"] == [3] and len(row["kept"]["answers"]) == 5
    assert "accuracy" in results["stages"][-1]["final"]
    assert len(results["samples"]) == 5 and results["samples"][0]["prompt"].endswith(
        "<|assistant|>"
    )
    last, final = mil.load(run / "dpo" / "model"), mil.load(run / "model")
    for name, array in last.parameters().items():
        assert np.array_equal(array, final.parameters()[name])
    assert not list(run.rglob("checkpoints"))


def test_distilling_from_stored_labels(teacher, data, tmp_path):
    """The teacher's likeliest tokens, stored by one stage, take its place in another."""
    recipe = small(tmp_path, teacher, data / "chats.jsonl", "[soft_labels]\ntop = 16\n")
    found = pipeline.run_recipe(recipe, progress=False)
    assert [row["stage"] for row in found["stages"]] == [
        "soft_labels",
        "convert",
        "align",
        "distill",
    ]
    assert found["stages"][-1]["final"]["kl"] > 0
    run = json.loads((tmp_path / "run" / "distill" / "run.json").read_text())
    assert run["teacher"] is None
    again = pipeline.run_recipe(recipe, resume=True, progress=False)
    assert again["stages"] == found["stages"]
    text = EVERYTHING.format(teacher=teacher, data=data).replace(
        "[label]", "[label]\ntop_logprobs = 8"
    )
    path = write(tmp_path / "r.toml", text.replace('[distill]\nfiles = "', '[distill]\n# "'))
    only = ['stages=["label", "convert", "distill"]']
    pipeline.run_recipe(path, overrides=only, progress=False)
    assert json.loads((tmp_path / "out" / "distill" / "run.json").read_text())["teacher"] is None


@pytest.mark.parametrize("stage", ["convert", "stepwise"])
def test_layers_chosen_by_measurement(teacher, tokens, tmp_path, stage):
    recipe = small(tmp_path, teacher, tokens, "[stepwise]\n" if stage == "stepwise" else "")
    overrides = ["student.attention_layers=auto:1", "student.calibration_rows=16"]
    overrides.append(f'stages=["{stage}"]')
    checked = pipeline.check_recipe(read_recipe(recipe, overrides))
    assert checked["student"] == "1 of the layers stay attention, chosen by measurement"
    found = pipeline.run_recipe(recipe, overrides=overrides, progress=False)
    [row] = found["stages"]
    assert len(row["layers"]["scores"]) == 4
    assert row["kept"]["attention_layers"] == row["layers"]["layers"]
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Which layers stay attention" in text and ">layer 3<" in text


class Page(HTMLParser):
    """Tags must close, and nothing may be fetched."""

    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.svgs = [], [], 0

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert tag not in ("script", "link", "img", "iframe", "object") and "src" not in found
        assert "href" not in found
        self.svgs += tag == "svg"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(text)


def test_report_stands_alone(everything):
    recipe, results = everything
    text = (recipe.parent / "out" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open and page.svgs >= 8
    assert page.headings[0] == "Every stage <at once>" and "Time and memory" in page.headings
    assert not re.search(r"https?://|url\(|@import", text)
    for row in results["stages"]:
        assert f">{row['stage']}" in text
    for shown in ("by likelihood", "by generation", "peak memory", "learning_rate", "tokens/s"):
        assert shown in text
    kept_share = results["stages"][-1]["kept"]["likelihood"]["kept"]
    assert f"{100 * kept_share:.1f}" in text
    # What models say may look like HTML; what a title says, too.
    assert "Every stage &lt;at once&gt;" in text and "<|user|>" not in text


def test_done_stages_are_not_run_again(everything, monkeypatch):
    recipe, results = everything
    said = []
    monkeypatch.setattr(pipeline.Run, "run_stage", lambda self, *a: pytest.fail("ran again"))
    again = pipeline.run_recipe(recipe, resume=True, progress=False, say=said.append)
    assert sum("done before" in line for line in said) == 6
    assert again["stages"] == results["stages"]


@pytest.mark.parametrize(
    "override, words",
    [
        ("distill.learning_rate=1e-4", r"\[distill\] is done, its learning_rate was 0.002"),
        ("label.max_new_tokens=7", r"\[label\] is done, its max_new_tokens was 6, is 7 now"),
        ("student.attention_layers=half", r"\[stepwise\] is done, its attention_layers was"),
        ('stages=["convert", "distill"]', None),
    ],
)
def test_other_settings_are_refused(everything, override, words):
    recipe, _ = everything
    before = (recipe.parent / "out" / "results.json").read_bytes()
    if words is None:  # stages that were not run may be added: here the conversion
        assert read_recipe(recipe, [override]).stages[0].name == "convert"
        return
    with pytest.raises(mil.StateError, match=words) as caught:
        pipeline.run_recipe(recipe, resume=True, overrides=[override], progress=False)
    assert "\n" not in str(caught.value)
    assert (recipe.parent / "out" / "results.json").read_bytes() == before


def test_what_is_measured_may_change(everything, tmp_path):
    """Done stages are measured again, so that a report never mixes two ways of measuring."""
    recipe, results = everything
    copied = tmp_path / "out"
    shutil.copytree(recipe.parent / "out", copied)
    again = pipeline.run_recipe(
        recipe, copied, True, overrides=["report.prompts=3"], progress=False
    )
    assert len(again["samples"]) == 3
    for before, after in zip(results["stages"][1:], again["stages"][1:], strict=True):
        assert len(after["kept"]["answers"]) == 3
        assert after["kept"]["likelihood"] == before["kept"]["likelihood"]
        assert after["seconds"] == before["seconds"]
    with pytest.raises(mil.StateError, match=r"\[distill\] is done, its before was 'align'"):
        pipeline.run_recipe(
            recipe,
            copied,
            True,
            overrides=['stages=["label", "stepwise", "distill", "align"]'],
            progress=False,
        )


def small(folder, teacher, data, extra=""):
    files = json.dumps(str(data))
    return write(
        folder / "small.toml",
        f'[teacher]\nmodel = "{teacher}"\n[student]\ncalibration_length = 16\n'
        f"[data]\nfiles = {files}\nvalidation = 0.25\n"
        "[training]\nbatch_size = 4\nmax_steps = 2\n[align]\n[distill]\n" + extra,
    )


def test_a_changed_data_file_is_refused(teacher, tokens, tmp_path):
    mine = tmp_path / "mine.npy"
    mine.write_bytes(tokens.read_bytes())
    recipe = small(tmp_path, teacher, mine)
    pipeline.run_recipe(recipe, progress=False)
    changed = bytearray(mine.read_bytes())
    changed[-2] ^= 1
    mine.write_bytes(changed)
    with pytest.raises(
        mil.StateError, match=r"mine\.npy has changed since the run began"
    ) as caught:
        pipeline.run_recipe(recipe, resume=True, progress=False)
    assert "the same size, other content" in str(caught.value) and "\n" not in str(caught.value)
    mine.write_bytes(changed + b"12")
    with pytest.raises(mil.StateError, match=r"bytes then, .* now"):
        pipeline.run_recipe(recipe, resume=True, progress=False)
    mine.write_bytes(tokens.read_bytes())
    pipeline.run_recipe(recipe, resume=True, progress=False)


def test_another_teacher_is_refused_and_new_runs_move_old_ones(teacher, tokens, tmp_path):
    recipe = small(tmp_path, teacher, tokens)
    pipeline.run_recipe(recipe, progress=False)
    other = write_llama(tmp_path / "other", layers=4, seed=9)
    with pytest.raises(mil.StateError, match="the teacher .* is another one"):
        pipeline.run_recipe(
            recipe, resume=True, overrides=[f"teacher.model={other}"], progress=False
        )
    before = outcome(tmp_path / "run")
    pipeline.run_recipe(recipe, progress=False)
    assert_same(outcome(tmp_path / "run" / "previous-1"), before)
    assert_same(outcome(tmp_path / "run"), before)


def test_changed_answers_are_refused(teacher, data, tmp_path):
    text = EVERYTHING.format(teacher=teacher, data=data)
    recipe = write(tmp_path / "r.toml", text)
    only = ['stages=["label", "convert", "sft"]', "sft.max_steps=1"]
    pipeline.run_recipe(recipe, overrides=only, progress=False)
    with open(tmp_path / "out" / "label" / "answers.jsonl", "a") as file:
        file.write('{"text": "mine"}\n')
    with pytest.raises(mil.StateError, match=r"answers\.jsonl has changed since the run began"):
        pipeline.run_recipe(recipe, overrides=only, resume=True, progress=False)


RUN = """
import sys, time
sys.path.insert(0, {root!r})
import mambainllama as mil
from mambainllama import pipeline, training

step = training.Loop.step
training.Loop.step = lambda self, *a: (time.sleep({pause}), step(self, *a))
print("ready", flush=True)
pipeline.run_recipe({recipe!r}, {output!r}, resume=True, progress=False)
print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments(everything, tmp_path):
    recipe, _ = everything
    wanted = outcome(recipe.parent / "out")
    chance = random.Random(5)
    kills, root = 0, str(Path(mil.__file__).parents[1])
    code = RUN.format(root=root, pause=0.04, recipe=str(recipe), output=str(tmp_path / "run"))
    for _ in range(60):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stdout.readline()
        if kills < 8:
            time.sleep(chance.uniform(0.05, 0.5))
            kills += process.poll() is None
            process.kill()
            process.communicate()
            continue
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0 and "done" in out, error
        break
    assert kills == 8
    assert_same(outcome(tmp_path / "run"), wanted)


def test_bad_records_are_counted(teacher, data, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not JSON\n" + (data / "chats.jsonl").read_text() + '{"messages": []}\n')
    recipe = small(tmp_path, teacher, bad, "[report]\nprompts = 2\nmax_new_tokens = 2\n")
    with pytest.raises(mil.FormatError, match=r"bad\.jsonl:1: not JSON"):
        pipeline.run_recipe(recipe, progress=False)
    found = pipeline.run_recipe(recipe, overrides=["training.skip_bad=true"], progress=False)
    final = found["stages"][-1]["final"]
    assert final["skipped_records"] == 2
    assert final["first_skipped_record"].startswith(f"{bad}:1: not JSON")
    assert (
        "2 bad records were left out, the first: " in (tmp_path / "run" / "report.html").read_text()
    )


# ---- what is kept


def test_a_student_that_is_its_teacher_keeps_everything(teacher, data):
    model = mil.load(teacher)
    documents = read_documents(data / "chats.jsonl", model.tokenizer, vocab=264, loss_on="marked")
    prompts = kept.prompts_of(documents, 4, 64)
    assert [model.tokenizer.decode(p, skip_special_tokens=False) for p in prompts[:1]] == [
        "<|user|>0 and 0<|end|><|assistant|>"
    ]
    yardstick = kept.Yardstick(model, documents, prompts, max_new_tokens=6)
    found = yardstick.measure(model)
    assert found["likelihood"]["kept"] == found["likelihood"]["same_top"] == 1
    generation = found["generation"]
    assert [generation[k] for k in ("kept", "same_start", "same_answers", "same_words")] == [1] * 4
    assert all(a["start"] == a["text"] for a in found["answers"])
    # Only answers count: "make N<|end|>".
    assert found["likelihood"]["tokens"] == sum(len(f"make {2 * n}") + 1 for n in range(30))


def test_kept_by_its_own_words_is_its_formula(teacher, data, tmp_path):
    model = mil.load(teacher)
    other = mil.load(write_llama(tmp_path / "other", layers=4, scale=2.0, seed=8))
    documents = read_documents(data / "chats.jsonl", model.tokenizer, vocab=264, loss_on="marked")
    prompts = kept.prompts_of(documents, 3, 64)
    yardstick = kept.Yardstick(model, documents, prompts, max_new_tokens=5, batch_size=2)
    [end] = other.stop_tokens
    total, rows = 0.0, 0
    for seed, prompt in enumerate(prompts):
        [answer] = mil.generate(other, prompt, 5, temperature=1.0, seed=seed)
        sample = [*answer.token_ids, *[end] * (answer.finish_reason == "stop")]
        ids = np.array([[*prompt, *sample]])
        logs = []
        for one in (other, model):
            logits = one(ids)[0, len(prompt) - 1 : -1].astype(np.float64)
            logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        total += (np.exp(logs[0]) * (logs[0] - logs[1])).sum()
        rows += len(logs[0])
    found = yardstick.measure(other)["generation"]["kept"]
    assert found == pytest.approx(np.exp(-total / rows), rel=1e-4)


def test_a_student_that_says_nothing_is_measured(teacher, data, tmp_path):
    """Where it ended its answers counts; only without prompts is there no figure."""
    folder = write_llama(tmp_path / "mute", layers=4, scale=2.0, seed=8)
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = list(range(264))  # whatever it samples ends the answer
    (folder / "config.json").write_text(json.dumps(config))
    model, mute = mil.load(teacher), mil.load(folder)
    documents = read_documents(data / "chats.jsonl", model.tokenizer, vocab=264, loss_on="marked")
    prompts = kept.prompts_of(documents, 3, 64)
    found = kept.Yardstick(model, documents, prompts, max_new_tokens=4).measure(mute)
    assert {answer["text"] for answer in found["answers"]} == {""}
    assert 0 < found["generation"]["kept"] < 0.9
    assert kept.Yardstick(model, documents, []).measure(mute)["generation"] == {}


def test_kept_example():
    import doctest

    assert doctest.testmod(kept).failed == 0


# ---- recipes


def test_extending_and_overriding(tmp_path):
    (tmp_path / "sub").mkdir()
    write(
        tmp_path / "sub" / "base.toml",
        '[teacher]\nmodel = "base/teacher"\n[data]\nfiles = "base.npy"\nvalidation = 0.1\n'
        "[training]\nbatch_size = 3\nseed = 5\n[distill]\nlearning_rate = 1e-3\n[sft]\n"
        '[student]\ntrained = "old"\n',
    )
    write(tmp_path / "more.toml", '[training]\nseed = 6\n[sft]\nbatch_size = 4\nfiles = "m.npy"\n')
    path = write(
        tmp_path / "r.toml",
        'extends = ["sub/base.toml", "more.toml"]\n[distill]\nepochs = 2\n'
        '[student]\nmixer = "mamba1"\n',
    )
    recipe = read_recipe(path, ["training.gradient_accumulation=2", "title=It"])
    assert [s.name for s in recipe.stages] == ["convert", "distill", "sft"]
    distill, sft = recipe["distill"].config, recipe["sft"].config
    assert (distill.epochs, distill.learning_rate, distill.batch_size, distill.seed) == (
        2,
        1e-3,
        3,
        6,
    )
    assert sft.batch_size == 4 and sft.gradient_accumulation == 2 and recipe.title == "It"
    assert recipe["sft"].options == {"files": [str(tmp_path / "m.npy")]}
    assert recipe.data["files"] == [str(tmp_path / "sub" / "base.npy")]
    assert recipe.student == {"mixer": "mamba1"} and recipe.teacher["model"] == "base/teacher"
    moved = read_recipe(path, ["sft.files=base.npy", "data.files=here.npy"])
    assert moved.data["files"] == ["here.npy"]  # paths on the command line: from where we are
    assert moved["sft"].options["files"] == ["base.npy"]
    write(tmp_path / "same.toml", 'extends = "r.toml"\n[sft]\nfiles = "sub/base.npy"\n')
    follows = read_recipe(tmp_path / "same.toml", ["data.files=here.npy"])
    assert follows["sft"].options["files"] == ["here.npy"]
    some = read_recipe(path, ['stages=["sft", "distill"]'])
    assert [s.name for s in some.stages] == ["convert", "sft", "distill"]
    write(tmp_path / "sub" / "base.toml", 'extends = "../r.toml"')
    with pytest.raises(mil.ArgumentError, match=r"r\.toml: extends itself"):
        read_recipe(path)
    (tmp_path / "more.toml").unlink()
    (tmp_path / "sub" / "base.toml").write_text("")
    with pytest.raises(
        mil.NotFoundError, match=r"more\.toml: no such recipe \(extended by .*r.toml"
    ):
        read_recipe(path)


def test_one_seed_for_everything(tmp_path):
    path = tmp_path / "recipe.toml"
    head = "[teacher]\nmodel = 'llama'\n[data]\nfiles = 'stories.jsonl'\n[distill]\n"
    path.write_text(head + "[student]\nseed = 3\n[sft]\nfiles = 'chats.jsonl'\nseed = 4\n")
    for seed, expected in ((None, [3, 0, 4]), (7, [7, 7, 7])):
        recipe = read_recipe(path, seed=seed)
        seeds = [recipe[name].config.seed for name in ("distill", "sft")]
        assert [recipe.student["seed"], *seeds] == expected
    path.write_text(head + "[student]\ntrained = 'student'\n")
    assert "seed" not in read_recipe(path, seed=7).student


def test_an_editors_mark_before_a_recipe(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b'\xef\xbb\xbf[teacher]\nmodel = "a/b"\n[data]\nfiles = "x.npy"\n')
    assert read_recipe(path).teacher == {"model": "a/b"}


@pytest.mark.parametrize(
    "extra, words",
    [
        ('stages = ["destil"]', "unknown stage 'destil'; did you mean 'distill'"),
        ("stages = []", "stages: expected a list"),
        ('stages = ["sft", "sft"]', "a list of different stages"),
        ('stages = [["sft"]]', "unknown stage ['sft']"),
        ('stages = ["distill", "convert"]', "'distill' has no student before 'convert'"),
        ('stages = ["stepwise", "convert"]', "both make the student"),
        ("[label]\nprompts = ['a', 'b']", "[label] prompts: expected one file"),
        ("[student]\nmixer = 'mamba3'", "[student] mixer='mamba3': expected 'mamba1'"),
        ("[student]\ninit = 'best'", "[student] init='best': expected 'auto'"),
        ("[student]\nseed = -1", "[student] seed=-1: expected a whole number"),
        ("[student]\ncalibration_rows = 1.5", "[student] calibration_rows=1.5: expected"),
        ("[student]\ncalibration_length = 'x'", "[student] calibration_length='x': expected"),
        ("[output]\nkeep_checkpoints = 'no'", "[output] keep_checkpoints='no': expected true"),
        ("[sft]\nvalidation = 1.5", "[sft] validation=1.5: expected files, or a share"),
        ("titel = 'x'", "unknown section [titel]; did you mean 'title'?"),
        ("title = 3", "title: expected text"),
        ("[dpo]", "[dpo] needs 'files'"),
        ("[label]", "[label] needs 'prompts'"),
        ("[label]\nprompts = 3", "[label] prompts: expected a file"),
        ("[dpo]\nfiles = 'p.jsonl'\nbeta = 0", "[dpo] beta=0: expected a number above 0"),
        ("[stepwise]\nparts = 0", "[stepwise] parts=0: expected a whole number"),
        ("[report]\nprompts = -1", "[report] prompts=-1: expected a whole number of at least 0"),
        ("[report]\nevery_stage = 1", "[report] every_stage=1: expected true or false"),
        ("[training]\nkl_weight = 1", "unknown key 'kl_weight' in [training]"),
        ("[sft]\nkl_weight = 1", "unknown key 'kl_weight' in [sft]"),
        ('[student]\ntrained = "x"\n[stepwise]\n[convert]', "unknown section [convert]"),
    ],
)
def test_mistakes_are_told_by_section_and_key(extra, words, tmp_path):
    top, _, rest = extra.partition("[")
    body = f'{top}\n[teacher]\nmodel = "a/b"\n[data]\nfiles = "x.npy"\n' + (
        f"[{rest}" if rest else ""
    )
    path = write(tmp_path / "r.toml", body)
    if extra.startswith("stages = ["):
        path.write_text(f'{extra}\n[teacher]\nmodel = "a/b"\n[data]\nfiles = "x.npy"\n')
    with pytest.raises(mil.Error) as caught:
        read_recipe(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checking_finds_what_would_stop_a_run(teacher, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = small(tmp_path, teacher, tokens)
    found = pipeline.check_recipe(read_recipe(path))
    assert found["stages"] == ["convert", "align", "distill"] and not found["missing"]
    assert found["student"] == "2 of 4 layers become mamba2 mixers"
    with pytest.raises(mil.ArgumentError, match="attention_layers"):
        pipeline.check_recipe(read_recipe(path, ["student.attention_layers=[9]"]))
    with pytest.raises(mil.ArgumentError, match="must name each layer to be replaced once"):
        pipeline.check_recipe(read_recipe(path, ['stages=["stepwise"]', "stepwise.parts=[[9]]"]))
    stored = ['stages=["soft_labels", "convert", "distill"]', "distill.temperature=2.0"]
    with pytest.raises(mil.ArgumentError, match="temperature=2.0 needs a teacher; soft labels"):
        pipeline.check_recipe(read_recipe(path, stored))
    write_llama(tmp_path / "deep", layers=5)
    other = ["teacher.model=deep", f"student.model={teacher}"]
    with pytest.raises(mil.ArgumentError, match=r"\[align\] .* the teacher has 5 layers of 32"):
        pipeline.check_recipe(read_recipe(path, other))
    assert pipeline.check_recipe(read_recipe(path, [*other, 'stages=["sft"]']))["student"]
    words = (tmp_path / "deep" / "tokenizer.json").read_text().replace("<|user|>", "<|human|>")
    (tmp_path / "deep" / "tokenizer.json").write_text(words)
    with pytest.raises(mil.ArgumentError, match="different tokenizers"):
        pipeline.check_recipe(read_recipe(path, [*other, 'stages=["sft"]']))
    absent = pipeline.check_recipe(
        read_recipe(path, ["data.files=none.jsonl", "teacher.model=owner/name"])
    )
    assert absent["missing"] == ["owner/name", str(tmp_path / "none.jsonl")]
    with pytest.raises(mil.ArgumentError, match="no such model folder"):
        pipeline.check_recipe(read_recipe(path, ["teacher.model=./nowhere"]))
    bad = write(tmp_path / "bad.jsonl", "{\n")
    with pytest.raises(mil.FormatError, match=r"bad\.jsonl:1: not JSON"):
        pipeline.check_recipe(read_recipe(path, [f"data.files={bad}"]))
    chats = write(tmp_path / "c.jsonl", '{"messages": []}\n')
    pairs = write(tmp_path / "p.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for change, words in (
        (f"data.files={pairs}", r"p\.jsonl:1: expected 'messages' or 'text', found prompt, chosen"),
        (f"dpo.files={chats}", r"c\.jsonl:1: expected 'chosen', found messages"),
    ):
        with pytest.raises(mil.FormatError, match=words):
            stage = change.partition(".")[0].replace("data", "distill")
            pipeline.check_recipe(read_recipe(path, [f'stages=["{stage}"]', change]))
    fine = [f"dpo.files={pairs}", f"label.prompts={pairs}", 'stages=["label", "dpo"]']
    assert pipeline.check_recipe(read_recipe(path, fine))["student"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (["student.attention_layers=auto:9"], '"auto:9": expected a number from 0 to 4'),
        (["student.attention_layers='auto:'"], '"auto:": expected a number from 0 to 4'),
        (["student.attention_layers=auto:2", "student.init=paper"], "measures on data, which init"),
        (["student.attention_layers=auto:4", 'stages=["stepwise"]'], "leaves nothing to replace"),
        (["student.attention_layers=1.0", 'stages=["stepwise"]'], "leaves nothing to replace"),
        (["output.folder=a.file"], "a.file: is a file; use another output folder"),
        (["output.folder=a.file/run"], "a.file: is a file; use another output folder"),
        (["distill.temperature=1e300"], "temperature=1e+300: expected a number from"),
        (["extends=other.toml"], "--set 'extends=other.toml': only a file can extend"),
    ],
)
def test_checking_refuses_what_the_run_would(
    teacher, tokens, tmp_path, monkeypatch, changes, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.file").write_text("")
    path = small(tmp_path, teacher, tokens)
    with pytest.raises(mil.Error) as caught:
        pipeline.check_recipe(read_recipe(path, changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_more_parts_than_layers_are_checked_at_once(teacher, tokens, tmp_path):
    changes = ['stages=["stepwise"]', "stepwise.parts=99999999999"]
    assert pipeline.check_recipe(read_recipe(small(tmp_path, teacher, tokens), changes))["student"]


def test_a_run_does_not_move_its_own_inputs(teacher, data, tmp_path):
    """Where the output folder is the user's own, and where it is an earlier run's."""

    def refused(words, *changes, **options):
        for run in (
            lambda: pipeline.check_recipe(read_recipe(path, changes), **options),
            lambda: pipeline.run_recipe(path, overrides=changes, progress=False, **options),
        ):
            before = sorted(tmp_path.rglob("*[!k]"))  # all but .lock
            with pytest.raises(mil.Error, match=words) as caught:
                run()
            assert "\n" not in str(caught.value)
            assert sorted(tmp_path.rglob("*[!k]")) == before

    shutil.copytree(teacher, tmp_path / "model")
    path = small(tmp_path, "model", data / "chats.jsonl")
    refused("model: is read by this run and lies in", f"output.folder={tmp_path}")
    for resume in (False, True):
        refused(
            "model: stands where the run writes, and no earlier run made it",
            f"output.folder={tmp_path}",
            f"teacher.model={teacher}",
            resume=resume,
        )
    pipeline.run_recipe(path, progress=False)
    trained = ["student.trained=" + str(tmp_path / "run" / "model"), 'stages=["sft"]']
    refused("run/model: is read by this run and lies in", *trained)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    refused("model: is read by this run", *trained, output_dir=tmp_path / "link")
    files = tmp_path / "run" / "distill" / "mine.jsonl"
    shutil.copy(data / "chats.jsonl", files)
    refused(r"mine.jsonl: is read by this run and lies in .*distill", f"data.files={files}")
    pipeline.run_recipe(path, tmp_path / "other", overrides=trained, progress=False)
    assert pipeline.check_recipe(read_recipe(path), resume=True)["student"]
    pipeline.run_recipe(path, resume=True, progress=False)


def test_names_that_are_not_utf8(teacher, data, tmp_path):
    odd = os.fsdecode(b"\xff")
    folder = tmp_path / f"\u00e9{odd}"
    model = shutil.copytree(teacher, folder / f"teacher{odd}")
    chats = shutil.copy(data / "chats.jsonl", folder / f"chats{odd}.jsonl")
    plain = small(tmp_path, teacher, data / "chats.jsonl")
    recipe = shutil.copy(plain, folder / f"r{odd}.toml")
    changes = [f"data.files={chats}", f"teacher.model={model}"]
    for resume in (False, True):
        results = pipeline.run_recipe(recipe, resume=resume, overrides=changes, progress=False)
    written = (folder / "run" / "results.json").read_text("utf-8")
    assert json.loads(written) == results and "/\u00e9\\udcff/" in written
    assert "<title>r?</title>" in (folder / "run" / "report.html").read_text("utf-8")


def test_checking_pairs_in_parquet(teacher, tokens, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    changes = ['stages=["dpo"]', "dpo.files=p.parquet"]
    assert pipeline.check_recipe(read_recipe(small(tmp_path, teacher, tokens), changes))


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(RECIPES)) for p in SHIPPED])
def test_shipped_recipes_can_be_run(path, data, tmp_path):
    """Each one is checked against a teacher of its depth, made here, and files of its kinds."""
    recipe = read_recipe(path, ["teacher.model=owner/any"])
    found = re.search(r"\((\d+) layers\)", path.read_text())
    layers = int(found[1]) if found else 4
    model = write_llama(tmp_path / "llama", layers=layers, hidden=64)
    overrides = [f"teacher.model={model}", f"data.files={data / 'chats.jsonl'}"]
    if not isinstance(recipe.data.get("validation", 0.0), float):
        overrides.append(f"data.validation={data / 'chats.jsonl'}")
    if "model" in recipe.student:
        overrides.append(f"student.model={model}")
    for settings in recipe.stages:
        for key, name in (
            ("files", "pairs" if settings.name == "dpo" else "chats"),
            ("prompts", "prompts"),
        ):
            if key in settings.options:
                overrides.append(f"{settings.name}.{key}={data / f'{name}.jsonl'}")
    found = pipeline.check_recipe(read_recipe(path, overrides))
    assert found["missing"] == [] and found["student"]
    kept_layers = len(
        mil.convert(
            mil.load(model),
            init="paper",
            attention_layers=recipe.student.get("attention_layers", "half"),
        ).config.attention_layers
    )
    share = {"half": 2, "quarter": 4, "eighth": 8}.get(recipe.student.get("attention_layers"))
    assert share is None or kept_layers == layers // share


@pytest.mark.parametrize("name", ["published", "ours"])
def test_base_recipes_run(name, teacher, data, tmp_path):
    """Their stages follow each other to the end, in small."""
    overrides = [f"teacher.model={teacher}", f"data.files={data / 'chats.jsonl'}"]
    overrides += ["data.validation=0.2", "training.sequence_length=64", "training.batch_size=4"]
    overrides += ["student.calibration_length=16", "report.prompts=2", "report.max_new_tokens=4"]
    overrides += ["dpo.sequence_length=64", "dpo.prompt_length=32", f"dpo.files={data}/pairs.jsonl"]
    overrides += [f"label.prompts={data / 'prompts.jsonl'}", "label.max_new_tokens=4"]
    path = RECIPES / f"{name}.toml"
    wanted = [s.name for s in read_recipe(path, ["teacher.model=any"]).stages]
    for stage in set(wanted) - {"label", "convert"}:
        overrides.append(f"{stage}.max_steps=1")
    found = pipeline.run_recipe(path, tmp_path / "run", overrides=overrides, progress=False)
    assert [row["stage"] for row in found["stages"]] == wanted
    assert found["stages"][-1]["steps"] == 1


def test_the_documented_recipe_is_one(tmp_path):
    text = (RECIPES.parent / "docs" / "recipes.md").read_text()
    block = re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1]
    path = write(tmp_path / "r.toml", block.replace('"recipes/', f'"{RECIPES}/'))
    recipe = read_recipe(path)
    assert [s.name for s in recipe.stages] == ["convert", "align", "distill", "sft", "dpo"]
    assert recipe["dpo"].options["files"] == [str(tmp_path / "preferences.jsonl")]
    table = re.findall(r"^\| `\[?(\w+)\]?`", text, re.MULTILINE)
    assert set(STAGES) <= set(table)


@pytest.mark.parametrize("page", ["docs/recipes.md", "recipes/README.md"])
def test_documented_recipes_read_the_files_they_name(page, tmp_path):
    """Nothing of the recipe that they extend is left: those files are nowhere."""
    block = re.search(r"```toml\n(.*?)```", (RECIPES.parent / page).read_text(), re.DOTALL)[1]
    recipe = read_recipe(write(tmp_path / "r.toml", block.replace('"recipes/', f'"{RECIPES}/')))
    files = list(recipe.data["files"])
    for settings in recipe.stages:
        files += settings.options.get("files", [])
        files += [settings.options[key] for key in ("prompts",) if key in settings.options]
    assert {str(Path(name).parent) for name in files} == {str(tmp_path)}


def test_every_stage_has_a_section():
    assert set(KEYS) == {"teacher", "student", "data", "training", "report", "output"} | (
        set(STAGES) - {"convert"}
    )


def test_relative_paths_work_from_anywhere(teacher, tokens, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "t.npy").write_bytes(tokens.read_bytes())
    small(tmp_path / "here", os.path.relpath(teacher, tmp_path / "here"), "t.npy")
    monkeypatch.chdir(tmp_path)
    pipeline.run_recipe("here/small.toml", progress=False)
    monkeypatch.chdir(tmp_path / "here")
    found = pipeline.run_recipe("small.toml", resume=True, progress=False)
    assert found["stages"][-1]["steps"] == 2

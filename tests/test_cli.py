"""The command line: what commands print, JSON, one-line errors with status 2, recipes, chats.

Most tests call `main` in this process; how a process ends (status, Ctrl-C, a closed pipe) is looked
at from outside.
"""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_llama

import mambainllama as mil
from mambainllama.cli import main, make_parser
from mambainllama.conversation import Conversation
from mambainllama.recipe import read_recipe

COMMANDS = (
    "info",
    "convert",
    "layers",
    "label",
    "distill",
    "sft",
    "dpo",
    "generate",
    "chat",
    "eval",
    "bench",
    "demo",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(write_llama(tmp_path_factory.mktemp("cli") / "llama", scale=2.0))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "tokens.npy"
    np.save(path, np.random.default_rng(3).integers(0, 264, (24, 16), dtype=np.uint16))
    return str(path)


def run(capsys, *arguments):
    """(status, standard output, standard error) of a command."""
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys, *arguments):
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(out)


def process(*arguments, env=None, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(mil.__file__).parents[1]), **(env or {})}
    options = {"stdout": subprocess.PIPE, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "mambainllama", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


# ---- help and errors


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for option in ("--device", "--dtype", "--seed", "--json", "--debug", "--threads", "example:"):
        assert option in out
    seed = "the recipe's" if command == "distill" else "0"
    words = " ".join(out.split())
    assert "(default: [" not in out and f"everything random (default: {seed})" in words


@pytest.mark.parametrize("command", ["label", "generate", "chat", "eval", "bench"])
def test_weights_are_read_into_memory_where_asked_for(command, teacher, tokens, monkeypatch):
    """Each command that generates or scores hands --no-mmap on."""
    asked = []

    def load(path, mmap, **rest):
        asked.append(mmap)
        raise mil.ArgumentError("enough")

    monkeypatch.setattr("mambainllama.model.load", load)
    words = {
        "label": ["prompts.jsonl", "answers.jsonl"],
        "generate": ["hello"],
        "eval": ["--data", tokens],
    }
    for options in ([], ["--no-mmap"]):
        assert main([command, teacher, *words.get(command, []), *options]) == 2
    assert asked == [True, False]


def test_usage_errors_have_status_2(capsys):
    for arguments in (
        [],
        ["destil"],
        ["info"],
        ["generate", "m", "--prompt", "x"],
        ["bench", "m", "--lengths", "a,b"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["info", "m", "--prompt", "x"])
    assert "usage: mambainllama info" in capsys.readouterr().err


def test_errors_are_one_line(capsys, tmp_path, teacher, tokens):
    (tmp_path / "link").symlink_to(teacher)
    cases = [
        ("convert", teacher, tmp_path / "link"),
        ("info", tmp_path / "none"),
        ("info", teacher, "--device", "cuda:0"),
        ("info", teacher, "--threads", "0"),
        ("convert", teacher, tmp_path / "out", "--attention-layers", "7"),
        ("convert", teacher, tmp_path / "out", "--attention-layers", "most"),
        ("convert", teacher, tmp_path / "out", "--calibration", tmp_path / "none.npy"),
        ("distill", tmp_path / "none.toml"),
        ("generate", teacher, "hello", "--draft-tokens", "99"),
        ("eval", teacher, "--data", tmp_path / "none.jsonl"),
        ("bench", teacher, "--lengths", "0"),
        ("demo", "--device", "cuda"),
        ("demo", "--dtype", "bfloat16"),
        ("info", teacher, "--batch", "0"),
        ("info", teacher, "--context", "0"),
        ("info", teacher, "--batch", "1" + 20 * "0"),
        ("bench", teacher, "--tokens", "1" + 20 * "0"),
        ("bench", teacher, "--lengths", "1" + 20 * "0"),
        ("info", teacher, "--weights", "int8"),
        ("convert", teacher, teacher),
        ("convert", teacher, tmp_path / "out", "--calibration", tokens, "--calibration-rows", "0"),
        (
            "convert",
            teacher,
            tmp_path / "out",
            "--calibration",
            tokens,
            "--calibration-length",
            "0",
        ),
        ("eval", teacher, "--data", tokens, "--max-batches", "0"),
        ("sft", teacher, "--data", tokens, "--set", "max_steps"),
    ]
    for arguments in cases:
        status, out, error = run(capsys, *arguments)
        assert (status, out) == (2, ""), arguments
        assert error.startswith(f"mambainllama {arguments[0]}: ") and error.count("\n") == 1, error
    for arguments in (("info", teacher, "--batch"), ("bench", teacher, "--lengths")):
        _, _, error = run(capsys, *arguments, 10**20)
        assert f"must be an integer of at most {2**63 - 1}, not {10**20}" in error
    with pytest.raises(mil.Error):
        main(["info", str(tmp_path / "none"), "--debug"])


# ---- commands


def test_info(capsys, teacher):
    facts = run_json(capsys, "info", teacher)
    assert (facts["layers"], facts["attention_layers"], facts["vocab_size"]) == (2, [0, 1], 264)
    assert facts["state_bytes"]["16384"] == 8 * facts["state_bytes"]["2048"]
    _, out, _ = run(capsys, "info", teacher)
    assert "state at 2048 tokens" in out


def test_convert_and_eval(capsys, teacher, tokens, tmp_path):
    facts = run_json(
        capsys,
        "convert",
        teacher,
        tmp_path / "h",
        "--attention-layers",
        "1",
        "--calibration",
        tokens,
        "--calibration-length",
        "16",
    )
    assert facts["attention_layers"] == [1] and facts["start"] == "fitted"
    assert mil.load(tmp_path / "h").config.mixer == "mamba2"
    status, out, error = run(capsys, "convert", teacher, tmp_path / "p", "--mixer", "mamba1")
    assert (status, error) == (0, "") and "start: paper" in out
    found = run_json(capsys, "eval", tmp_path / "h", "--teacher", teacher, "--data", tokens)
    assert set(found) == {"kl", "perplexity", "teacher_perplexity", "agreement", "tokens"}
    assert run_json(capsys, "eval", teacher, "--data", tokens)["perplexity"] == pytest.approx(
        found["teacher_perplexity"], rel=1e-5
    )


def test_figures_of_a_broken_model_are_json(capsys, teacher, tokens, tmp_path):
    model = mil.load(teacher)
    model.parameters()["model.norm.weight"][:] = np.nan
    model.save(tmp_path / "broken")
    assert np.isnan(mil.evaluate.perplexity(model, np.arange(8)[None]))
    for arguments in ((), ("--teacher", teacher)):
        status, out, _ = run(
            capsys, "eval", tmp_path / "broken", "--data", tokens, *arguments, "--json"
        )
        assert status == 0 and "NaN" not in out and json.loads(out)["perplexity"] is None


def test_layers(capsys, teacher, tokens, tmp_path):
    """Layers chosen by measurement, and a conversion that keeps the same ones."""
    calibration = ("--calibration", tokens, "--calibration-length", "16")
    facts = run_json(capsys, "layers", teacher, *calibration, "--keep", "1", "--method", "greedy")
    assert set(facts["scores"]) == {"0", "1"} and len(facts["layers"]) == 1
    status, out, error = run(capsys, "layers", teacher, *calibration, "--keep", "half")
    assert (status, error) == (0, "") and "--attention-layers" in out and "evenly spread" in out
    converted = run_json(
        capsys, "convert", teacher, tmp_path / "h", "--attention-layers", "auto:1", *calibration
    )
    assert converted["attention_layers"] == facts["layers"]
    status, out, error = run(capsys, "layers", teacher, *calibration, "--keep", "5")
    assert status == 2 and "2 attention layers" in error and error.count("\n") == 1


def test_layers_prints_the_conversion(capsys, teacher, tokens, tmp_path):
    """A command that runs as it stands, and converts as was measured."""
    options = ("--calibration-rows", "8", "--calibration-length", "16", "--seed", "3")
    options += ("--dtype", "float32", "--device", "cpu", "--calibration", tokens)
    _, out, _ = run(capsys, "layers", teacher, "--keep", "1", *options)
    program, *command = shlex.split(out.splitlines()[-1])
    command[command.index("OUTPUT")] = str(tmp_path / "h")
    parsed = make_parser().parse_args(command)
    assert program == "mambainllama" and parsed.calibration == [tokens]
    assert (parsed.calibration_rows, parsed.calibration_length, parsed.seed) == (8, 16, 3)
    assert (parsed.dtype, parsed.device) == ("float32", "cpu")
    assert run(capsys, *command)[0] == 0


def test_generate(capsys, teacher, monkeypatch):
    [row] = run_json(capsys, "generate", teacher, "hello", "--max-new-tokens", "8")
    [read] = run_json(capsys, "generate", teacher, "hello", "--max-new-tokens", "8", "--no-mmap")
    assert read["token_ids"] == row["token_ids"]
    assert len(row["token_ids"]) <= 8 and row["stats"]["new_tokens"] == len(row["token_ids"])
    status, out, _ = run(capsys, "generate", teacher, "hello", "--max-new-tokens", "8")
    assert status == 0 and out == row["text"] + "\n"
    options = ("--max-new-tokens", "8", "--draft", "ngram", "--stats")
    status, again, stats = run(capsys, "generate", teacher, "hello", *options)
    assert again == out and "tokens/s" in stats
    _, behind, _ = run(capsys, "generate", teacher, "--max-new-tokens", "8", "hello")
    assert behind == out
    _, dashes, _ = run(capsys, "generate", teacher, "hello", "--max-new-tokens", "8", "--", "-v")
    assert "== -v\n" in dashes
    rows = run_json(
        capsys, "generate", teacher, "hello", "other", "--max-new-tokens", "4", "--chat"
    )
    assert len(rows) == 2 and rows[0]["prompt"][0]["role"] == "user"
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("hello"))
    status, piped, _ = run(capsys, "generate", teacher, "--max-new-tokens", "8")
    assert piped == out


def test_sampling_is_that_of_the_library(capsys, teacher):
    settings = {
        "max_new_tokens": 12,
        "temperature": 1.5,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.4,
        "seed": 3,
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    [row] = run_json(capsys, "generate", teacher, "hello", *options)
    [wanted] = mil.generate(mil.load(teacher), ["hello"], **settings)
    assert row["token_ids"] == list(wanted.token_ids)
    status, _, error = run(capsys, "generate", teacher, "hello", "--min-p", "2")
    assert status == 2 and "min_p" in error and error.count("\n") == 1


def test_bench(capsys, teacher, tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--lengths", "8,16", "--tokens", "2", "--repeats", "1")
    tables = run_json(capsys, "bench", teacher, *options)
    assert [row["length"] for row in tables[teacher]] == [8, 16]
    status, out, _ = run(capsys, "bench", teacher, *options, "--plot", tmp_path / "s.png")
    assert status == 0 and "decode tokens/s" in out and (tmp_path / "s.png").exists()
    for name, words in (("none/s.png", "cannot be written"), ("s.xyz", "xyz")):
        status, _, error = run(capsys, "bench", teacher, *options, "--plot", tmp_path / name)
        assert status == 2 and words in error and error.count("\n") == 1
    odd = tmp_path / b"\xff".decode("utf-8", "surrogateescape")  # a name that is no text
    odd.symlink_to(teacher)
    status, _, error = run(capsys, "bench", odd, *options, "--plot", tmp_path / "odd.png")
    assert status == 0 and (tmp_path / "odd.png").exists(), error


def test_a_full_disk_leaves_the_old_picture(tmp_path):
    from mambainllama.plot import finish

    class Full:
        def savefig(self, path, **settings):
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

    old = tmp_path / "s.png"
    old.write_bytes(b"old")
    with pytest.raises(mil.FileError, match=r"s\.png: the figure cannot be written \(No space"):
        finish(Full(), old)
    assert old.read_bytes() == b"old" and list(tmp_path.iterdir()) == [old]


def test_bad_records_can_be_left_out(capsys, teacher, tmp_path):
    data = tmp_path / "a.jsonl"
    good = json.dumps(
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}
    )
    data.write_text(f"{good}\nnot JSON\n{good}\n{{}}\n")
    options = ("sft", teacher, "--data", data, "--output", tmp_path / "run", "--set", "max_steps=1")
    status, _, error = run(capsys, *options)
    assert status == 2 and f"{data}:2: not JSON" in error
    final = run_json(capsys, *options, "--skip-bad")
    assert final["skipped_records"] == 2
    status, _, error = run(capsys, *options, "--skip-bad")
    assert f"2 bad records were left out, the first: {data}:2: not JSON" in error


# ---- recipes


def write_recipe(folder, teacher, tokens, extra="", distill="max_steps = 2\nbatch_size = 4"):
    path = folder / "recipe.toml"
    path.write_text(
        f'[teacher]\nmodel = "{teacher}"\n'
        "[student]\nattention_layers = [1]\ncalibration_length = 16\n"
        f'[data]\nfiles = "{tokens}"\nvalidation = 0.25\n[distill]\n{distill}\n{extra}'
    )
    return path


def test_distill_runs_a_recipe(capsys, teacher, tokens, tmp_path):
    path = write_recipe(tmp_path, teacher, tokens, '[output]\nfolder = "out"\n')
    found = run_json(capsys, "distill", path, "--set", "distill.learning_rate=1e-3")
    assert found["step"] == 2 and "eval_kl" in found
    assert mil.load(tmp_path / "out" / "model").config.mixer == "mamba2"
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    record = json.loads((tmp_path / "out" / "distill" / "run.json").read_text())
    assert record["learning_rate"] == 1e-3
    again = run_json(capsys, "distill", path, "--set", "distill.learning_rate=1e-3", "--resume")
    assert again == found
    status, out, _ = run(capsys, "distill", path, "--check")
    assert status == 0 and "fine" in out and f"output: {tmp_path / 'out'}" in out
    _, out, _ = run(capsys, "distill", path, "--check", "--output", "elsewhere")
    assert "output: elsewhere" in out
    _, out, _ = run(capsys, "distill", path, "--resume", "--set", "distill.learning_rate=1e-3")
    assert out.startswith(f"trained model: {tmp_path / 'out' / 'model'}\n")
    trained = tmp_path / "more.toml"
    trained.write_text(
        f'[teacher]\nmodel = "{teacher}"\n[student]\ntrained = "out/model"\n'
        f'[data]\nfiles = "{tokens}"\n'
        "[distill]\nmax_steps = 1\nbatch_size = 4\n"
    )
    assert run_json(capsys, "distill", trained)["step"] == 1
    assert (tmp_path / "run" / "model").is_dir()


def test_seed_zero_takes_the_place_of_a_recipes(teacher, tokens, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, teacher, tokens, "[training]\nseed = 7\n")
    found = []
    monkeypatch.setattr(
        "mambainllama.pipeline.check_recipe",
        lambda recipe, *_: found.append(recipe["distill"].config.seed) or {"output": ""},
    )
    monkeypatch.setattr("mambainllama.cli.plan_words", str)
    for seed in ((), ("--seed", "0"), ("--seed", "5")):
        assert main(["distill", str(path), "--check", *seed]) == 0
    assert found == [7, 0, 5]


def test_a_recipe_that_only_labels_names_the_answers(capsys, teacher, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    path = tmp_path / "r.toml"
    path.write_text(
        f'stages = ["label"]\n[teacher]\nmodel = "{teacher}"\n[student]\ntrained = "{teacher}"\n'
        '[label]\nprompts = "p.jsonl"\nmax_new_tokens = 2\n'
    )
    status, out, error = run(capsys, "distill", path)
    assert status == 0, error
    assert out.startswith(f"made: {tmp_path / 'run' / 'label' / 'answers.jsonl'}\nreport: ")


@pytest.mark.parametrize(
    "extra, distill, words",
    [
        (
            "",
            "lerning_rate = 1",
            "unknown key 'lerning_rate' in [distill]; did you mean 'learning_rate'?",
        ),
        ("[ouput]\nfolder = 'x'", "", "unknown section [ouput]; did you mean 'output'?"),
        ("", "learning_rate = -1", "[distill] learning_rate=-1: expected a number above 0"),
        ("", "learning_rate = ", "not TOML"),
        (
            "[output]\nfolder = 'x'\nfiles = 'y'",
            "",
            "unknown key 'files' in [output]; known: folder",
        ),
    ],
)
def test_recipes_are_checked(extra, distill, words, teacher, tokens, tmp_path):
    path = write_recipe(tmp_path, teacher, tokens, extra, distill)
    with pytest.raises(mil.Error) as caught:
        read_recipe(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_recipes_that_lack_something(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[teacher]\nmodel = "a/b"\n')
    with pytest.raises(mil.ArgumentError, match=r"\[data\] needs 'files'"):
        read_recipe(path)
    path.write_text(
        '[teacher]\nmodel = "a/b"\n[data]\nfiles = ["x.npy"]\n'
        '[student]\ntrained = "s"\ninit = "paper"'
    )
    with pytest.raises(mil.ArgumentError, match="both 'trained' and 'init'"):
        read_recipe(path)
    path.write_text('[teacher]\nmodel = "a/b"\n[data]\nfiles = ["x.npy"]\n')
    recipe = read_recipe(path, ["distill.epochs=3", "student.mixer=mamba1"])
    assert recipe["distill"].config.epochs == 3 and recipe.student["mixer"] == "mamba1"
    assert recipe.teacher["model"] == "a/b" and recipe.data["files"] == [str(tmp_path / "x.npy")]
    with pytest.raises(mil.ArgumentError, match="expected section.key=value"):
        read_recipe(path, ["epochs=3"])


def test_label_then_fine_tune(capsys, teacher, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"hello {n}"}) + "\n" for n in range(6)))
    answers, output = tmp_path / "a.jsonl", tmp_path / "run"
    found = run_json(capsys, "label", teacher, prompts, answers, "--max-new-tokens", "6")
    assert found["answers"] == 6
    status, _, error = run(
        capsys, "label", teacher, prompts, tmp_path / "b.jsonl", "--top-logprobs", "5000"
    )
    assert status == 2 and "top=5000" in error and not (tmp_path / "b.jsonl").exists()
    options = ("--data", answers, "--output", output, "--set", "skip_bad=true")
    final = run_json(capsys, "sft", teacher, *options, "--set", "learning_rate=1e-3")
    assert final["step"] == 1 and mil.load(output / "model").num_parameters
    status, _, error = run(capsys, "sft", teacher, *options, "--set", "learnig_rate=1")
    assert status == 2 and "did you mean 'learning_rate'?" in error


def test_preferences(capsys, teacher, tmp_path):
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / "run"
    rows = [{"prompt": f"say {n}", "chosen": "yes", "rejected": "no"} for n in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--data", pairs, "--output", output, "--set", "learning_rate=1e-3")
    final = run_json(capsys, "dpo", teacher, *options, "--validation", "0.25")
    assert final["step"] == 2 and "eval_margin" in final
    assert (output / "reference" / "pairs.f64").exists()
    assert run_json(capsys, "dpo", teacher, *options, "--reference", teacher)["accuracy"] >= 0
    status, _, error = run(capsys, "dpo", teacher, *options, "--set", "bata=1")
    assert status == 2 and "did you mean 'beta'?" in error


def test_labels_without_answers(capsys, teacher, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(4)))
    labels = tmp_path / "texts.labels"
    found = run_json(capsys, "label", teacher, texts, labels, "--as-is", "--top-logprobs", "5")
    assert found == {"output": str(labels), "top_logprobs": 5}
    senseless = ("--temperature", "0.7", "--max-new-tokens", "9", "--top-p", "0.9", "--seed", "3")
    status, _, error = run(capsys, "label", teacher, texts, tmp_path / "x", "--as-is", *senseless)
    assert status == 2 and error.count("\n") == 1 and not (tmp_path / "x").exists()
    assert all(option in error for option in senseless)
    status, _, error = run(
        capsys, "label", teacher, texts, tmp_path / "x", "--as-is", "--max-batch", "0"
    )
    assert status == 2 and "max_batch=0: expected a whole number of at least 1" in error
    answers = tmp_path / "answers.jsonl"
    run_json(
        capsys, "label", teacher, texts, answers, "--max-new-tokens", "4", "--top-logprobs", "3"
    )
    assert (tmp_path / "answers.labels" / "labels.json").exists()


# ---- chats


def test_conversations_read_only_what_is_new(teacher):
    model = mil.load(teacher)
    talk = Conversation(model, system="be brief", max_new_tokens=6)
    first = talk.ask("hello")
    read = len(talk.tokens)
    second = talk.ask("and now?")
    assert talk.stats.cached_tokens >= read - 1
    assert [m["role"] for m in talk.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    # The same answers as from a fresh reading of the same chat.
    for count, answer in ((2, first), (4, second)):
        if "\ufffd" not in first + second:
            [fresh] = mil.generate(model, [talk.messages[:count]], max_new_tokens=6)
            assert fresh.text == answer
    talk.reset()
    assert talk.ask("hello") == first


def test_a_stop_string_is_not_said(teacher):
    """The next turn reads what the messages say, not the tokens of a stop string."""
    model = mil.load(teacher)
    whole = Conversation(model, max_new_tokens=20).ask("hello")
    cut = next(piece for piece in whole[1:] if piece not in whole[0] + "\ufffd")
    talk = Conversation(model, max_new_tokens=20, stop=[cut])
    first = talk.ask("hello")
    assert first == whole[: whole.index(cut)]
    second = talk.ask("and now?")
    [fresh] = mil.generate(model, [talk.messages[:3]], max_new_tokens=20, stop=[cut])
    assert second == fresh.text and talk.stats.cached_tokens == 0
    assert talk.stats.prompt_tokens == fresh.stats.prompt_tokens


def test_an_interrupted_answer_stays_in_the_chat(teacher):
    talk = Conversation(mil.load(teacher), max_new_tokens=50)

    def stop(index, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("hello", stop)
    assert talk.messages[-1]["role"] == "assistant"
    assert isinstance(talk.ask("go on"), str)


def test_chat_on_a_pipe(teacher):
    chat = process("chat", teacher, "--max-new-tokens", "4", "--json", stdin=subprocess.PIPE)
    out, error = chat.communicate("hello\n\n/reset\nhello\n/exit\n", timeout=60)
    rows = [json.loads(line) for line in out.splitlines()]
    assert chat.returncode == 0 and error == "" and len(rows) == 2 and rows[0] == rows[1]


# ---- processes


def test_interrupting_a_run_says_what_it_saved(teacher, tokens, tmp_path):
    path = write_recipe(tmp_path, teacher, tokens, distill="max_steps = 100000\nbatch_size = 4")
    command = process("distill", path)
    metrics = tmp_path / "run" / "distill" / "metrics.jsonl"
    while command.poll() is None and (not metrics.exists() or metrics.stat().st_size < 500):
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "interrupted after step" in error and "Traceback" not in error
    assert "--resume" in error
    assert list((tmp_path / "run" / "distill" / "checkpoints").glob("step-*"))


def test_a_closed_pipe_is_no_error(teacher):
    command = process("generate", teacher, "hello", "--max-new-tokens", "400", "--stop", "<none>")
    command.stdout.close()
    assert command.wait(60) == 0 and command.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(teacher):
    with open("/dev/full", "w") as full:
        command = process("info", teacher, stdout=full)
        _, error = command.communicate(timeout=60)
    assert command.returncode == 2 and "No space left" in error and error.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_text_that_is_none(teacher, encoding):
    """Bytes that are no text, and characters that a terminal has not, end no command."""
    env = {"PYTHONIOENCODING": encoding}
    odd = b"\xff".decode("utf-8", "surrogateescape")
    options = ("--max-new-tokens", "2")
    for more in ((), ("--json",)):
        command = process(
            "generate",
            teacher,
            odd,
            "ï",
            "--stop",
            odd,
            *options,
            *more,
            env=env,
        )
        out, error = command.communicate(timeout=60)
        assert command.returncode == 0, error
    assert len(json.loads(out)) == 2
    for verb in ("generate", "chat"):
        command = process(verb, teacher, *options, env=env, stdin=subprocess.PIPE)
        command.stdin.buffer.write(b"h\xffllo")
        _, error = command.communicate(timeout=60)
        assert (command.returncode, error) == (0, "")


def test_without_standard_input(teacher):
    command = process("chat", teacher, preexec_fn=lambda: os.close(0))
    _, error = command.communicate(timeout=60)
    assert (command.returncode, error) == (0, "")


def test_version(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--version"])
    assert mil.__version__ in capsys.readouterr().out

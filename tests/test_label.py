"""Labelling gives records that training reads, in order, and goes on where it stopped."""

import errno
import json
import sys

import pytest
from tiny_models import write_llama

import mambainllama as mil
from mambainllama import label
from mambainllama.data import read_documents


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return mil.load(write_llama(tmp_path_factory.mktemp("label") / "llama", scale=2.0))


PROMPTS = [f"question {n}" for n in range(7)]


def test_answers_become_records(teacher, tmp_path):
    rows = label(teacher, PROMPTS, tmp_path / "a.jsonl", max_new_tokens=5)
    assert [row["messages"][0]["content"] for row in rows] == PROMPTS
    [alone] = mil.generate(teacher, [rows[3]["messages"][:1]], max_new_tokens=5)
    assert rows[3]["messages"][1] == {"role": "assistant", "content": alone.text}
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    documents = read_documents(
        tmp_path / "a.jsonl", teacher.tokenizer, vocab=264, loss_on="answers", skip_bad=True
    )
    assert len(documents) + documents.skipped == len(PROMPTS)


def test_a_stopped_run_goes_on(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["mambainllama.label"], "BLOCK", 2)
    whole = label(teacher, PROMPTS, tmp_path / "whole.jsonl", max_new_tokens=4, temperature=0.9)
    part = tmp_path / "part.jsonl"
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:4]) + lines[4][:9])  # killed while it wrote
    with pytest.raises(mil.StateError, match="is there already"):
        label(teacher, PROMPTS, part)
    rest = label(teacher, PROMPTS, part, resume=True, max_new_tokens=4, temperature=0.9)
    assert rest == whole[4:] and part.read_text() == "".join(lines)
    with pytest.raises(mil.StateError, match=r"part\.jsonl:2: cannot resume: .* prompt 2"):
        label(teacher, [PROMPTS[0], "another", *PROMPTS[2:]], part, resume=True)
    with pytest.raises(mil.StateError, match="holds 7 answers"):
        label(teacher, PROMPTS[:2], part, resume=True)


@pytest.mark.parametrize("tail", ["", "my words", '{"messages": [{"role": "system"'])
def test_other_files_stay_whole(teacher, tmp_path, tail):
    """A file that is no run's output loses nothing, whatever its last line is."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "question 0"}' + tail)
    before = path.read_bytes()
    with pytest.raises(mil.StateError, match=r"mine\.jsonl:1: cannot resume"):
        label(teacher, PROMPTS, path, resume=True)
    assert path.read_bytes() == before


def test_kills_at_every_byte(teacher, tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    prompts = ["é", "half a pair: \ud83d"]
    label(teacher, prompts, whole, max_new_tokens=2)
    content = whole.read_bytes()
    for length in range(0, len(content), 7):
        part.write_bytes(content[:length])
        label(teacher, prompts, part, resume=True, max_new_tokens=2)
        assert part.read_bytes() == content


def test_kinds_of_prompts(teacher, tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "old"}]
    path = tmp_path / "p.jsonl"
    records = [{"prompt": "a"}, {"messages": chat}, {"text": "a"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = label(teacher, path, max_new_tokens=3)
    assert rows[0] == rows[1] == rows[2]
    bare = mil.load(write_llama(tmp_path / "bare", scale=2.0))
    bare.tokenizer.chat_template = None
    [row] = label(bare, ["abc"], max_new_tokens=3)
    assert row["text"].startswith("abc")


def test_mistakes(teacher, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(mil.FormatError, match=r"p\.jsonl:2: expected 'prompt'"):
        label(teacher, path)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(mil.FormatError, match=r"none\.jsonl: holds no prompt"):
        label(teacher, tmp_path / "none.jsonl")
    (tmp_path / "lines.txt").write_text(
        "one\ntwo\n"
    )  # read as data it is one text, not two prompts
    with pytest.raises(mil.ArgumentError, match=r"lines\.txt: prompts come in \.jsonl"):
        label(teacher, tmp_path / "lines.txt")
    with pytest.raises(mil.FormatError, match=r"prompts\[0\]"):
        label(teacher, [[{"role": "assistant", "content": "x"}]])
    with pytest.raises(mil.ArgumentError):
        label(teacher, 7)
    with pytest.raises(mil.FormatError, match="'content', both strings"):
        label(teacher, [[{"role": "user", "content": 5}]])
    for settings in ({"seed": "x"}, {"max_batch": "x"}):
        with pytest.raises(mil.ArgumentError, match="='x': expected a whole number"):
            label(teacher, ["a"], **settings)
    with pytest.raises(mil.FileError, match="directory"):
        label(teacher, ["a"], tmp_path, resume=True)
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "my own"}\n{"text": "without a line end"}')
    with pytest.raises(mil.ArgumentError, match="holds the prompts"):
        label(teacher, mine, mine, resume=True)
    assert mine.read_text().endswith('without a line end"}')
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(mil.StateError, match="not an answer to prompt 1"):
        label(teacher, ["a"], tmp_path / "bytes.jsonl", resume=True)


def test_nothing_is_answered_that_could_not_be_kept(teacher, tmp_path, monkeypatch):
    module = sys.modules["mambainllama.label"]
    monkeypatch.setattr(module, "generate", None)
    with pytest.raises(mil.FileError, match="No such file or directory"):
        label(teacher, ["a"], tmp_path / "none" / "a.jsonl")
    with pytest.raises(TypeError):  # what stopped it left no file in the way of the next try
        label(teacher, ["a"], tmp_path / "a.jsonl")
    assert not list(tmp_path.iterdir())
    labels = tmp_path / "a.labels"
    labels.mkdir()
    with pytest.raises(TypeError):  # an empty folder is in nobody's way
        label(teacher, ["a"], tmp_path / "a.jsonl", top_logprobs=4)
    (labels / "labels.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(mil.StateError, match=r"a\.labels: is there already.*delete a\.labels"):
            label(teacher, ["a"], tmp_path / "a.jsonl", top_logprobs=4, resume=resume)
    with pytest.raises(mil.ArgumentError, match=r"a file that ends in \.jsonl"):
        label(teacher, ["a"], tmp_path / "a.txt", top_logprobs=4)
    for settings in ({"top_logprobs": 1000}, {"top_logprobs": 4, "sequence_length": 1}):
        with pytest.raises(mil.ArgumentError, match="expected a whole number"):
            label(teacher, ["a"], tmp_path / "a.jsonl", **settings)


def test_a_full_disk_leaves_whole_lines(teacher, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    label(teacher, PROMPTS[:1], path, max_new_tokens=2)
    whole = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(mil.FileError, match="No space left"):
            label(teacher, PROMPTS[:2], path, max_new_tokens=2, resume=True)
        assert path.read_bytes() == whole
        with pytest.raises(mil.FileError, match="No space left"):  # and no empty file
            label(teacher, PROMPTS[:2], tmp_path / "b.jsonl", max_new_tokens=2)
    assert list(tmp_path.iterdir()) == [path]

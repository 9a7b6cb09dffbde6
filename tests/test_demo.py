"""The demo runs offline from what the package holds; its figures are of its own students."""

import json

import numpy as np
import pytest

import mambainllama as mil
from mambainllama import corpus, demo


@pytest.fixture(scope="module")
def texts():
    return corpus.documents()


def test_corpus_is_prose_without_repeats(texts):
    train, held = texts
    assert len(train) > 3000 and len(held) > 100
    assert not set(train) & set(held) and len(set(train)) == len(train)
    assert all(corpus.is_held_out(text) for text in held)
    lines = (line for text in train for line in text.splitlines())
    assert not any(line.lstrip().startswith(">>>") for line in lines)


def test_clean_drops_examples_and_rulers():
    text = "Add two.\n\n    >>> add(1,\n    ...     2)\n    3\n\n    ====\n    More words."
    assert corpus.clean(text) == "Add two.\n\nMore words."


def test_teacher_knows_its_language(texts):
    teacher = demo.teacher()
    found = mil.evaluate.perplexity(
        teacher, [{"text": text} for text in texts[1][:60]], sequence_length=256
    )
    assert found < 100  # of 2,048 tokens; a uniform guess has 2,048
    size = sum(path.stat().st_size for path in teacher_files())
    assert size < 12e6
    [answer] = mil.generate(teacher, "Return the", max_new_tokens=20)
    assert answer.text.strip()


def teacher_files():
    from pathlib import Path

    folder = Path(demo.__file__).parent / "packaged" / "teacher"
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_interrupted_demo_does_not_advise_what_it_cannot(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt("resume=True (--resume) goes on")

    for name in ("convert", "compare", "sample_rows"):
        monkeypatch.setattr(demo, name, lambda *arguments, **options: None)
    monkeypatch.setattr(demo, "distill", interrupted)
    made = demo.Demo(tmp_path, 2, 0, True)
    made.teacher = made.data = made.held = None
    with pytest.raises(KeyboardInterrupt, match="^interrupted; the next demo starts anew$"):
        made.make("none")


@pytest.mark.slow
def test_demo_end_to_end(texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "documents", lambda: (texts[0][:300], texts[1][:20]))
    monkeypatch.setattr(demo, "LENGTHS", (16, 64))
    result = demo.Demo(tmp_path, 6, 0, False).run()
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    out = capsys.readouterr().out
    for name in demo.STUDENTS:
        found = result["comparisons"][name]
        assert found["after"]["kl"] < found["before"]["kl"]
        assert f"{found['after']['kl']:.3f}" in out
        assert mil.load(tmp_path / name / "model").config.mixer == "mamba2"
    assert all(way["same_tokens"] for way in result["speculation"])
    assert np.isfinite(
        [row["decode_tokens_per_second"] for row in result["speed"]["teacher"]]
    ).all()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "loss.png").exists() and (tmp_path / "speed.png").exists()
    # A second run replaces the first's students.
    monkeypatch.setattr(demo, "STUDENTS", {"none": "none"})
    demo.Demo(tmp_path, 2, 0, True).run()
    assert not list((tmp_path / "none").glob("previous-*")) and capsys.readouterr().out == ""

"""Data become batches: nothing mixes or is lost, order repeats, bad input is told by its place."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest

from mambainllama import data as mil_data
from mambainllama.data import Batches, Documents, read_documents, sample_rows
from mambainllama.errors import (
    ArgumentError,
    DtypeError,
    Error,
    FileError,
    FormatError,
    NotFoundError,
    ShapeError,
)


class Bytes:
    """A tokenizer of bytes: 0 ends a text, 1 begins one; a chat is <role>content</>."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [2 + byte for byte in text.encode()]

    def encode_batch(self, texts, add_special_tokens=True):
        return [self.encode(text, add_special_tokens) for text in texts]

    def apply_chat_template(self, messages, add_generation_prompt=False):
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text + "<assistant>" * add_generation_prompt


def write_lines(path, records):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    return path


@pytest.fixture
def texts():
    random = np.random.default_rng(0)
    return ["".join(map(chr, random.integers(97, 123, n))) for n in (5, 40, 1, 17, 100, 3, 33)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_text_files(tmp_path, texts, suffix):
    path = write_lines(tmp_path / f"a{suffix}", [{"text": text} for text in texts])
    documents = read_documents(path, Bytes(), vocab=300)
    assert len(documents) == len(texts)
    for index, text in enumerate(texts):
        assert documents[index].tolist() == [*Bytes().encode(text), 0]
    assert documents.fingerprint() == read_documents(path, Bytes(), vocab=300).fingerprint()


def test_records_folders_and_plain_text(tmp_path, texts):
    write_lines(tmp_path / "b.jsonl", [{"text": t} for t in texts[:3]])
    write_lines(tmp_path / "c.jsonl.gz", [{"text": t} for t in texts[3:]])
    folder = read_documents(tmp_path, Bytes(), vocab=300)
    listed = read_documents([{"text": t} for t in texts], Bytes(), vocab=300)
    assert folder.fingerprint() == listed.fingerprint()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "x.txt").write_text("one\ntwo\n")
    assert read_documents(str(tmp_path / "plain"), Bytes(), vocab=300)[0].tolist()[-1] == 0


def test_parquet(tmp_path, texts):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    documents = read_documents(tmp_path / "a.parquet", Bytes(), vocab=300)
    assert [len(documents[i]) for i in range(len(texts))] == [len(t) + 2 for t in texts]
    both = {"messages": [None, [{"role": "user", "content": "a"}]], "text": ["abc", None]}
    parquet.write_table(pyarrow.table(both), tmp_path / "b.parquet")
    assert len(read_documents(tmp_path / "b.parquet", Bytes(), vocab=300)) == 2
    good = (tmp_path / "a.parquet").read_bytes()
    for begin in range(4, len(good) - 8, 40):
        damaged = good[:begin] + b"\xff" * 8 + good[begin + 8 :]
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            read_documents(tmp_path / "a.parquet", Bytes(), vocab=300)
        except Error as error:
            assert "a.parquet" in str(error) and "\n" not in str(error)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArgumentError, match="pip install pyarrow"):
        read_documents(tmp_path / "a.parquet", Bytes(), vocab=300)


class SavedRows(list):
    """As much of datasets.Dataset as is used."""

    @property
    def column_names(self):
        return list(self[0])

    def select_columns(self, names):
        return SavedRows({name: row[name] for name in names} for row in self)


def test_datasets_in_memory(texts):
    rows = SavedRows({"text": text, "id": i} for i, text in enumerate(texts))
    found = read_documents(rows, Bytes(), vocab=300)
    listed = read_documents([{"text": t} for t in texts], Bytes(), vocab=300)
    assert found.fingerprint() == listed.fingerprint()
    with pytest.raises(FormatError, match="expected a column 'text' or 'messages', found .'id'"):
        read_documents(SavedRows([{"id": 1}]), Bytes(), vocab=300)
    with pytest.raises(FormatError, match="data: row 2: 'text' must be a string"):
        read_documents(SavedRows([{"text": "fine"}, {"text": None}]), Bytes(), vocab=300)


def test_folders_of_datasets(tmp_path, texts):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    rows = datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})
    rows.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    splits.save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "three"))
    listed = read_documents([{"text": t} for t in texts], Bytes(), vocab=300).fingerprint()
    for path in (tmp_path / "one", tmp_path / "two", tmp_path / "two" / "train"):
        assert read_documents(path, Bytes(), vocab=300).fingerprint() == listed
    assert len(read_documents(tmp_path / "two" / "test", Bytes(), vocab=300)) == 1
    with pytest.raises(ArgumentError, match="three: holds the splits test: give the folder of one"):
        read_documents(tmp_path / "three", Bytes(), vocab=300)
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(FormatError, match="one: not a data set") as caught:
        read_documents(tmp_path / "one", Bytes(), vocab=300)
    assert "\n" not in str(caught.value)


def test_folders_of_datasets_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ArgumentError, match="pip install datasets"):
        read_documents(tmp_path, Bytes(), vocab=300)


def test_answers_only_count_what_the_assistant_said():
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "you"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "me"},
    ]
    documents = read_documents([{"messages": chat}], Bytes(), vocab=300, loss_on="answers")
    text = bytes(int(t) - 2 for t in documents.tokens).decode()
    assert text == Bytes().apply_chat_template(chat)
    marked = "".join(c for c, m in zip(text, documents.targets, strict=True) if m)
    assert marked == "you</>me</>"
    batch = Batches(documents, batch_size=1, sequence_length=100).step(0)[0]
    # A row counts where the token that it predicts is an answer's.
    counted = [int(label) - 2 for label in batch.labels[batch.row_weight > 0]]
    assert bytes(counted).decode() == marked
    assert batch.counted == batch.labelled == len(marked)


def check_batches(batches, documents):
    """Every piece is in an epoch once, whole, on its own."""
    seen = []
    for epoch_step in range(batches.steps_per_epoch):
        for batch in batches.step(epoch_step):
            for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
                seen.append(batch.tokens[a:b].tolist())
                assert batch.labels[a : b - 1].tolist() == batch.tokens[a + 1 : b].tolist()
                assert batch.labels[b - 1] == -1
    wanted = []
    for index in range(len(documents)):
        row = documents[index].tolist()
        wanted += [row[at : at + batches_length] for at in range(0, len(row), batches_length)]
    wanted = [piece for piece in wanted if len(piece) > 1]
    assert sorted(seen) == sorted(wanted)


batches_length = 16


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_packing_keeps_documents_apart(texts, accumulation, shuffle):
    documents = read_documents([{"text": t} for t in texts], Bytes(), vocab=300)
    batches = Batches(
        documents,
        batch_size=2,
        sequence_length=batches_length,
        accumulation=accumulation,
        shuffle=shuffle,
    )
    check_batches(batches, documents)
    lengths = [
        sum(batches.piece_lengths[a:b])
        for a, b in zip(batches.row_bounds, batches.row_bounds[1:], strict=False)
    ]
    assert max(lengths) <= batches_length


def test_rows_of_arrays_are_rows_of_batches():
    tokens = np.arange(60, dtype=np.uint16).reshape(10, 6)
    batches = Batches(read_documents(tokens, vocab=60), batch_size=4, sequence_length=2048, seed=3)
    assert batches.rows_per_epoch == 10 and batches.steps_per_epoch == 3
    sizes = [batches.step(k)[0].rows for k in range(3)]
    assert sizes == [4, 4, 2]
    rows = np.concatenate([batches.step(k)[0].tokens for k in range(3)]).reshape(-1, 6)
    assert sorted(rows.tolist()) == tokens.tolist() and rows.tolist() != tokens.tolist()
    assert batches.step(0)[0].tokens.dtype == np.int32


def test_order_depends_on_seed_and_epoch_alone():
    documents = read_documents(np.arange(600).reshape(100, 6), vocab=600)

    def orders(seed):
        batches = Batches(documents, batch_size=10, sequence_length=6, seed=seed)
        return [batches.step(k)[0].tokens.tolist() for k in (17, 3, 12, 3)]

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)
    assert orders(1)[1] == orders(1)[3]
    batches = Batches(documents, batch_size=100, sequence_length=6)
    assert batches.step(0)[0].tokens.tolist() != batches.step(1)[0].tokens.tolist()


def test_accumulation_takes_the_rows_of_a_larger_batch():
    documents = read_documents(np.arange(96).reshape(16, 6), vocab=96)
    whole = Batches(documents, batch_size=8, sequence_length=6).step(1)[0]
    parts = Batches(documents, batch_size=2, sequence_length=6, accumulation=4).step(1)
    assert np.concatenate([p.tokens for p in parts]).tolist() == whole.tokens.tolist()


def test_numpy_files(tmp_path):
    tokens = np.arange(40, dtype=np.uint16).reshape(8, 5)
    np.save(tmp_path / "a.npy", tokens)
    np.savez(tmp_path / "b.npz", tokens=tokens)
    np.savez(tmp_path / "c.npz", tokens=tokens.reshape(-1), offsets=np.array([0, 7, 9, 40]))
    assert isinstance(read_documents(tmp_path / "a.npy", vocab=40).tokens.base, (np.memmap, object))
    a, b = (read_documents(tmp_path / name, vocab=40) for name in ("a.npy", "b.npz"))
    assert a.fingerprint() == b.fingerprint()
    assert len(read_documents(tmp_path / "c.npz", vocab=40)) == 3
    both = read_documents([tmp_path / "a.npy", tmp_path / "b.npz"], vocab=40)
    assert len(both) == 16


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text": "a', "not JSON"),
        ("[1, 2]", "expected an object"),
        ('{"txt": "abc"}', "expected 'text'"),
        ('{"text": 7}', "'text' must be a string, got int"),
        ('{"messages": null}', "expected 'text' .* found messages"),
        ('{"messages": []}', "must be a list"),
        ('{"messages": [{"role": "user"}]}', "messages\\[0\\]"),
        ("[" * 100_000, "not JSON"),
        ('{"text": %s}' % ("9" * 5000), "not JSON|'text' must"),  # Python 3.10 reads it
    ],
)
def test_bad_records_are_told_by_line_or_skipped(tmp_path, line, words):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "fine"}, "", line, {"text": "fine too"}])
    with pytest.raises(FormatError, match=words) as caught:
        read_documents(path, Bytes(), vocab=300)
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)
    documents = read_documents(path, Bytes(), vocab=300, skip_bad=True)
    assert (len(documents), documents.skipped) == (2, 1)
    assert documents.first_skipped.startswith(f"{path}:3: ")


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok, this"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(FormatError, match=r"a\.jsonl:2: not UTF-8"):
        read_documents(tmp_path / "a.jsonl", Bytes(), vocab=300)


def test_files_without_a_record_are_named(tmp_path):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text("")
        with pytest.raises(FormatError, match=f"{name}: holds no record"):
            read_documents(tmp_path / name, Bytes(), vocab=300)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "b.txt").write_bytes(b"abc")
    a, b = (read_documents(tmp_path / f"{name}.txt", Bytes(), vocab=300) for name in "ab")
    assert a[0].tolist() == b[0].tolist()


def test_a_folder_for_temporary_files_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(FileError, match="set TMPDIR"):
        read_documents([{"text": "abc"}], Bytes(), vocab=300)


def test_damaged_files(tmp_path):
    packed = gzip.compress(b'{"text": "abc"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04rubbish")
    (tmp_path / "bad.npy").write_bytes(b"rubbish")
    np.savez(tmp_path / "names.npz", a=np.zeros(2), b=np.zeros(2))
    np.savez(tmp_path / "pickle.npz", tokens=np.array([{}], object))
    np.savez(tmp_path / "offsets.npz", tokens=np.zeros(9, int), offsets=np.array([0, 7, 5, 9]))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(FormatError) as caught:
            read_documents(path, Bytes(), vocab=300)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_are_checked_with_place(tmp_path):
    tokens = np.ones((5, 4), np.int64)
    tokens[3, 2] = 9
    with pytest.raises(ArgumentError, match="token 9 at row 3, column 2"):
        read_documents(tokens, vocab=9)
    tokens[3, 2] = -1
    with pytest.raises(ArgumentError, match="token -1 at row 3, column 2"):
        read_documents(tokens, vocab=9)
    with pytest.raises(DtypeError, match="integers"):
        read_documents(np.ones((2, 2)), vocab=9)
    with pytest.raises(ShapeError, match="shape"):
        read_documents(np.ones((2, 2, 2), int), vocab=9)
    with pytest.raises(ShapeError):
        read_documents(np.ones((0, 4), int), vocab=9)
    for arrays in ((np.ones(4), np.array([0, 4])), (np.ones(4, int), np.array([0, 2.5, 4]))):
        np.savez(tmp_path / "a.npz", tokens=arrays[0], offsets=arrays[1])
        with pytest.raises(DtypeError, match=r"a\.npz: .*integers, got float64"):
            read_documents(tmp_path / "a.npz", vocab=9)


def test_wrong_kinds_of_data(tmp_path):
    for wrong in (None, 7, [], {}, ["a.jsonl", {"text": "b"}], object()):
        with pytest.raises(Error) as caught:
            read_documents(wrong, Bytes(), vocab=9)
        assert "\n" not in str(caught.value)
    with pytest.raises(NotFoundError, match="no such data file"):
        read_documents(tmp_path / "none.jsonl", Bytes(), vocab=9)
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "none.jsonl", Bytes(), vocab=9)
    with pytest.raises(ArgumentError, match="no tokenizer"):
        read_documents([{"text": "a"}], vocab=9)
    with pytest.raises(FormatError, match="outside the model's vocabulary"):
        read_documents([{"text": "zz"}], Bytes(), vocab=50)


def test_split_holds_back_documents_evenly():
    documents = read_documents(np.arange(600).reshape(100, 6), vocab=600)
    rest, held = documents.split(0.1)
    assert (len(rest), len(held)) == (90, 10)
    assert sorted([*rest.tokens.tolist(), *held.tokens.tolist()]) == list(range(600))
    with pytest.raises(ArgumentError, match="leaves one side empty"):
        documents.split(0.001)
    for fraction in (0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(ArgumentError, match="a share of them between 0 and 1"):
            documents.split(fraction)


def test_rows_of_any_length(texts):
    documents = read_documents([{"text": t} for t in texts], Bytes(), vocab=300)
    for length in (len(documents.tokens), 1 << 62, 1 << 70):
        [row] = Batches(documents, batch_size=9, sequence_length=length)
        assert len(row.tokens) == len(documents.tokens)


def test_sample_rows_for_calibration(texts):
    documents = read_documents(np.arange(600).reshape(100, 6), vocab=600)
    assert sample_rows(documents, 7, 3).shape == (7, 3)
    short = read_documents([{"text": t} for t in texts], Bytes(), vocab=300)
    assert sample_rows(short, 4, 64).shape == (3, 64)
    with pytest.raises(ArgumentError, match="at least"):
        sample_rows(short, 4, 10_000)
    for rows, length in ((0, 8), ("x", 8), (4, 0), (4, -7), (4, 1.5)):
        with pytest.raises(ArgumentError, match="expected a whole number"):
            sample_rows(short, rows, length)


def test_memory_is_bounded(tmp_path, monkeypatch):
    """Tokens of text go to a mapped file, not to the heap."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 500} for _ in range(50)])
    documents = read_documents(path, Bytes(), vocab=300)
    assert isinstance(documents.tokens, np.memmap) and documents.tokens.dtype == np.uint16
    rest, held = documents.split(0.1)
    assert isinstance(rest.tokens, np.memmap) and isinstance(held.tokens, np.memmap)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """A file four times as large is read, packed and split in the same memory, but for offsets."""
    monkeypatch.setattr(mil_data, "BLOCK_CHARACTERS", 1 << 13)
    monkeypatch.setattr(mil_data, "BLOCK", 1 << 13)

    def peak(records):
        path = write_lines(tmp_path / f"{records}.jsonl.gz", [{"text": "x" * 900}] * records)
        tracemalloc.start()
        documents = read_documents(path, Bytes(), vocab=300, skip_bad=True)
        documents.split(0.5)
        Batches(documents, batch_size=4, sequence_length=64).step(3)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, documents.tokens.nbytes

    (small, _), (large, size) = peak(500), peak(2000)
    pieces = 2000 * -(-902 // 64)
    assert size > 3_500_000
    # What may grow: some arrays of 8 bytes a piece while the rows are packed, and their order.
    assert large - small < 100 * pieces * 3 // 4 < size


def test_documents_pass_through():
    documents = Documents(np.arange(4), np.array([0, 4]))
    assert read_documents(documents, vocab=4) is documents
    with pytest.raises(ArgumentError):
        read_documents(documents, vocab=3)


def test_module_example():
    import doctest

    assert doctest.testmod(mil_data).failed == 0

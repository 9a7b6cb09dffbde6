"""Training data: documents of tokens, and the batches that a training step takes from them.

Whatever the data come from, they become one long array of tokens and the places where documents
start (`Documents`); `Batches` cuts documents into pieces of at most `sequence_length` tokens, packs
pieces into rows, and hands out the rows of any optimizer step by its number.  Three things follow
from this form:

- Documents never mix.  A batch is a flat run of tokens with `offsets`; the C core treats every
  piece as a sequence of its own (positions, convolutions and states start afresh), so packing costs
  no padding and leaks nothing from one document into the next.
- A run resumes at the exact example.  The order of rows is a function of (seed, epoch), and batch k
  of a function of that order: nothing has to be replayed or remembered.
- Memory stays bounded.  Files are read a record at a time; text is tokenised once into an unnamed
  temporary file that is mapped, not read, and so is what `split` holds back.  What stays in memory
  is 8 bytes a document and 16 bytes a piece.

Token arrays are taken as they are, memory-mapped where they come from a .npy file.  Each of their
rows is one row of a batch, not packed with others, so that `batch_size` counts what the user
counts.

>>> import numpy as np
>>> documents = read_documents(np.arange(12).reshape(3, 4), vocab=12)
>>> batch = Batches(documents, batch_size=2, sequence_length=4, shuffle=False).step(0)[0]
>>> batch.tokens.tolist(), batch.offsets.tolist()
([0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 8])
>>> batch.labels.tolist()
[1, 2, 3, -1, 5, 6, 7, -1]
"""

from __future__ import annotations

import gzip
import hashlib
import json
import numbers
import os
import tempfile
import zipfile
import zlib
from array import array as compact_array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import (
    ArgumentError,
    DtypeError,
    FileError,
    FormatError,
    NotFoundError,
    ShapeError,
    listing,
    shorten,
)

__all__ = ["Batch", "Batches", "Documents", "read_documents", "sample_rows"]

SUFFIXES = (".npz", ".npy", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet", ".txt")

# Tokens checked, hashed or written at once: large enough to be fast, small beside a model.
BLOCK = 1 << 22

# Records tokenised at once: enough to keep all cores busy.
BLOCK_RECORDS = 512
BLOCK_CHARACTERS = 1 << 22

# Files above this many bytes of tokens are told apart by evenly spaced samples instead of every
# byte.
FULL_HASH_BYTES = 1 << 28


class BadRecord(Exception):
    """One record cannot be used; the reader adds where it stands and decides whether to go on."""


# ---- documents ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's likeliest tokens at the tokens that count (soft_labels.py).

    Attributes
    ----------
    index : int64 array [total]
        For each token, which row below holds what the teacher expected after it; -1: none.
    tokens : integer array [rows, top]
    logprobs : float16 array [rows, top + 1], the last of all other tokens together
    """

    index: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, end to end.

    Attributes
    ----------
    tokens : integer array [total]
    starts : int64 array [documents + 1], where each document begins; the last entry is `total`
    targets : bool array [total] or None
        Whether a token is something to learn to predict (an answer); None means that all are.
    packed : bool
        Whether several documents may share a row of a batch.
    skipped : int
        Bad records that were left out (`skip_bad`).
    first_skipped : str
        Place of the first of them, and what was wrong with it.
    soft : SoftTargets or None
        What a teacher expected at each token.
    """

    tokens: np.ndarray
    starts: np.ndarray
    targets: np.ndarray | None = None
    packed: bool = True
    skipped: int = 0
    first_skipped: str = ""
    soft: SoftTargets | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def fingerprint(self) -> str:
        """A short hash of all tokens and borders: equal data give equal training."""
        digest = hashlib.sha256()
        arrays = [self.starts, self.tokens, self.targets]
        if self.soft is not None:
            arrays += [self.soft.index, self.soft.tokens, self.soft.logprobs]
        for array in arrays:
            if array is None:
                continue
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            step = max(1, BLOCK // 8)
            begins: Iterable[int] = range(0, len(array), step)
            if array.nbytes > FULL_HASH_BYTES:
                begins = np.linspace(0, len(array) - step, 64).astype(np.int64).tolist()
            for begin in begins:
                digest.update(np.ascontiguousarray(array[begin : begin + step]).tobytes())
        return digest.hexdigest()[:16]

    def split(self, fraction: float, together: int = 1) -> tuple[Documents, Documents]:
        """(the rest, an evenly spaced `fraction` of the documents), for validation.

        `together` neighbours stay together.
        """
        count = len(self) // together
        if not 0 < fraction < 1:
            raise ArgumentError(
                f"validation={fraction}: expected data, or a share of them between 0 and 1"
            )
        held = round(count * fraction)
        if held < 1 or held >= count:
            raise ArgumentError(
                f"validation={fraction} of {count} documents leaves one side empty: give more data"
            )
        keep = np.ones(count, bool)
        keep[(np.arange(held) * count) // held] = False
        keep = np.repeat(keep, together)
        return self._select(keep), self._select(~keep)

    def _select(self, keep: np.ndarray) -> Documents:
        """The documents that `keep` marks, their tokens in a mapped file of their own."""
        lengths = np.diff(self.starts)[keep]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = self._gather(self.tokens, keep)
        targets = None if self.targets is None else self._gather(self.targets, keep)
        soft = None
        if self.soft is not None:
            index = self._gather(self.soft.index, keep)
            soft = SoftTargets(index, self.soft.tokens, self.soft.logprobs)
        return Documents(
            tokens, starts, targets, self.packed, self.skipped, self.first_skipped, soft
        )

    def _gather(self, values: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Those of `values` that lie in marked documents, copied run by run of neighbours."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
        file = TokenFile(values.dtype)
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            low, high = int(self.starts[first]), int(self.starts[end])
            for begin in range(low, high, BLOCK):
                file.add(values[begin : min(high, begin + BLOCK)])
        return file.array()


def read_documents(
    data: Any,
    tokenizer: Any = None,
    *,
    vocab: int,
    loss_on: str = "all",
    skip_bad: bool = False,
) -> Documents:
    """Tokens of any data that the library takes.

    Parameters
    ----------
    data : integer array (n, length); path or list of paths; list of records; list of token lists
        Paths: .npz or .npy of tokens, .jsonl or .jsonl.gz or parquet of ``{"text": ...}`` or
        ``{"messages": [...]}``, .txt, a folder of such files, one that `mil.soft_labels` wrote, or
        one that Hugging Face `datasets` saved (`save_to_disk`). Records are the same dictionaries;
        a `datasets.Dataset` is a list of records.
    tokenizer : Tokenizer, needed for text
    vocab : int
        Tokens must lie in [0, vocab).
    loss_on : "all" or "answers"
        With "answers", only the assistant's tokens of ``messages`` are learnt. ("marked" takes what
        "all" takes, and marks answers as "answers" does: to measure, not to learn.)
    skip_bad : bool
        Leave bad records out and count them instead of stopping at the first.

    Raises
    ------
    mil.FormatError, mil.FileError, mil.ArgumentError, mil.ShapeError
        One line with file and line, or array row and column.
    """
    if loss_on not in ("all", "answers", "marked"):
        raise ArgumentError(f"loss_on={shorten(loss_on)}: expected 'all' or 'answers'")
    if isinstance(data, Documents):
        check_tokens(data.tokens, data.starts, vocab, "data")
        return data
    if hasattr(data, "__array__") or hasattr(data, "__dlpack__"):
        return documents_of_array(np.asarray(data), vocab, "data")
    if isinstance(data, (str, os.PathLike)):
        data = [data]
    if hasattr(data, "column_names"):
        records = dataset_records(data, "data")
        return documents_of_records(records, tokenizer, vocab, loss_on, skip_bad)
    if not isinstance(data, Sequence) or len(data) == 0:
        raise ArgumentError(
            f"data is {describe(data)}: expected a token array (n, length), a path, a list of "
            "paths, or a list "
            "of records such as {'text': ...} or {'messages': [...]}"
        )
    if all(isinstance(item, (str, os.PathLike)) for item in data):
        from .soft_labels import is_labels, read_labels

        if all(map(is_labels, data)):
            return read_labels(list(data), tokenizer, vocab)
        return documents_of_files(expand_paths(data), tokenizer, vocab, loss_on, skip_bad)
    if all(isinstance(item, Mapping) for item in data):
        records = ((f"data[{index}]", record) for index, record in enumerate(data))
        return documents_of_records(records, tokenizer, vocab, loss_on, skip_bad)
    if all(isinstance(item, (Sequence, np.ndarray)) for item in data):
        rows = [integer_row(item, f"data[{index}]") for index, item in enumerate(data)]
        if len({len(row) for row in rows}) == 1:
            return documents_of_array(np.stack(rows), vocab, "data")
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        documents = Documents(np.concatenate(rows), starts)
        check_tokens(documents.tokens, starts, vocab, "data")
        return documents
    raise ArgumentError("data mixes kinds: expected only paths, only records, or only token lists")


def hold_back(
    documents: Documents,
    validation: Any,
    read: Callable[[Any], Documents],
    together: int = 1,
) -> tuple[Documents, Documents | None]:
    """(documents to train on, those to evaluate on): a share is held back, data are read."""
    if isinstance(validation, numbers.Real):
        return documents.split(float(validation), together)
    return documents, None if validation is None else read(validation)


def describe(value: Any) -> str:
    return "empty" if isinstance(value, Sequence) and len(value) == 0 else type(value).__name__


def integer_row(row: Any, where: str) -> np.ndarray:
    array = np.asarray(row)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ShapeError(
            f"{where}: expected a list of token ids, got {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.int64)


def documents_of_array(array: np.ndarray, vocab: int, where: str) -> Documents:
    """Each row of a (n, length) array is a document; a one-dimensional array is a single one."""
    if array.dtype.kind not in "iu":
        raise DtypeError(f"{where}: token arrays hold integers, got {array.dtype}")
    if array.ndim not in (1, 2) or array.size == 0:
        raise ShapeError(f"{where}: expected tokens of shape (n, length), got {array.shape}")
    length = array.shape[-1]
    count = array.size // length
    starts = np.arange(count + 1, dtype=np.int64) * length
    documents = Documents(array.reshape(-1), starts, packed=False)
    check_tokens(documents.tokens, starts, vocab, where)
    return documents


def check_tokens(tokens: np.ndarray, starts: np.ndarray, vocab: int, where: str) -> None:
    """Every token lies in the vocabulary; the message names the first that does not."""
    for begin in range(0, len(tokens), BLOCK):
        block = tokens[begin : begin + BLOCK]
        if int(block.min()) >= 0 and int(block.max()) < vocab:
            continue
        at = begin + int(np.argmax((block < 0) | (block >= vocab)))
        row = int(np.searchsorted(starts, at, side="right")) - 1
        raise ArgumentError(
            f"{where}: token {int(tokens[at])} at row {row}, column {at - int(starts[row])} is "
            "outside the "
            f"model's vocabulary [0, {vocab})"
        )


# ---- files -------------------------------------------------------------------------------------


def expand_paths(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Existing files, folders replaced by the files in them; folders of `datasets` stay."""
    files: list[Path] = []
    for path in map(Path, paths):
        if is_dataset_folder(path):
            files.append(path)
        elif path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
            if not inside:
                raise ArgumentError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
            files += inside
        elif not path.exists():
            raise NotFoundError(f"{path}: no such data file")
        elif not path.name.endswith(SUFFIXES):
            raise ArgumentError(
                f"{path}: unknown kind of data file; expected {', '.join(SUFFIXES)}"
            )
        else:
            files.append(path)
    return files


def documents_of_files(
    files: list[Path], tokenizer: Any, vocab: int, loss_on: str, skip_bad: bool
) -> Documents:
    arrays = [path for path in files if path.suffix in (".npz", ".npy")]
    if not arrays:
        records = (record for path in files for record in read_records(path, skip_bad))
        return documents_of_records(records, tokenizer, vocab, loss_on, skip_bad, listing(files))
    if len(arrays) < len(files):
        raise ArgumentError(f"data mixes token arrays ({arrays[0]}) with text files: give one kind")
    parts = [read_array(path, vocab) for path in arrays]
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.diff(part.starts) for part in parts])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Documents(
        np.concatenate([p.tokens for p in parts]), starts, packed=any(p.packed for p in parts)
    )


def read_array(path: Path, vocab: int) -> Documents:
    """Tokens of a .npy (mapped) or .npz file (`tokens`; `offsets` where lengths differ)."""
    try:
        content = np.load(
            path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False
        )
        if path.suffix == ".npy":
            return documents_of_array(content, vocab, str(path))
        with content:
            names = list(content)
            name = "tokens" if "tokens" in names else names[0] if len(names) == 1 else None
            if name is None:
                raise FormatError(f"{path}: expected an array named 'tokens', found {names}")
            tokens = content[name]
            if "offsets" not in names:
                return documents_of_array(tokens, vocab, str(path))
            starts = content["offsets"]
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, (FormatError, ArgumentError, ShapeError)):
            raise
        raise FormatError(f"{path}: not a NumPy file of tokens ({error})") from None
    for array in (tokens, starts):
        if array.dtype.kind not in "iu":
            raise DtypeError(f"{path}: 'tokens' and 'offsets' hold integers, got {array.dtype}")
    starts = starts.astype(np.int64)
    if (
        tokens.ndim != 1
        or starts.ndim != 1
        or len(starts) < 2
        or starts[0] != 0
        or starts[-1] != len(tokens)
    ):
        raise FormatError(
            f"{path}: 'offsets' must rise from 0 to the number of tokens, {len(tokens)}"
        )
    if np.any(np.diff(starts) < 0):
        raise FormatError(f"{path}: 'offsets' must not fall")
    check_tokens(tokens, starts, vocab, str(path))
    return Documents(tokens, starts)


# Keys of which a record of text has one.
TEXT_KEYS = ("messages", "text")


def read_records(
    path: Path, skip_bad: bool, columns: Sequence[str] = TEXT_KEYS
) -> Iterator[tuple[str, Any]]:
    """(place, record) of a text file, one at a time; a BadRecord could not be read.

    Of a parquet file, the `columns` that it has are read.
    """
    if path.is_dir():
        yield from dataset_records(open_dataset(path), str(path))
        return
    if path.suffix == ".parquet":
        yield from read_parquet(path, columns)
        return
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as lines:
            if path.suffix == ".txt":
                yield from read_plain(path, lines)
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", parse_line(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FormatError(f"{path}: damaged gzip file ({error})") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None


def parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        return BadRecord(f"not JSON ({error})")


def read_plain(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Plain text is cut at line ends into documents of about a megabyte, whatever its size."""
    held: list[bytes] = []
    size, first = 0, 1
    for number, line in enumerate(lines, start=1):
        held.append(line)
        size += len(line)
        if size >= 1 << 20:
            yield f"{path}:{first}", text_record(held)
            held, size, first = [], 0, number + 1
    if size:
        yield f"{path}:{first}", text_record(held)


def text_record(lines: list[bytes]) -> Any:
    try:
        return {"text": b"".join(lines).decode("utf-8-sig")}  # without an editor's mark
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 ({error.reason})")


def read_parquet(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ArgumentError(
            f"{path}: reading parquet needs pyarrow (pip install pyarrow), or convert it to .jsonl"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in wanted if name in table.schema_arrow.names]
        if not columns:
            raise FormatError(
                f"{path}: expected a column {' or '.join(map(repr, wanted))}, found "
                f"{table.schema_arrow.names}"
            )
        row = 0
        for block in table.iter_batches(batch_size=256, columns=columns):
            for record in block.to_pylist():
                row += 1
                yield f"{path}: row {row}", record
    except FormatError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # whatever damage it met
        words = " ".join(str(error).split())
        raise FormatError(f"{path}: not a parquet file ({words})") from None


# Columns of a data set that a record may need; all others stay on the disk.
COLUMNS = ("messages", "text", "prompt", "chosen", "rejected")


def is_dataset_folder(path: Path) -> bool:
    """Whether Hugging Face `datasets` saved a data set here, or a dictionary of splits."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def open_dataset(path: Path) -> Any:
    """The data set that `datasets.Dataset.save_to_disk` wrote; of several splits, "train"."""
    try:
        import datasets
    except ImportError:
        raise ArgumentError(
            f"{path}: a data set of Hugging Face datasets, which is not installed: pip install "
            "datasets, or convert it to .jsonl"
        ) from None
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # it raises whatever its parts raise
        words = " ".join(str(error).split())
        raise FormatError(f"{path}: not a data set of Hugging Face datasets ({words})") from None
    if isinstance(found, Mapping):
        if "train" not in found:
            names = ", ".join(sorted(found))
            raise ArgumentError(f"{path}: holds the splits {names}: give the folder of one of them")
        return found["train"]
    return found


def dataset_records(dataset: Any, where: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of a data set, read from its mapped files row by row."""
    names = [name for name in COLUMNS if name in dataset.column_names]
    if not names:
        raise FormatError(
            f"{where}: expected a column 'text' or 'messages', found {dataset.column_names}"
        )
    for row, record in enumerate(dataset.select_columns(names), start=1):
        yield f"{where}: row {row}", record


# ---- tokenising --------------------------------------------------------------------------------


class TokenFile:
    """A growing array in an unnamed temporary file: memory stays bounded however much is added."""

    def __init__(self, dtype: Any):
        self.dtype = np.dtype(dtype)
        self.count = 0
        try:
            self.file = tempfile.TemporaryFile(prefix="mambainllama-", buffering=1 << 20)  # noqa: SIM115
        except OSError as error:
            raise FileError(
                f"no temporary file for tokens: {error.strerror}; set TMPDIR to a folder that can "
                "be written"
            ) from None

    def add(self, values: Any) -> None:
        try:
            self.file.write(np.asarray(values, self.dtype).tobytes())
        except OSError as error:
            raise FileError(
                f"{tempfile.gettempdir()}: {error.strerror} while tokenising; set TMPDIR to a "
                "larger disk"
            ) from None
        self.count += len(values)

    def array(self) -> np.ndarray:
        """All values, mapped; the file goes when the array does."""
        try:
            self.file.flush()
        except OSError as error:
            raise FileError(
                f"{tempfile.gettempdir()}: {error.strerror} while tokenising; set TMPDIR to a "
                "larger disk"
            ) from None
        if self.count == 0:
            return np.empty(0, self.dtype)
        return np.memmap(self.file, self.dtype, "r", shape=(self.count,))


def documents_of_records(
    records: Iterable[tuple[str, Any]],
    tokenizer: Any,
    vocab: int,
    loss_on: str,
    skip_bad: bool,
    where: str = "data",
) -> Documents:
    """Tokenises records into a mapped file, some hundred at a time, on all cores."""
    if tokenizer is None:
        raise ArgumentError(
            "data is text, but the model has no tokenizer: give token arrays instead"
        )
    writer = DocumentWriter(
        tokenizer, vocab, loss_on == "answers", skip_bad, marked=loss_on == "marked", where=where
    )
    for place, record in records:
        writer.add(place, record)
    return writer.documents()


# What a record becomes: runs of text, told apart by whether they are to be learnt.
Segments = list[tuple[str, bool]]


class DocumentWriter:
    """Collects records, tokenises a block of them at once, and writes the tokens to a file."""

    def __init__(
        self,
        tokenizer: Any,
        vocab: int,
        answers_only: bool,
        skip_bad: bool,
        *,
        marked: bool = False,
        where: str = "data",
    ):
        self.tokenizer, self.vocab, self.skip_bad = tokenizer, vocab, skip_bad
        self.answers_only = answers_only
        self.tokens = TokenFile(np.uint16 if vocab <= 1 << 16 else np.int32)
        self.targets = TokenFile(np.bool_) if answers_only or marked else None
        self.starts = compact_array("q", [0])
        self.skipped, self.first_skipped = 0, ""
        self.place = where
        # Waiting records: place, segments, and whether the tokenizer adds its special tokens.
        self.block: list[tuple[str, Segments, bool]] = []
        self.characters = 0

    def add(self, place: str, record: Any) -> None:
        self.place = place
        try:
            segments, plain = self.segments(record)
        except BadRecord as error:
            self.refuse(place, error)
            return
        self.block.append((place, segments, plain))
        self.characters += sum(len(text) for text, _ in segments)
        if len(self.block) >= BLOCK_RECORDS or self.characters >= BLOCK_CHARACTERS:
            self.flush()

    def segments(self, record: Any) -> tuple[Segments, bool]:
        return segments_of(record, self.tokenizer)

    def flush(self) -> None:
        """Tokenises and writes the waiting records."""
        encoded = {
            kind: iter(
                self.tokenizer.encode_batch(
                    [t for _, segments, plain in self.block if plain is kind for t, _ in segments],
                    add_special_tokens=kind,
                )
            )
            for kind in (True, False)
        }
        for place, segments, plain in self.block:
            runs = [(next(encoded[plain]), learnt) for _, learnt in segments]
            try:
                self.write(runs, plain)
            except BadRecord as error:
                self.refuse(place, error)
        self.block, self.characters = [], 0

    def write(self, runs: list[tuple[list[int], bool]], plain: bool) -> None:
        ids = [token for run, _ in runs for token in run]
        end = self.tokenizer.eos_token_id
        if plain and end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        if len(ids) < 2:
            raise BadRecord("an empty document: nothing to predict")
        if max(ids) >= self.vocab:
            raise BadRecord(
                f"the tokenizer gives token {max(ids)}, outside the model's vocabulary "
                f"[0, {self.vocab})"
            )
        if self.targets is not None:
            learnt = [flag for run, flag in runs for _ in run]
            learnt += [True] * (len(ids) - len(learnt))
            if self.answers_only and not any(learnt):
                raise BadRecord("no assistant message to learn from")
            self.targets.add(learnt)
        self.tokens.add(ids)
        self.starts.append(self.tokens.count)

    def refuse(self, place: str, error: BadRecord) -> None:
        if not self.skip_bad:
            raise FormatError(
                f"{place}: {error}; mend it, or skip such records with skip_bad"
            ) from None
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"{place}: {error}"

    def documents(self) -> Documents:
        self.flush()
        if len(self.starts) == 1 and not self.skipped:
            raise FormatError(f"{self.place}: holds no record")
        if len(self.starts) == 1:
            raise FormatError(
                f"{self.place}: no usable record ({self.skipped} bad ones skipped; the first is "
                f"{self.first_skipped})"
            )
        return Documents(
            self.tokens.array(),
            np.array(self.starts, np.int64),
            self.targets.array() if self.targets is not None else None,
            skipped=self.skipped,
            first_skipped=self.first_skipped,
        )


def segments_of(record: Any, tokenizer: Any) -> tuple[Segments, bool]:
    """A record's runs of text, and whether it is plain text (special tokens are added then)."""
    if isinstance(record, BadRecord):
        raise record
    if not isinstance(record, Mapping):
        raise BadRecord(
            f"expected an object with 'text' or 'messages', got {type(record).__name__}"
        )
    # A column that this record lacks is None in parquet files.
    if record.get("messages") is not None:
        return chat_segments(record["messages"], tokenizer), False
    if isinstance(record.get("text"), str):
        return [(record["text"], True)], True
    if "text" in record:
        raise BadRecord(f"'text' must be a string, got {type(record['text']).__name__}")
    raise BadRecord(
        "expected 'text' (a string) or 'messages' (a list), found "
        f"{listing(record, 5) or 'nothing'}"
    )


def chat_segments(messages: Any, tokenizer: Any) -> Segments:
    """Runs of text of a chat, told apart by whether the assistant said them.

    Each answer is what the template adds after its generation prompt, and is tokenised on its own:
    just so the model meets it when it generates.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRecord("'messages' must be a list of {'role', 'content'}")
    for index, message in enumerate(messages):
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise BadRecord(f"messages[{index}] must have a 'role' and a 'content', both strings")
    try:
        whole = tokenizer.apply_chat_template(messages)
        cuts = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
                answered = tokenizer.apply_chat_template(messages[: index + 1])
                if (
                    whole.startswith(prompt)
                    and whole.startswith(answered)
                    and len(answered) > len(prompt)
                ):
                    cuts.append((len(prompt), len(answered)))
    except ValueError as error:
        raise BadRecord(f"the chat template refused it ({error})") from None
    segments: Segments = []
    at = 0
    for begin, end in cuts:
        segments.append((whole[at:begin], False))
        segments.append((whole[begin:end], True))
        at = end
    segments.append((whole[at:], False))
    return [(text, learnt) for text, learnt in segments if text]


# ---- batches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What one forward and backward pass takes.

    Attributes
    ----------
    tokens : int32 array [n], sequences end to end
    offsets : int64 array [sequences + 1]
    labels : int32 array [n], the next token of the same document, -1 at its end
    row_weight : float32 array [n] or None (all 1)
    rows : int
        Rows of the batch in the user's sense (array rows, or packed rows).
    numbers : int64 array [rows] or None
        Which of all rows these are.
    top_tokens : int32 array [n, top] or None
    top_logprobs : float32 array [n, top + 1] or None
        A teacher's likeliest next tokens, where they are stored; rows without them weigh nothing.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    row_weight: np.ndarray | None
    rows: int
    numbers: np.ndarray | None = None
    top_tokens: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None

    @property
    def counted(self) -> float:
        """Sum of row weights: how many distributions are compared."""
        return float(len(self.tokens)) if self.row_weight is None else float(self.row_weight.sum())

    @property
    def labelled(self) -> float:
        """Sum of row weights where a next token is known."""
        known = self.labels >= 0
        return float(known.sum() if self.row_weight is None else self.row_weight[known].sum())


class Batches:
    """Rows of at most `sequence_length` tokens, and the batches that each optimizer step takes.

    An optimizer step takes `batch_size * accumulation` rows in `accumulation` micro-batches. The
    last step of an epoch takes what is left. Step numbers run on through epochs, each in an order
    of its own.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        batch_size: int,
        sequence_length: int,
        accumulation: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        self.documents = documents
        self.batch_size, self.accumulation = batch_size, accumulation
        self.seed, self.shuffle = seed, shuffle
        self.piece_starts, self.piece_lengths = cut_pieces(documents.starts, sequence_length)
        if len(self.piece_starts) == 0:
            raise ArgumentError("data holds no document of two tokens or more: nothing to predict")
        if documents.packed:
            self._pack(sequence_length)
        else:
            self.row_bounds = np.arange(len(self.piece_starts) + 1, dtype=np.int64)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def _pack(self, sequence_length: int) -> None:
        """Fills rows with pieces in a shuffled order, each row until the next piece does not fit.

        Nothing is gained by a cleverer fit: an unfilled row costs no padding, it is only shorter.
        The rows are the same in every epoch; their order is not.
        """
        if self.shuffle:
            order = np.random.default_rng([self.seed, 0, 1]).permutation(len(self.piece_starts))
            self.piece_starts, self.piece_lengths = (
                self.piece_starts[order],
                self.piece_lengths[order],
            )
        ends = np.cumsum(self.piece_lengths)
        bounds, used = [0], 0
        while bounds[-1] < len(ends):
            bounds.append(int(np.searchsorted(ends, used + sequence_length, side="right")))
            used = int(ends[bounds[-1] - 1])
        self.row_bounds = np.array(bounds, np.int64)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.row_bounds) - 1

    @property
    def tokens_per_epoch(self) -> int:
        return int(self.piece_lengths.sum())

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // (self.batch_size * self.accumulation))

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers in the order of an epoch: a function of (seed, epoch) alone."""
        if epoch != self._epoch:
            count = self.rows_per_epoch
            self._order = (
                np.random.default_rng([self.seed, epoch]).permutation(count)
                if self.shuffle
                else np.arange(count)
            )
            self._epoch = epoch
        return self._order

    def step(self, index: int) -> list[Batch]:
        """The micro-batches of optimizer step `index`, counted from 0 through all epochs."""
        epoch, within = divmod(index, self.steps_per_epoch)
        window = self.batch_size * self.accumulation
        rows = self.order(epoch)[within * window : (within + 1) * window]
        return [
            self.batch(rows[at : at + self.batch_size])
            for at in range(0, len(rows), self.batch_size)
        ]

    def batch(self, rows: np.ndarray) -> Batch:
        """The given rows as one flat batch."""
        pieces = np.concatenate(
            [np.arange(self.row_bounds[r], self.row_bounds[r + 1]) for r in rows]
        )
        starts, lengths = self.piece_starts[pieces], self.piece_lengths[pieces]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.empty(offsets[-1], np.int32)
        labels = np.full(offsets[-1], -1, np.int32)
        targets = self.documents.targets
        weight = None if targets is None else np.zeros(offsets[-1], np.float32)
        for begin, start, length in zip(offsets[:-1], starts, lengths, strict=True):
            tokens[begin : begin + length] = self.documents.tokens[start : start + length]
            labels[begin : begin + length - 1] = tokens[begin + 1 : begin + length]
            if weight is not None:
                weight[begin : begin + length - 1] = targets[start + 1 : start + length]
        soft = self.documents.soft
        if soft is None:
            return Batch(tokens, offsets, labels, weight, len(rows), np.asarray(rows))
        index = np.concatenate(
            [soft.index[at : at + n] for at, n in zip(starts, lengths, strict=True)]
        )
        index[offsets[1:] - 1] = -1  # the last token of a piece has no next one in it
        weight = (index >= 0).astype(np.float32) * (1 if weight is None else weight)
        top = soft.tokens.shape[1]
        top_tokens = np.tile(np.arange(top, dtype=np.int32), (len(index), 1))
        top_logprobs = np.zeros((len(index), top + 1), np.float32)
        top_tokens[index >= 0] = soft.tokens[index[index >= 0]]
        top_logprobs[index >= 0] = soft.logprobs[index[index >= 0]]
        return Batch(
            tokens, offsets, labels, weight, len(rows), np.asarray(rows), top_tokens, top_logprobs
        )

    def __iter__(self) -> Iterator[Batch]:
        """All micro-batches of the first epoch."""
        for index in range(self.steps_per_epoch):
            yield from self.step(index)


def cut_pieces(starts: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) of every piece: documents cut at multiples of `sequence_length`.

    Pieces of one token hold nothing to predict and are dropped.
    """
    lengths = np.diff(starts)
    sequence_length = min(sequence_length, int(starts[-1]) + 1)  # an int64, however large it was
    counts = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = number * sequence_length
    sizes = np.minimum(sequence_length, lengths[document] - begins)
    keep = sizes >= 2
    return (starts[:-1][document] + begins)[keep], sizes[keep]


def check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ArgumentError(f"{name}={shorten(value)}: expected a whole number of at least {least}")


def sample_rows(documents: Documents, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """An int32 array (at most `rows`, `length`) for calibration: whole windows, evenly drawn."""
    check_whole("calibration rows", rows, 1)
    check_whole("calibration length", length, 2)
    starts, lengths = cut_pieces(documents.starts, length)
    full = starts[lengths == length]
    usable = len(documents.tokens) // length
    if len(full) < min(rows, usable):
        # Many documents are shorter: run them together, calibration minds no borders.
        full = np.arange(usable, dtype=np.int64) * length
    if len(full) == 0:
        raise ArgumentError(
            f"calibration needs at least {length} tokens, the data hold {len(documents.tokens)}"
        )
    if len(full) > rows:
        full = np.sort(np.random.default_rng([seed, 2]).choice(full, rows, replace=False))
    return np.stack([documents.tokens[at : at + length] for at in full]).astype(np.int32)

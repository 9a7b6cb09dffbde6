"""Checkpoint folders: config.json, safetensors files (one or sharded), and the files beside them.

Reading.  A safetensors file is eight bytes (the header's length, little-endian), a JSON header that
gives each tensor's dtype, shape and byte range, and the bytes.  The file is mapped, not read: a 16
GB model opens at once and its pages come in as they are used.  The mapping is copy-on-write, so a
model can be trained in place without touching its file and without a second copy of what is not
changed.  Some processors compute more slowly from mapped files, most of all where tensors lie
across lines of the caches (docs/performance-log.md), so a caller may ask for tensors in memory of
their own.

Files are treated as hostile.  Every number in the header is checked before it is used for anything:
the ranges must tile the data exactly (no hole, no overlap, nothing beyond the end), the products of
the shapes must give the ranges' lengths, names must not repeat, and a shard index may only name
files in its own folder.

Writing.  A folder is written beside its destination and renamed when all of it is on the disk; into
a folder that exists already, files are moved one by one, each by an atomic rename.  A full disk or
a killed process never leaves half a file under a name that a reader would open.  Tensors stand at
multiples of 64 bytes where the format, which has no holes, allows it: a product of several rows is
slower where each vector of weights lies in two lines of the caches.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dtypes import LINE, STORAGE, empty
from .errors import (
    ArgumentError,
    Error,
    FileError,
    FormatError,
    NotFoundError,
    listing,
    shorten,
)

__all__ = [
    "Checkpoint",
    "StoredTensor",
    "read_header",
    "read_json",
    "write_folder",
    "write_safetensors",
]

#: Names of the safetensors dtypes and their bytes an element.
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
_WEIGHT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FILE_DTYPES = {ours: theirs for theirs, ours in _WEIGHT_DTYPES.items()}

_MAX_HEADER = 100_000_000  # the limit of the format
_MAX_JSON = 100_000_000
_MAX_DIGITS = 300  # of an integer: all of them then fit a float
_MAX_RANK = 32  # of a tensor
_MAX_NAME = 255  # bytes of a file's name
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 5_000_000_000

#: What belongs to a checkpoint besides weights and configuration, and is copied along with it.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_COMPANION_FOLDER = "additional_chat_templates"  # of named templates, NAME.jinja


# ---- JSON ----------------------------------------------------------------------------------------


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs of one JSON object; a repeated key is an error."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shorten(key)} appears twice")
            seen.add(key)
    return result


def _integer(text: str) -> int:
    """An integer of JSON text; none has hundreds of digits, and no float could hold them."""
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def parse_json(data: bytes, where: str) -> dict:
    """The JSON object in `data`; any other content, however deep or large, is a FormatError."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_int=_integer
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise FormatError(
            f"{where}: not valid JSON ({reason}); download or write the file again"
        ) from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def read_file(path: str | os.PathLike) -> bytes:
    """The content of a file that is to be small, or a NotFoundError, FileError or FormatError."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_JSON + 1)
    except FileNotFoundError:
        raise _not_found(path) from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > _MAX_JSON:
        raise FormatError(
            f"{path}: larger than {_MAX_JSON} bytes; this is not a configuration file"
        )
    return data


def _not_found(path: str | os.PathLike) -> NotFoundError:
    broken = "is a link to a file that is not there; download or copy the file itself"
    return NotFoundError(f"{path}: {broken if os.path.islink(path) else 'no such file'}")


def read_json(path: str | os.PathLike) -> dict:
    """The JSON object of a file, or an error as of `read_file`."""
    return parse_json(read_file(path), str(path))


# ---- safetensors: reading ------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `begin` and `end` are bytes from the start of the file."""

    name: str
    file: Path
    dtype: str
    """The word of the file: F32, BF16, ..."""
    shape: tuple[int, ...]
    begin: int
    end: int


def _checked_tensor(
    name: str, entry: object, path: Path, data_start: int, data_bytes: int
) -> StoredTensor:
    """One header entry as a StoredTensor, every number of it checked."""

    def fail(expected: str, got: object) -> FormatError:
        return FormatError(
            f"{path}: tensor {shorten(name)}: expected {expected}, got {shorten(got)}"
        )

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("an object of dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise fail(f"a dtype among {', '.join(_ITEM_BYTES)}", dtype)
    if not _is_sizes(shape) or len(shape) > _MAX_RANK:
        raise fail(f"a shape of at most {_MAX_RANK} non-negative integers", shape)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("data_offsets [begin, end] with 0 <= begin <= end", offsets)
    begin, end = offsets
    if end > data_bytes:
        raise fail(
            f"bytes within the {data_bytes} of the file's data (is the file cut off?)", offsets
        )
    wanted = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != wanted:
        raise fail(f"{wanted} bytes for {dtype} of shape {shorten(shape)}", f"{end - begin} bytes")
    return StoredTensor(name, path, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value
    )


def read_header(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name, in the order of their bytes.

    Raises
    ------
    FormatError
        For anything that is not exactly the format; the message names file, tensor, expected and
        got.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if len(prefix) == 8 and length <= min(size - 8, _MAX_HEADER):
                header = file.read(length)
    except FileNotFoundError:
        raise _not_found(path) from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None
    if len(prefix) < 8:
        raise FormatError(
            f"{path}: {size} bytes are too few for a safetensors file; download it again"
        )
    if length > min(size - 8, _MAX_HEADER):
        raise FormatError(
            f"{path}: the header claims {length} bytes, but the file has {size} (and {_MAX_HEADER} "
            "are allowed); it is cut off or not a safetensors file: download it again"
        )
    if not header.startswith(b"{"):
        raise FormatError(
            f"{path}: the header does not start with '{{': this is not a safetensors file"
        )

    entries = parse_json(header, f"{path}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise FormatError(f"{path}: __metadata__: expected an object, got {shorten(metadata)}")
    start, data_bytes = 8 + length, size - 8 - length
    tensors = [
        _checked_tensor(name, entry, path, start, data_bytes) for name, entry in entries.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = start
    for tensor in tensors:
        if tensor.begin != position:
            kind = (
                "overlaps the one before it"
                if tensor.begin < position
                else "leaves a hole before it"
            )
            raise FormatError(
                f"{path}: tensor {shorten(tensor.name)} {kind}: expected its data at byte "
                f"{position - start}, got {tensor.begin - start}"
            )
        position = tensor.end
    if position != size:
        raise FormatError(
            f"{path}: {size - position} bytes after the last tensor; the file is damaged"
        )
    return {tensor.name: tensor for tensor in tensors}


# ---- folders: reading ----------------------------------------------------------------------------


class Checkpoint:
    """An opened checkpoint folder: its configuration and, by name, its tensors.

    Attributes
    ----------
    folder : Path
    config : dict
        config.json.
    mamba_config : dict or None
        mamba_config.json, which only hybrids have.
    tensors : dict of str to StoredTensor
        Of all shards.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        hybrid = self.folder / "mamba_config.json"
        self.mamba_config = read_json(hybrid) if os.path.lexists(hybrid) else None
        self.tensors = self._find_tensors()
        self._maps: dict[Path, np.ndarray] = {}

    def _find_tensors(self) -> dict[str, StoredTensor]:
        single, index = self.folder / _SINGLE, self.folder / _INDEX
        if os.path.lexists(single):
            return read_header(single)
        if os.path.lexists(index):
            return self._read_shards(index)
        others = sorted(
            path.name
            for path in self.folder.glob("*")
            if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        )
        mend = (
            f"; it holds {listing(others)}: save the model as safetensors first" if others else ""
        )
        raise NotFoundError(f"{self.folder}: neither {_SINGLE} nor {_INDEX} is there{mend}")

    def _read_shards(self, index: Path) -> dict[str, StoredTensor]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(
                f"{index}: expected a weight_map object of tensor names to files, got "
                f"{shorten(weight_map)}"
            )
        for name, shard in weight_map.items():
            # A shard is a plain name in this folder: an index cannot make us open anything else.
            if (
                not isinstance(shard, str)
                or shard != os.path.basename(shard)
                or shard in ("", ".", "..")
                or "\\" in shard
                or "\0" in shard
                or len(shard.encode("utf-8", "replace")) > _MAX_NAME
            ):
                raise FormatError(
                    f"{index}: tensor {shorten(name)}: expected the name of a file in this folder, "
                    f"got {shorten(shard)}"
                )
        tensors: dict[str, StoredTensor] = {}
        for shard in sorted(set(weight_map.values())):
            path = self.folder / shard
            if not path.exists():
                raise NotFoundError(
                    f"{index}: shard {shorten(shard)} is missing; download the whole repository"
                )
            for name, tensor in read_header(path).items():
                if name in tensors:
                    raise FormatError(
                        f"{path}: tensor {shorten(name)} is also in {tensors[name].file.name}; "
                        "expected it once"
                    )
                tensors[name] = tensor
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard:
                raise FormatError(
                    f"{index}: tensor {shorten(name)} is not in {shorten(shard)}; index and shards "
                    "do not belong together"
                )
        return tensors

    def weight_dtype(self, name: str) -> str:
        """A tensor's dtype by our name; refuses one that no weight has."""
        tensor = self.tensors[name]
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise FormatError(
                f"{tensor.file}: tensor {shorten(name)}: expected dtype F32, BF16 or F16, got "
                f"{tensor.dtype}; save the model in one of these (quantised weights are not read)"
            )
        return _WEIGHT_DTYPES[tensor.dtype]

    def read(
        self, name: str, mmap: bool = True, new: Callable[..., np.ndarray] = empty
    ) -> tuple[np.ndarray, str]:
        """A tensor and the name of its dtype; the array is a writeable copy-on-write view of the
        file or, without `mmap`, memory of its own, made by `new`.

        bfloat16 comes as uint16 (see `dtypes`).
        """
        tensor, dtype = self.tensors[name], self.weight_dtype(name)
        if tensor.begin == tensor.end:
            return np.zeros(tensor.shape, STORAGE[dtype]), dtype
        if not mmap:
            array = new(tensor.shape, dtype)
            _read_into(array.reshape(-1).view(np.uint8), tensor)
            return array, dtype
        data = self._map(tensor.file)[tensor.begin : tensor.end]
        if data.size < tensor.end - tensor.begin:
            raise _became_shorter(tensor.file)
        if tensor.begin % STORAGE[dtype].itemsize != 0:
            data = data.copy()  # an unaligned tensor cannot be used in place
        return data.view(STORAGE[dtype]).reshape(tensor.shape), dtype

    def _map(self, path: Path) -> np.ndarray:
        if path not in self._maps:
            try:
                data: np.ndarray = np.memmap(path, np.uint8, mode="c")
            except (OSError, ValueError):
                # Systems may refuse a writeable mapping larger than memory; reading needs none.
                data = _map_read_only(path)
            self._maps[path] = data.view(np.ndarray)
        return self._maps[path]


def _read_into(data: np.ndarray, tensor: StoredTensor) -> None:
    """Reads a tensor's bytes into `data`."""
    try:
        with open(tensor.file, "rb") as file:
            file.seek(tensor.begin)
            count = file.readinto(data.data)
    except OSError as error:
        raise FileError(f"{tensor.file}: cannot be read ({error.strerror})") from None
    if count < data.size:
        raise _became_shorter(tensor.file)


def _became_shorter(path: Path) -> FileError:
    return FileError(f"{path}: became shorter while it was being read; load it again")


def _map_read_only(path: Path) -> np.ndarray:
    try:
        return np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be mapped into memory ({error})") from None


# ---- safetensors: writing ------------------------------------------------------------------------


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file and waits until it is on the disk.

    The arrays are streamed: nothing the size of the model is held beside them.

    Parameters
    ----------
    path
        A name that no reader opens yet: the file is not atomic by itself (see `write_folder`).
    tensors
        Name to (C-contiguous array, dtype name), as `Checkpoint.read` gives them.
    metadata
        Strings for the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    # Whole lines of the caches first, then wider types: every tensor can be used in place, and no
    # vector of a large one lies in two lines.
    order = sorted(
        tensors,
        key=lambda name: (
            tensors[name][0].nbytes % LINE != 0,
            -STORAGE[tensors[name][1]].itemsize,
        ),
    )
    position = 0
    for name in order:
        array, dtype = tensors[name]
        end = position + array.nbytes
        header[name] = {
            "dtype": _FILE_DTYPES[dtype],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % LINE)  # eight bytes of its length stand before it
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            array = np.ascontiguousarray(tensors[name][0])
            if array.size:
                file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _split_shards(tensors: Mapping[str, tuple[np.ndarray, str]], limit: int) -> list[dict]:
    """Consecutive tensors in files of at most `limit` bytes (larger tensors stand alone)."""
    shards: list[dict] = [{}]
    size = 0
    for name, (array, dtype) in tensors.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = (array, dtype)
        size += array.nbytes
    return shards


def _write_json(path: Path, value: Mapping) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)  # in ASCII: a JSON string may hold what UTF-8 cannot
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes renames in `folder` last, on file systems that can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_folder(
    folder: str | os.PathLike,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    config: Mapping,
    mamba_config: Mapping | None = None,
    companions: Mapping[str, bytes] | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Writes a checkpoint folder; until it is complete, nothing of an older one there is touched.

    Parameters
    ----------
    folder
        Its parents are made where they are missing.
    tensors
        Name to (array, dtype name), in the order in which they are to be sharded.
    config, mamba_config
        config.json and, for hybrids, mamba_config.json.
    companions
        Further files by name: tokenizer, chat template, generation settings.
    shard_bytes
        Above this size the weights are split into several files with an index.

    Raises
    ------
    ArgumentError
        `folder` is not a name.
    FileError
        The disk is full, the place is not writeable, ...; what was there before is unharmed.
    """
    text = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ArgumentError(f"save: expected the name of a folder, got {shorten(folder)}")
    folder = Path(os.path.abspath(os.path.expanduser(text)))
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise FileError(f"{folder}: is a file; a model is saved as a folder")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.saving-", dir=folder.parent))
        os.chmod(temporary, 0o777 & ~_umask())
        _write_weights(temporary, tensors, shard_bytes)
        for name, content in (companions or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)
        if mamba_config is not None:
            _write_json(temporary / "mamba_config.json", mamba_config)
        _write_json(temporary / "config.json", config)
        _sync_folder(temporary)
        _move_into_place(temporary, folder)
    except OSError as error:
        if isinstance(error, Error):
            raise
        reason = error.strerror or error
        raise FileError(
            f"{folder}: the model could not be saved ({reason}); what was there before is unharmed"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_weights(
    folder: Path, tensors: Mapping[str, tuple[np.ndarray, str]], shard_bytes: int
) -> None:
    shards = _split_shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / _SINGLE, shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(array.nbytes for array, _ in tensors.values())
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Renames the finished folder to its name, or its files over those of a folder that exists."""
    try:
        os.rename(temporary, folder)  # also over an empty folder
        _sync_folder(folder.parent)
        return
    except OSError:
        if not folder.is_dir():
            raise
    fresh = {str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()}
    # Weights come before the configuration that describes them; other people's files stay.
    for name in sorted(fresh, key=lambda name: (name.endswith(".json"), name)):
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(temporary / name, folder / name)
    # What the old checkpoint had and the new one has not would be read along with it.
    stale = {_SINGLE, _INDEX, "mamba_config.json"} | {
        path.name for path in folder.glob("model-*-of-*.safetensors")
    }
    if set(COMPANION_FILES) & fresh:  # one model's chat template is not another's
        stale.update(COMPANION_FILES, _named_templates(folder))
    for name in stale - fresh:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / name)
    _sync_folder(folder)


def _named_templates(folder: Path) -> list[str]:
    """Names of a folder's further chat templates, as seen from it."""
    return sorted(
        str(path.relative_to(folder)) for path in (folder / _COMPANION_FOLDER).glob("*.jinja")
    )


def read_companions(folder: Path) -> dict[str, bytes]:
    """The tokenizer files, chat templates and generation settings of a checkpoint folder."""
    found = {}
    for name in (*COMPANION_FILES, *_named_templates(folder)):
        with contextlib.suppress(NotFoundError):
            found[name] = read_file(folder / name)
    return found

"""A loaded model: `load`, and the `Model` that it returns.

A model is the C core's description of itself plus the arrays of its parameters, which Python owns:
they are views of the mapped files until something writes to them, unless `load` was told to read
them into memory.  `parameters()` shows them without a copy, and training changes them in place.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .checkpoint import Checkpoint, parse_json, read_companions, write_folder
from .devices import check_device, operator_table
from .dtypes import Room, bytes_of, check_dtype, convert, empty, to_float32
from .errors import (
    ArgumentError,
    FormatError,
    OutOfMemoryError,
    ShapeError,
    check_at_least,
    shorten,
)
from .families import Description, describe, match_tensors
from .hub import find_folder
from .memory import IN_FILES, check_weights
from .quantize import check_kind, coded
from .tokenizer import Tokenizer

__all__ = ["Model", "ModelConfig", "load"]


@dataclass(frozen=True)
class ModelConfig:
    """What a model is, in a few words; `raw` is its whole config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    attention_layers: tuple[int, ...]
    """Layers that are attention; the others are mixers."""
    mixer: str | None
    """"mamba1" or "mamba2"; None where every layer is attention."""
    heads: int
    """Attention heads; in a model without attention those of Mamba-2, or 0."""
    kv_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the MLP, 0 where there is none."""
    max_position_embeddings: int | None
    """The length that it was trained for; longer inputs are allowed."""
    tied: bool
    """Whether the output product uses the embedding."""
    dtype: str
    """In which the matrices are stored."""
    raw: Mapping = field(repr=False, compare=False)
    mamba: Mapping | None = field(repr=False, compare=False, default=None)
    """mamba_config.json of a hybrid."""


class Model:
    """A Transformer, a hybrid, or a Mamba model, on one device. Made by `load` and `convert`.

    Calling it gives logits:

    >>> model = mil.load("my-model")                      # doctest: +SKIP
    >>> model(np.array([[1, 15, 27]])).shape              # doctest: +SKIP
    (1, 3, 2048)

    Attributes
    ----------
    config : ModelConfig
    core : mambainllama._core.Model
        The C core's model, for what packs its own rows.
    """

    def __init__(
        self,
        description: Description,
        parameters: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        config: Mapping,
        mamba_config: Mapping | None = None,
        companions: Mapping[str, bytes] | None = None,
        name: str = "",
        folder: Path | None = None,
        device: str = "cpu",
        weights: str | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        table = None
        if device != "cpu":
            table = operator_table(device, activation_dtype(dtypes, weights))
        specs = _core.Model.parameter_specs(description.canonical) if weights else ()
        codes = coded(specs, dtypes, weights)
        self.core = _core.Model(description.canonical, parameters, dtypes, table, codes)
        self._device, self._weights = device, weights
        self.name = name
        self._description = description
        self._raw, self._mamba_config = dict(config), mamba_config and dict(mamba_config)
        self._companions = companions
        self._folder = folder
        self._tokenizer, self._tokenizer_sought = tokenizer, tokenizer is not None
        self.config = self._summary()

    def _summary(self) -> ModelConfig:
        canonical = self._description.canonical
        layers = canonical["layers"]
        kept = tuple(i for i, layer in enumerate(layers) if layer["mixer"] == "attention")
        first = layers[kept[0] if kept else 0]
        mixers = {layer["mixer"] for layer in layers} - {"attention"}
        return ModelConfig(
            model_type=self._description.model_type,
            vocab_size=canonical["vocab"],
            hidden_size=canonical["hidden"],
            num_layers=len(layers),
            attention_layers=kept,
            mixer=mixers.pop() if mixers else None,
            heads=first.get("heads", 0),
            kv_heads=first.get("kv_heads", first.get("heads", 0)),
            head_dim=first.get("head_dim", 0),
            intermediate_size=first.get("intermediate", 0),
            max_position_embeddings=self._raw.get("max_position_embeddings"),
            tied=canonical["tied"],
            dtype=self.dtype,
            raw=self._raw,
            mamba=self._mamba_config,
        )

    # ---- what it is

    @property
    def device(self) -> str:
        """Where it computes: "cpu", "cuda:0" and so on."""
        return self._device

    @property
    def dtype(self) -> str:
        """In which its matrices are stored: "float32", "bfloat16" or "float16"."""
        return self.core.dtypes()["model.embed_tokens.weight"]

    @property
    def weights(self) -> str | None:
        """ "float8" or "int8" where the device holds the matrices in 8 bits; None: as `dtype`."""
        return self._weights

    @property
    def num_parameters(self) -> int:
        """How many numbers it has; a tied output product counts once."""
        return sum(array.size for array in self.core.parameters().values())

    def parameters(self) -> dict[str, Any]:
        """Name -> array, no copy: writing to one changes the model.

        Names are those of the hybrid layout (see families.py). bfloat16 matrices come as uint16,
        the upper half of float32; `dtypes()` tells them apart. Those of a model on a GPU are its
        own arrays there, for other libraries to take by DLPack (``torch.from_dlpack``); codes of
        8-bit weights come as uint8 or int8.
        """
        return self.core.parameters() if self.device == "cpu" else self.core.device_parameters()

    def dtypes(self) -> dict[str, str]:
        """Name -> "float32", "bfloat16" or "float16", as `parameters()`."""
        return self.core.dtypes()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, read when first asked for; None without one. Can be set."""
        if not self._tokenizer_sought:
            self._tokenizer_sought = True
            if self._folder is not None and (self._folder / "tokenizer.json").exists():
                self._tokenizer = Tokenizer.load(self._folder)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        # The checkpoint's files but one are those of the tokenizer that it came with.
        kept = "generation_config.json"
        self._companions = {name: file for name, file in self.companions().items() if name == kept}
        self._tokenizer, self._tokenizer_sought = tokenizer, True

    @property
    def generation_config(self) -> dict:
        """generation_config.json, or nothing."""
        content = self.companions().get("generation_config.json")
        where = os.fspath((self._folder or Path()) / "generation_config.json")
        return {} if content is None else parse_json(content, where)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text: of generation_config.json, config.json, or the tokenizer."""
        for value in (self.generation_config.get("eos_token_id"), self._raw.get("eos_token_id")):
            ids = value if isinstance(value, list) else [value]
            ids = [
                i
                for i in ids
                if isinstance(i, int)
                and not isinstance(i, bool)
                and 0 <= i < self.config.vocab_size
            ]
            if ids:
                return tuple(dict.fromkeys(ids))
        eos = self.tokenizer.eos_token_id if self.tokenizer else None
        return () if eos is None else (eos,)

    # ---- computing

    def __call__(self, input_ids: Any, lengths: Any = None) -> np.ndarray:
        """Logits of every position.

        Parameters
        ----------
        input_ids
            (batch, length) integers, or a list of token lists of any lengths.
        lengths
            How many tokens of each row count, where the rows are padded; all of them if not given.
            What stands behind them is not looked at.

        Returns
        -------
        numpy.ndarray
            (batch, length, vocab) float32; zeros past a row's length.

        Raises
        ------
        ShapeError, ArgumentError
            A wrong shape, length or token; the message names it.

        Notes
        -----
        Rows are computed packed one after another, so padding costs nothing and a row's logits are
        the same bits in any batch. There is no limit on the length beyond memory: past
        `max_position_embeddings` positions simply go on.

        This pass has no KV cache. Where weights have 16 bits, a cache rounds keys and values to 16
        bits, so the logits behind `generate` and `score` differ from these by such roundings.
        """
        tokens, offsets, length = pack(input_ids, lengths)
        counts = np.diff(offsets)
        filled = counts > 0  # the core's sequences have tokens
        packed = _offsets(counts[filled])
        vocab = self.config.vocab_size
        if tokens.size == 0:
            return np.zeros((counts.size, length, vocab), np.float32)
        logits = self.core.forward(tokens, packed)
        if (counts == length).all():
            return logits.reshape(counts.size, length, vocab)
        out = np.zeros((counts.size, length, vocab), np.float32)
        for row, count in enumerate(counts):
            out[row, :count] = logits[offsets[row] : offsets[row] + count]
        return out

    def state(self, capacity: int = 0) -> _core.State:
        """An empty state for one sequence, with room for `capacity` tokens (it grows by itself)."""
        check_at_least("state", "capacity", capacity, 0)
        return self.core.state(capacity)

    # ---- saving

    def save(self, folder: str | os.PathLike) -> Path:
        """Saves the model as a Hugging Face folder (with mamba_config.json where it is a hybrid),
        tokenizer included.

        The parameters are written in the dtypes that they have in memory, so that loading gives the
        same bits; those of a model with 8-bit weights as they were before. The folder is written
        aside and renamed: an older model there is unharmed until the new one is complete.

        Returns
        -------
        Path
            The folder.
        """
        names = self._description.file_name
        tensors = {names(name): (array, dtype) for name, array, dtype in self._on_host()}
        config = {
            key: value for key, value in self._raw.items() if key not in ("torch_dtype", "dtype")
        }
        # The key that this file has always had; both are read by everybody.
        config["dtype" if "dtype" in self._raw else "torch_dtype"] = self.dtype
        return write_folder(folder, tensors, config, self._mamba_config, self.companions())

    def _on_host(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """Name, array and dtype of each parameter. A GPU's are copied here, since somebody may have
        written to them; for 8-bit weights what they were made of stands in."""
        dtypes = self.core.dtypes()
        there = {} if self.device == "cpu" else self.core.device_parameters()
        for name, array in self.core.parameters().items():
            if name in there and there[name].dtype == dtypes[name]:
                array = there[name].numpy()
            yield name, array, dtypes[name]

    def companions(self) -> dict[str, bytes]:
        """Files saved beside the weights: tokenizer, chat template, generation settings."""
        if self._companions is None:
            self._companions = read_companions(self._folder) if self._folder else {}
        files = dict(self._companions)
        if "tokenizer.json" not in files and self._tokenizer is not None:
            files.update(self._tokenizer.files())
        return files

    # ---- showing

    def _facts(self) -> list[tuple[str, str]]:
        config = self.config
        size = self.num_parameters
        unit, divisor = ("B", 1e9) if size >= 1e9 else ("M", 1e6) if size >= 1e6 else ("k", 1e3)
        layers = f"{config.num_layers} layers"
        if config.mixer:
            kept = len(config.attention_layers)
            mixer = {"mamba1": "Mamba", "mamba2": "Mamba-2"}[config.mixer]
            layers += f": {config.num_layers - kept} {mixer}" + (
                f", {kept} attention" if kept else ""
            )
        facts = [
            ("family", config.model_type + (" hybrid" if self._mamba_config else "")),
            ("layers", layers),
            ("hidden", str(config.hidden_size)),
            ("vocabulary", str(config.vocab_size)),
            ("parameters", f"{size / divisor:.3g} {unit}"),
            ("dtype", config.dtype + (f", {self.weights} weights" if self.weights else "")),
            ("device", self.device),
        ]
        return [("name", self.name), *facts] if self.name else facts

    def __repr__(self) -> str:
        facts = dict(self._facts())
        name = f" {facts['name']!r}" if "name" in facts else ""
        return (
            f"<Model{name}: {facts['family']}, {facts['layers']}, hidden {facts['hidden']}, "
            f"{facts['parameters']} parameters, {facts['dtype']} on {facts['device']}>"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{key}</th><td>{html.escape(value)}</td></tr>" for key, value in self._facts()
        )
        return f"<table>{rows}</table>"


def pack(input_ids: Any, lengths: Any = None) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows of tokens as the core takes them: packed one after another.

    Returns
    -------
    tokens : int32 array
        The counting tokens of all rows.
    offsets : int64 array of rows + 1
        Where each row starts.
    length : int
        Of the longest row, padding included.
    """
    rows = _ragged(input_ids)
    if rows is not None:
        if lengths is not None:
            raise ShapeError(
                "input_ids: rows of different lengths need no lengths: leave lengths out"
            )
        given = [row.size for row in rows]
        tokens = np.concatenate([row for row in rows if row.size])
        return _integers(tokens), _offsets(given), max(given)
    ids = _array(input_ids)
    if ids.ndim != 2:
        raise ShapeError(
            f"input_ids: expected (batch, length), got shape {ids.shape}; one sequence is [tokens]"
        )
    batch, length = ids.shape
    if lengths is None:
        return _integers(ids.reshape(-1)), np.arange(batch + 1, dtype=np.int64) * length, length
    counts = _array(lengths, "lengths")
    if counts.shape != (batch,) or not np.issubdtype(counts.dtype, np.integer):
        raise ShapeError(
            f"lengths: expected {batch} integers, one for each row, got {shorten(lengths)}"
        )
    if batch and (counts.min() < 0 or counts.max() > length):
        raise ArgumentError(
            f"lengths: expected values from 0 to {length}, got {shorten(counts.tolist())}"
        )
    tokens = ids[np.arange(length) < counts[:, None]]
    return _integers(tokens), _offsets(counts), length


def _ragged(input_ids: Any) -> list[np.ndarray] | None:
    """The rows of a list of token lists whose lengths differ; None for everything else."""
    if isinstance(input_ids, (np.ndarray, str)) or not isinstance(input_ids, Sequence):
        return None
    if not all(isinstance(row, (Sequence, np.ndarray)) for row in input_ids):
        return None
    rows = [_array(row) for row in input_ids]
    different = len({row.size for row in rows}) > 1
    return rows if different and all(row.ndim == 1 for row in rows) else None


def _offsets(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _array(value: Any, name: str = "input_ids") -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise ShapeError(
            f"{name}: expected a rectangle of integers, got {shorten(value)}"
        ) from None


def _integers(tokens: np.ndarray) -> np.ndarray:
    """Tokens as int32; anything that is not a whole number, or does not fit, is refused."""
    if tokens.size == 0:
        return np.zeros(0, np.int32)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ArgumentError(f"input_ids: expected integers, got {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() > np.iinfo(np.int32).max:
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ArgumentError(f"input_ids: token {worst} is not in the vocabulary")
    return np.ascontiguousarray(tokens, np.int32)


# ---- loading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outline:
    """What a checkpoint holds, told from its headers alone."""

    checkpoint: Checkpoint
    description: Description
    specs: list[tuple[str, tuple[int, ...], bool, bool]]
    """Of `_core.Model.parameter_specs`."""
    sources: Mapping[str, str]
    """Parameter -> its tensor's name in the files."""
    dtypes: dict[str, str]
    """Parameter -> the dtype that it is loaded as."""


def outline(
    path_or_hub_id: str | os.PathLike, dtype: str = "auto", revision: str | None = None
) -> Outline:
    """A checkpoint's configuration, parameters and dtypes, as `load` would take them."""
    dtype = check_dtype(dtype)
    folder = find_folder(path_or_hub_id, revision)
    checkpoint = Checkpoint(folder)
    description = describe(
        checkpoint.config, checkpoint.mamba_config, checkpoint.tensors, str(folder)
    )
    try:
        specs = _core.Model.parameter_specs(description.canonical)
    except ArgumentError as error:  # sizes that no mixer can have, by the core's words
        raise FormatError(f"{folder}: its configuration makes no model: {error}") from None
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    sources = match_tensors(description, specs, shapes, str(folder))
    dtypes = {}
    for name, _, is_matrix, _ in specs:
        if name in sources:
            stored = checkpoint.weight_dtype(sources[name])
            dtypes[name] = (stored if dtype == "auto" else dtype) if is_matrix else "float32"
    return Outline(checkpoint, description, specs, sources, dtypes)


def _check_tied(found: Outline) -> None:
    """Refuses a tied model whose files hold an output matrix of its own: transformers uses that one
    where it differs, so to pass over it would be to load another model."""
    embedding, output = found.sources["model.embed_tokens.weight"], "lm_head.weight"
    held = found.checkpoint.tensors
    if not found.description.canonical["tied"] or output not in held or output == embedding:
        return
    (a, stored), (b, other) = found.checkpoint.read(embedding), found.checkpoint.read(output)
    parts = [slice(i, i + 4096) for i in range(0, len(a), 4096)]
    if a.shape != b.shape or not all(
        np.array_equal(to_float32(a[part], stored), to_float32(b[part], other), equal_nan=True)
        for part in parts
    ):
        raise FormatError(
            f"{found.checkpoint.folder}: tie_word_embeddings contradicts the tensors: {output} is "
            f'not equal to {embedding}; if both are right, write "tie_word_embeddings": false into '
            "config.json"
        )


def activation_dtype(dtypes: Mapping[str, str], weights: str | None) -> str:
    """What a GPU computes rows in: the matrices' dtype; bfloat16 where those are float32, but
    become 8 bits."""
    dtype = dtypes["model.embed_tokens.weight"]
    return "bfloat16" if weights and dtype == "float32" else dtype


def load(
    path_or_hub_id: str | os.PathLike,
    device: str = "auto",
    dtype: str = "auto",
    *,
    weights: str | None = None,
    mmap: bool = True,
    revision: str | None = None,
) -> Model:
    """Loads a model from a Hugging Face folder: a Transformer, a hybrid, or a pure Mamba model.

    Parameters
    ----------
    path_or_hub_id
        A folder with config.json and model.safetensors (or shards), or "owner/name" on the Hugging
        Face Hub.
    device
        "cpu", "cuda" (the first GPU), or "cuda:1" and so on. "auto" is the CPU: training and
        conversion run there only, so a GPU has to be asked for.
    dtype
        "float32", "bfloat16" or "float16" for the matrices, or "auto": as they are stored. Vectors
        (norms, biases, convolutions, A_log, D, dt biases) are always float32 in memory.
    weights
        "float8" or "int8": a GPU holds the matrices in 8 bits, made of those of `dtype` on their
        way there, and one scale a row: half the memory and up to twice the speed of generating, for
        a small loss that docs/cuda.md tells (see `mambainllama.quantize`). Rows are still computed
        in 16 bits.
    mmap
        False reads the weights into memory instead of mapping their files: a copy of this process's
        own, beside the one that the system keeps of the files. Loading takes longer, and generating
        is faster on some CPUs, most of all from files whose tensors lie across lines of the caches
        (those that this library writes do not); logits are the same bits. No effect with a GPU: its
        weights are copied to it out of the mapped files.
    revision
        Branch, tag or commit on the Hub.

    Returns
    -------
    Model

    Raises
    ------
    NotFoundError
        There is no such folder or repository, or a file in it is missing.
    FormatError
        A file is damaged, or configuration and tensors contradict each other.
    UnsupportedError
        A family, activation or rope type that is not supported; 8-bit weights on the CPU.
    OutOfMemoryError
        The weights do not fit the GPU or, without `mmap`, the memory here (known from the files'
        headers, before any is read), or their copies of another dtype do not fit here.

    Notes
    -----
    Files are mapped, not read, so a model of any size opens at once and shares its memory with
    other processes; only dtype conversions and ``mmap=False`` make copies.

    Examples
    --------
    >>> model = mil.load("my-model", dtype="bfloat16")    # doctest: +SKIP
    """
    device = check_device(device)
    weights = check_kind(weights, device)
    found = outline(path_or_hub_id, dtype, revision)
    checkpoint, folder = found.checkpoint, found.checkpoint.folder
    dtypes = dict(found.dtypes)
    if weights and "model.embed_tokens.weight" not in coded(found.specs, dtypes, weights):
        dtypes["model.embed_tokens.weight"] = activation_dtype(dtypes, weights)
    mmap = mmap or device != "cpu"  # a GPU has its own copy: one here would serve nobody
    check_weights(str(path_or_hub_id), device, found.specs, dtypes, weights, mmap)
    _check_tied(found)
    parameters = {}
    stored = {name: checkpoint.weight_dtype(source) for name, source in found.sources.items()}
    room = Room(  # for all that does not stay in its file
        bytes_of(checkpoint.tensors[found.sources[name]].shape, wanted)
        for name, wanted in dtypes.items()
        if not mmap or stored[name] != wanted
    )
    for name, wanted in dtypes.items():
        try:
            new = room.empty if stored[name] == wanted else empty
            array, _ = checkpoint.read(found.sources[name], mmap, new)
            parameters[name] = convert(array, stored[name], wanted, room.empty)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"load: {checkpoint.tensors[found.sources[name]].file}: no memory for {name} as "
                f"{wanted} ({shorten(str(error), 120)}); use {IN_FILES}"
            ) from None
    return Model(
        found.description,
        parameters,
        dtypes,
        checkpoint.config,
        checkpoint.mamba_config,
        name=Path(os.path.abspath(folder)).name
        if os.path.isdir(os.fspath(path_or_hub_id))
        else str(path_or_hub_id),
        folder=folder,
        device=device,
        weights=weights,
    )

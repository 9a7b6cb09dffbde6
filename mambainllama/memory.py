"""Memory before work: what a model, its texts and a pass need of a device, against what is free.

>>> print(mil.memory_plan("my-hybrid", device="cuda", batch=32, context=4096))    # doctest: +SKIP
my-hybrid on cuda:0 (NVIDIA H100 80GB HBM3), 78.6 of 79.2 GiB free
  weights                     15.4 GiB
  states of 32 texts          12.3 GiB   393.1 MiB for 4,096 tokens
  workspace of a pass          0.2 GiB   512 prompt rows beside 32 texts
  recorded steps               0.1 GiB
  left alone                   0.5 GiB
  together                    28.5 GiB   fits
  would fit                             161 texts of 4,096 tokens, or 32 of 24,576

`mil.load`, `mil.generate` and `Engine` make the same plan before they begin, choose `max_batch`
and the rows of a prompt's pass by it, and refuse what cannot fit in one line with these numbers.

Where the numbers come from: states and caches are sums over the configuration (a cache grows with
the text, a mixer's state does not); activations are those of a rehearsed pass, counted by the
core (csrc/model/rehearsal.c); what a device's libraries and recordings take besides is a measured
allowance.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import _core
from .devices import check_device, cuda_devices, free_memory, operator_table
from .errors import ArgumentError, OutOfMemoryError, check_at_least
from .quantize import check_kind, coded
from .rope import fixed_until

__all__ = ["MemoryPlan", "Need", "memory_plan", "weight_bytes"]

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

#: Requests that run at once where nobody says otherwise.
DEFAULT_BATCH = 16
#: The most that an engine takes (csrc/decode/generate.c).
MAX_BATCH = 1 << 16
#: Prompt rows of a pass that are tried where the device's own number does not fit; below the first
#: of them a GPU's products are slow, so fewer texts come before fewer rows.
_FEWER_ROWS = (4096, 2048, 1024, 512, 256, 128, 64, 16)
_ROWS_WORTH_TEXTS = 1024
#: A device hands out larger blocks in multiples of this.
_PAGE = 2 * MiB
#: Operators' own workspace on CUDA: cuBLASLt's 32 MiB, decays and segments of a long SSD.
_OPERATORS = 96 * MiB
#: Instantiated graphs of recorded steps and the kernels that a first call loads.
_RECORDINGS = 96 * MiB
#: What a plan leaves alone on a GPU (at most a sixteenth of it).
_APART = 512 * MiB
#: How `mil.load` takes no memory for weights.
IN_FILES = 'mmap=True with dtype="auto", which leaves weights in their files'
#: Tokens beyond its end that a text has room for (csrc/decode/sequence.c).
_SLACK = _core.WINDOW
#: New tokens that get their room at once; a longer text's cache is copied when it grows.
_ROOM_AT_ONCE = 4096


def size_words(count: float) -> str:
    """Bytes for people: "393.1 MiB"."""
    for unit, limit in (("bytes", KiB), ("KiB", MiB), ("MiB", GiB)):
        if count < limit:
            scale = limit // KiB
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count / scale:,.1f} {unit}"
    return f"{count / GiB:,.1f} GiB"


# ---- weights -----------------------------------------------------------------------------------


def weight_bytes(
    specs: Iterable[tuple[str, tuple[int, ...], bool, bool]],
    dtypes: Mapping[str, str],
    weights: str | None = None,
) -> int:
    """Bytes of a model's parameters in memory.

    Parameters
    ----------
    specs
        Of `_core.Model.parameter_specs`; those without a dtype are not there and do not count.
    dtypes
        Name -> "float32", "bfloat16" or "float16", as loaded.
    weights : "float8" or "int8", optional
        Matrices as codes of 8 bits with one float32 scale a row (those of `quantize.coded`).
    """
    item = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
    specs = list(specs)
    codes = coded(specs, dtypes, weights)
    total = 0
    for name, shape, _, _ in specs:
        if name not in dtypes:
            continue
        count = 1
        for extent in shape:
            count *= extent
        total += count * item[codes.get(name, dtypes[name])] + (
            4 * shape[0] if name in codes else 0
        )
    return total


def weights_in_memory(core: _core.Model) -> int:
    """The same of a model that is loaded."""
    if core.table_info["device"] == "cpu":
        return weight_bytes(_core.Model.parameter_specs(core.config), core.dtypes())
    arrays = core.device_parameters().values()
    scales = sum(4 * one.shape[0] for one in arrays if one.dtype in ("int8", "uint8"))
    return scales + sum(one.nbytes for one in arrays)


# ---- what one model needs ----------------------------------------------------------------------


class Footprint:
    """Bytes that texts and passes of one model take on one device."""

    def __init__(self, config: Mapping[str, Any], dtype: str, table_info: Mapping[str, Any]):
        self.config, self.dtype = config, dtype
        self.device, self.prefill_rows = table_info["device"], table_info["prefill_rows"]
        self._activation = None if self.device == "cpu" else table_info["activation"]
        self.vocab = config["vocab"]
        #: Frequencies follow the length: each prompt is read in one pass.
        self.whole_prompts = fixed_until(config.get("rope")) < math.inf
        self.workspace = lru_cache(maxsize=64)(self._workspace)
        found = self._rehearse(1, 1, 0)
        self.mixers, self.token = found["mixers"], found["token"]

    def _rehearse(self, sequences: int, rows: int, logits: int) -> dict[str, int]:
        return _core.Model.footprint(
            self.config,
            dtype=self.dtype,
            activation=self._activation,
            sequences=sequences,
            rows=rows,
            logits=logits,
        )

    def _workspace(self, sequences: int, rows: int, logits: int) -> int:
        """Activations of one pass."""
        return self._rehearse(sequences, rows, logits)["workspace"]

    def text(self, tokens: int) -> int:
        """The state of a text of so many tokens, as its device hands it out."""
        return self._pages(self.mixers) + self._pages(self.token * tokens)

    def _pages(self, count: int) -> int:
        coarse = self.device != "cpu" and count >= MiB
        return -(-count // _PAGE) * _PAGE if coarse else count


def footprint_of(model: Any) -> Footprint:
    """Of a model in memory; a `Model` keeps its own."""
    known = getattr(model, "footprint", None)
    if isinstance(known, Footprint):
        return known
    core = getattr(model, "core", model)
    info = core.table_info
    on_cpu = info["device"] == "cpu"
    name = "lm_head.weight" if "lm_head.weight" in core.dtypes() else "model.embed_tokens.weight"
    found = Footprint(core.config, core.dtypes()[name] if on_cpu else info["activation"], info)
    if core is not model:
        model.footprint = found
    return found


# ---- what a call needs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One text to be: its prompt's tokens and the most that it may grow by."""

    prompt: int
    new: int
    held: int = 0
    """Tokens that a state given for it has room for already."""

    @property
    def tokens(self) -> int:
        return self.prompt + self.new


@dataclass(frozen=True)
class Need:
    """What so many texts at once need, by purpose."""

    batch: int
    prefill_rows: int
    states: int
    draft_states: int
    workspace: int
    recordings: int
    reserve: int
    """Workspace that is taken before the first pass; 0 on the CPU."""

    @property
    def total(self) -> int:
        return self.states + self.draft_states + self.workspace + self.recordings


class Call:
    """Texts, a model and perhaps a draft model: what running them needs."""

    def __init__(
        self,
        model: Footprint,
        texts: Sequence[Text],
        draft: Footprint | None = None,
        draft_tokens: int = 0,
        extra: int = 0,
    ):
        self.model, self.draft = model, draft
        self.draft_tokens = int(draft_tokens)  # sums with NumPy's shorter integers would wrap
        if model.device == "cpu":  # memory is taken as a text grows: many are never to be so long
            texts = [t if t.new <= _ROOM_AT_ONCE else replace(t, new=_ROOM_AT_ONCE) for t in texts]
        self.texts = sorted(texts, key=lambda text: text.tokens, reverse=True)
        self.extra = extra

    def need(self, batch: int, prefill_rows: int) -> Need:
        """With the `batch` longest texts at once and passes of up to so many prompt rows."""
        batch = max(1, min(batch, len(self.texts)))
        texts = self.texts[:batch]
        room = self.draft_tokens + _SLACK
        states = self.extra + sum(
            self.model.text(text.tokens + room) for text in texts if text.held < text.tokens + room
        )
        if texts[0].new > _ROOM_AT_ONCE:  # old and new cache of the one that grows
            states += self.model.text(texts[0].tokens)
        drafts = sum(self.draft.text(t.tokens + room) for t in texts) if self.draft else 0
        prompts = sum(sorted((t.prompt for t in self.texts), reverse=True)[:batch])
        if not self.model.whole_prompts:
            prompts = min(prompts, prefill_rows)
        wide = batch * (1 + self.draft_tokens)
        rows = max(wide, batch) + prompts
        passing = self.model.workspace(batch, rows, min(rows, max(wide, 64)))
        if self.draft:
            passing = max(passing, self.draft.workspace(batch, rows, min(rows, wide)))
        if self.model.device == "cpu":  # logits, and a sampler's distributions of each text
            beside = 4 * self.model.vocab * (wide + 3 * batch)
            return Need(batch, prefill_rows, states, drafts, passing + beside, 0, 0)
        workspace = passing + _OPERATORS
        recordings = _RECORDINGS + self._recorded(batch, wide)
        return Need(batch, prefill_rows, states, drafts, workspace, recordings, workspace)

    def _recorded(self, batch: int, wide: int) -> int:
        """Logits and activations of steps that are recorded and stay."""
        logits = 4 * self.model.vocab * wide
        step = self.model.workspace(batch, wide, 0)
        if self.draft:
            logits += 4 * self.draft.vocab * wide
            step += self.draft.workspace(batch, 2 * batch, 0)
        return 2 * logits + step


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in low .. high that fits, or low - 1; what is smaller fits as well."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# ---- the plan of a call ------------------------------------------------------------------------


def apart_of(device: str, total: int) -> int:
    """What is left alone for kernels that load late and for other processes."""
    return 0 if device == "cpu" else min(_APART, total // 16)


def plan_call(
    what: str,
    call: Call,
    max_batch: int | None,
    prefill_rows: int | None,
    names: Mapping[str, str] | None = None,
    free: int | None = None,
) -> Need:
    """How a call runs in what is free: as asked for, or as many texts at once as fit.

    Raises
    ------
    OutOfMemoryError
        What was asked for cannot fit; the line says by how much, and what would.
    """
    device, own_rows = call.model.device, call.model.prefill_rows
    batch = min(len(call.texts), DEFAULT_BATCH if max_batch is None else int(max_batch))
    rows = own_rows if prefill_rows is None else int(prefill_rows)
    if free is None:
        free = available(device, call.need(batch, rows).total)

    def fits(count: int, prompt_rows: int) -> bool:
        return call.need(count, prompt_rows).total <= free

    fewer = [n for n in _FEWER_ROWS if n < rows] if prefill_rows is None else []
    enough = [rows, *(n for n in fewer if n >= _ROWS_WORTH_TEXTS)]
    for choice in enough:
        if fits(batch, choice):
            return call.need(batch, choice)
    if max_batch is None:
        at_once = largest(lambda count: fits(count, enough[-1]), 1, batch - 1)
        if at_once >= 1:
            return call.need(at_once, enough[-1])
        batch = 1
    for choice in fewer:
        if fits(batch, choice):
            return call.need(batch, choice)
    raise refusal(what, call, call.need(batch, fewer[-1] if fewer else rows), free, names or {})


def available(device: str, needed: int = 0) -> int:
    """Bytes that may be used; where they are too few, idle memory of earlier calls is given up."""
    free, total = free_memory(device)
    if needed > free - apart_of(device, total):
        _core.trim_memory()
        free, total = free_memory(device)
    return max(0, free - apart_of(device, total))


def refusal(
    what: str, call: Call, need: Need, free: int, names: Mapping[str, str]
) -> OutOfMemoryError:
    """The one line: what is needed, what is free, and settings that would fit."""
    batch, longest = need.batch, call.texts[0].tokens
    parts = [f"states {size_words(need.states)}"]
    if need.draft_states:
        parts.append(f"the draft's {size_words(need.draft_states)}")
    parts.append(f"workspace {size_words(need.workspace)}")
    if need.recordings:
        parts.append(f"recorded steps {size_words(need.recordings)}")
    texts = "a text" if batch == 1 else f"{batch:,} texts at once"
    message = (
        f"{what}: {texts} of up to {longest:,} tokens {'needs' if batch == 1 else 'need'} "
        f"{size_words(need.total)} ({', '.join(parts)}) and {size_words(free)} are free on "
        f"{call.model.device}; "
    )
    ways = ways_out(call, need, free, names)
    return OutOfMemoryError(
        message
        + (
            f"{' or '.join(ways)} would fit"
            if ways
            else "not even a short text fits beside this model: use a smaller dtype or other device"
        )
    )


def ways_out(call: Call, need: Need, free: int, names: Mapping[str, str]) -> list[str]:
    """Settings that would fit, in the caller's words."""
    ways = []
    fewer = largest(lambda n: call.need(n, need.prefill_rows).total <= free, 1, need.batch - 1)
    if fewer >= 1 and need.batch > 1:
        ways.append(f"{names.get('batch', 'max_batch')}={fewer}")
    longest = call.texts[0].tokens

    def cut(tokens: int) -> Call:
        texts = [
            Text(min(t.prompt, tokens), max(0, min(t.tokens, tokens) - t.prompt))
            for t in call.texts
        ]
        return Call(call.model, texts, call.draft, call.draft_tokens, call.extra)

    shorter = largest(
        lambda n: cut(n).need(need.batch, need.prefill_rows).total <= free, 1, longest - 1
    )
    if shorter >= 1 and longest > 1:
        rounded = shorter - shorter % 64 if shorter > 128 else shorter
        ways.append(f"at most {rounded:,} tokens a text, prompt and answer")
    if call.draft is not None:
        alone = Call(call.model, call.texts, None, 0, call.extra)
        if alone.need(need.batch, need.prefill_rows).total <= free:
            ways.append("no draft model")
    return ways


# ---- loading -----------------------------------------------------------------------------------


def check_weights(
    name: str,
    device: str,
    specs: Sequence[tuple[str, tuple[int, ...], bool, bool]],
    dtypes: Mapping[str, str],
    weights: str | None = None,
    mmap: bool = True,
) -> None:
    """Refuses a model whose weights do not fit a GPU, or the memory that they are to be read into
    without `mmap`, before any of them is read."""
    if device == "cpu" and mmap:
        return
    needed = weight_bytes(specs, dtypes, weights)
    room = available(device, needed)
    if needed <= room:
        return
    kinds = sorted({dtypes[n] for n, _, is_matrix, _ in specs if is_matrix and n in dtypes})
    ways = []
    if "float32" in kinds and weights is None:
        halves = {n: "bfloat16" if m and n in dtypes else "float32" for n, _, m, _ in specs}
        halves = {n: d for n, d in halves.items() if n in dtypes}
        if (half := weight_bytes(specs, halves)) <= room:
            ways.append(f'dtype="bfloat16" ({size_words(half)})')
    ways += [IN_FILES] if device == "cpu" else _ways_on_gpu(device, specs, dtypes, weights, room)
    raise OutOfMemoryError(
        f"load: {name}: its weights take {size_words(needed)} as {weights or ', '.join(kinds)} and "
        f"{size_words(room)} are free on {device}; use {' or '.join(ways)}"
    )


def _ways_on_gpu(
    device: str,
    specs: Sequence[tuple[str, tuple[int, ...], bool, bool]],
    dtypes: Mapping[str, str],
    weights: str | None,
    room: int,
) -> list[str]:
    """What makes weights fit a GPU that are too many for it, and other places for them."""
    ways = []
    if weights is None and (eight := weight_bytes(specs, dtypes, "float8")) <= room:
        ways.append(f'weights="float8" ({size_words(eight)})')
    number, needed = int(device.partition(":")[2]), weight_bytes(specs, dtypes, weights)
    for other, about in enumerate(cuda_devices()):
        if other != number and needed <= about["free"] - apart_of("cuda", about["memory"]):
            ways.append(f'device="cuda:{other}" ({size_words(about["free"])} free)')
            break
    return [*ways, 'device="cpu"']


# ---- shown -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """What running a model needs, and what is free, in bytes. `print` shows it as a table.

    Attributes
    ----------
    name, device, device_name : str
    free, total : int
        Of the device's memory, before what is still to be loaded.
    weights, loading : int
        Of the model, and of its draft; the part of them that is still to be loaded.
    batch, context : int
        Texts at once, and tokens of each, prompt and answer.
    text : int
        One text's state.
    need : states, draft states, workspace and recorded steps of all of them
    apart : int
        Left alone for kernels and other processes.
    most_batch : int
        Texts of this length that fit at once.
    most_context : int
        Tokens of each of `batch` texts that fit; -1: any number, since no cache grows.
    """

    name: str
    device: str
    device_name: str
    free: int
    total: int
    weights: int
    loading: int
    batch: int
    context: int
    text: int
    need: Need = field(repr=False)
    apart: int = field(repr=False)
    most_batch: int = field(default=0)
    most_context: int = field(default=0)

    @property
    def needed(self) -> int:
        """Bytes beyond what is in use now."""
        return self.need.total + self.apart + self.loading

    @property
    def fits(self) -> bool:
        """Whether that is free."""
        return self.needed <= self.free

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "device": self.device,
            "device_name": self.device_name,
            "free": self.free,
            "total": self.total,
            "weights": self.weights,
            "loading": self.loading,
            "batch": self.batch,
            "context": self.context,
            "text": self.text,
            "states": self.need.states,
            "draft_states": self.need.draft_states,
            "workspace": self.need.workspace,
            "recordings": self.need.recordings,
            "apart": self.apart,
            "needed": self.needed,
            "fits": self.fits,
            "max_batch": self.most_batch,
            "max_context": self.most_context,
        }

    def __str__(self) -> str:
        texts = f"{self.batch:,} texts" if self.batch > 1 else "one text"
        rows: list[tuple[str, int | None, str]] = [
            ("weights", self.weights, "" if self.loading else "in memory already"),
            (f"states of {texts}", self.need.states,
             f"{size_words(self.text)} for {self.context:,} tokens"),
        ]  # fmt: skip
        if self.need.draft_states:
            rows.append(("the draft's states", self.need.draft_states, ""))
        rows.append(
            ("workspace of a pass", self.need.workspace, f"{self.need.prefill_rows:,} prompt rows")
        )
        if self.need.recordings:
            rows.append(("recorded steps", self.need.recordings, ""))
        if self.apart:
            rows.append(("left alone", self.apart, "kernels, other processes"))
        verdict = "fits" if self.fits else f"{size_words(self.needed - self.free)} too much"
        rows.append(("together" if self.loading else "needed now", self.needed, verdict))
        rows.append(("would fit", None, self._limits()))
        width = max(len(name) for name, _, _ in rows)
        device = f"{self.device} ({self.device_name})" if self.device_name else self.device
        lines = [
            f"{self.name} on {device}, {size_words(self.free)} of {size_words(self.total)} free"
        ]
        for name, count, words in rows:
            shown = "" if count is None else size_words(count)
            lines.append(f"  {name:<{width}}  {shown:>11}  {words}".rstrip())
        return "\n".join(lines)

    def _limits(self) -> str:
        if self.most_batch < 1:
            return "not even one text of this length"
        many = f"{self.most_batch:,} texts of {self.context:,} tokens"
        if self.most_context < 0:
            return f"{many}; a text's length does not matter"
        if self.most_context == 0:
            return many
        return f"{many}, or {self.batch:,} of {self.most_context:,}"


def memory_plan(
    model: Any,
    *,
    batch: int = DEFAULT_BATCH,
    context: int | None = None,
    draft: Any = None,
    draft_tokens: int = 4,
    prefill_rows: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    weights: str | None = None,
) -> MemoryPlan:
    """What generating with a model needs of its device's memory, before anything is loaded or run.

    Parameters
    ----------
    model
        From `mil.load`, or a folder or Hub id: then only its headers are read.
    batch
        Texts at once.
    context
        Tokens of each, prompt and answer; by default 4096, or fewer where the model was trained
        for fewer.
    draft
        A draft model, "ngram", or None; a folder where `model` is one.
    draft_tokens
        As for `mil.generate`.
    prefill_rows
        Prompt rows of one pass; by default what the device likes.
    device, dtype, weights
        As for `mil.load`, where `model` is a folder.

    Returns
    -------
    MemoryPlan

    Raises
    ------
    ArgumentError, UnsupportedError
        A number that makes no sense; what the device cannot do. What does not fit is no error here.
    NotFoundError, FormatError, FileError
        As for `mil.load`.

    Examples
    --------
    >>> plan = mil.memory_plan("my-hybrid", device="cuda", batch=32)   # doctest: +SKIP
    >>> plan.fits, plan.most_batch                                     # doctest: +SKIP
    (True, 161)
    """
    check_at_least("memory_plan", "batch", batch, 1)
    for name, value in (("prefill_rows", prefill_rows), ("context", context)):
        if value is not None:
            check_at_least("memory_plan", name, value, 1)
    check_at_least("memory_plan", "draft_tokens", draft_tokens, 0)
    if batch > MAX_BATCH:
        raise ArgumentError(f"memory_plan: batch must be at most {MAX_BATCH:,}, not {batch:,}")
    subject = _Subject.of(model, device, dtype, weights)
    batch = int(batch)
    context = min(4096, subject.trained or 4096) if context is None else int(context)
    second = None
    if draft is not None and draft != "ngram":
        second = _Subject.of(draft, subject.device, dtype, weights)
    drafted = 0 if draft is None else int(draft_tokens)
    rows = subject.footprint.prefill_rows if prefill_rows is None else int(prefill_rows)
    known = [subject] if second is None else [subject, second]
    loading = sum(one.weights for one in known if not one.loaded)
    free, total = free_memory(subject.device)
    apart = apart_of(subject.device, total)

    def need(count: int, tokens: int) -> Need:
        texts = [Text(max(1, tokens - 1), 1)] * count
        call = Call(subject.footprint, texts, second.footprint if second else None, drafted)
        return call.need(count, rows)

    def fits(count: int, tokens: int) -> bool:
        return need(count, tokens).total <= free - apart - loading

    grows = any(one.footprint.token for one in known)
    longest = largest(lambda tokens: fits(batch, tokens), 1, 1 << 24) if grows else -1
    return MemoryPlan(
        name=subject.name,
        device=subject.device,
        device_name=_device_name(subject.device),
        free=free,
        total=total,
        weights=sum(one.weights for one in known),
        loading=loading,
        batch=batch,
        context=context,
        text=subject.footprint.text(context + drafted + _SLACK),
        need=need(batch, context),
        apart=apart,
        most_batch=largest(lambda count: fits(count, context), 1, 4096),
        most_context=longest - longest % 64 if longest > 128 else longest,
    )


def _device_name(device: str) -> str:
    if device == "cpu":
        return ""
    return str(cuda_devices()[int(device.partition(":")[2])]["name"])


@dataclass(frozen=True)
class _Subject:
    """A model in memory, or one that is still on the disk."""

    name: str
    device: str
    footprint: Footprint
    weights: int
    loaded: bool
    trained: int | None

    @classmethod
    def of(cls, model: Any, device: str | None, dtype: str, weights: str | None) -> _Subject:
        if isinstance(model, str | os.PathLike):
            return cls._on_disk(model, check_device(device or "auto"), dtype, weights)
        core = getattr(model, "core", model)
        if not isinstance(core, _core.Model):
            raise ArgumentError(
                "memory_plan: model must be a folder, a Hub id, or what mil.load gave"
            )
        where = core.table_info["device"]
        if device is not None and check_device(device) != where:
            raise ArgumentError(
                f"memory_plan: this model is on {where}; give its folder to plan for {device}"
            )
        return cls(
            name=getattr(model, "name", "") or "this model",
            device=where,
            footprint=footprint_of(model),
            weights=weights_in_memory(core),
            loaded=True,
            trained=getattr(getattr(model, "config", None), "max_position_embeddings", None),
        )

    @classmethod
    def _on_disk(cls, model: Any, device: str, dtype: str, weights: str | None) -> _Subject:
        from .model import outline

        weights = check_kind(weights, device)
        found = outline(model, dtype)
        kind = found.dtypes.get("lm_head.weight", found.dtypes["model.embed_tokens.weight"])
        table_info = _core.table_info(operator_table(device, kind))
        return cls(
            name=Path(os.fspath(model)).name,
            device=device,
            footprint=Footprint(found.description.canonical, kind, table_info),
            weights=weight_bytes(found.specs, found.dtypes, weights),
            loaded=False,
            trained=found.checkpoint.config.get("max_position_embeddings"),
        )

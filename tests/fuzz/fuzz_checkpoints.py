"""Damaged checkpoints by the thousand: each works or is refused in one line, and nothing else.

A case is a valid tiny checkpoint with one to three changes: bits, lengths, header entries,
configuration values, tokenizer files, chat templates, weights that are not numbers. It is loaded,
run, continued, saved and loaded again, and the image of its state is damaged and restored. Allowed
are success and a `mil.Error` of one line. Any other exception, a crash, a sanitizer's report, more
than `--cpu-seconds` of processor time or more than `--memory` of memory is a finding: the case's
files, what was printed, and the command that repeats it are kept.

A case depends on `--seed` and its number alone, so a run repeats whatever the machine's speed. Each
runs in a child of its own by fork, so that a crash costs one case, and what it used is known.

    make fuzz                                    under AddressSanitizer, four minutes
    make fuzz ARGS="--seed 7 --seconds 60"
    make fuzz ARGS="--seed 7 --only 1234"        one case again, with its files and traceback
"""

import argparse
import collections
import contextlib
import faulthandler
import json
import math
import os
import platform
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked child has no team of threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
from tiny_checkpoints import CONFIGS, tiny, tiny_hybrid  # noqa: E402

import mambainllama as mil  # noqa: E402
from mambainllama.chat import ChatTemplate  # noqa: E402

PROMPT = np.arange(3, 23, dtype=np.int64)  # longer than one window of a mixer's tail
MESSAGES = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m['content'] }}\n{% endfor %}{{ eos_token }}"

# ---- the good checkpoints ------------------------------------------------------------------------

BASES = {
    "llama": lambda folder: tiny(folder, "llama"),
    "rope-llama3": lambda folder: tiny(folder, "rope-llama3-new", dtype="float16"),
    "rope-yarn": lambda folder: tiny(folder, "rope-yarn-old"),
    "rope-longrope": lambda folder: tiny(folder, "rope-longrope-old"),
    "rope-dynamic": lambda folder: tiny(folder, "rope-dynamic-old"),
    "sharded": lambda folder: tiny(folder, "llama-bias", shards=2),
    "bfloat16": lambda folder: tiny(folder, "qwen3", dtype="bfloat16"),
    "windows": lambda folder: tiny(folder, "ministral"),
    "smollm3": lambda folder: tiny(folder, "smollm3-list"),
    "hybrid-1": lambda folder: tiny_hybrid(folder, "mamba1"),
    "hybrid-2": lambda folder: tiny_hybrid(folder, "mamba2", dtype="bfloat16"),
    "mamba": lambda folder: tiny(folder, "mamba-tied"),
    "mamba2": lambda folder: tiny(folder, "mamba2-limit"),
    "bamba": lambda folder: tiny(folder, "bamba"),
    "jamba": lambda folder: tiny(folder, "jamba", shards=3),
}


def good_files(base):
    """Name -> bytes of a whole folder, tokenizer and chat templates included."""
    with tempfile.TemporaryDirectory() as folder:
        BASES[base](folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    vocabulary = {f"w{i}": i for i in range(CONFIGS["llama"]["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["w1", "w2"])
    config = {"bos_token": "w1", "eos_token": {"content": "w2"}, "chat_template": TEMPLATE}
    files["tokenizer.json"] = tokenizer.to_str().encode()
    files["tokenizer_config.json"] = json.dumps(config).encode()
    files["special_tokens_map.json"] = json.dumps({"pad_token": "w0"}).encode()
    files["generation_config.json"] = json.dumps({"eos_token_id": [2, 95]}).encode()
    if base in ("llama", "hybrid-2"):
        files["chat_template.jinja"] = TEMPLATE.encode()
    return files


# ---- damage --------------------------------------------------------------------------------------

NUMBERS = [
    0, 1, -1, 2, 3, 7, 16, 48, 97, 2**16, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**53, 2**60,
    2**63 - 1, 2**63, -(2**63), 2**64, 2**64 - 4, 10**400, -(10**400),
    0.0, -0.0, 0.5, 1.5, 1e-8, 1e-45, 1e-300, 1e38, 1e39, 1e300, -1e300, math.inf, -math.inf,
    math.nan,
]  # fmt: skip
WORDS = [
    "", " ", "a\nb", "\0", "\ud800", "x" * 5000, "../x", "/etc/passwd", "é漢🙂", "auto", "none",
    "F32", "BF16", "F16", "I64", "BOOL", "llama", "mamba", "mamba2", "mistral", "jamba", "linear",
    "llama3", "yarn", "longrope", "dynamic", "default", "gelu", "silu", "full_attention", "w3",
    "BPE", "Unigram", "WordPiece", "ByteLevel", "Metaspace", "Sequence", "TemplateProcessing",
    "{{ messages }}", "Infinity",
]  # fmt: skip
SNIPPETS = [
    "{{ messages[99].content }}", "{{ messages.x.y }}", "{% for i in range(10**9) %}.{% endfor %}",
    "{{ 'a' * 10**12 }}", "{{ 10 ** 10 ** 10 }}", "{{ 1 / 0 }}", "{{ raise_exception('a\nb') }}",
    "{{ ''.__class__.__mro__ }}", "{% include 'x' %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages | tojson(indent=2**40) }}", "{{ strftime_now(3) }}", "{{ x.y.z }}", "{% if %}",
    "{%", "{{", "{#", "{% break %}", "{% generation %}", "{{ messages.append(1) }}",
    "{{ (" + "(" * 500, "{{ " + "-" * 3000 + "1 }}", "{{ '%0999999999999d' % 3 }}",
    "{{ 'x'.center(10**13) }}", "{{ [1] * 10**11 }}", "\0", "\ufeff", "{{ lipsum(n=1000) }}",
]  # fmt: skip


def pick(rng, values):
    return values[rng.integers(len(values))]


def number(rng):
    """A hostile number, sometimes near one of the list."""
    value = pick(rng, NUMBERS)
    return value + int(rng.integers(-3, 4)) if isinstance(value, int) else value


def nest(rng, value):
    """`value` in a few or in thousands of lists or objects."""
    depth = int(pick(rng, [1, 2, 60, 500, 990, 5000]))
    if rng.random() < 0.5:
        return Raw("[" * depth + dump(value) + "]" * depth)
    return Raw('{"a":' * depth + dump(value) + "}" * depth)


def anything(rng, old):
    """What may stand in place of a JSON value."""
    kind = rng.integers(8)
    if kind <= 2:
        return number(rng)
    if kind == 3:
        return pick(rng, WORDS)
    if kind == 4:
        return pick(rng, [None, True, False, [], {}, [[]], [None], {"": {}}])
    if kind == 5:
        return nest(rng, None if isinstance(old, (dict, list)) else old)
    if kind == 6 and type(old) in (int, float) and abs(old) < 2**63:
        return pick(rng, [old + 1, old - 1, old * 2, -old, old / 2, float(old), str(old), [old]])
    return [number(rng) for _ in range(rng.integers(1, 70))]


class Raw(str):
    """JSON text that is written as it stands."""


def dump(value):
    """JSON of a value that may hold Raw text."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(k))}:{dump(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def change_json(rng, root):
    """Changes one place of a JSON value, in place; says which."""
    holder, path = root, ""
    while True:
        places = list(holder) if isinstance(holder, dict) else range(len(holder))
        if not len(places):
            return f"{path or 'root'} is empty"
        key = places[rng.integers(len(places))]
        path += f"[{key!r}]"
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.25:
            break
        holder = inner
    action = rng.integers(10)
    if action == 0:
        del holder[key]
        return f"{path} removed"
    if action == 1 and isinstance(holder, dict):
        holder[pick(rng, [key + "x", *WORDS])] = holder.pop(key)
        return f"{path} renamed"
    if action == 2:
        other = places[rng.integers(len(places))]
        holder[key], holder[other] = holder[other], holder[key]
        return f"{path} exchanged with {other!r}"
    holder[key] = anything(rng, inner)
    return f"{path} = {dump(holder[key])[:100]}"


def damage_json(rng, files):
    """A value of a configuration, index or tokenizer file."""
    name = pick(rng, sorted(name for name in files if name.endswith(".json")))
    if rng.random() < 0.5:  # the two that matter most
        mamba = "mamba_config.json" in files and rng.random() < 0.5
        name = "mamba_config.json" if mamba else "config.json"
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError):  # damaged before
        return damage_bytes(rng, files, name)
    if not isinstance(value, (dict, list)):
        return damage_bytes(rng, files, name)
    done = change_json(rng, value)
    files[name] = dump(value).encode("utf-8", "surrogatepass")
    return f"{name}: {done}"


# Keys that a family reads but the tiny files leave out.
SPARE_KEYS = [
    "head_dim", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers",
    "no_rope_layer_interval", "original_max_position_embeddings", "max_position_embeddings",
    "time_step_limit", "time_step_rank", "num_experts", "attention_bias", "mlp_bias", "use_bias",
    "use_conv_bias", "quantization_config", "attn_layer_period", "attn_layer_offset", "expand",
    "mixer_rms_eps", "eos_token_id", "attn_layer_indices", "mamba_d_head",
]  # fmt: skip
ROPE_KEYS = [
    "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "attention_factor", "truncate", "short_factor", "long_factor",
    "original_max_position_embeddings", "partial_rotary_factor", "max_position_embeddings",
]  # fmt: skip


def damage_keys(rng, files):
    """A key that config.json (or ssm_cfg, or RoPE) may have, with a hostile value."""
    try:
        config = json.loads(files["config.json"])
        if not isinstance(config, dict):
            raise ValueError
    except (ValueError, RecursionError):
        return damage_bytes(rng, files)
    if rng.random() < 0.4:
        kind = pick(rng, ["linear", "dynamic", "yarn", "longrope", "llama3", "default"])
        form = pick(rng, ["rope_scaling", "rope_parameters"])
        rope = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}  # fmt: skip
        for _ in range(rng.integers(1, 4)):
            key = pick(rng, ROPE_KEYS)
            rope[key] = number(rng) if rng.random() < 0.7 else anything(rng, rope.get(key))
        config[form] = rope
        done = f"{form} = {dump(rope)[:300]}"
    else:
        key = pick(rng, SPARE_KEYS)
        config[key] = number(rng) if rng.random() < 0.5 else anything(rng, config.get(key))
        done = f"{key} = {dump(config[key])[:100]}"
    files["config.json"] = dump(config).encode("utf-8", "surrogatepass")
    return f"config.json: {done}"


def damage_header(rng, files):
    """An entry of a safetensors header, with the file otherwise as its format wants it."""
    name = pick(rng, sorted(name for name in files if name.endswith(".safetensors")))
    data = files[name]
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        tensors = [key for key in header if key != "__metadata__"]
        tensor = pick(rng, tensors)
        entry = header[tensor]
        shape, offsets = entry["shape"], entry["data_offsets"]
        action = rng.integers(9)
        if action == 0:
            entry["dtype"] = pick(
                rng, ["F32", "F16", "BF16", "I32", "F64", "U8", "C64", "F8_E4M3", "Q4"]
            )
        elif action == 1:
            entry["shape"] = [number(rng) for _ in range(rng.integers(0, 5))]
        elif action == 2:
            entry["data_offsets"] = [number(rng), number(rng)]
        elif action == 3:
            offsets[rng.integers(2)] += int(rng.integers(-8, 9))
        elif action == 4:  # the same bytes as twice as many halves: consistent, but contradictory
            entry["dtype"], entry["shape"] = "BF16", [*shape[:-1], shape[-1] * 2]
        elif action == 5:
            entry["shape"] = pick(
                rng, [shape[::-1], [*shape, 1], [math.prod(shape)], [1] * 70 + shape]
            )
        elif action == 6:
            header[pick(rng, [tensor + "x", *tensors, *WORDS])] = header.pop(tensor)
        elif action == 7:
            header[tensor] = anything(rng, entry)
        else:
            change_json(rng, header)
        done = f"{tensor}: {dump(header.get(tensor))[:200]}"
    except (ValueError, KeyError, IndexError, TypeError, struct.error, RecursionError):
        return damage_bytes(rng, files, name)  # damaged before
    text = dump(header).encode("utf-8", "surrogatepass")
    said = len(text) if rng.random() < 0.95 else int(rng.integers(0, 2**63))
    files[name] = struct.pack("<Q", said) + text + data[8 + length :]
    return f"{name}: header: {done}"


def damage_bytes(rng, files, name=None):
    """Bits, bytes and lengths of any file."""
    name = name or pick(rng, sorted(files))
    data = bytearray(files[name])
    # Half of the damage goes where headers are.
    end = len(data) if rng.random() < 0.5 else min(len(data), 4096)
    action = rng.integers(7)
    if not data:
        action = 3
    if action == 0:
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(end)] ^= 1 << rng.integers(8)
    elif action == 1:
        for _ in range(rng.integers(1, 5)):
            data[rng.integers(end)] = pick(rng, list(b'\0\xff{}[]",:-0919eE.\\\n'))
    elif action == 2:
        del data[rng.integers(end) :]
    elif action == 3:
        data += rng.bytes(rng.integers(1, 64))
    elif action == 4:
        begin = rng.integers(end)
        del data[begin : begin + rng.integers(1, 64)]
    elif action == 5:
        begin = rng.integers(end)
        data[begin:begin] = data[begin : begin + rng.integers(1, 64)]
    else:
        data = bytearray(
            pick(rng, [b"", b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b"\x1f\x8b\x08"])
        )
    files[name] = bytes(data)
    return f"{name}: bytes ({action}), {len(data)} long"


def damage_weights(rng, files):
    """Values of weights: not numbers, infinities, the largest, the smallest."""
    name = pick(rng, sorted(name for name in files if name.endswith(".safetensors")))
    data = bytearray(files[name])
    start = 8 + struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    if start >= len(data) - 8:
        return damage_bytes(rng, files, name)
    word = pick(rng, [b"\x7f\xc0", b"\x7f\x80", b"\xff\x80", b"\x7f\x7f", b"\x00\x01", b"\xff\xff"])
    count = int(pick(rng, [1, 10, 1000, (len(data) - start) // 4]))
    for place in rng.integers(start, len(data) - 4, count):
        place -= (place - start) % 4
        data[place : place + 4] = word[::-1] * 2
    files[name] = bytes(data)
    return f"{name}: {count} weights = {word.hex()}"


def damage_template(rng, files):
    """A piece of a hostile program in the chat template."""
    piece = pick(rng, SNIPPETS)
    place = int(rng.integers(len(TEMPLATE)))
    source = TEMPLATE[:place] + piece + TEMPLATE[place:] if rng.random() < 0.3 else piece + TEMPLATE
    files["chat_template.jinja"] = source.encode("utf-8", "surrogatepass")
    return f"chat template: {piece[:60]!r} at {place}"


def damage_folder(rng, files):
    """A file gone, exchanged for another, or a folder in its place (None)."""
    name, other = pick(rng, sorted(files)), pick(rng, sorted(files))
    action = rng.integers(4)
    if action == 0:
        del files[name]
        return f"{name} removed"
    if action == 1:
        files[name] = None
        return f"{name} is a folder"
    if action == 2:
        files[name] = files[other]
        return f"{name} holds {other}"
    files["mamba_config.json"] = pick(rng, [b"{}", b'{"attn_layers": [0]}', b'{"attn_layers": []}'])
    return "mamba_config.json put there"


DAMAGE = {
    "json": (damage_json, 6),
    "keys": (damage_keys, 5),
    "header": (damage_header, 5),
    "bytes": (damage_bytes, 3),
    "weights": (damage_weights, 1),
    "template": (damage_template, 1),
    "folder": (damage_folder, 1),
    "image": (None, 2),  # the folder stays good: only the state's image is damaged
}
CHANCES = np.array([weight for _, weight in DAMAGE.values()]) / sum(w for _, w in DAMAGE.values())


def damage_image(rng, image):
    """The bytes of a saved state, changed: its header's numbers, bits, or length."""
    data = bytearray(image)
    action = rng.integers(5)
    if action <= 1:
        place = 8 + 8 * int(rng.integers(9))  # header, and the counters behind it
        old = struct.unpack_from("<q", data, place)[0] if place + 8 <= len(data) else 0
        near = [old + 1, old - 1, old + 16, 2 * old, len(data)]
        new = pick(rng, [0, 1, -1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), *near])
        if place + 8 <= len(data):
            struct.pack_into("<Q", data, place, new % 2**64)
    elif action == 2:
        del data[rng.integers(len(data)) :]
    elif action == 3:
        data += rng.bytes(rng.integers(1, 100))
    else:
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(data)


def make_case(goods, seed, case):
    """The files of a case, what was done to them, and the random numbers that its run uses."""
    rng = np.random.default_rng([seed, case])
    base = pick(rng, list(goods))
    files, done, kinds = dict(goods[base]), [base], []
    for _ in range(pick(rng, [1, 1, 1, 2, 3])):
        kind = list(DAMAGE)[rng.choice(len(DAMAGE), p=CHANCES)]
        kinds.append(kind)
        readable = {name: data for name, data in files.items() if data is not None}
        names = " ".join(readable)
        if kind == "image" or ".safetensors " not in names + " " or "config.json" not in readable:
            continue  # what the others damage has been taken away before
        before = set(readable)
        try:
            done.append(DAMAGE[kind][0](rng, readable))
        except RecursionError:  # the change before nested it as deeply as Python can follow
            done.append(f"{kind}: left as it is")
        for name in before - set(readable):
            del files[name]
        files.update(readable)
    return files, done, kinds[0] if len(kinds) == 1 else "several", rng


# ---- what is done with a checkpoint --------------------------------------------------------------


def use(folder, rng):
    """Loads the folder and does with it what users do; yields (step, a call)."""
    model = mil.load(folder)
    prompt = (PROMPT % model.config.vocab_size)[None]

    def forward():
        model(prompt)

    def show():
        repr(model), model._repr_html_(), model.stop_tokens, model.generation_config

    def generate():
        mil.generate(model, [prompt[0].tolist(), prompt[0, :3].tolist()], max_new_tokens=4)

    def sample():
        mil.generate(model, [prompt[0].tolist()], max_new_tokens=3, temperature=1.0, top_k=5)

    def state():
        filled = model.state()
        model.core.forward(prompt[0].astype(np.int32), states=[filled])
        image = filled.save()
        again = type(filled).restore(model.core, image)
        last = prompt[0, :1].astype(np.int32)
        want = model.core.forward(last, states=[filled])
        got = model.core.forward(last, states=[again])
        if not np.array_equal(want, got, equal_nan=True):
            raise AssertionError("a restored state gives other logits")
        for _ in range(8):
            with contextlib.suppress(mil.Error):
                bad = type(filled).restore(model.core, damage_image(rng, image))
                model.core.forward(prompt[0, :18].astype(np.int32), states=[bad])
                bad.rollback(1)
                model.core.forward(last, states=[bad.copy()])

    def text():
        tokenizer = model.tokenizer
        if tokenizer is not None:
            ids = tokenizer.encode("w5 w6 zebra")
            tokenizer.decode(ids)
            stream = tokenizer.stream()
            [stream.push(token) for token in [3, 4, 96]]
            tokenizer.files()
            tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
            mil.generate(model, "w5 w6", max_new_tokens=2)

    def save():
        mil.load(model.save(Path(folder) / "saved"))

    def convert():
        if len(model.config.attention_layers) > 1:
            student = mil.convert(model, pick(rng, ["mamba1", "mamba2"]), "half", init="paper")
            student(prompt)

    yield from (
        ("show", show), ("forward", forward), ("generate", generate), ("sample", sample),
        ("state", state), ("text", text), ("save", save), ("convert", convert),
    )  # fmt: skip


def run_steps(folder, rng):
    """Outcome of a case: "works", or what refused it; what is no mil.Error is raised."""
    outcome = "works"
    steps, step = use(folder, rng), "load"
    while True:
        try:
            step, call = next(steps)
        except StopIteration:
            return outcome
        except mil.Error as error:
            check_message(error)
            return f"refused by load ({type(error).__name__})"
        try:
            call()
        except mil.Error as error:
            check_message(error)
            if outcome == "works":
                outcome = f"loads; refused by {step} ({type(error).__name__})"


def check_message(error):
    text = str(error)
    if "\n" in text or not 10 <= len(text) < 1000:
        raise AssertionError(f"a message of {len(text)} characters: {text[:300]!r}") from error


# ---- children ------------------------------------------------------------------------------------


def child(folder, rng, log, pipe, options):
    """The whole life of one case's process; never returns."""
    code = 0
    try:
        os.dup2(log, 2)
        # Too long: faulthandler writes where it is, then the signal ends the process.
        resource.setrlimit(resource.RLIMIT_CPU, (options.cpu_seconds, options.cpu_seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not options.sanitized:  # a sanitizer reserves terabytes of addresses
            limit = 8 * options.memory << 20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        faulthandler.register(signal.SIGXCPU, file=2, chain=True)
        os.write(pipe, run_steps(folder, rng).encode())
    except BaseException as error:  # a panic of a Rust library is no Exception
        traceback.print_exc()
        os.write(pipe, f"FINDING: {type(error).__name__}: {error}".encode()[:500])
        code = 3
    sys.stderr.flush()
    os._exit(code)


def run_case(folder, rng, log, options):
    """(outcome, megabytes) of a case in a child of its own."""
    read, write = os.pipe()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pid = os.fork()
    if pid == 0:
        os.close(read)
        child(folder, rng, log, write, options)
    os.close(write)
    signal.setitimer(signal.ITIMER_REAL, options.wall_seconds)  # asleep for ever: a deadlock
    try:
        _, status, usage = os.wait4(pid, 0)
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    outcome = os.read(read, 4096).decode(errors="replace")
    os.close(read)
    megabytes = max(0, usage.ru_maxrss - before) >> 10
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        slow = " (too long)" if name in ("SIGXCPU", "SIGKILL") else ""
        return f"FINDING: ended by {name}{slow}", megabytes
    if os.WEXITSTATUS(status) != 0 and not outcome.startswith("FINDING"):
        return f"FINDING: ended with status {os.WEXITSTATUS(status)}", megabytes
    if megabytes > options.memory and not outcome.startswith("FINDING"):
        return f"FINDING: used {megabytes} MB; {outcome}", megabytes
    return outcome, megabytes


def write_case(folder, files):
    for name, data in files.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)


def keep(folder, log, done, outcome, case, options):
    """Keeps a finding: its files, what was printed, and the command that repeats it."""
    kept = options.findings / f"seed-{options.seed}-case-{case}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept / "checkpoint", symlinks=True)
    again = f'make fuzz ARGS="--seed {options.seed} --only {case}"'
    report = "\n".join([outcome, again, *done, "", log])
    (kept / "report.txt").write_text(report, errors="backslashreplace")


# ---- a run ---------------------------------------------------------------------------------------


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=240, help="stop after this long")
    parser.add_argument("--cases", type=int, default=10**9, help="stop after so many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="CASE", help="run this case alone")
    parser.add_argument("--cpu-seconds", type=int, default=10, help="of one case")
    parser.add_argument("--wall-seconds", type=int, default=180, help="of one case")
    parser.add_argument("--memory", type=int, default=600, help="megabytes that one case may add")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz/findings"))
    options = parser.parse_args(arguments)
    options.sanitized = "libasan" in Path("/proc/self/maps").read_text()
    return options


def raise_timeout(signum, frame):
    raise TimeoutError


def warm_up():
    """Imports and caches that every child would otherwise make again."""
    ChatTemplate(TEMPLATE).render(MESSAGES, eos_token="")


def main(arguments=None):
    options = parse(arguments)
    signal.signal(signal.SIGALRM, raise_timeout)
    goods = {base: good_files(base) for base in BASES}
    warm_up()
    outcomes, largest = collections.Counter(), 0
    by_kind = collections.defaultdict(collections.Counter)
    findings, started, case = [], time.monotonic(), 0
    cases = [options.only] if options.only is not None else range(options.cases)
    count = 0
    for case in cases:
        if time.monotonic() - started > options.seconds:
            break
        files, done, kind, rng = make_case(goods, options.seed, case)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, tempfile.TemporaryFile() as log:
            write_case(Path(folder), files)
            outcome, megabytes = run_case(folder, rng, log.fileno(), options)
            count, largest = count + 1, max(largest, megabytes)
            log.seek(0)
            printed = log.read().decode(errors="replace")
            if outcome.startswith("FINDING"):
                keep(folder, printed, done, outcome, case, options)
                findings.append((case, outcome, done))
                print(f"case {case}: {outcome}\n    {' | '.join(done)[:400]}", flush=True)
        if options.only is not None:
            print("\n".join([*done, printed, outcome]))
        label = "FINDING" if outcome.startswith("FINDING") else outcome
        outcomes[label] += 1
        by_kind[kind][label.partition(" (")[0]] += 1
    report(options, count, time.monotonic() - started, outcomes, by_kind, largest, findings)
    return 1 if findings else 0


def report(options, count, seconds, outcomes, by_kind, largest, findings):
    sanitizer = "AddressSanitizer" if options.sanitized else "no sanitizer"
    print(
        f"\nmambainllama {mil.__version__}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, tokenizers {tokenizers.__version__}, {sanitizer}\n"
        f"seed {options.seed}: {count} cases in {seconds:.0f} s, at most {largest} MB more in one; "
        f"{len(findings)} findings"
    )
    for label, number_of in outcomes.most_common():
        print(f"  {number_of:6}  {label}")
    print("by kind of damage:")
    for kind, counter in sorted(by_kind.items()):
        print(f"  {kind:9} " + ", ".join(f"{label}: {n}" for label, n in counter.most_common()))


if __name__ == "__main__":
    sys.exit(main())

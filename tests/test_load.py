"""Loading and saving: the same bits back, files left alone, errors in one line with the mend."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from core_models import to_bfloat16
from safetensors import safe_open
from tiny_checkpoints import CONFIGS, VOCAB, tiny, tiny_hybrid

import mambainllama as mil
from mambainllama import _core
from mambainllama.checkpoint import Checkpoint, write_folder, write_safetensors
from mambainllama.dtypes import PAGE, convert, from_float32, to_float32


@pytest.fixture
def llama(tmp_path):
    return tiny(tmp_path / "llama", "llama")


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and text
    return text


# ---- what a model tells --------------------------------------------------------------------------


def test_facts(llama):
    model = mil.load(llama)
    assert model.device == "cpu" and model.dtype == "float32" and model.tokenizer is None
    config = model.config
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (VOCAB, 48, 3)
    assert config.attention_layers == (0, 1, 2) and config.mixer is None
    assert config.raw["intermediate_size"] == 80 and model.stop_tokens == (2,)
    assert model.num_parameters == sum(array.size for array in model.parameters().values())
    assert "llama, 3 layers" in repr(model) and "<table>" in model._repr_html_()
    assert "vocab_size=97" in repr(config) and "raw" not in repr(config)


def test_hybrid_facts(tmp_path):
    model = mil.load(tiny_hybrid(tmp_path / "h", "mamba2", [2]))
    assert model.config.mixer == "mamba2" and model.config.attention_layers == (2,)
    assert "2 Mamba-2, 1 attention" in repr(model)
    pure = mil.load(tiny(tmp_path / "m", "mamba"))
    assert pure.config.attention_layers == () and pure.config.intermediate_size == 0


def test_parameters_are_views_and_files_stay(llama):
    before = (llama / "model.safetensors").read_bytes()
    model = mil.load(llama)
    tokens = np.arange(10)[None]
    old = model(tokens)
    model.parameters()["model.norm.weight"][:] *= 2
    np.testing.assert_allclose(model(tokens), 2 * old, rtol=1e-6)
    assert (llama / "model.safetensors").read_bytes() == before
    assert np.array_equal(mil.load(llama)(tokens), old)


@pytest.mark.parametrize("case", ["llama", "mamba2", "sharded hybrid"])
def test_weights_in_memory_are_those_of_the_files(case, tmp_path, rng):
    """Other memory, the same bits, and the files are let go of."""
    folder = tmp_path / "model"
    if case == "sharded hybrid":
        tiny_hybrid(folder, "mamba1", [0], shards=3, dtype="bfloat16")
    else:
        tiny(folder, case)
    mapped, read = mil.load(folder), mil.load(folder, mmap=False)
    assert read.dtypes() == mapped.dtypes()
    for name, array in mapped.parameters().items():
        assert np.array_equal(bits(read.parameters()[name]), bits(array)), name
    assert any(map(is_mapped, mapped.parameters().values()))
    assert not any(map(is_mapped, read.parameters().values()))
    check_in_one_piece(read)
    tokens = rng.integers(0, VOCAB, (2, 11))
    assert np.array_equal(read(tokens), mapped(tokens))
    options = {"max_new_tokens": 12, "stop": [], "logprobs": True}
    [a], [b] = (mil.generate(model, [tokens[0].tolist()], **options) for model in (mapped, read))
    assert a.token_ids == b.token_ids and np.array_equal(a.logprobs, b.logprobs)


def check_in_one_piece(model):
    """What is no file's: huge pages then hold nearly all of it."""
    arrays = [array for array in model.parameters().values() if not is_mapped(array)]
    begin = min(array.ctypes.data for array in arrays)
    end = max(array.ctypes.data + array.nbytes for array in arrays)
    assert end - begin <= sum(-(-array.nbytes // PAGE) * PAGE for array in arrays)
    assert all(array.ctypes.data % PAGE == 0 for array in arrays)


def test_converted_weights_lie_in_one_piece(tmp_path):
    tiny(tmp_path, "llama")
    [stored] = {*mil.load(tmp_path).dtypes().values()}
    other = "bfloat16" if stored == "float32" else "float32"
    for mmap in (True, False):
        check_in_one_piece(mil.load(tmp_path, dtype=other, mmap=mmap))


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def is_mapped(array):
    """Whether its memory is a file's, as the system sees it."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            return line.endswith(".safetensors")
    return False


def test_no_file_stays_open(llama):
    before = os.listdir("/proc/self/fd")
    model = mil.load(llama, mmap=False)
    assert os.listdir("/proc/self/fd") == before
    assert str(llama) not in Path("/proc/self/maps").read_text() and model.num_parameters


# ---- inputs --------------------------------------------------------------------------------------


@pytest.fixture
def model(llama):
    return mil.load(llama)


def test_lengths_and_ragged_rows(model, rng):
    rows = [rng.integers(0, VOCAB, n).tolist() for n in (5, 1, 0, 9)]
    padded = np.full((4, 9), VOCAB + 5)  # what stands behind the lengths is not looked at
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    logits = model(padded, lengths=[5, 1, 0, 9])
    assert logits.shape == (4, 9, VOCAB) and logits.dtype == np.float32
    assert np.array_equal(model(rows), logits)
    for i, row in enumerate(rows):
        assert not logits[i, len(row) :].any()
        if row:  # in a batch as alone, to the bit
            assert np.array_equal(logits[i, : len(row)], model([row])[0])


def test_longer_than_the_positions_trained_for(model, rng):
    tokens = rng.integers(0, VOCAB, (1, 200))
    assert np.isfinite(model(tokens)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint16, np.int64, np.uint64])
def test_integer_types(model, dtype):
    tokens = np.array([[1, 2, 3]])
    assert np.array_equal(model(tokens.astype(dtype)), model(tokens))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_batches(model, shape):
    assert model(np.zeros(shape, int)).shape == (*shape, VOCAB)


@pytest.mark.parametrize(
    ("input_ids", "lengths", "words"),
    [
        ([1, 2, 3], None, "(batch, length)"),
        ([[[1, 2]]], None, "(batch, length)"),
        ("text", None, "(batch, length)"),
        ([[0.5, 1.0]], None, "integers"),
        ([[1, VOCAB]], None, str(VOCAB)),
        ([[1, -1]], None, "-1"),
        ([[1, 2**40]], None, str(2**40)),
        ([[1, 2]], [3], "0 to 2"),
        ([[1, 2]], [-1], "0 to 2"),
        ([[1, 2]], [1, 1], "1 integers"),
        ([[1, 2]], [0.5], "1 integers"),
        ([[1, 2], [1]], [2, 1], "leave lengths out"),
    ],
)
def test_bad_inputs(model, input_ids, lengths, words):
    with pytest.raises(mil.Error) as error:
        model(input_ids, lengths)
    assert isinstance(error.value, (ValueError, TypeError))
    assert words in one_line(error)


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama", "llama-tied", "qwen3-bias", "mamba", "mamba2", "hybrid"])
def test_save_and_load_give_the_same_bits(case, dtype, tmp_path, rng):
    if case == "hybrid":
        folder = tiny_hybrid(tmp_path / "a", "mamba1", [0], dtype=dtype)
    else:
        folder = tiny(tmp_path / "a", case, dtype=dtype)
    model = mil.load(folder)
    for array in model.parameters().values():
        if array.dtype == np.float32:  # as after training: vectors hold more than 16 bits
            array += rng.normal(0, 1e-3, array.shape).astype(np.float32)
    saved = model.save(tmp_path / "b")
    again = mil.load(saved)
    assert again.dtypes() == model.dtypes()
    for name, array in model.parameters().items():
        assert np.array_equal(array, again.parameters()[name]), name
    config = json.loads((saved / "config.json").read_text())
    assert config == {**CONFIGS.get(case, config), "torch_dtype": dtype}
    assert (saved / "mamba_config.json").exists() == (case == "hybrid")
    if dtype != "bfloat16":  # the safetensors library agrees about the file
        with safe_open(saved / "model.safetensors", "np") as file:
            with safe_open(folder / "model.safetensors", "np") as original:
                assert set(file.keys()) == set(original.keys())


@pytest.mark.parametrize("name", ["a", "b" * 9, "c" * 30])
def test_tensors_begin_at_lines_of_the_caches(name, tmp_path, rng):
    """In files that we write, whatever names and odd tensors there are, and read into memory."""
    tensors = {
        f"{name}.odd": (rng.integers(0, 9, 3, dtype=np.uint16), "bfloat16"),
        f"{name}.half": (rng.integers(0, 9, (5, 32), dtype=np.uint16), "bfloat16"),
        f"{name}.vector": (rng.normal(size=5).astype(np.float32), "float32"),
        f"{name}.matrix": (rng.normal(size=(3, 16)).astype(np.float32), "float32"),
    }
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path / "model.safetensors", tensors)
    checkpoint = Checkpoint(tmp_path)
    for key, (array, dtype) in tensors.items():
        begin = checkpoint.tensors[key].begin
        assert begin % (64 if array.nbytes % 64 == 0 else array.itemsize) == 0, key
        for mmap in (True, False):
            read, stored = checkpoint.read(key, mmap)
            assert stored == dtype and np.array_equal(read, array)
        assert read.ctypes.data % 64 == 0, key
        assert convert(array, dtype, "float16").ctypes.data % 64 == 0


def test_save_keeps_the_other_files(shared, tmp_path):
    model = mil.load(shared / "models" / "story-llama")
    saved = model.save(tmp_path / "new" / "deep")
    names = {path.name for path in saved.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert mil.load(saved).tokenizer.encode("Once") == model.tokenizer.encode("Once")


def test_save_writes_a_tokenizer_that_was_set(llama, shared, tmp_path):
    model = mil.load(llama)
    model.tokenizer = mil.load(shared / "models" / "story-llama").tokenizer
    again = mil.load(model.save(tmp_path / "saved")).tokenizer
    assert again.encode("Once upon a time") == model.tokenizer.encode("Once upon a time")
    assert (again.bos_token_id, again.eos_token_id) == (1, 2)


def test_save_writes_a_tokenizer_that_was_changed(shared, tmp_path):
    """Also where the checkpoint came with one, whose files would be saved with the model."""
    model = mil.load(shared / "models" / "story-llama")
    other = mil.load(shared / "models" / "story-llama").tokenizer
    other.chat_template = mil.chat.ChatTemplate("{{ messages[0].content }}!")
    model.tokenizer = other
    saved = model.save(tmp_path / "saved")
    chat = mil.load(saved).tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert chat == "Hello!" and (saved / "generation_config.json").exists()
    model.tokenizer = None
    assert mil.load(model.save(tmp_path / "bare")).tokenizer is None


def test_save_over_a_model_with_another_chat_template(shared, tmp_path):
    model = mil.load(shared / "models" / "story-llama")
    target = model.save(tmp_path / "saved")
    (target / "chat_template.jinja").write_text("another model's")
    assert mil.load(model.save(target)).tokenizer.chat_template is None


@pytest.mark.parametrize("over", [False, True], ids=["anew", "over another"])
def test_named_chat_templates_are_saved(shared, tmp_path, over):
    source = mil.load(shared / "models" / "story-llama").save(tmp_path / "source")
    (source / "chat_template.jinja").write_text("default")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    target = tmp_path / "saved"
    if over:
        mil.load(shared / "models" / "story-llama").save(target)
        (target / "additional_chat_templates").mkdir()
        (target / "additional_chat_templates" / "rag.jinja").write_text("another model's")
    templates = {"default": "default", "tool_use": "tools"}
    saved = mil.load(mil.load(source).save(target))
    assert saved.tokenizer.chat_template.templates == templates
    tokenizer = saved.tokenizer  # given to a model that came without any
    bare = mil.load(tiny(tmp_path / "bare", "llama"))
    bare.tokenizer = tokenizer
    again = mil.load(bare.save(tmp_path / "again")).tokenizer
    assert again.chat_template.templates == templates


def test_save_over_an_older_model(tmp_path, rng):
    """The new model is whole, the rest of the old one is gone, other files stay."""
    target = tiny_hybrid(tmp_path / "target", "mamba2", shards=3)
    (target / "notes.txt").write_text("mine")
    model = mil.load(tiny(tmp_path / "llama", "llama"))
    model.save(target)
    names = {path.name for path in target.iterdir()}
    assert names == {"config.json", "model.safetensors", "notes.txt"}
    tokens = rng.integers(0, VOCAB, (1, 9))
    assert np.array_equal(mil.load(target)(tokens), model(tokens))
    assert not [path for path in tmp_path.iterdir() if "saving" in path.name]


def test_save_where_it_was_loaded_from(llama):
    """The mapped file is replaced, not written to: arrays that are its views stay as they are."""
    model = mil.load(llama)
    model.parameters()["model.norm.weight"][:] = 3
    tokens = np.arange(8)[None]
    logits = model(tokens)
    model.save(llama)
    assert np.array_equal(model(tokens), logits) and np.array_equal(mil.load(llama)(tokens), logits)


def test_a_failed_save_leaves_the_old_model(llama, monkeypatch):
    model = mil.load(llama)
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(mil.FileError, match="No space left on device") as error:
        model.save(llama)
    assert isinstance(error.value, OSError) and one_line(error)
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before
    assert [path.name for path in llama.parent.iterdir()] == ["llama"]


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("left", [0, 20_000, None])
def test_a_file_that_becomes_shorter(llama, left, mmap):
    checkpoint = Checkpoint(llama)
    if left is None:
        os.unlink(llama / "model.safetensors")
    else:
        os.truncate(llama / "model.safetensors", left)
    with pytest.raises(mil.FileError) as caught:
        for name in checkpoint.tensors:
            checkpoint.read(name, mmap)
    assert "model.safetensors" in one_line(caught)


def test_save_onto_a_file(llama, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(mil.FileError, match="folder"):
        mil.load(llama).save(tmp_path / "file")


@pytest.mark.parametrize("name", ["", "a\0b", b"model", None, 5])
def test_save_under_no_name(name, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mil.ArgumentError, match="save: expected the name of a folder"):
        mil.load(llama).save(name)


@pytest.mark.parametrize("name", ["n" * 300, "~nobody-of-this-name/model"])
def test_names_that_no_folder_can_have(name, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = mil.load(llama)
    with pytest.raises(mil.NotFoundError, match="no such folder"):
        mil.load(name)
    if name.startswith("n"):
        with pytest.raises(mil.FileError, match="too long"):
            model.save(name)


def test_no_memory_for_another_dtype(llama, monkeypatch):
    def refuse(array, dtype, to, new):
        raise MemoryError("Unable to allocate 128. GiB")

    monkeypatch.setattr("mambainllama.model.convert", refuse)
    with pytest.raises(mil.OutOfMemoryError, match="embed_tokens.weight as bfloat16") as error:
        mil.load(llama, dtype="bfloat16")
    assert isinstance(error.value, MemoryError) and "128. GiB" in one_line(error)


def test_no_memory_for_a_copy(llama, monkeypatch):
    """Known before anything is read where the system tells what is free, and else when it fails."""
    with monkeypatch.context() as patch:
        patch.setattr("mambainllama.memory.free_memory", lambda device: (1000, 1000))
        with pytest.raises(mil.OutOfMemoryError, match="float32 .* use mmap=True") as error:
            mil.load(llama, mmap=False)
        assert str(llama) in one_line(error) and "1,000 bytes are free on cpu" in one_line(error)
        mil.load(llama)

    def refuse(shape, dtype):
        raise MemoryError("Unable to allocate 128. GiB for an array")

    monkeypatch.setattr("mambainllama.checkpoint.np.empty", refuse)
    with pytest.raises(mil.OutOfMemoryError, match="128. GiB .* use mmap=True") as error:
        mil.load(llama, mmap=False)
    assert "model.safetensors: no memory for model.embed_tokens.weight" in one_line(error)


def test_large_models_are_sharded(tmp_path, rng):
    tensors = {f"t{i}": (rng.random((100, 10), np.float32), "float32") for i in range(5)}
    folder = write_folder(tmp_path / "model", tensors, {"model_type": "llama"}, shard_bytes=9000)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 20000
    checkpoint = Checkpoint(folder)
    for name, (array, _) in tensors.items():
        assert np.array_equal(checkpoint.read(name)[0], array)


# ---- dtypes, devices, names ----------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_conversions_agree_with_torch(stored, wanted, tmp_path):
    torch = pytest.importorskip("torch")
    folder = tiny(tmp_path / "m", "llama", dtype=stored)
    original = mil.load(folder)
    converted = mil.load(folder, dtype=wanted)
    name = "model.layers.0.mlp.up_proj.weight"
    assert converted.dtypes()[name] == wanted
    assert converted.dtypes()["model.norm.weight"] == "float32"

    def tensor(model, dtype):
        array = model.parameters()[name]
        return torch.from_numpy(array.copy()).view(getattr(torch, dtype))

    theirs = tensor(original, stored).to(getattr(torch, wanted))
    assert torch.equal(theirs, tensor(converted, wanted))


def test_bfloat16_rounding_of_special_values():
    torch = pytest.importorskip("torch")
    bits = np.concatenate(
        [np.arange(0, 2**32, 65521, dtype=np.uint64), [0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF]]
    )
    values = bits.astype(np.uint32).view(np.float32)
    ours = to_float32(from_float32(values, "bfloat16"), "bfloat16")
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_conversions_of_large_arrays():
    """By a team, in blocks: all bit patterns of float16, and random ones of float32."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(to_float32(halves, "float16"), halves.astype(np.float32))
    bits = np.random.default_rng(0).integers(0, 1 << 32, (5, 100_003), np.uint32)
    values = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(from_float32(values, "float16"), values.astype(np.float16))
    number, found = ~np.isnan(values), from_float32(values, "bfloat16")
    np.testing.assert_array_equal(found[number], to_bfloat16(values[number]))
    assert np.isnan(to_float32(found, "bfloat16")[~number]).all()
    np.testing.assert_array_equal(
        convert(found[number], "bfloat16", "float16"),
        from_float32(to_float32(found[number], "bfloat16"), "float16"),
    )
    np.testing.assert_array_equal(from_float32(values[:, ::2], "bfloat16"), found[:, ::2])
    assert convert(values[:0], "float32", "bfloat16").shape == (0, 100_003)


def test_conversions_that_do_not_fit():
    source, target = np.zeros(4, np.float32), np.zeros(3, np.uint16)
    with pytest.raises(mil.ShapeError, match="16 bytes of float32 do not become 6 bytes of bf"):
        _core.convert(source, "float32", target, "bfloat16")
    with pytest.raises(mil.DtypeError, match="int8"):
        _core.convert(source, "int8", target, "bfloat16")
    target.flags.writeable = False
    with pytest.raises((BufferError, TypeError, ValueError)):
        _core.convert(source[:3], "float32", target, "bfloat16")


def test_dtype_and_device_errors(llama):
    with pytest.raises(mil.DtypeError, match="float32, bfloat16, float16"):
        mil.load(llama, dtype="int8")
    if not mil.devices.cuda_devices():
        with pytest.raises(mil.DeviceError, match=r"device \"cuda\".* use device=\"cpu\"$"):
            mil.load(llama, device="cuda")
    for device in ("abacus", "cuda:99999999999"):
        with pytest.raises(mil.ArgumentError, match="auto"):
            mil.load(llama, device=device)
    assert mil.load(llama, device="cpu", dtype=np.float32).dtype == "float32"


def test_paths_and_hub_names(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mil.load("llama").name == "llama"
    with pytest.raises(FileNotFoundError, match="no such folder") as error:
        mil.load("./missing/model")
    assert isinstance(error.value, mil.NotFoundError) and one_line(error)
    with pytest.raises(mil.NotFoundError, match="owner/name"):
        mil.load("missing-model")
    with pytest.raises(mil.ArgumentError, match="is a file"):
        mil.load(llama / "config.json")
    with pytest.raises(mil.ArgumentError, match="int"):
        mil.load(3)


def test_hub_failures_are_one_line(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nwith many lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(mil.FileError, match="someone/some-model") as error:
        mil.load("someone/some-model")
    assert "network" in one_line(error)


def test_hub_download(llama, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = mil.load("someone/some-model", revision="v1")
    assert asked["repository"] == model.name == "someone/some-model" and asked["revision"] == "v1"
    assert not any(pattern.endswith(".bin") for pattern in asked["allow_patterns"])

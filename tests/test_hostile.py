"""Files that lie: each is one mil.Error line that names the file, and never a crash or a huge
allocation.

The malicious files are made here, from a good checkpoint by one change each.
"""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import CONFIGS, mamba_config, tiny, tiny_hybrid, write_file

import mambainllama as mil


def refused(folder, *words, kind=mil.Error):
    """Loading fails with one line of bounded length that holds these words, mapped or read."""
    with pytest.raises(kind) as error:
        mil.load(folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 700, text
    with pytest.raises(kind) as again:
        mil.load(folder, mmap=False)
    assert str(again.value) == text
    for word in words:
        assert word in text, text


# ---- safetensors ---------------------------------------------------------------------------------


def read_parts(folder):
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_parts(folder, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


NAME = "model.layers.1.mlp.up_proj.weight"


def edit(key, value):
    def change(header, data):
        header[NAME][key] = value(header[NAME][key]) if callable(value) else value
        return header, data

    return change


def without(key):
    def change(header, data):
        del header[NAME][key]
        return header, data

    return change


def add(name, entry):
    return lambda header, data: ({**header, name: entry}, data)


HEADERS = {
    "cut-off": (lambda header, data: (header, data[:-1]), "within"),
    "longer": (lambda header, data: (header, data + b"\0"), "after the last tensor"),
    "shifted": (edit("data_offsets", lambda o: [o[0] + 4, o[1] + 4]), NAME),
    "overlap": (edit("data_offsets", [0, 80 * 48 * 4]), "overlaps"),
    "reversed": (edit("data_offsets", lambda o: o[::-1]), "begin <= end"),
    "negative": (edit("data_offsets", lambda o: [-4, o[1]]), "begin"),
    "huge-offset": (edit("data_offsets", lambda o: [o[0], 2**70]), "within"),
    "three-offsets": (edit("data_offsets", lambda o: [*o, 0]), "begin"),
    "float-offset": (edit("data_offsets", lambda o: [float(o[0]), o[1]]), "begin"),
    "bool-offset": (edit("data_offsets", [False, True]), "begin"),
    "no-offsets": (without("data_offsets"), "data_offsets"),
    "wrong-product": (edit("shape", [81, 48]), "bytes"),
    "huge-shape": (edit("shape", [2**62, 2**62]), "bytes"),
    "overflowing-shape": (edit("shape", [2**63, 2, 2**63]), "bytes"),
    "negative-shape": (edit("shape", [-80, -48]), "shape"),
    "text-shape": (edit("shape", "80x48"), "shape"),
    "nested-shape": (edit("shape", [[80], 48]), "shape"),
    "unknown-dtype": (edit("dtype", "F31"), "dtype"),
    "list-dtype": (edit("dtype", ["F32"]), "dtype"),
    "other-dtype": (edit("dtype", "I32"), "I32; save the model in one of these"),
    "half-dtype": (edit("dtype", "F16"), "bytes"),
    "entry-is-list": (add(NAME, [1, 2]), NAME),
    "entry-is-null": (add("x", None), "x"),
    "bad-metadata": (add("__metadata__", 5), "__metadata__"),
    "extra-tensor": (add("extra", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), "extra"),
    "long-name": (add("n" * 5000, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), "nnn"),
    "newlines": (add("a\nb", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}), "a\\nb"),
    "other-rank": (edit("shape", [80 * 48]), "shape"),
    "transposed": (edit("shape", [48, 80]), "[48, 80]"),
    "many-dimensions": (edit("shape", [1] * 70 + [80, 48]), "at most 32"),
    "many-large-sizes": (edit("shape", [10**290] * 20_000), "at most 32"),
    "deep-entry": (lambda header, data: (deep_entry(header), data), "model"),
}


def deep_entry(header):
    """JSON that Python's parser can follow, but its repr cannot."""
    text = json.dumps(header)
    return (text[:-1] + ', "deep": ' + "[" * 900 + "]" * 900 + "}").encode()


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case, tmp_path):
    folder = tiny(tmp_path / "model", "llama")
    change, word = HEADERS[case]
    write_parts(folder, *change(*read_parts(folder)))
    refused(folder, "model", word, kind=mil.FormatError)


RAW = {
    "empty": b"",
    "short": b"\1\2\3",
    "length-only": struct.pack("<Q", 2),
    "huge-length": struct.pack("<Q", 2**63) + b"{}",
    "largest-length": b"\xff" * 8 + b"{}",
    "zero-length": struct.pack("<Q", 0) + b"abc",
    "not-json": struct.pack("<Q", 5) + b"{nope",
    "list": struct.pack("<Q", 2) + b"[]",
    "number": struct.pack("<Q", 1) + b"7",
    "not-utf8": struct.pack("<Q", 4) + b"{\xff\xfe}",
    "deep": struct.pack("<Q", 200_001) + b'{"a":' + b"[" * 199_996,
    "long-number": struct.pack("<Q", 10_006) + b'{"a":' + b"9" * 10_000 + b"}",
    "pickle": b"\x80\x02}q\x00." + b"\0" * 100,
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("case", RAW)
def test_bytes_that_are_no_safetensors(case, tmp_path):
    folder = tiny(tmp_path / "model", "llama")
    (folder / "model.safetensors").write_bytes(RAW[case])
    refused(folder, "model.safetensors", kind=mil.FormatError)


def test_duplicate_names(tmp_path):
    folder = tiny(tmp_path / "model", "llama")
    header, data = read_parts(folder)
    text = json.dumps(header)
    entry = json.dumps({NAME: header[NAME]})[1:-1]
    write_parts(folder, (text[:-1] + ", " + entry + "}").encode(), data)
    refused(folder, "twice", NAME, kind=mil.FormatError)


def test_unaligned_tensors_are_read(tmp_path):
    """Not a lie, only unusual: data that starts at an odd byte."""
    folder = tiny(tmp_path / "model", "llama")
    want = mil.load(folder)(np.arange(5)[None])
    header, data = read_parts(folder)
    text = json.dumps(header).encode()
    write_parts(folder, text + b" " * (1 + len(text) % 2), data)
    assert np.array_equal(mil.load(folder)(np.arange(5)[None]), want)
    assert np.array_equal(mil.load(folder, mmap=False)(np.arange(5)[None]), want)


def test_random_damage(tmp_path):
    """Any byte of the header may be wrong: either it still loads, or it is refused in one line."""
    folder = tiny(tmp_path / "model", "mamba2-groups")
    path = folder / "model.safetensors"
    good = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", good[:8])
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(0, 8 + length)] = rng.integers(0, 256)
        path.write_bytes(bad)
        try:
            mil.load(folder)
        except mil.Error as error:
            assert "\n" not in str(error)


# ---- shards --------------------------------------------------------------------------------------


def damage_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../llama/model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        5,
        None,
        "a\\b",
        "a\0b",
        "a" * 300,
    ],
)
def test_an_index_names_files_of_its_folder_only(name, tmp_path):
    folder = tiny(tmp_path / "model", "llama", shards=2)
    damage_index(folder, lambda index: index["weight_map"].update({NAME: name}))
    refused(folder, "index.json", NAME, kind=mil.FormatError)


def test_missing_shard(tmp_path):
    folder = tiny(tmp_path / "model", "llama", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors", "missing", kind=mil.NotFoundError)


def test_tensor_in_two_shards(tmp_path):
    folder = tiny(tmp_path / "model", "llama", shards=2)
    first, second = sorted(folder.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    refused(folder, "expected it once", kind=mil.FormatError)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("weight_map"),
        lambda index: index.update(weight_map=[]),
        lambda index: index.update(weight_map={}),
    ],
)
def test_index_without_map(change, tmp_path):
    folder = tiny(tmp_path / "model", "llama", shards=2)
    damage_index(folder, change)
    refused(folder, "weight_map", kind=mil.FormatError)


def test_index_of_another_model(tmp_path):
    folder = tiny(tmp_path / "model", "llama", shards=2)
    damage_index(
        folder, lambda index: index["weight_map"].update(nobody="model-00001-of-00002.safetensors")
    )
    refused(folder, "nobody", kind=mil.FormatError)


# ---- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"model_type": "gpt2"}, "these are"),
        ({"model_type": None}, "these are"),
        ({"model_type": ["llama"]}, "these are"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"hidden_size": -48}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 2**60}, "hidden_size"),
        ({"hidden_size": 1e300}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 96}, "contradict"),
        ({"num_hidden_layers": 4}, "missing"),
        ({"num_hidden_layers": 2}, "does not account for"),
        ({"num_hidden_layers": 2**20}, "4096"),
        ({"num_attention_heads": 5}, "multiple"),
        ({"num_key_value_heads": 4}, "multiple"),
        ({"head_dim": 7}, "even"),
        ({"vocab_size": 2**24}, "contradict"),
        ({"hidden_act": "xielu"}, "these are"),
        ({"hidden_act": {"a": 1}}, "these are"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -0.5}, "rms_norm_eps: expected a finite number of at least 0"),
        ({"attention_bias": True}, "missing"),
        ({"rope_scaling": {"type": "magic"}}, "these are"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "factor"),
        ({"rope_scaling": 4}, "rope_scaling"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1]}}, "short_factor"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": 1e-300}, "finite"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer types"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rms_norm_eps": 10**400}, "401 digits"),
        ({"rope_theta": 10**400}, "401 digits"),
        ({"rope_scaling": {"type": "a\nb" * 500}}, "these are"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1e-320}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 1e300},
         "trained length"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 4,
                           "original_max_position_embeddings": 1e300}}, "trained length"),
    ],
)  # fmt: skip
def test_configurations(keys, word, tmp_path):
    folder = tiny(tmp_path / "model", "llama")
    config = {**json.loads((folder / "config.json").read_text()), **keys}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "model", word)


def test_tied_model_with_an_output_matrix(tmp_path):
    """A copy of the embedding is nothing; another matrix is what transformers would use."""
    folder = tiny(tmp_path / "model", "llama-tied")
    want = mil.load(folder)(np.arange(5)[None])
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_file(folder / "model.safetensors", tensors)
    assert np.array_equal(mil.load(folder)(np.arange(5)[None]), want)
    tensors["lm_head.weight"][-1, -1] += 1
    write_file(folder / "model.safetensors", tensors)
    refused(folder, "tie_word_embeddings", "lm_head.weight", kind=mil.FormatError)


@pytest.mark.parametrize("case", ["llama-tied", "mamba", "mamba2", "llama"])
def test_models_stored_without_their_output_matrix(case, tmp_path):
    """As transformers saves LlamaModel or MambaModel: names lack their first part."""
    folder = tiny(tmp_path / "model", case)
    want = mil.load(folder)(np.arange(5)[None])
    tensors = load_file(folder / "model.safetensors")
    tied = "lm_head.weight" not in tensors
    tensors.pop("lm_head.weight", None)
    write_file(
        folder / "model.safetensors",
        {name.partition(".")[2]: tensor for name, tensor in tensors.items()},
    )
    if tied:
        assert np.array_equal(mil.load(folder)(np.arange(5)[None]), want)
    else:
        refused(folder, "lm_head.weight", "output matrix", kind=mil.FormatError)


@pytest.mark.parametrize("share", [1e308, 9.0, 0, -1, "half"])
def test_rotated_part_of_a_head(share, tmp_path):
    folder = tiny(tmp_path / "model", "bamba")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "partial_rotary_factor": share}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "rotary", kind=mil.FormatError)


@pytest.mark.parametrize("width", [1, 9])
def test_convolutions_that_are_not_supported(width, tmp_path):
    folder = tiny(tmp_path / "model", "mamba")
    config = {**json.loads((folder / "config.json").read_text()), "conv_kernel": width}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, str(folder), "conv_width", "2 and 8", kind=mil.FormatError)


@pytest.mark.parametrize("expand", [1e308, -1, 0, 1e-9])
def test_width_of_a_mixer(expand, tmp_path):
    folder = tiny(tmp_path / "model", "mamba")
    config = {**json.loads((folder / "config.json").read_text()), "expand": expand}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "expand", kind=mil.FormatError)


def test_saving_what_utf8_cannot_hold(tmp_path):
    """A JSON string may hold half of a surrogate pair; it is saved as it was read."""
    folder = tiny(tmp_path / "model", "llama")
    config = {**json.loads((folder / "config.json").read_text()), "note": "\ud800 é"}
    (folder / "config.json").write_text(json.dumps(config))
    again = mil.load(mil.load(folder).save(tmp_path / "again"))
    assert again.config.raw["note"] == "\ud800 é"


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a": 1, "a": 2}', "\ufeff{}", "nul"])
def test_config_that_is_no_object(text, tmp_path):
    folder = tiny(tmp_path / "model", "llama")
    (folder / "config.json").write_text(text, encoding="utf-8")
    refused(folder, "config.json", kind=mil.FormatError)


def test_missing_files(tmp_path):
    folder = tiny(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", kind=mil.NotFoundError)
    (folder / "config.json").unlink()
    refused(folder, "config.json", kind=mil.NotFoundError)


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"attn_layers": [3]}, "attn_layers"),
        ({"attn_layers": "all"}, "attn_layers"),
        ({"attn_layers": [0]}, "missing"),
        ({"d_model": 64}, "d_model"),
        ({"n_layer": 9}, "n_layer"),
        ({"d_xb": 7}, "d_xb"),
        ({"rms_norm_eps": 0.5}, "rms_norm_eps"),
        ({"ssm_cfg": [1]}, "ssm_cfg"),
        ({"ssm_cfg": {"ngroups": 5}}, "ngroups"),
        ({"ssm_cfg": {"ngroups": 6, "d_state": 13}}, "state size"),
        ({"ssm_cfg": {"ngroups": 3}}, "contradict"),
        ({"ssm_cfg": {"d_conv": 3}}, "contradict"),
        ({"ssm_cfg": {"dt_limit": [1, 0]}}, "dt_limit"),
    ],
)
def test_hybrid_configurations(keys, word, tmp_path):
    folder = tiny_hybrid(tmp_path / "model", "mamba2", [1])
    config = {**mamba_config(CONFIGS["llama-head-dim"], "mamba2", [1]), **keys}
    (folder / "mamba_config.json").write_text(json.dumps(config))
    refused(folder, "model", word)


def test_mamba_with_a_hybrid_configuration(tmp_path):
    folder = tiny(tmp_path / "model", "mamba")
    (folder / "mamba_config.json").write_text("{}")
    refused(folder, "no attention layers", kind=mil.FormatError)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_damaged_tokenizer(name, shared, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(shared / "models" / "story-llama", folder)
    (folder / name).chmod(0o644)
    (folder / name).write_text('{"model": 7')
    model = mil.load(folder)  # the weights are fine
    with pytest.raises(mil.FormatError, match=name):
        model.tokenizer  # noqa: B018


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "mamba_config.json"])
def test_links_to_nothing(name, tmp_path):
    """What is left of a download's cache that was copied without what its links point to."""
    folder = tiny_hybrid(tmp_path / "model", "mamba2")
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/0")
    refused(folder, name, "is a link", kind=mil.NotFoundError)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("what", ["folder", "huge"])
def test_small_files_that_are_none(name, what, shared, tmp_path):
    """Not passed over in silence when a model is saved, and not read into all of memory."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(shared / "models" / "story-llama", folder)
    (folder / name).unlink(missing_ok=True)
    if what == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).touch()
        os.truncate(folder / name, 1 << 33)
    model = mil.load(folder)
    for use in (lambda: model.save(tmp_path / "again"), lambda: mil.generate(model, "Once")):
        with pytest.raises(mil.FileError if what == "folder" else mil.FormatError) as error:
            use()
        assert str(folder / name) in str(error.value)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('a\nb') }}", "{{ ('x' * 5000).y.z }}", "{{ messages['a\nb'].c }}"],
)
def test_chat_templates_complain_in_one_line(source):
    with pytest.raises(mil.ArgumentError) as error:
        mil.chat.ChatTemplate(source).render([{"role": "user", "content": "Hello"}])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# ---- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    ["llama", "mamba", "mamba2-groups", "bamba"],
)
def test_damaged_images_of_states(case, tmp_path, rng):
    """Header, counters and lengths changed at random: restored, or refused in one line."""
    model = mil.load(tiny(tmp_path / "model", case))
    tokens = np.arange(20, dtype=np.int32)
    state = model.state()
    model.core.forward(tokens, states=[state])
    image = state.save()
    for _ in range(60):
        bad = bytearray(image)
        value = [0, 1, 16, 10**6, 2**31, 2**40, 2**62, 2**64 - 1][rng.integers(8)]
        at = 8 * int(rng.integers(0, 10))
        bad[at : at + 8] = struct.pack("<Q", value)
        bad = bad[: rng.integers(0, len(bad))] if rng.random() < 0.2 else bad
        try:
            restored = type(state).restore(model.core, bytes(bad))
        except mil.Error as error:
            assert "\n" not in str(error)
            continue
        model.core.forward(tokens, states=[restored])


def test_an_image_asks_for_no_more_memory_than_it_can_fill(tmp_path):
    model = mil.load(tiny(tmp_path / "model", "llama"))
    state = model.state()
    model.core.forward(np.arange(20, dtype=np.int32), states=[state])
    image = bytearray(state.save())
    image[8:16] = struct.pack("<q", len(image) - 1)  # tokens: one for each byte
    with pytest.raises(mil.FormatError, match="cannot be"):
        type(state).restore(model.core, bytes(image))

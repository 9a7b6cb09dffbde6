"""Tokenizers and chat templates: tokens and text as in transformers; streams that lose nothing."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import mambainllama as mil
from mambainllama.chat import ChatTemplate
from mambainllama.tokenizer import Tokenizer

TEXTS = [
    "Once upon a time, there was a girl.",
    "",
    " leading and  double spaces ",
    "line\nbreaks\n\nand\ttabs",
    "naïve café — “quotes”",
    "日本語と漢字 and emoji 👩‍👩‍👧‍👦🎉",
    "<|end_story|> as text",
    "\u0000\u200b\ufeff odd characters \U0010ffff",
]


def byte_level(folder):
    """A small byte-level BPE like Llama 3's or Qwen's."""
    from tokenizers.trainers import BpeTrainer

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return save(folder, backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def byte_fallback(folder):
    """A small BPE like Llama 2's: a leading space, unknown characters as bytes."""
    words = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzOT.,"))
    vocab = {token: i for i, token in enumerate([*words, *letters, "▁a", "▁t", "he", "▁the"])}
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return save(folder, backend, bos_token="<s>", eos_token="</s>", add_bos_token=True)


def save(folder, backend, **config):
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["byte-level", "byte-fallback", "story"])
def folder(request, tmp_path):
    if request.param == "story":
        return request.getfixturevalue("shared") / "models" / "story-llama"
    return {"byte-level": byte_level, "byte-fallback": byte_fallback}[request.param](tmp_path / "t")


def test_same_tokens_and_text_as_transformers(folder):
    """The class that takes tokenizer.json as it is; AutoTokenizer builds Llama's anew and treats
    leading spaces otherwise than the file says."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
            plain = [token for token in ids if token not in theirs.all_special_ids]
            assert ours.decode(ids) == theirs.decode(plain)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    for name in ("bos_token_id", "eos_token_id", "bos_token", "eos_token"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_streams_give_the_decoded_whole(folder):
    """With characters of several tokens, and long enough that the stream forgets."""
    tokenizer = Tokenizer.load(folder)
    long = " ".join(TEXTS * 4) + "👩‍👩‍👧‍👦🎉日本語" * 30
    for text in [*TEXTS, long]:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_stream_holds_half_characters_back(tmp_path):
    tokenizer = Tokenizer.load(byte_fallback(tmp_path / "t"))
    ids = tokenizer.encode("日")[-3:]
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == ["", "", "日"]
    stream = tokenizer.stream()
    assert stream.push(ids[0]) == "" and stream.finish() == "\ufffd"


def test_odd_inputs(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "t"))
    assert tokenizer.decode([]) == "" and tokenizer.decode(np.array([5, 6], np.uint16))
    assert tokenizer.decode([10**6]) == ""  # models have more rows than tokenizers have tokens
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # a lone surrogate
    for bad in ([-1], [2**40]):
        with pytest.raises(mil.ArgumentError):
            tokenizer.decode(bad)
    with pytest.raises(mil.ArgumentError, match="bytes"):
        tokenizer.encode(b"x")
    assert "chat template" in repr(tokenizer)


def test_special_tokens_that_utf8_cannot_hold(tmp_path):
    folder = byte_level(tmp_path / "t")
    (folder / "special_tokens_map.json").write_text('{"pad_token": "\\ud800"}')
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.pad_token == "\ufffd" and tokenizer.pad_token_id is not None


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False},
                                   {"add_bos_token": True, "add_eos_token": True}])  # fmt: skip
def test_start_and_end_tokens(flags, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = byte_level(tmp_path / "t")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **flags}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert Tokenizer.load(folder).encode("a girl") == theirs.encode("a girl")


# ---- chat templates ------------------------------------------------------------------------------

# Written for these tests in the shape of what models ship.
LLAMA3 = (
    "{{- bos_token }}\n{%- for message in messages %}\n"
    "    {%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CHATML = (
    "{% set ns = namespace(count=0) %}{% for message in messages %}"
    "{% if loop.index0 == 0 and message.role != 'system' %}"
    "<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "{% set ns.count = ns.count + 1 %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n"
    "{% if ns.count > 3 %}{% break %}{% endif %}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "Hello <b>&"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\n"}],
    [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 3, "abcdef", strict=True)],
]


@pytest.mark.parametrize("template", [LLAMA3, ZEPHYR, CHATML], ids=["llama3", "zephyr", "chatml"])
@pytest.mark.parametrize("where", ["config", "file", "list"])
def test_same_text_as_transformers(template, where, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = byte_level(tmp_path / "t")
    if where == "file":
        (folder / "chat_template.jinja").write_text(template)
    else:
        path = folder / "tokenizer_config.json"
        both = [{"name": "default", "template": template}, {"name": "other", "template": "x"}]
        value = template if where == "config" else both
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": value}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    for chat in CHATS:
        for prompt in (True, False):
            for tools in (None, [{"name": "f", "äöü": [1, None, "<"]}]):
                expected = theirs.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=prompt, tools=tools
                )
                assert ours.apply_chat_template(chat, prompt, tools=tools) == expected
    if where == "list":
        assert ours.apply_chat_template([], template="other") == "x"


def test_templates_that_refuse_or_fail():
    chat = [{"role": "robot", "content": "x"}]
    with pytest.raises(mil.ArgumentError, match="unknown role robot"):
        ChatTemplate(LLAMA3).render(chat, bos_token="")
    with pytest.raises(mil.ArgumentError, match="ZeroDivisionError"):
        ChatTemplate("{{ 1 / 0 }}").render(chat)
    with pytest.raises(mil.FormatError, match="line 1"):
        ChatTemplate("{% if %}").render(chat)
    with pytest.raises(mil.ArgumentError, match="default"):
        ChatTemplate("x").render(chat, name="none")
    with pytest.raises(mil.ArgumentError, match="list"):
        ChatTemplate("x").render("text")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_templates_are_kept_in_the_sandbox(template):
    """Either refused, or what they reach for is undefined and empty."""
    try:
        assert ChatTemplate(template).render([{"role": "user", "content": ""}]) == ""
    except mil.ArgumentError as error:
        assert "\n" not in str(error)


def test_without_a_template(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "t"))
    with pytest.raises(mil.ArgumentError, match="no chat template"):
        tokenizer.apply_chat_template(CHATS[0])
    tokenizer.chat_template = ChatTemplate("{{ eos_token }}")
    assert tokenizer.apply_chat_template(CHATS[0]) == "<|eot_id|>"


def test_missing_tokenizer(tmp_path):
    with pytest.raises(mil.NotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(mil.NotFoundError, match="convert"):
        Tokenizer.load(tmp_path)


def test_generation_settings(shared, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(shared / "models" / "story-llama", folder)
    model = mil.load(folder)
    assert model.stop_tokens == (2,) and model.generation_config["bos_token_id"] == 1
    path = folder / "generation_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps({"eos_token_id": [7, 2, 7, 99999]}))
    assert mil.load(folder).stop_tokens == (7, 2)
    path.unlink()
    assert mil.load(folder).stop_tokens == (2,)

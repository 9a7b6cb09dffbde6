"""Memory before work: plans add up, choose what fits, and refuse in one line what cannot.

A GPU's plan needs no GPU: the numbers come from the configuration, so these tests plan for a device
with as much free memory as they say.
"""

import json

import numpy as np
import pytest
from core_models import KINDS, build, configuration
from tiny_models import write_llama

import mambainllama as mil
from mambainllama import _core, memory
from mambainllama.cli import main
from mambainllama.engine import Engine
from mambainllama.memory import Call, Footprint, Text, largest, plan_call, weight_bytes

MiB = 1 << 20
CUDA = {"device": "cuda:0", "activation": "bfloat16", "prefill_rows": 8192}
HYBRID = [  # of the 8B hybrid's widths, so that numbers are far above what is rounded
    {"mixer": "attention", "heads": 32, "kv_heads": 8, "head_dim": 128, "rotary": 128,
     "intermediate": 14336},
    {"mixer": "mamba2", "heads": 32, "head_dim": 128, "inner": 4096, "state_dim": 128,
     "x_width": 1024, "B_groups": 8, "C_groups": 32, "conv_width": 4, "norm_group": 128,
     "intermediate": 14336},
]  # fmt: skip
ROPE = {"rotary": 128, "inv_freq": [1.0] * 64}


@pytest.fixture
def hybrid():
    config = configuration(HYBRID * 4, vocab=128256, hidden=4096, rope=ROPE)
    return Footprint(config, "bfloat16", CUDA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"), layers=4, hidden=64)


def has(monkeypatch, free, total=80 << 30):
    monkeypatch.setattr(memory, "free_memory", lambda device: (free, total))


# ---- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_footprints_are_those_of_states(kind):
    model = build(KINDS[kind], dtype="bfloat16")
    found = memory.footprint_of(model)
    for tokens in (0, 1, 1000):
        assert found.text(tokens) == model.state_bytes(tokens)


def test_a_rehearsal_counts_what_a_pass_takes(kind="mamba2 hybrid"):
    """The CPU's arena holds the rehearsed bytes and the operators' own workspace."""
    model = build(KINDS[kind])
    rows = 3000
    foreseen = _core.Model.footprint(model.config, rows=rows, logits=1)["workspace"]
    _core.trim_memory()
    before = _core.memory()["bytes"]
    model.forward(np.zeros(rows, np.int32), rows="last")
    taken = _core.memory()["bytes"] - before
    assert foreseen <= taken < 2 * foreseen
    _core.trim_memory()


def test_workspace_grows_with_rows_and_not_with_depth(hybrid):
    few, many = hybrid.workspace(1, 512, 1), hybrid.workspace(1, 4096, 1)
    assert 6 * few < many < 9 * few
    deeper = Footprint({**hybrid.config, "layers": hybrid.config["layers"] * 4}, "bfloat16", CUDA)
    assert deeper.workspace(1, 512, 1) == few
    assert deeper.token == 4 * hybrid.token


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"sequences": 5, "rows": 4}, {"rows": 3, "logits": 4}, {"rows": 1 << 40}]
)
def test_footprint_refuses_nonsense(wrong):
    with pytest.raises(mil.ArgumentError, match="rehearse"):
        _core.Model.footprint(configuration(KINDS["mamba2"]), **wrong)
    with pytest.raises(mil.DtypeError, match="float9"):
        _core.Model.footprint(configuration(KINDS["mamba2"]), dtype="float9")


def test_weights_by_dtype():
    config = configuration(KINDS["transformer"], hidden=32, vocab=61)
    specs = _core.Model.parameter_specs(config)
    matrices = sum(int(np.prod(shape)) for _, shape, matrix, _ in specs if matrix)
    vectors = sum(
        int(np.prod(shape)) for _, shape, matrix, needed in specs if not matrix and needed
    )
    rows = sum(shape[0] for _, shape, matrix, _ in specs if matrix)
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        dtypes = {n: dtype if matrix else "float32" for n, _, matrix, needed in specs if needed}
        assert weight_bytes(specs, dtypes) == item * matrices + 4 * vectors
        assert weight_bytes(specs, dtypes, "float8") == matrices + 4 * rows + 4 * vectors


# ---- choosing ----------------------------------------------------------------------------------


def test_largest():
    for limit in range(12):
        assert largest(lambda n, limit=limit: n <= limit, 1, 10) == min(limit, 10)


def test_a_plan_takes_as_many_texts_as_fit(hybrid):
    call = Call(hybrid, [Text(4000, 96)] * 64)
    everything = plan_call("generate", call, 64, None, free=1 << 40)
    assert (everything.batch, everything.prefill_rows) == (64, 8192)
    assert plan_call("generate", call, None, None, free=1 << 40).batch == 16
    for free in (700 * MiB, 900 * MiB, 1500 * MiB):
        need = plan_call("generate", call, None, None, free=free)
        assert 1 <= need.batch < 16 and need.total <= free
        assert call.need(need.batch + 1, need.prefill_rows).total > free
    fewer_rows = plan_call("generate", call, 16, None, free=call.need(16, 8192).total - MiB)
    assert fewer_rows.batch == 16 and fewer_rows.prefill_rows < 8192


def test_one_line_with_numbers_and_ways(hybrid):
    call = Call(hybrid, [Text(8000, 192)] * 64)
    with pytest.raises(mil.OutOfMemoryError) as caught:
        plan_call("generate", call, 48, None, free=1 << 30)
    line = str(caught.value)
    assert "\n" not in line and "48 texts" in line and "8,192 tokens" in line and "1.0 GiB" in line
    fitting = int(line.split("max_batch=")[1].split()[0])
    assert plan_call("generate", call, fitting, None, free=1 << 30).batch == fitting
    with pytest.raises(mil.OutOfMemoryError):
        plan_call("generate", call, fitting + 1, None, free=1 << 30)
    tokens = int(line.split("at most ")[1].split()[0].replace(",", ""))
    shorter = Call(hybrid, [Text(tokens - 1, 1)] * 64)
    assert plan_call("generate", shorter, 48, None, free=1 << 30).batch == 48
    with pytest.raises(mil.OutOfMemoryError, match="not even a short text"):
        plan_call("generate", call, None, None, free=10 * MiB)


def test_a_draft_counts(hybrid):
    texts = [Text(1000, 100)] * 4
    plain = Call(hybrid, texts).need(4, 512)
    drafted = Call(hybrid, texts, hybrid, 4).need(4, 512)
    assert drafted.draft_states == drafted.states > 0 == plain.draft_states
    with pytest.raises(mil.OutOfMemoryError, match="no draft model"):
        plan_call("generate", Call(hybrid, texts, hybrid, 4), 4, 512, free=plain.total + MiB)


def test_whole_prompts_count_where_frequencies_follow_the_length(hybrid):
    rope = {**ROPE, "long_inv_freq": [0.5] * 64, "long_after": 100}
    stretched = Footprint({**hybrid.config, "rope": rope}, "bfloat16", CUDA)
    texts = [Text(9000, 10)]
    assert (
        Call(stretched, texts).need(1, 512).workspace
        > 4 * Call(hybrid, texts).need(1, 512).workspace
    )


# ---- in use ------------------------------------------------------------------------------------


def test_generate_refuses_before_it_begins(folder, monkeypatch):
    model = mil.load(folder)
    heard = []
    has(monkeypatch, 4 * MiB)
    with pytest.raises(mil.OutOfMemoryError, match="generate: 16 texts .* are free on cpu"):
        mil.generate(
            model,
            ["a"] * 20,
            max_new_tokens=2000,
            max_batch=16,
            on_tokens=lambda *_: heard.append(1),
        )
    assert not heard
    few = mil.generate(model, ["abc"] * 5, max_new_tokens=300, stop=[])
    has(monkeypatch, 1 << 40)
    assert [g.token_ids for g in few] == [
        g.token_ids for g in mil.generate(model, ["abc"] * 5, max_new_tokens=300, stop=[])
    ]


def test_engine_refuses_a_text_that_never_fits(folder, monkeypatch):
    model = mil.load(folder)
    has(monkeypatch, 6 * MiB)
    with Engine(model) as engine:
        with pytest.raises(mil.OutOfMemoryError, match="submit: a text"):
            engine.submit([1] * 20000, max_new_tokens=10)
        assert engine.submit("abc", max_new_tokens=5, stop=[]).result(60).stats.new_tokens == 5


def test_engine_goes_on_after_memory_ran_out(folder, monkeypatch):
    """Another process may take what was free: that request fails, the next one runs."""
    model = mil.load(folder)
    with Engine(model) as engine:
        first = engine.submit("abc", max_new_tokens=5, stop=[]).result(60)
        find = engine._cache.find

        def no_memory(prompt):
            monkeypatch.setattr(engine._cache, "find", find)
            raise mil.OutOfMemoryError("state: out of memory")

        monkeypatch.setattr(engine._cache, "find", no_memory)
        with pytest.raises(mil.OutOfMemoryError, match="out of memory"):
            engine.submit("abc", max_new_tokens=5, stop=[]).result(60)
        again = engine.submit("abc", max_new_tokens=5, stop=[]).result(60)
    assert again.token_ids == first.token_ids


def test_load_refuses_before_reading(folder, monkeypatch):
    has(monkeypatch, MiB // 4)
    monkeypatch.setattr(memory, "cuda_devices", lambda: [])
    specs = _core.Model.parameter_specs(mil.load(folder).core.config)
    dtypes = {name: "float32" for name, _, _, required in specs if required}
    memory.check_weights("tiny", "cpu", specs, dtypes)
    with pytest.raises(mil.OutOfMemoryError, match="load: tiny: .* float32 .* mmap=True"):
        memory.check_weights("tiny", "cpu", specs, dtypes, mmap=False)
    with pytest.raises(
        mil.OutOfMemoryError, match='load: tiny: .* float32 .* device="cpu"'
    ) as caught:
        memory.check_weights("tiny", "cuda:0", specs, dtypes)
    assert "\n" not in str(caught.value)
    has(monkeypatch, weight_bytes(specs, dtypes) * 2 // 3, total=0)
    with pytest.raises(mil.OutOfMemoryError, match='dtype="bfloat16".* or weights="float8"'):
        memory.check_weights("tiny", "cuda:0", specs, dtypes)


# ---- shown -------------------------------------------------------------------------------------


def test_a_plan_from_a_folder_and_from_a_model_agree(folder):
    on_disk = mil.memory_plan(folder, batch=3, context=300)
    loaded = mil.memory_plan(mil.load(folder), batch=3, context=300)
    assert on_disk.need == loaded.need and on_disk.weights == loaded.weights
    assert on_disk.loading == on_disk.weights and loaded.loading == 0
    assert on_disk.fits and on_disk.most_batch >= 3 and on_disk.most_context >= 300
    text = str(on_disk)
    assert "weights" in text and "states of 3 texts" in text and "fits" in text


def test_short_integers_of_numpy_do_not_wrap(folder):
    wanted = mil.memory_plan(folder, batch=100, context=100, draft="ngram", draft_tokens=100)
    numbers = {name: np.int8(100) for name in ("batch", "context", "draft_tokens")}
    found = mil.memory_plan(folder, draft="ngram", **numbers)
    assert (found.needed, found.text, found.need) == (wanted.needed, wanted.text, wanted.need)
    model = mil.load(folder)
    found = mil.generate(model, [[5] * 100, [5] * 3], max_new_tokens=np.uint8(200), stop=[])
    assert [one.stats.new_tokens for one in found] == [200, 200]


def test_plans_refuse_nonsense(folder):
    with pytest.raises(mil.ArgumentError, match="batch"):
        mil.memory_plan(folder, batch=None)
    with pytest.raises(mil.ArgumentError, match="batch"):
        mil.memory_plan(folder, batch=0)
    with pytest.raises(mil.ArgumentError, match="context"):
        mil.memory_plan(mil.load(folder), context=-1)
    for name in ("batch", "context", "prefill_rows", "draft_tokens"):
        for value in (2.5, "4", -1, 10**30):
            with pytest.raises(mil.ArgumentError, match=name):
                mil.memory_plan(folder, draft="ngram", **{name: value})
    with pytest.raises(mil.ArgumentError, match="at most 65,536, not 10,000,000"):
        mil.memory_plan(folder, batch=10**7)
    with pytest.raises(mil.ArgumentError, match="folder"):
        mil.memory_plan(7)


def test_info_shows_the_plan(folder, capsys):
    assert main(["info", str(folder), "--batch", "4", "--context", "200"]) == 0
    assert "states of 4 texts" in capsys.readouterr().out
    assert main(["info", str(folder), "--batch", "4", "--draft", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["memory"]
    assert facts["batch"] == 4 and facts["fits"] and facts["draft_states"] > 0

"""benchmarks/gpu_*.py without a GPU: peers compute what ours does, figures merge, tables are right.

The peers' model is compared in plain PyTorch, in float32, token by token: what is timed on a GPU is
the same code with other kernels in place of some operators.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

torch = pytest.importorskip("torch", reason="the peers of the GPU benchmarks are made of torch")

import gpu_all  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_shapes  # noqa: E402

from mambainllama import _core  # noqa: E402
from mambainllama.families import describe  # noqa: E402
from mambainllama.model import Model  # noqa: E402

TINY = dict(hidden=128, layers=4, heads=4, kv_heads=2, intermediate=192, vocab=300)
PURE = dict(hidden=64, layers=2, vocab=300)


def random_parameters(specs, seed=0):
    random = np.random.default_rng(seed)
    parameters = {}
    for name, shape, is_matrix, required in specs:
        if is_matrix:
            parameters[name] = 0.2 * random.standard_normal(shape)
        elif required or "conv" in name:
            value = random.random(shape)
            if name.endswith("A_log"):
                value = np.log(1 + 15 * value)
            elif "dt" in name:
                value = 2 * value - 3
            parameters[name] = value
    return {name: value.astype(np.float32) for name, value in parameters.items()}


@pytest.mark.parametrize("name", ["tiny", "tiny-mamba2", "tiny-mamba1", "pure1", "pure2"])
def test_peer_computes_the_same(name, monkeypatch):
    monkeypatch.setitem(gpu_shapes.LLAMAS, "tiny", TINY)
    monkeypatch.setitem(gpu_shapes.MAMBAS, "pure1", ("mamba", PURE))
    monkeypatch.setitem(gpu_shapes.MAMBAS, "pure2", ("mamba2", PURE))
    config, mamba = gpu_shapes.configs(name)
    description = describe(config, mamba, [], name)
    specs = _core.Model.parameter_specs(description.canonical)
    parameters = random_parameters(specs)
    ours = Model(description, parameters, dict.fromkeys(parameters, "float32"), config, mamba)
    tokens = np.random.default_rng(3).integers(0, 300, (2, 6))
    wanted = ours(tokens)
    with torch.inference_mode():
        peer = gpu_peers.Decoder(
            config, mamba, 2, 6, gpu_peers.reference_kernels(), None, "cpu",
            torch.float32, parameters,
        )  # fmt: skip
        for position in range(tokens.shape[1]):
            peer.tokens.copy_(torch.from_numpy(tokens[:, position]))
            error = np.abs(peer.logits(position).numpy() - wanted[:, position]).max()
            assert error <= 1e-5 * np.abs(wanted).max()


def figure(seconds, **more):
    return {"seconds": seconds, "tokens_per_second": 1 / seconds, **more}


def collected(tmp_path):
    collector = gpu_all.Collector(gpu_all.Figures(), "abc1234")
    decode = {"kind": "decode", "model": "8b-mamba2", "batch": 1, "context": 512}
    lines = [
        {"kind": "rates", "copy": 3e12, "gemm": 8e14},
        {**decode, **figure(6e-3, of_limit=0.87)},
        {**decode, "peer": "torch + mamba-ssm", **figure(9.6e-3, state_dtype="bfloat16")},
        {**decode, "peer": "torch + mamba-ssm + fla", "absent": "fla-core is not installed"},
        {"kind": "ssd", "shape": "8 x 2048", "peer": "mamba-ssm mamba_chunk", "seconds": 1e-3},
        {"kind": "load", "who": "ours", "cold": False, "seconds": 3.0},
        {"kind": "load", "who": "ours", "cold": False, "seconds": 2.0},
        {"kind": "load", "who": "ours", "cold": False, "seconds": 2.5},
        {"kind": "load", "who": "reference", "cold": False, "seconds": 2.0},
    ]
    for line in lines:
        collector.keep(line, "made up")
    one = {"ms_a_round": 2.0, "tokens_per_second": 500.0}
    lines = {"ratio": 1.8, "plain": one, "fixed": {**one, "ms_a_round": 2.2}, "seconds": 2.2e-3}
    shape = "mamba-2.8b:ngram, K = 4, batch 1"
    collector.keep({"kind": "speculation", "shape": shape, **lines}, "made up")
    text = "issue    ssd   b 8    rows 2048   tail 0      250.00 us   1 GB/s   1.0 % of a copy\n"
    gpu_all.keep_log(collector, text, "made up")
    return collector.figures


def test_table(tmp_path):
    figures = collected(tmp_path)
    rows = {(row.work, row.beside.split(":")[0]): row for row in gpu_all.rows_of(figures)}
    first = rows["8B, half Mamba-2, one text, context 512", "the copy rate"]
    assert (round(first.ratio), first.verdict()) == (87, "required")
    against = rows["8B, half Mamba-2, one text", "torch + mamba-ssm"]
    assert against.ratio == pytest.approx(1.6) and against.verdict() == "aim"
    ssd = rows["SSD forward, 8 x 2048 x 32 heads x 128 x 128", "mamba-ssm"]
    assert ssd.ratio == pytest.approx(4) and ssd.verdict() == "aim"
    assert rows["Mamba 2.8B, 5 rows", "one row"].verdict() == "required"
    load = next(row for row in gpu_all.rows_of(figures) if row.work.startswith("mil.load"))
    assert load.ratio == pytest.approx(1) and load.verdict() == "aim"
    just_short = gpu_all.Row("work", ratio=1.3493, required=1.35, aim=1.5)
    assert just_short.cells()[3] == "1.349 x" and just_short.cells()[-1] == "missed"
    page = gpu_all.page({"name": "GPU", "driver": "1"}, figures)
    assert "fla-core is not installed" in page and "not run" in page


def test_files_merge_and_pages_keep_their_words(tmp_path):
    device = {"name": "NVIDIA H100 80GB HBM3", "driver": "1", "memory": "2"}
    assert gpu_all.slug(device) == "gpu-h100"
    path = tmp_path / "gpu-h100.json"
    gpu_all.write(path, device, collected(tmp_path))
    again, figures = gpu_all.read(path)
    assert again == device and figures == json.loads(json.dumps(collected(tmp_path)))
    page = path.with_suffix(".md")
    page.write_text("# One H100\n\nWords by hand.\n")
    for _ in range(2):
        gpu_all.write_page(page, device, figures)
    text = page.read_text()
    assert text.startswith("# One H100\n") and text.endswith("Words by hand.\n")
    assert text.count(gpu_all.BEGIN) == 1 and "copy rate" in text

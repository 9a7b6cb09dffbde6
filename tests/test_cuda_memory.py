"""Memory of a CUDA device: what is planned is what is taken, and running out harms nothing."""

import threading

import pytest
from core_models import build, some_tokens

import mambainllama as mil
from mambainllama import _core, memory
from mambainllama.devices import cuda_devices, free_memory
from mambainllama.memory import Call, Text

pytestmark = pytest.mark.skipif(
    not cuda_devices(), reason="no CUDA device here, or a build without CUDA operators"
)

MiB = 1 << 20
WIDE_ATTENTION = {
    "mixer": "attention", "heads": 16, "kv_heads": 8, "head_dim": 128, "rotary": 128,
    "intermediate": 4096,
}  # fmt: skip
WIDE_MAMBA2 = {
    "mixer": "mamba2", "heads": 16, "head_dim": 128, "inner": 2048, "state_dim": 128,
    "x_width": 1024, "B_groups": 8, "C_groups": 16, "conv_width": 4, "norm_group": 128,
    "intermediate": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide():
    rope = {"rotary": 128, "inv_freq": [0.9**i for i in range(64)]}
    layers = [WIDE_ATTENTION, WIDE_MAMBA2] * 2
    return build(
        layers, dtype="bfloat16", device="cuda:0", vocab=32000, hidden=1024, rope=rope, biases=False
    )


class LowestFree:
    """The least free memory while it runs, polled."""

    def __enter__(self):
        _core.trim_memory()
        self.before = self.lowest = free_memory("cuda:0")[0]
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.0005):
            self.lowest = min(self.lowest, free_memory("cuda:0")[0])

    def __exit__(self, *exception):
        self.done.set()
        self.thread.join()
        self.taken = self.before - self.lowest


@pytest.mark.parametrize("batch, prompt, draft", [(1, 6000, 0), (48, 700, 0), (16, 300, 4)])
def test_what_was_planned_is_what_is_taken(wide, batch, prompt, draft):
    tokens = some_tokens(wide, batch * prompt).reshape(batch, prompt)
    settings = dict(max_new_tokens=40, stop=[], max_batch=batch, draft_tokens=draft)
    settings["draft"] = "ngram" if draft else None
    mil.generate(wide, tokens[:1, :20], max_new_tokens=20, stop=[])  # kernels load once
    texts = [Text(prompt, 40)] * batch
    footprint = memory.footprint_of(wide)
    need = Call(footprint, texts, None, draft).need(batch, footprint.prefill_rows)
    with LowestFree() as watched:
        mil.generate(wide, list(tokens), **settings)
    print(f"planned {need}, taken {watched.taken}")
    assert watched.taken <= need.total + 64 * MiB
    assert watched.taken >= 0.4 * (need.total - need.recordings)


def test_too_much_is_refused_before_work_and_less_succeeds(wide):
    prompts = [some_tokens(wide, 600)] * 40
    with pytest.raises(mil.OutOfMemoryError, match="max_batch=|tokens a text") as caught:
        mil.generate(wide, prompts, max_new_tokens=1_000_000, max_batch=40)
    assert "\n" not in str(caught.value) and "cuda:0" in str(caught.value)
    assert len(mil.generate(wide, prompts[:2], max_new_tokens=4, stop=[])) == 2


def test_another_process_takes_the_memory(wide, monkeypatch):
    """What was free when it was planned is gone: one line, and later work succeeds."""
    prompt = some_tokens(wide, 600)
    _core.trim_memory()
    free = free_memory("cuda:0")[0]
    token = memory.footprint_of(wide).token
    hoard = []
    for size in (free // 4, 512 * MiB, 32 * MiB):
        with pytest.raises(
            mil.OutOfMemoryError, match="out of memory: .* free on cuda:0"
        ) as caught:
            while True:
                hoard.append(wide.state(size // token))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(memory, "free_memory", lambda device: (1 << 50, 1 << 50))
    with pytest.raises(mil.OutOfMemoryError, match="out of memory|would fit"):
        mil.generate(wide, [prompt], max_new_tokens=4, stop=[])
    hoard.clear()
    assert mil.generate(wide, [prompt], max_new_tokens=4, stop=[])[0].token_ids
    _core.trim_memory()
    assert free_memory("cuda:0")[0] > 0.95 * free

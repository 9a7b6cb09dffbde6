"""Operators on PyTorch's CUDA tensors: the CPU's results, in place, on the caller's stream.

float32 agrees with the CPU to 2e-5 of the largest result; 16-bit tensors are judged against float32
of the same rounded inputs. What happens around a kernel (places, dtypes, references) is proven
without a GPU in test_device_arrays.py.
"""

import time

import numpy as np
import pytest

import mambainllama as mil
from mambainllama import _core, ops
from mambainllama.devices import cuda_devices

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(
    not cuda_devices() or not torch.cuda.is_available(),
    reason="no CUDA device here, or a build of either library without CUDA",
)

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
rng = np.random.default_rng(0)


def random(*shape, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(np.float32)


ROWS = {"offsets": [0, 3, 40, 41, 75]}

# name -> operator, arrays, other options, and which of the arrays are float32 everywhere
CASES = {
    "linear": (
        ops.linear_forward,
        {"x": random(5, 64), "weight": random(48, 64), "bias": random(48)}, {}, {"bias"},
    ),
    "linear, many rows": (
        ops.linear_forward, {"x": random(100, 64), "weight": random(48, 64)}, {}, set(),
    ),
    "norm": (ops.norm_forward, {"x": random(7, 96), "weight": random(96)}, {}, {"weight"}),
    "gated norm": (
        ops.norm_forward,
        {"x": random(7, 96), "weight": random(96), "z": random(7, 96)}, {"group": 32}, {"weight"},
    ),
    "glu": (ops.glu_forward, {"gate": random(7, 96), "up": random(7, 96)}, {}, set()),
    "add": (ops.add, {"x": random(7, 96), "y": random(7, 96)}, {}, set()),
    "gather": (ops.gather_rows, {"x": random(7, 96)}, {"index": [6, 0, 0, 3]}, set()),
    "embedding": (
        ops.embedding_forward,
        {"table": random(50, 96)}, {"tokens": [7, 0, 49], "scale": 2.0}, set(),
    ),
    "rope": (
        ops.rope,
        {"x": random(9, 4, 32), "table": ops.rope_table(0.7 ** np.arange(8, dtype=np.float32), 9)},
        {}, {"table"},
    ),
    "attention": (
        ops.attention_forward,
        {"q": random(75, 8, 64), "k": random(75, 2, 64), "v": random(75, 2, 64)}, ROWS, set(),
    ),
    "attention, window": (
        ops.attention_forward,
        {"q": random(75, 8, 64), "k": random(75, 2, 64), "v": random(75, 2, 64)},
        {**ROWS, "window": 5}, set(),
    ),
    "conv1d": (
        ops.conv1d_forward,
        {"x": random(75, 64), "weight": random(64, 4), "bias": random(64)}, ROWS,
        {"weight", "bias"},
    ),
    "scan": (
        ops.scan_forward,
        {"x": random(75, 64), "dt": random(75, 64), "B": random(75, 2, 16), "C": random(75, 4, 16),
         "z": random(75, 64), "A_log": random(64, 16, scale=0.5), "D": random(64),
         "dt_bias": random(64) - 1},
        ROWS, {"A_log", "D", "dt_bias"},
    ),
    "ssd": (
        ops.ssd_forward,
        {"x": random(75, 2, 64), "dt": random(75, 4), "B": random(75, 1, 64),
         "C": random(75, 4, 64), "A_log": random(4, scale=0.5), "D": random(4),
         "dt_bias": random(4) - 1},
        ROWS, {"A_log", "D", "dt_bias"},
    ),
}  # fmt: skip


def on_gpu(array, dtype="float32"):
    return torch.tensor(array, device="cuda").to(getattr(torch, dtype))


def relative(found, expected):
    found = found.float().cpu().numpy().astype(np.float64)
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_each_operator_against_the_cpu(case, dtype):
    function, arrays, options, vectors = CASES[case]
    there = {n: on_gpu(a, "float32" if n in vectors else dtype) for n, a in arrays.items()}
    rounded = {n: t.float().cpu().numpy() for n, t in there.items()}
    expected = function(**rounded, **options)
    found = function(**there, **options)
    assert isinstance(found, torch.Tensor) and found.device.type == "cuda"
    assert found.dtype == getattr(torch, dtype) and tuple(found.shape) == expected.shape
    assert relative(found, expected) < TOLERANCE[dtype]
    out = torch.full_like(found, 7)
    pointer = out.data_ptr()
    assert function(**there, **options, out=out) is out
    assert out.data_ptr() == pointer
    assert torch.equal(out, found)


def test_caches_and_states_change_in_place():
    caches = [(np.zeros((40, 2, 64), np.float32), np.zeros((40, 2, 64), np.float32))]
    there = [tuple(map(on_gpu, caches[0]))]
    state = ops.ssd_state(4, 64, 64, 4, 64, x_heads=2, B_groups=1)
    other = ops.ssd_state(4, 64, 64, 4, 64, x_heads=2, B_groups=1, like=there[0][0])
    scan = ops.scan_state(64, 16, 4, 64, B_groups=2)
    other_scan = ops.scan_state(64, 16, 4, 64, B_groups=2, like=there[0][0])
    assert isinstance(other["state"], torch.Tensor) and other["state"].dtype == torch.float32
    past = 0
    for count, boundary in ((20, 0), (3, 16), (1, 16), (9, 16)):
        q, k, v = random(count, 8, 64), random(count, 2, 64), random(count, 2, 64)
        ops.kv_append(k, v, caches, past=[past])
        ops.kv_append(on_gpu(k), on_gpu(v), there, past=[past])
        expected = ops.attention_forward(q, caches=caches, past=[past])
        assert (
            relative(ops.attention_forward(on_gpu(q), caches=there, past=[past]), expected)
            < TOLERANCE["float32"]
        )
        where = {"past": [past], "boundary": [boundary]}
        for name, states, others in (("ssd", state, other), ("scan", scan, other_scan)):
            function, arrays, _, vectors = CASES[name]
            cut = {n: a if n in vectors else a[:count] for n, a in arrays.items()}
            expected = function(**cut, **where, states=[states])
            found = function(**{n: on_gpu(a) for n, a in cut.items()}, **where, states=[others])
            assert relative(found, expected) < TOLERANCE["float32"]
        past += count
    assert relative(other["state"], state["state"]) < TOLERANCE["float32"]
    assert relative(other_scan["state"], scan["state"]) < TOLERANCE["float32"]


def test_slices_are_used_in_place():
    wide = torch.randn(20, 256, device="cuda")
    x, y = wide[:, 64:128], wide[:, 192:]
    expected = x + y
    ops.add(x, y, out=y)
    assert torch.equal(wide[:, 192:], expected)


# ---- streams -----------------------------------------------------------------------------------

SLEEP = 200_000_000  # cycles, about a tenth of a second


@pytest.mark.parametrize("how", ["current", "named", "default"])
def test_the_callers_stream_is_followed(how):
    """The operator reads what is written after a long wait, its result is read without one; and the
    host waits for neither."""
    weight, x, big = torch.randn(64, 64, device="cuda"), torch.zeros(8, 64, device="cuda"), 3.0
    expected = torch.full_like(x, big) @ weight.T
    for _ in range(3):
        ops.linear_forward(x, weight)  # kernels load once
    torch.cuda.synchronize()
    stream = torch.cuda.default_stream() if how == "default" else torch.cuda.Stream()
    named = {"stream": stream.cuda_stream} if how == "named" else {}
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        x.fill_(big)
        begin = time.perf_counter()
        y = ops.linear_forward(x, weight, **named)
        took = time.perf_counter() - begin
        x.zero_()  # after the operator has read it
        copied = y.clone()
    stream.synchronize()
    assert torch.allclose(copied, expected, rtol=1e-4, atol=1e-4)
    assert took < 0.05


def test_many_calls_from_two_streams():
    weight = torch.randn(512, 512, device="cuda") / 512**0.5
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            x = torch.ones(300, 512, device="cuda")
            for _ in range(40):
                x = ops.linear_forward(x, weight)
            found.append(x)
    torch.cuda.synchronize()
    assert torch.equal(*found) and torch.isfinite(found[0]).all()


def test_a_capture_is_refused():
    x = torch.randn(4, 64, device="cuda")
    ops.add(x, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    out = torch.empty_like(x)
    with pytest.raises(mil.UnsupportedError, match="captured"), torch.cuda.graph(graph):
        ops.add(x, x, out=out)
    torch.cuda.synchronize()
    assert torch.equal(ops.add(x, x), 2 * x)


def test_host_time_of_a_call():
    x, weight = torch.randn(1, 64, device="cuda"), torch.randn(64, 64, device="cuda")
    out = torch.empty(1, 64, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(500):
            ops.linear_forward(x, weight, out=out)
        took = (time.perf_counter() - begin) / 500
    print(f"a call takes the host {1e6 * took:.1f} us")
    assert took < 1e-3


# ---- errors, and arrays of ours ----------------------------------------------------------------


def test_one_line_errors():
    x, weight = torch.randn(4, 64, device="cuda"), torch.randn(8, 64, device="cuda")
    for call, error, words in (
        (lambda: ops.linear_forward(x, weight.cpu()), mil.DeviceError, "weight lies on the CPU"),
        (lambda: ops.linear_backward(x, weight, x), mil.DeviceError, r"computes on the CPU.*\.cpu"),
        (lambda: ops.linear_forward(x.half(), weight), mil.DtypeError, "must agree"),
        (lambda: ops.norm_forward(x.double()), mil.DtypeError, "float64; expected float32, bfl"),
        (lambda: ops.norm_forward(x.T), mil.ArgumentError, r"pass x\.contiguous\(\)"),
        (
            lambda: ops.linear_forward(x, torch.nn.Parameter(weight)),
            mil.ArgumentError, "weight cannot be read through DLPack.*detach",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert torch.equal(ops.add(x, x), 2 * x)


def test_integers_of_the_device_are_read():
    x = torch.randn(9, 64, device="cuda")
    index = torch.tensor([8, 0, 3], device="cuda")
    assert torch.equal(ops.gather_rows(x, index), x[index])


class Nobody:
    """A tensor of a library that says nothing of streams."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.__dlpack_device__ = tensor.__dlpack_device__

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)


def test_results_for_other_libraries():
    x = torch.randn(40, 64, device="cuda")
    torch.cuda._sleep(SLEEP // 10)
    y = x + 1
    found = ops.add(Nobody(y), Nobody(y))
    assert isinstance(found, _core.DeviceArray) and found.dtype == "float32"
    tensor = torch.from_dlpack(found)
    del found
    assert torch.equal(tensor, 2 * y)
    half = ops.add(Nobody(y.bfloat16()), Nobody(y.bfloat16()))
    assert torch.from_dlpack(half).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_models_parameters_are_lent(dtype):
    from core_models import KINDS, build

    model = build(KINDS["mamba2 hybrid"], dtype=dtype, device="cuda:0")
    tokens = np.arange(12, dtype=np.int32)
    before = model.forward(tokens)
    tensors = {name: torch.from_dlpack(a) for name, a in model.device_parameters().items()}
    table = tensors["model.embed_tokens.weight"]
    assert table.dtype == getattr(torch, dtype) and table.is_cuda
    tensors["model.norm.weight"].mul_(2)
    torch.cuda.synchronize()
    np.testing.assert_allclose(model.forward(tokens), 2 * before, rtol=2e-2, atol=1e-5)
    del model
    assert torch.isfinite(table.float()).all()

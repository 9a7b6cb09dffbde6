"""Operators on arrays of a device, without one: the CPU's operators behind another name.

`pretend_device.c` is a device whose memory is the host's, and `Tensor` a NumPy array that says it
lies on it. So everything around a kernel runs here: what DLPack asks and promises, places, dtypes,
streams, new results, references, and each message. The kernels have test_cuda_ops.py.
"""

import ctypes
import gc
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from core_models import KINDS, configuration, random_parameters

import mambainllama as mil
from mambainllama import _core, interop, ops
from mambainllama.devices import cuda_devices
from mambainllama.quantize import coded, quantize

HERE = Path(__file__).parent
rng = np.random.default_rng(0)


def random(*shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    library = tmp_path_factory.mktemp("pretend") / "pretend_device.so"
    include = sysconfig.get_path("include")
    build = [compiler, "-shared", "-fPIC", "-std=c11", "-O1", f"-I{HERE.parent / 'csrc'}"]
    done = subprocess.run(
        [*build, f"-I{include}", str(HERE / "pretend_device.c"), "-o", str(library)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"the pretended device does not compile: {done.stderr.splitlines()[0]}")
    spec = importlib.util.spec_from_file_location("pretend_device", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(device, monkeypatch):
    capsule = device.table(_core._cpu_table)
    monkeypatch.setattr(interop, "operator_table", lambda device, dtype: capsule)
    gc.collect()  # a caught error keeps its frame in a cycle, and the arrays in it on the device
    yield capsule
    _core.trim_memory()


class Tensor:
    """A NumPy array that says it lies on a GPU."""

    def __init__(self, array, number=0):
        self.array, self.number, self.streams = array, number, []

    shape = property(lambda self: self.array.shape)
    ndim = property(lambda self: self.array.ndim)

    def __dlpack_device__(self):
        return (2, self.number)

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        place = (ctypes.c_int32 * 2).from_address(pointer(capsule, b"dltensor") + 8)
        place[0], place[1] = 2, self.number
        return capsule


def moved(value):
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return Tensor(value)
    return value


def on_host(value):
    return value.array if isinstance(value, Tensor) else value.numpy()


CASES = {
    "linear": (ops.linear_forward, (random(5, 16), random(8, 16), random(8)), {}),
    "norm": (ops.norm_forward, (random(5, 16), random(16)), {"z": random(5, 16)}),
    "glu": (ops.glu_forward, (random(5, 16), random(5, 16)), {"activation": "gelu"}),
    "add": (ops.add, (random(5, 16), random(5, 16)), {}),
    "gather": (ops.gather_rows, (random(5, 16), [3, 1, 1]), {}),
    "embedding": (ops.embedding_forward, ([1, 0, 2], random(10, 6)), {"scale": 2.0}),
    "attention": (
        ops.attention_forward,
        (random(7, 4, 8), random(7, 2, 8), random(7, 2, 8)),
        {"offsets": [0, 3, 7], "log_sum_exp": True},
    ),
    "rope": (ops.rope, (random(7, 4, 8), ops.rope_table(np.ones(2, np.float32), 7)), {}),
    "conv1d": (ops.conv1d_forward, (random(9, 6), random(6, 4), random(6)), {}),
    "scan": (
        ops.scan_forward,
        (random(9, 6), random(9, 6), random(9, 1, 4), random(9, 1, 4)),
        {"A_log": random(6, 4), "D": random(6), "dt_bias": random(6), "z": random(9, 6)},
    ),
    "ssd": (
        ops.ssd_forward,
        (random(9, 2, 8), random(9, 4), random(9, 2, 6), random(9, 4, 6)),
        {"A_log": random(4), "D": random(4), "dt_bias": random(4)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_operator_takes_device_arrays(case, device, table):
    function, arguments, options = CASES[case]
    expected = function(*arguments, **options)
    before = device.counts()
    found = function(*map(moved, arguments), **{k: moved(v) for k, v in options.items()})
    orders, waits = np.subtract(device.counts(), before)
    assert (orders, waits) == (1, 1)  # behind the caller; and the host waits, since no one says how
    for one, two in zip(
        found if isinstance(found, tuple) else [found],
        expected if isinstance(expected, tuple) else [expected],
        strict=True,
    ):
        assert isinstance(one, _core.DeviceArray) and one.device == "cuda:0"
        np.testing.assert_array_equal(one.numpy(), two)


def test_several_products_and_a_table(table):
    x, weights = random(5, 16), [random(8, 16), random(4, 16)]
    found = ops.linear_group(Tensor(x), list(map(Tensor, weights)))
    for one, two in zip(found, ops.linear_group(x, weights), strict=True):
        np.testing.assert_array_equal(one.numpy(), two)
    frequencies, out = np.array([1.0, 0.1], np.float32), Tensor(np.zeros((7, 2, 2), np.float32))
    assert ops.rope_table(frequencies, 7, out=out) is out
    np.testing.assert_array_equal(out.array, ops.rope_table(frequencies, 7))


def test_slices_are_read_and_written_in_place(table):
    wide, out = random(5, 48), np.zeros((5, 40), np.float32)
    ops.add(Tensor(wide[:, 8:24]), Tensor(wide[:, 24:40]), out=Tensor(out[:, 4:20]))
    np.testing.assert_array_equal(out[:, 4:20], wide[:, 8:24] + wide[:, 24:40])
    assert not out[:, :4].any() and not out[:, 20:].any()


def test_caches_and_states_change_in_place(table):
    k, v, q = random(3, 2, 8), random(3, 2, 8), random(3, 4, 8)
    caches = [[(np.zeros((20, 2, 8), np.float32),) * 2] for _ in range(2)]
    caches = [[tuple(a.copy() for a in pair) for pair in one] for one in caches]
    ops.kv_append(k, v, caches[0], past=[4])
    there = [tuple(map(Tensor, pair)) for pair in caches[1]]
    ops.kv_append(Tensor(k), Tensor(v), there, past=[4])
    np.testing.assert_array_equal(caches[0], caches[1])
    np.testing.assert_array_equal(
        ops.attention_forward(q, caches=caches[0], past=[4]),
        ops.attention_forward(Tensor(q), caches=there, past=[4]).numpy(),
    )
    sizes = dict(x_heads=2, B_groups=2)
    state = ops.ssd_state(4, 8, 6, 4, 24, **sizes)
    other = ops.ssd_state(4, 8, 6, 4, 24, like=Tensor(k), **sizes)
    vectors = {"A_log": random(4), "D": random(4), "dt_bias": random(4)}
    past = 0
    for count, boundary in ((40, 0), (3, 32), (1, 32)):
        rows = random(count, 2, 8), random(count, 4), random(count, 2, 6), random(count, 4, 6)
        where = {"past": [past], "boundary": [boundary]}
        expected = ops.ssd_forward(*rows, **vectors, **where, states=[state])
        found = ops.ssd_forward(
            *map(Tensor, rows),
            **{n: Tensor(a) for n, a in vectors.items()},
            **where,
            states=[other],
        )
        np.testing.assert_array_equal(found.numpy(), expected)
        past += count
    for key in state:
        np.testing.assert_array_equal(other[key].numpy(), state[key])


def test_streams(device, table, monkeypatch):
    """A known stream is told to the producer, and put before and behind the work; nobody waits."""
    x, weight, out = Tensor(random(5, 16)), Tensor(random(8, 16)), Tensor(random(5, 8))
    before = device.counts()
    assert ops.linear_forward(x, weight, out=out, stream=9) is out
    assert tuple(np.subtract(device.counts(), before)) == (2, 0)
    assert x.streams == weight.streams == out.streams == [9]
    ops.linear_forward(x, weight, out=out)
    assert x.streams[-1] == 1 and device.counts()[1] == before[1] + 1
    monkeypatch.setattr(interop, "current_stream", lambda array: 5)
    ops.linear_forward(x, weight, out=out)
    assert x.streams[-1] == 5 and device.counts()[1] == before[1] + 1
    ops.linear_forward(x, weight)  # a result of ours is ready when it is there
    assert device.counts()[1] == before[1] + 2


def scan_arguments():
    rows = map(Tensor, (random(9, 6), random(9, 6), random(9, 1, 4), random(9, 1, 4)))
    vectors = {"A_log": Tensor(random(6, 4)), "D": Tensor(random(6)), "dt_bias": Tensor(random(6))}
    return list(rows), vectors


X, W = random(5, 16), random(8, 16)
WRONG = {
    "weight on the host": (
        lambda: ops.linear_forward(Tensor(X), W),
        mil.DeviceError, "weight lies on the CPU and the arguments before it on cuda:0",
    ),
    "weight on a device": (
        lambda: ops.linear_forward(X, Tensor(W)),
        mil.DeviceError, "weight lies on cuda:0 and the arguments before it on the CPU",
    ),
    "two devices": (
        lambda: ops.linear_forward(Tensor(X), Tensor(W, 1)),
        mil.DeviceError, "weight lies on cuda:1 and the arguments before it on cuda:0",
    ),
    "out elsewhere": (
        lambda: ops.linear_forward(Tensor(X), Tensor(W), out=np.zeros((5, 8), np.float32)),
        mil.DeviceError, "y lies on the CPU",
    ),
    "backward": (
        lambda: ops.linear_backward(Tensor(X), W, X),
        mil.DeviceError, r"x lies on a device .* computes on the CPU.*\.cpu\(\)",
    ),
    "loss": (
        lambda: ops.linear_loss(Tensor(X), W), mil.DeviceError, r"x lies on a device .*\.cpu\(\)",
    ),
    "dtypes": (
        lambda: ops.linear_forward(Tensor(X.astype(np.float16)), Tensor(W)),
        mil.DtypeError, "weight has dtype float32 and x float16",
    ),
    "float64": (
        lambda: ops.add(Tensor(X.astype(np.float64)), Tensor(X)),
        mil.DtypeError, "x has dtype float64; expected float32, bfloat16 or float16",
    ),
    "two activations": (
        lambda: ops.add(Tensor(X.astype(np.float16)), Tensor(X)),
        mil.DtypeError, "y has dtype float32; expected float16",
    ),
    "16-bit vector": (
        lambda: ops.norm_forward(Tensor(X), Tensor(random(16).astype(np.float16))),
        mil.DtypeError, "weight has dtype float16; expected float32",
    ),
    "transposed": (
        lambda: ops.norm_forward(Tensor(X.T)),
        mil.ArgumentError, r"x steps by 16 elements along axis 1; expected 1: pass x\.contiguous",
    ),
    "unaligned": (
        lambda: ops.linear_forward(Tensor(random(5, 40)[:, 1:17]), Tensor(W)),
        mil.ArgumentError, "x begins at an address that is no multiple of 16 bytes",
    ),
    "unaligned state": (
        lambda: ops.conv1d_forward(
            Tensor(X), Tensor(random(16, 4)), states=[{"conv": Tensor(random(35 * 16 + 1)[1:])}]
        ),
        mil.ArgumentError, r'states\[0\]\["conv"\] begins at an address that is no multiple of 16',
    ),
    "index": (lambda: ops.gather_rows(Tensor(X), [9]), mil.ArgumentError, r"index\[0\] = 9"),
    "stream": (
        lambda: ops.linear_forward(Tensor(X), Tensor(W), stream=0), mil.ArgumentError, "stream = 0",
    ),
    "past without states": (
        lambda: ops.conv1d_forward(Tensor(X), Tensor(random(16, 4)), past=[20]),
        mil.ArgumentError, r"past\[0\] = 20, but no states are given",
    ),
    "a state's CPU part": (
        lambda: ops.scan_forward(
            *scan_arguments()[0], **scan_arguments()[1],
            states=[{
                **ops.scan_state(6, 4, 4, 6, B_groups=1, like=Tensor(X)),
                "current": Tensor(random(4, 6)),
            }],
        ),
        mil.ArgumentError, '"current", which only the CPU keeps',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_one_line_errors(case, table):
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(bool(cuda_devices()), reason="there is a GPU here")
def test_without_operators_the_line_says_so():
    with pytest.raises(mil.DeviceError, match=r"linear_forward: x lies on cuda:0, but .*\.cpu\(\)"):
        ops.linear_forward(Tensor(X), W)


# ---- arrays of ours ----------------------------------------------------------------------------


def test_a_device_array_lends_itself(table):
    array = _core.device_array(table, (2, 3), "bfloat16", True)
    assert (array.shape, array.dtype, array.ndim) == ((2, 3), "bfloat16", 2)
    assert (array.size, array.nbytes, array.device) == (6, 12, "cuda:0")
    assert array.__dlpack_device__() == (2, 0) and "(2, 3) bfloat16" in repr(array)
    np.testing.assert_array_equal(array.numpy(), np.zeros((2, 3), np.uint16))
    assert '"dltensor"' in repr(array.__dlpack__())
    assert '"dltensor_versioned"' in repr(array.__dlpack__(max_version=(1, 0), stream=4))
    for refused in ({"copy": True}, {"dl_device": (1, 0)}, {"dl_device": (2, 1)}):
        with pytest.raises(BufferError):
            array.__dlpack__(**refused)
    with pytest.raises(TypeError):
        _core.DeviceArray()
    for shape, dtype in (((2, -1), "float32"), ((2, 2), "float64"), ((1,) * 5, "float32")):
        with pytest.raises(mil.ArgumentError, match="device_array"):
            _core.device_array(table, shape, dtype, False)


def test_references_are_given_back(table):
    x, weight = Tensor(random(5, 16)), Tensor(random(8, 16))
    array = _core.device_array(table, (4, 4), "float32", True)
    held = [sys.getrefcount(one) for one in (x, weight, x.array, array, table)]
    for _ in range(50):
        ops.linear_forward(x, weight)
        ops.add(array, array)
        array.__dlpack__()
        with pytest.raises(mil.Error):
            ops.linear_forward(x, X)
    assert [sys.getrefcount(one) for one in (x, weight, x.array, array, table)] == held


def test_a_models_parameters_are_its_own(table):
    """Lent, not copied: they keep the model, and what is written to them counts."""
    config = configuration(KINDS["mamba2 hybrid"])
    parameters = random_parameters(config)
    model = _core.Model(config, parameters, {}, table)
    lent = model.device_parameters()
    assert lent.keys() == parameters.keys()
    for name, array in lent.items():
        assert array.shape == parameters[name].shape and array.dtype == "float32"
        np.testing.assert_array_equal(array.numpy(), parameters[name])
    tokens = np.arange(20, dtype=np.int32)
    before = model.forward(tokens)
    np.testing.assert_array_equal(before, _core.Model(config, parameters).forward(tokens))
    norm = lent["model.norm.weight"]
    ops.add(
        _core.device_array(table, (1, norm.size), "float32", True), as_row(norm), out=as_row(norm)
    )
    ops.add(as_row(norm), as_row(norm), out=as_row(norm))
    np.testing.assert_allclose(model.forward(tokens), 2 * before, rtol=1e-5)
    held = sys.getrefcount(model)
    del lent, array
    assert sys.getrefcount(model) == held - len(parameters) + 1
    with pytest.raises(mil.DeviceError, match="on the CPU"):
        _core.Model(config, parameters).device_parameters()


# ---- codes of 8 bits on their way there ----------------------------------------------------------

SLICE = 64 << 20  # bytes of values at once (csrc/model/upload.c)


@pytest.fixture(scope="module")
def tall():
    """A model whose embedding, which is its output product as well, goes over in two slices."""
    config = configuration(KINDS["mamba2 hybrid"], vocab=20001, hidden=1024)
    parameters = random_parameters({**config, "vocab": 61})
    name, pool = "model.embed_tokens.weight", random(4099)
    parameters[name] = np.resize(pool, 20001 * 1024).reshape(20001, 1024)
    parameters[name][20000, 5] = 9
    return config, parameters


def test_matrices_become_codes_on_the_way(device, table, tall):
    config, parameters = tall
    codes = coded(_core.Model.parameter_specs(config), parameters, "int8")
    before = device.memory(-1)[0]
    model = _core.Model(config, parameters, {}, table, codes)
    assert device.memory(-1)[1] - before > SLICE  # of values
    lent, parts = model.device_parameters(), device.scales()
    assert [rows for rows, _ in parts if rows > 10_000] == [SLICE // 4096]
    scales = np.frombuffer(b"".join(one for _, one in parts), np.float32)
    expected = []
    for name, *_ in _core.Model.parameter_specs(config):
        if name in codes:
            found, scale = quantize(parameters[name], "int8")
            np.testing.assert_array_equal(lent[name].numpy(), found, err_msg=name)
            expected.append(scale)
        else:
            np.testing.assert_array_equal(lent[name].numpy(), parameters[name])
    np.testing.assert_array_equal(scales, np.concatenate(expected))
    assert device.memory(-1)[0] - before < parameters["model.embed_tokens.weight"].size + 10**6
    del lent, model
    assert device.memory(-1)[0] == before


def test_codes_that_cannot_be_made_leave_nothing_behind(device, table, tall):
    config, parameters = tall
    codes = coded(_core.Model.parameter_specs(config), parameters, "int8")
    name = "model.embed_tokens.weight"
    strange = {**parameters, name: parameters[name].copy()}
    strange[name][19000, 3] = np.inf  # in the last slice
    before = device.memory(-1)[0]
    with pytest.raises(mil.Error, match=f"{name} has NaN or infinite") as caught:
        _core.Model(config, strange, {}, table, codes)
    assert "\n" not in str(caught.value) and device.memory(-1)[0] == before
    for less in (1, 20001 * 1024, SLICE):  # no room for the rest, the codes, the values
        device.memory(before + SLICE + 20001 * 1024 - less)
        with pytest.raises(mil.OutOfMemoryError):
            _core.Model(config, parameters, {}, table, codes)
        assert device.memory(-1)[0] == before
    assert _core.Model(config, parameters, {}, table, codes).state()


def test_texts_wait_for_room(device, table):
    """As many run at once as the device has memory for; those that find none join later."""
    config = configuration(KINDS["mamba2 hybrid"])
    model = _core.Model(config, random_parameters(config), {}, table)
    requests = [{"prompt": [1 + i, 2, 3], "max_new_tokens": 20} for i in range(6)]

    def run():
        found = _core.generate(model, requests, max_batch=6, workspace=1 << 20)
        _core.trim_memory()
        return [one["tokens"].tolist() for one in found]

    before, _ = device.memory(-1)
    expected = run()
    after, most = device.memory(-1)
    assert after == before
    text = model.state_bytes(3 + 20 + 4 + 16)
    for texts in (4, 2):
        limit = most - (6 - texts) * text - text // 2
        device.memory(limit)
        assert run() == expected
        assert device.memory(-1)[1] <= limit
    device.memory(before + (1 << 20) + text // 2)
    with pytest.raises(mil.OutOfMemoryError, match="out of memory"):
        run()
    _core.trim_memory()
    assert device.memory(-1)[0] == before  # nothing is left behind, and the next call works
    assert run() == expected


class as_row:  # noqa: N801 (a function in all but name)
    """A device array [n] as [1, n], as a library would reshape it."""

    def __init__(self, array):
        self.array = array
        self.__dlpack_device__ = array.__dlpack_device__

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        at = pointer(capsule, b"dltensor")
        ctypes.c_int32.from_address(at + 16).value = 2
        shape = ctypes.c_void_p.from_address(at + 24).value
        strides = ctypes.c_void_p.from_address(at + 32).value
        for base, first in ((shape, 1), (strides, self.array.size)):
            pair = (ctypes.c_int64 * 2).from_address(base)
            pair[0], pair[1] = first, self.array.size if base == shape else 1
        return capsule

"""The Python boundary: what comes in is checked, what is refused says why, nothing leaks, threads
may overlap.

Values are judged in the operators' own tests; here a call either works or raises one of our errors
with a line that names operator and argument.
"""

import array
import gc
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

import mambainllama as mil
from mambainllama import _core, ops


@pytest.fixture
def x(rng):
    return rng.standard_normal((5, 8), dtype=np.float32)


@pytest.fixture
def weight(rng):
    return rng.standard_normal((3, 8), dtype=np.float32)


# ---- what is refused, and in which words --------------------------------------------------------

REFUSED = {
    "float64": (
        lambda x, w: (x.astype("f8"), w),
        mil.errors.DtypeError,
        "x has dtype float64; expected float32",
    ),
    "integers": (lambda x, w: (x.astype("i4"), w), mil.errors.DtypeError, "x has dtype int32"),
    "byte-swapped": (
        lambda x, w: (x.astype(">f4"), w),
        mil.errors.DtypeError,
        "x has dtype byte-swapped float32",
    ),
    "list": (
        lambda x, w: (x.tolist(), w),
        mil.errors.DtypeError,
        "x is a list; expected a NumPy array",
    ),
    "bytes": (lambda x, w: (x.tobytes(), w), mil.errors.DtypeError, "x is a bytes"),
    "None": (lambda x, w: (None, w), mil.errors.ArgumentError, "argument x is missing"),
    "one axis": (
        lambda x, w: (x[0], w),
        mil.errors.ShapeError,
        r"x has shape \(8,\); expected \(rows, in\)",
    ),
    "five axes": (
        lambda x, w: (x.reshape(1, 1, 1, 5, 8), w),
        mil.errors.ShapeError,
        "x has 5 dimensions",
    ),
    "no rows": (lambda x, w: (x[:0], w), mil.errors.ShapeError, r"x has shape \(0, 8\)"),
    "other width": (lambda x, w: (x[:, :7], w), mil.errors.ShapeError, r"expected \(out, in = 7\)"),
    "transposed": (
        lambda x, w: (np.asfortranarray(x), w),
        mil.errors.ArgumentError,
        "numpy.ascontiguousarray",
    ),
    "reversed": (
        lambda x, w: (x[::-1], w),
        mil.errors.ArgumentError,
        "steps by -8 elements along axis 0",
    ),
    "broadcast": (
        lambda x, w: (np.broadcast_to(x[0], (5, 8)), w),
        mil.errors.ArgumentError,
        "steps by 0 elements along axis 0",
    ),
    "strided weight": (
        lambda x, w: (x, np.repeat(w, 2, 0)[::2]),
        mil.errors.ArgumentError,
        "weight steps by 16",
    ),
    "bare uint16": (
        lambda x, w: (x, w.astype("u2")),
        mil.errors.DtypeError,
        'weight has dtype uint16.*dtype="bfloat16"',
    ),
    "misaligned": (lambda x, w: (misaligned(x), w), mil.errors.ArgumentError, "x is not aligned"),
    "odd strides": (
        lambda x, w: (odd_strides(x), w),
        mil.errors.ArgumentError,
        "no whole number of elements",
    ),
}


def misaligned(x):
    """The same values one byte off."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(np.float32).reshape(x.shape)
    view[...] = x
    return view


def odd_strides(x):
    """Rows that are 33 bytes apart."""
    return np.ndarray((2, 8), np.float32, np.zeros(100, np.uint8), strides=(33, 4))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, x, weight):
    change, error, words = REFUSED[case]
    with pytest.raises(error, match=f"^linear_forward: .*{words}") as caught:
        ops.linear_forward(*change(x, weight))
    assert "\n" not in str(caught.value)


def test_refused_outputs(x, weight):
    frozen = np.zeros((5, 3), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(
        mil.errors.ArgumentError, match=r"y is read-only and would be written: pass y.copy\(\)"
    ):
        ops.linear_forward(x, weight, out=frozen)
    with pytest.raises(
        mil.errors.ShapeError, match=r"y has shape \(5, 4\); expected \(rows = 5, out = 3\)"
    ):
        ops.linear_forward(x, weight, out=np.zeros((5, 4), np.float32))
    with pytest.raises(mil.errors.DtypeError, match="y has dtype float64"):
        ops.linear_forward(x, weight, out=np.zeros((5, 3)))
    with pytest.raises(mil.errors.ArgumentError, match="accumulate adds to out"):
        ops.linear_forward(x, weight, accumulate=True)
    with pytest.raises(mil.errors.DtypeError, match="expected a dict of gradients"):
        ops.linear_backward(x, weight, x[:, :3], out=frozen)


def test_refused_values(x, weight):
    with pytest.raises(
        mil.errors.ArgumentError,
        match=r"tokens\[1\] = 3; expected at least 0 and less than vocab = 3",
    ):
        ops.embedding_forward([0, 3], weight)
    with pytest.raises(mil.errors.ArgumentError, match="outside int32"):
        ops.embedding_forward([0, 2**40], weight)
    with pytest.raises(mil.errors.DtypeError, match="tokens has dtype float64"):
        ops.embedding_forward([0.5], weight)
    with pytest.raises(mil.errors.ArgumentError, match=r"index\[0\] = -1; x has 5 rows"):
        ops.gather_rows(x, [-1])
    with pytest.raises(
        mil.errors.ArgumentError, match='activation is \'tanh\'; expected one of "silu", "gelu"'
    ):
        ops.glu_forward(x, activation="tanh")
    with pytest.raises(mil.errors.ArgumentError, match="eps is 'much'; expected a number"):
        ops.norm_forward(x, eps="much")
    with pytest.raises(mil.errors.ShapeError, match="group = 3 does not divide width = 8"):
        ops.norm_forward(x, group=3)
    with pytest.raises(mil.errors.ArgumentError, match="unknown argument colour"):
        _core.add(x=x, y=x, colour=1)
    with pytest.raises(mil.errors.ArgumentError, match="keyword arguments only"):
        _core.add(x, x)


def test_groups_message():
    f = np.zeros
    with pytest.raises(mil.errors.ShapeError) as caught:
        ops.ssd_forward(
            f((2, 32, 4), "f4"),
            f((2, 32), "f4"),
            f((2, 6, 4), "f4"),
            f((2, 6, 4), "f4"),
            A_log=f(32, "f4"),
            D=f(32, "f4"),
            dt_bias=f(32, "f4"),
        )
    assert str(caught.value) == "ssd_forward: B has 6 groups; heads = 32 is not a multiple of 6"


OFFSETS = {
    "descending": ([0, 4, 3, 5], r"offsets\[1\] = 4 is more than offsets\[2\] = 3"),
    "not from 0": ([1, 5], "offsets run from 1 to 5; expected 0 to rows = 5"),
    "short": ([0, 4], "offsets run from 0 to 4; expected 0 to rows = 5"),
    "one entry": ([5], "offsets has one entry"),
    "negative": ([0, -3, 5], r"offsets\[0\] = 0 is more than offsets\[1\] = -3"),
}


@pytest.mark.parametrize("case", OFFSETS)
def test_refused_offsets(case, x, rng):
    offsets, words = OFFSETS[case]
    taps = rng.standard_normal((8, 4), dtype=np.float32)
    with pytest.raises(mil.Error, match=words):
        ops.conv1d_forward(x, taps, offsets=offsets)


def test_refused_states(x, rng):
    taps = rng.standard_normal((8, 4), dtype=np.float32)
    state = {"conv": np.zeros((3 + ops.TAIL, 8), np.float32)}
    ops.conv1d_forward(x, taps, states=[state])
    for states, options, words in [
        ([], {}, "states has 0 entries; sequences = 1"),
        (3, {}, "states is a int; expected a list"),
        ([None], {}, r"states\[0\] is a NoneType; expected a dict"),
        ([{}], {}, r'states\[0\] has no entry "conv"'),
        (
            [{"conv": np.zeros((3, 8), "f4")}],
            {},
            r'states\[0\]\["conv"\] has shape \(3, 8\); expected 280 elements',
        ),
        ([state], {"past": [-1]}, r"past\[0\] = -1"),
        ([state], {"past": [40], "boundary": [0]}, "a multiple of 16 at most 31 below past = 40"),
        ([state], {"past": [40], "boundary": [33]}, "a multiple of 16"),
        ([state], {"past": [1, 2]}, r"past has shape \(2,\); expected \(sequences = 1\)"),
    ]:
        with pytest.raises(mil.Error, match=words):
            ops.conv1d_forward(x, taps, states=states, **options)


def test_refused_caches(rng):
    q = rng.standard_normal((2, 4, 6), dtype=np.float32)
    cache = (np.zeros((8, 2, 6), np.float32), np.zeros((8, 2, 6), np.float32))
    ops.attention_forward(q, caches=[cache], past=[6])
    for caches, options, words in [
        ([cache], {"past": [7]}, r"caches\[0\] holds 8 tokens; past \+ rows = 9"),
        ([cache[:1]], {}, "expected a pair"),
        ([(cache[0], cache[1].astype("f2"))], {}, "k is float32 and v is float16"),
        ([(cache[0], cache[1][:7])], {}, "expected"),
        ([(cache[0].astype("u2"), cache[1].astype("u2"))], {}, 'cache_dtype="bfloat16"'),
        ([cache], {"k": q}, "give either caches or k and v"),
        (None, {"k": q, "v": q, "past": [3]}, "without caches there are no earlier keys"),
    ]:
        with pytest.raises(mil.Error, match=words):
            ops.attention_forward(q, caches=caches, **options)


# ---- what is taken ------------------------------------------------------------------------------


def test_rows_farther_apart_than_wide(x, weight):
    wide = np.full((5, 20), np.nan, np.float32)
    wide[:, 6:14] = x
    out = np.full((5, 10), 7, np.float32)
    result = ops.linear_forward(wide[:, 6:14], weight, out=out[:, 4:7])
    assert np.array_equal(result, ops.linear_forward(x, weight))
    assert np.shares_memory(result, out)
    assert (out[:, :4] == 7).all() and (out[:, 7:] == 7).all()  # guards


def test_read_only_inputs(x, weight):
    expected = ops.linear_forward(x, weight)
    x.flags.writeable = weight.flags.writeable = False
    assert np.array_equal(ops.linear_forward(x, weight), expected)


def test_buffers(x, weight):
    expected = ops.linear_forward(x, weight)
    assert np.array_equal(ops.linear_forward(memoryview(x), weight), expected)
    bias = array.array("f", [1.0, 2.0, 3.0])
    assert np.allclose(ops.linear_forward(x, weight, bias), expected + np.array([1, 2, 3], "f4"))


def test_one_way_for_bfloat16(x, weight, bf16):
    bits = bf16.bits(weight)
    expected = ops.linear_forward(x, bits, dtype="bfloat16")
    rounded = bf16.round(x) @ bf16.round(weight).T
    np.testing.assert_allclose(expected, rounded, atol=1e-5)
    with pytest.raises(
        mil.errors.DtypeError, match="weight has dtype float32, but dtype says bfloat16"
    ):
        ops.linear_forward(x, weight, dtype="bfloat16")
    with pytest.raises(mil.errors.ArgumentError, match="dtype is 'int8'"):
        ops.linear_forward(x, bits, dtype="int8")


def test_bfloat16_of_ml_dtypes(x, weight, bf16):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = bf16.bits(weight)
    expected = ops.linear_forward(x, bits, dtype="bfloat16")
    assert np.array_equal(ops.linear_forward(x, bits.view(ml_dtypes.bfloat16)), expected)


def test_torch_tensors(x, weight, bf16):
    torch = pytest.importorskip("torch")
    expected = ops.linear_forward(x, weight)
    assert np.array_equal(ops.linear_forward(torch.tensor(x), torch.tensor(weight)), expected)
    half = torch.tensor(weight).bfloat16()
    assert np.array_equal(
        ops.linear_forward(torch.tensor(x), half),
        ops.linear_forward(x, bf16.bits(weight), dtype="bfloat16"),
    )
    wide = torch.zeros(5, 20)
    wide[:, 6:14] = torch.tensor(x)
    assert np.array_equal(ops.linear_forward(wide[:, 6:14], weight), expected)

    out = torch.zeros(5, 3)
    assert ops.linear_forward(x, weight, out=out) is out  # written in place
    assert np.array_equal(out.numpy(), expected)

    with pytest.raises(
        mil.errors.ArgumentError, match="weight cannot be read through DLPack.*detach"
    ):
        ops.linear_forward(x, torch.nn.Parameter(torch.tensor(weight)))
    with pytest.raises(mil.Error, match="x"):
        ops.linear_forward(torch.tensor(x).to("meta"), weight)
    with pytest.raises(mil.errors.DtypeError, match="x has dtype float64"):
        ops.linear_forward(torch.tensor(x).double(), weight)
    with pytest.raises(mil.errors.ArgumentError, match="x steps by"):
        ops.linear_forward(torch.tensor(np.ascontiguousarray(x.T)).T, weight)
    with pytest.raises(mil.errors.ShapeError, match="x has 5 dimensions"):
        ops.linear_forward(torch.zeros(1, 1, 1, 5, 8), weight)


class OnDevice:
    """Looks like a tensor on a GPU."""

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **options):
        raise AssertionError("not to be asked for")


class Broken:
    """Answers DLPack's questions with nonsense."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **options):
        if isinstance(self.capsule, BaseException):
            raise self.capsule
        return self.capsule


def test_broken_producers(x, weight):
    with pytest.raises(mil.errors.DeviceError, match=r"x lies on a device.*\.cpu\(\)"):
        ops.linear_backward(OnDevice(), weight, x)
    with pytest.raises(mil.errors.ArgumentError, match="unknown version"):
        ops.linear_forward(Broken("no capsule"), weight)
    with pytest.raises(
        mil.errors.ArgumentError, match="x cannot be read through DLPack: no memory"
    ):
        ops.linear_forward(Broken(MemoryError("no memory")), weight)
    with pytest.raises(KeyboardInterrupt):
        ops.linear_forward(Broken(KeyboardInterrupt()), weight)

    used = x.__dlpack__()
    assert np.array_equal(ops.linear_forward(Broken(used), weight), ops.linear_forward(x, weight))
    with pytest.raises(mil.errors.ArgumentError, match="unknown version"):
        ops.linear_forward(Broken(used), weight)  # a capsule is good once


def test_dlpack_tensor_is_handed_back(weight):
    class Owner(np.ndarray):
        pass

    owner = np.ones((5, 8), np.float32).view(Owner)
    gone = weakref.ref(owner)
    capsule = owner.__dlpack__()
    del owner
    assert gone() is not None
    ops.linear_forward(Broken(capsule), weight)
    gc.collect()
    assert gone() is None


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ArgumentError", ValueError),
        ("ShapeError", ValueError),
        ("DtypeError", TypeError),
        ("FormatError", ValueError),
        ("OutOfMemoryError", MemoryError),
        ("FileError", OSError),
        ("DeviceError", RuntimeError),
        ("UnsupportedError", NotImplementedError),
        ("StateError", RuntimeError),
        ("NonFiniteError", ArithmeticError),
        ("StoppedError", RuntimeError),
    ],
)
def test_errors_are_ours_and_builtin(name, builtin):
    error = getattr(mil.errors, name)
    assert issubclass(error, mil.Error) and issubclass(error, builtin)
    assert error.__module__ == "mambainllama" and error.__doc__
    assert mil.Error is _core.Error


# ---- memory -------------------------------------------------------------------------------------


def blocks():
    _core.trim_memory()
    return _core.memory()["blocks"]


def test_nothing_is_left(x, weight):
    before = blocks()
    for _ in range(3):
        ops.linear_backward(x, weight, ops.linear_forward(x, weight))
        with pytest.raises(mil.Error):
            ops.linear_forward(x, weight[:, :5])
    assert blocks() == before


def test_references_are_given_back(x, weight):
    out = np.zeros((5, 3), np.float32)
    watched = [x, weight, out]
    before = [sys.getrefcount(item) for item in watched]
    for _ in range(10):
        ops.linear_forward(x, weight, out=out)
        with pytest.raises(mil.Error):
            ops.linear_forward(x, weight, out=x)
    assert [sys.getrefcount(item) for item in watched] == before


def test_out_of_memory_is_an_error(x, weight):
    """Whichever allocation fails, the call raises OutOfMemoryError and leaves nothing behind."""
    half = np.zeros((3, 8), np.float16)
    before = blocks()
    for allocations in range(50):
        _core.trim_memory()
        _core.fail_after(allocations)
        try:
            ops.linear_forward(x, half)
            break
        except MemoryError as error:
            assert isinstance(error, mil.Error)
        finally:
            _core.fail_after(-1)
        assert blocks() == before
    else:
        pytest.fail("the call never got through")
    assert allocations > 0
    assert blocks() == before


# ---- threads ------------------------------------------------------------------------------------


def test_thread_count(with_threads):
    with_threads(3)
    assert ops.get_threads() == 3
    for wrong in (0, -1, 10**6, 2**70, "two", 1.5):
        with pytest.raises(mil.errors.ArgumentError, match="set_threads: threads = "):
            ops.set_threads(wrong)
    assert ops.get_threads() == 3
    ops.set_threads(None)
    assert ops.get_threads() >= 1


@pytest.mark.parametrize("text", ["3", "3,2"])
def test_thread_count_from_environment(text):
    script = "from mambainllama import ops; print(ops.get_threads())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": text},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "3"


def test_calls_from_many_threads(rng):
    """Calls that overlap give the same bits as calls one after another."""
    inputs = [rng.standard_normal((40, 64), dtype=np.float32) for _ in range(8)]
    weight = rng.standard_normal((96, 64), dtype=np.float32)
    taps = rng.standard_normal((64, 4), dtype=np.float32)

    def work(x):
        return ops.linear_forward(ops.conv1d_forward(ops.norm_forward(x), taps), weight)

    expected = [work(x) for x in inputs]
    failures = []

    def loop(index):
        try:
            for _ in range(20):
                assert np.array_equal(work(inputs[index]), expected[index])
        except BaseException as error:  # noqa: B036 - a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


AFTER_FORK = """
import os, signal, threading
import numpy as np
from mambainllama import ops
x, weight = np.ones((64, 256), np.float32), np.ones((512, 256), np.float16)
def work():
    return ops.linear_forward(x, weight).sum()
ops.set_threads(2)
expected = work()
child = os.fork()
if child == 0:
    signal.alarm(30)
    found = [work()]
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    os._exit(0 if found == [expected, expected] else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert work() == expected
"""


def test_a_forked_child_computes():
    """Its parent's OpenMP workers are not there; as under multiprocessing's "fork"."""
    subprocess.run([sys.executable, "-c", AFTER_FORK], check=True, timeout=60)


def test_settings_from_the_environment():
    def run(**settings):
        environment = {**os.environ, **settings}
        script = "import mambainllama as m; print(m._core.cpu_info())"
        return subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )

    assert "'level': 'portable'" in run(MAMBAINLLAMA_CPU="portable").stdout
    assert "'blas_loaded': False" in run(MAMBAINLLAMA_BLAS="none").stdout
    for setting in ({"MAMBAINLLAMA_CPU": "sse9"}, {"MAMBAINLLAMA_BLAS": "/no/such/library.so"}):
        done = run(**setting)
        assert done.returncode != 0 and list(setting.values())[0] in done.stderr

"""Matrix products: C against the reference, and the same bits for a row however it is computed.

Tolerances: a sum of k float32 products in lanes, of numbers of size 1, is off by about
sqrt(k) * 1e-7 relative to its size; 16-bit inputs are rounded beforehand in the reference, too, so
they add nothing. Bits are compared with ==.

The tests of TestKernels also run in a process of their own for every other level of the processor
(MAMBAINLLAMA_CPU), so run this file on a machine with AVX-512 and AMX to test those, and for the
order in which it does not read weights by itself (MAMBAINLLAMA_CPU_READS).
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from reference import linear as reference
from reference.differences import check

from mambainllama import _core, ops
from mambainllama.errors import ArgumentError, DtypeError, ShapeError

DTYPES = ["float32", "bfloat16", "float16"]
LEVELS = ["portable", "avx2", "avx512", "avx512bf16", "amx"]
READS = ["side-by-side", "in-order"]

# rows, in, out: vector steps hit, missed by one and primes; thin and wide; several chunks of rows.
SIZES = [
    (1, 1, 1),
    (1, 64, 48),
    (2, 3, 5),
    (3, 17, 31),
    (4, 127, 24),
    (5, 31, 33),
    (6, 33, 7),
    (7, 65, 127),
    (8, 128, 128),
    (13, 1031, 29),
    (16, 63, 49),
    (17, 257, 3),
    (40, 96, 131),
    (257, 101, 67),
    (530, 400, 41),
]
# Longer than one cut of k, at few rows and many.
LONG = [(1, 6001, 40), (5, 9001, 83), (6, 4099, 50), (16, 2049, 17), (33, 3333, 26)]


def tolerance(terms):
    return 1e-6 * np.sqrt(terms) + 1e-6


class Case:
    """Random x, weight and bias, and what the kernels see of them: `rounded` x, `exact` weight."""

    def __init__(self, dtype, rows, width, out, bf16, seed=3):
        rng = np.random.default_rng(seed)
        self.dtype, self.sizes = dtype, (rows, width, out)
        self.x = rng.normal(size=(rows, width)).astype(np.float32)
        self.bias = rng.normal(size=out).astype(np.float32)
        self.weight = rng.normal(size=(out, width)).astype(np.float32)
        self.rounded, self.exact = self.x, self.weight
        if dtype == "bfloat16":
            self.rounded, self.exact = bf16.round(self.x), bf16.round(self.weight)
            self.weight = bf16.bits(self.weight)
        elif dtype == "float16":
            self.weight = self.weight.astype(np.float16)
            self.rounded, self.exact = self.x.astype(np.float16), self.weight
        self.rounded, self.exact = self.rounded.astype(np.float64), self.exact.astype(np.float64)

    def forward(self, x=None, **options):
        x = self.x if x is None else x
        return ops.linear_forward(x, self.weight, dtype=bits_of(self.dtype), **options)

    def expected(self, bias=True, y=None):
        return reference.forward(self.rounded, self.exact, self.bias if bias else None, y)


def bits_of(dtype):
    """What the binding must be told about uint16 weights."""
    return "bfloat16" if dtype == "bfloat16" else None


def test_reference_backward_is_the_gradient(rng):
    x, weight, grad_y = rng.normal(size=(3, 4)), rng.normal(size=(5, 4)), rng.normal(size=(3, 5))
    bias = rng.normal(size=5)
    check(
        lambda: (reference.forward(x, weight, bias) * grad_y).sum(),
        {"grad_x": x, "grad_weight": weight, "grad_bias": bias},
        reference.backward(x, weight, grad_y),
    )


@pytest.mark.parametrize("dtype", DTYPES)
class TestKernels:
    @pytest.mark.parametrize("sizes", SIZES + LONG, ids=str)
    def test_forward(self, dtype, sizes, bf16):
        case = Case(dtype, *sizes, bf16)
        y = case.forward(bias=case.bias)
        np.testing.assert_allclose(y, case.expected(), rtol=0, atol=4 * tolerance(sizes[1]))

    @pytest.mark.parametrize("sizes", [(1, 31, 9), (5, 64, 33), (40, 47, 50)], ids=str)
    def test_accumulates_into_part_of_a_wider_array(self, dtype, sizes, bf16):
        rows, width, out = sizes
        case = Case(dtype, *sizes, bf16)
        wide_x = np.full((rows, width + 7), np.nan, np.float32)
        wide_x[:, 3 : 3 + width] = case.x
        wide_y = np.random.default_rng(4).normal(size=(rows, out + 5)).astype(np.float32)
        before = wide_y.copy()
        case.forward(
            wide_x[:, 3 : 3 + width], bias=case.bias, out=wide_y[:, 2 : 2 + out], accumulate=True
        )
        expected = case.expected(y=before[:, 2 : 2 + out])
        np.testing.assert_allclose(
            wide_y[:, 2 : 2 + out], expected, rtol=0, atol=4 * tolerance(width)
        )
        before[:, 2 : 2 + out] = wide_y[:, 2 : 2 + out]
        assert (wide_y == before).all(), "wrote outside of its columns"

    @pytest.mark.parametrize("sizes", [(64, 16), (101, 37), (2300, 70)], ids=str)
    def test_a_row_has_the_same_bits_in_any_company(self, dtype, sizes, bf16, with_threads):
        case = Case(dtype, 300, *sizes, bf16)
        with_threads(1)
        alone = np.concatenate([case.forward(case.x[r : r + 1], bias=case.bias) for r in range(41)])
        for count in (1, 2, 5):
            with_threads(count)
            for rows in [*range(2, 41), 300]:
                y = case.forward(case.x[:rows], bias=case.bias)
                assert (y[:41] == alone[:rows]).all(), f"{rows} rows, {count} threads"
            late = case.forward(case.x[7:21], bias=case.bias)
            assert (late == alone[7:21]).all(), "rows 7 to 20 by themselves"

    @pytest.mark.parametrize("rows", [1, 3, 20])
    def test_a_product_has_the_same_bits_in_a_group(self, dtype, rows, bf16, threads):
        case = Case(dtype, rows, 130, 300, bf16)
        weights = [case.weight[:5], case.weight[5:150], case.weight[150:]]
        y = ops.linear_group(case.x, weights, dtype=bits_of(dtype))
        assert (np.concatenate(y, axis=1) == case.forward()).all()

    def test_weights_at_any_address(self, dtype, bf16):
        """A mapped file places weights at multiples of their own size at best."""
        case = Case(dtype, 3, 45, 19, bf16)
        size = case.weight.itemsize
        room = np.zeros(case.weight.nbytes + 64, np.uint8)
        expected = case.forward()
        for shift in range(size, 64, 5 * size):
            moved = room[shift : shift + case.weight.nbytes].view(case.weight.dtype)
            moved = moved.reshape(case.weight.shape)
            moved[:] = case.weight
            y = ops.linear_forward(case.x, moved, dtype=bits_of(dtype))
            assert (y == expected).all()

    def test_extremes(self, dtype, bf16):
        """Infinities and NaN go where they belong and no further; subnormal float16 counts."""
        case = Case(dtype, 3, 40, 20, bf16)
        x = case.x.copy()
        x[1, 5], x[2, 7] = np.inf, np.nan
        y = case.forward(x)
        assert (y[0] == case.forward()[0]).all()
        assert np.isinf(y[1]).all() and np.isnan(y[2]).all()
        if dtype == "float16":
            tiny = np.full((1, 32), 2.0**-24, np.float16)
            y = ops.linear_forward(np.ones((1, 32), np.float32), tiny)
            assert y == 32 * 2.0**-24


def run_python(*arguments, **settings):
    """A process with environment variables of its own that finds the package and the reference."""
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, **settings}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(here), *sys.path[:1]])
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level(level, reads):
    """The kernels of each level that this processor has beside the one that it picks."""
    here = _core.cpu_info()
    if (level, reads) == (here["level"], here["reads"]):
        pytest.skip(f"{level}, {reads}, is what is in use: the tests above ran it")
    settings = {"MAMBAINLLAMA_CPU": level, "MAMBAINLLAMA_CPU_READS": reads}
    ask = "from mambainllama import _core; print(_core.cpu_info()['level'])"
    found = run_python("-c", ask, **settings).stdout.strip()
    if found != level:
        pytest.skip(f"this processor (or MAMBAINLLAMA_CPU) has no {level}: {found} instead")
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{__file__}::TestKernels"]
    done = run_python(*command, **settings)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_order_of_reading_changes_no_bit():
    """Nothing but the time depends on it: sums of one order are those of the other."""
    script = (
        "import numpy as np\n"
        "from mambainllama import ops\n"
        "rng = np.random.default_rng(5)\n"
        "for rows in (1, 2, 3, 4, 5, 6, 8, 16, 40):\n"
        "    x = rng.normal(size=(rows, 5003)).astype(np.float32)\n"
        "    w = (rng.normal(size=(90, 5003)) * 2**-6).astype(np.float16)\n"
        "    for weight in (w, w.astype(np.float32), w.astype(np.float32).view(np.uint32) >> 16):\n"
        "        dtype = 'bfloat16' if weight.dtype == np.uint32 else None\n"
        "        weight = weight.astype(np.uint16) if dtype else weight\n"
        "        print(ops.linear_forward(x, weight, dtype=dtype).tobytes().hex())\n"
    )
    found = [run_python("-c", script, MAMBAINLLAMA_CPU_READS=reads) for reads in READS]
    assert found[0].returncode == 0, found[0].stderr
    assert found[0].stdout == found[1].stdout


@pytest.mark.parametrize(
    "variable, known", [("MAMBAINLLAMA_CPU", "avx512bf16"), ("MAMBAINLLAMA_CPU_READS", "in-order")]
)
def test_unknown_settings_are_refused(variable, known):
    done = run_python("-c", "import mambainllama", **{variable: "avx1024"})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert variable in last and "avx1024" in last and known in last


# ---- training: BLAS, and what stands in for it ---------------------------------------------------


def run_training_products(bf16):
    """`fast` products and gradients against the reference."""
    for dtype in DTYPES:
        for sizes in [(1, 1, 1), (5, 31, 33), (40, 130, 77), (300, 64, 200)]:
            rows, width, out = sizes
            case = Case(dtype, *sizes, bf16)
            exact_x = case.x.astype(np.float64)
            y = case.forward(bias=case.bias, fast=True)
            expected = reference.forward(exact_x, case.exact, case.bias)
            np.testing.assert_allclose(y, expected, rtol=0, atol=4 * tolerance(width))
            assert (y == case.forward(bias=case.bias, fast=True)).all(), "does not repeat"

            rng = np.random.default_rng(9)
            grad_y = rng.normal(size=(rows, out)).astype(np.float32)
            start = {
                "grad_x": rng.normal(size=(rows, width)).astype(np.float32),
                "grad_weight": rng.normal(size=(out, width)).astype(np.float32),
                "grad_bias": rng.normal(size=out).astype(np.float32),
            }
            expected = reference.backward(exact_x, case.exact, grad_y.astype(np.float64))
            terms = {"grad_x": out, "grad_weight": rows, "grad_bias": rows}
            for accumulate in (False, True):
                grads = ops.linear_backward(
                    case.x,
                    case.weight,
                    grad_y,
                    bias=True,
                    dtype=bits_of(dtype),
                    accumulate=accumulate,
                    out={name: array.copy() for name, array in start.items()},
                )
                for name, gradient in grads.items():
                    added = accumulate or name != "grad_x"
                    wanted = expected[name] + (start[name] if added else 0)
                    error = np.abs(gradient - wanted).max()
                    assert error < 8 * tolerance(terms[name]), f"{name} {dtype} {sizes}: {error}"


def test_training_products(bf16, threads):
    run_training_products(bf16)


def test_training_products_of_several_blocks(bf16):
    """More weights than are expanded at a time (2 Mi)."""
    case = Case("bfloat16", 3, 2500, 1700, bf16)
    y = case.forward(fast=True)
    expected = reference.forward(case.x.astype(np.float64), case.exact)
    np.testing.assert_allclose(y, expected, rtol=0, atol=4 * tolerance(2500))
    grad_y = np.random.default_rng(9).normal(size=(3, 1700)).astype(np.float32)
    grads = ops.linear_backward(
        case.x, case.weight, grad_y, dtype="bfloat16", out={"grad_weight": None}
    )
    expected = reference.backward(case.rounded, case.exact, grad_y.astype(np.float64))
    np.testing.assert_allclose(grads["grad_x"], expected["grad_x"], atol=8 * tolerance(1700))


def test_training_products_without_a_blas():
    """Our float32 kernels take over: the same checks in a process that loads no BLAS."""
    here = os.path.dirname(os.path.abspath(__file__))
    program = (
        "from mambainllama import _core; import conftest, test_linear\n"
        "assert not _core.cpu_info()['blas_loaded']\n"
        "test_linear.run_training_products(conftest.Bfloat16)\n"
        "test_linear.test_training_products_of_several_blocks(conftest.Bfloat16)\n"
    )
    environment = {**os.environ, "MAMBAINLLAMA_BLAS": "none"}
    environment["PYTHONPATH"] = os.pathsep.join([here, os.path.dirname(here)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- errors --------------------------------------------------------------------------------------


def test_error_messages():
    x, weight = np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)
    with pytest.raises(ShapeError, match=r"linear_forward: weight has shape \(3, 5\).*in = 4"):
        ops.linear_forward(x, np.ones((3, 5), np.float32))
    with pytest.raises(ShapeError, match=r"linear_forward: bias has shape \(2,\).*out = 3"):
        ops.linear_forward(x, weight, np.ones(2, np.float32))
    with pytest.raises(DtypeError, match="weight has dtype float64; expected float32, bfloat16"):
        ops.linear_forward(x, weight.astype(np.float64))
    with pytest.raises(DtypeError, match='uint16.*dtype="bfloat16"'):
        ops.linear_forward(x, np.ones((3, 4), np.uint16))
    with pytest.raises(ArgumentError, match="accumulate adds to out, which is missing"):
        ops.linear_forward(x, weight, accumulate=True)
    with pytest.raises(ShapeError, match=r"linear_backward: grad_y has shape \(2, 2\).*out = 3"):
        ops.linear_backward(x, weight, np.ones((2, 2), np.float32))


def test_blas_library_errors(tmp_path):
    with pytest.raises(OSError, match="BLAS: cannot load .*nothing.so"):
        _core.load_blas(os.fspath(tmp_path / "nothing.so"))

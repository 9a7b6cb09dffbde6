"""No argument crashes the process: every operator with damaged arguments works or raises our error.

From a valid call, one or two arguments at a time are replaced by something else: other shapes,
dtypes and strides, junk objects, extreme numbers.  A crash would end the whole test run, so there
is nothing to assert but the kind of the exception.  Run with AddressSanitizer preloaded, this also
finds reads beyond an array.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mambainllama as mil
from mambainllama import ops

ROWS, HEADS, DIM, STATE, GROUPS, INNER = 5, 4, 6, 8, 2, 12


def f(*shape):
    """Small floats, the same each time."""
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def scan_inputs():
    return {
        "x": f(ROWS, INNER),
        "dt": f(ROWS, INNER),
        "B": f(ROWS, GROUPS, STATE),
        "C": f(ROWS, 1, STATE),
        "A_log": f(INNER, STATE),
        "D": f(INNER),
        "dt_bias": f(INNER),
        "z": f(ROWS, INNER),
        "offsets": [0, 2, ROWS],
    }


def ssd_inputs():
    return {
        "x": f(ROWS, GROUPS, DIM),
        "dt": f(ROWS, HEADS),
        "B": f(ROWS, GROUPS, STATE),
        "C": f(ROWS, 1, STATE),
        "A_log": f(HEADS),
        "D": f(HEADS),
        "dt_bias": f(HEADS),
        "offsets": [0, 2, ROWS],
    }


def scan_states():
    return [ops.scan_state(INNER, STATE, 4, INNER, B_groups=GROUPS, current=True) for _ in range(2)]


def ssd_states():
    make = ops.ssd_state
    return [make(HEADS, DIM, STATE, 4, 9, x_heads=GROUPS, B_groups=GROUPS) for _ in range(2)]


def cache():
    return (f(8, GROUPS, DIM), f(8, GROUPS, DIM))


CALLS = {
    "linear_forward": lambda: {"x": f(ROWS, 8), "weight": f(3, 8), "bias": f(3), "out": f(ROWS, 3)},
    "linear_group": lambda: {"x": f(ROWS, 8), "weights": [f(3, 8), f(2, 8)]},
    "linear_backward": lambda: {
        "x": f(ROWS, 8),
        "weight": f(3, 8),
        "grad_y": f(ROWS, 3),
        "bias": True,
        "out": {"grad_x": f(ROWS, 8), "grad_weight": None},
    },
    "norm_forward": lambda: {"x": f(ROWS, 8), "weight": f(8), "z": f(ROWS, 8), "group": 4},
    "norm_backward": lambda: {"x": f(ROWS, 8), "weight": f(8), "grad_y": f(ROWS, 8), "group": 4},
    "rope_table": lambda: {"inv_freq": f(2, 3), "offsets": [0, 2, ROWS], "past": [4, 0]},
    "rope": lambda: {"x": f(ROWS, 2, 8), "table": f(ROWS, 3, 2), "inverse": True},
    "attention_forward": lambda: {
        "q": f(ROWS, HEADS, DIM),
        "k": f(ROWS, GROUPS, DIM),
        "v": f(ROWS, GROUPS, DIM),
        "offsets": [0, 2, ROWS],
        "window": 2,
        "scale": 0.5,
        "log_sum_exp": True,
    },
    "attention_forward with caches": lambda: {
        "q": f(ROWS, HEADS, DIM),
        "caches": [cache(), cache()],
        "offsets": [0, 2, ROWS],
        "past": [1, 3],
    },
    "attention_backward": lambda: {
        "q": f(ROWS, HEADS, DIM),
        "k": f(ROWS, GROUPS, DIM),
        "v": f(ROWS, GROUPS, DIM),
        "y": f(ROWS, HEADS, DIM),
        "log_sum_exp": f(ROWS, HEADS),
        "grad_y": f(ROWS, HEADS, DIM),
        "offsets": [0, 2, ROWS],
    },
    "kv_append": lambda: {
        "k": f(ROWS, GROUPS, DIM),
        "v": f(ROWS, GROUPS, DIM),
        "caches": [cache(), cache()],
        "offsets": [0, 2, ROWS],
        "past": [1, 3],
    },
    "conv1d_forward": lambda: {
        "x": f(ROWS, 8),
        "weight": f(16, 4),
        "bias": f(16),
        "repeat": 2,
        "repeat_group": 4,
        "offsets": [0, 2, ROWS],
        "past": [1, 3],
        "boundary": [0, 0],
        "states": [{"conv": f(3 + ops.TAIL, 8)}, {"conv": f(3 + ops.TAIL, 8)}],
    },
    "conv1d_backward": lambda: {"x": f(ROWS, 8), "weight": f(8, 4), "grad_y": f(ROWS, 8)},
    "scan_forward": lambda: {
        **scan_inputs(),
        "past": [3, 17],
        "boundary": [0, 16],
        "states": scan_states(),
        "dt_max": 3.0,
    },
    "scan_backward": lambda: {**scan_inputs(), "grad_y": f(ROWS, INNER)},
    "ssd_forward": lambda: {
        **ssd_inputs(),
        "past": [3, 17],
        "boundary": [0, 16],
        "states": ssd_states(),
        "dt_max": 3.0,
    },
    "ssd_backward": lambda: {**ssd_inputs(), "grad_y": f(ROWS, HEADS, DIM)},
    "glu_forward": lambda: {"gate": f(ROWS, 8), "up": f(ROWS, 8), "activation": "relu2"},
    "glu_backward": lambda: {"gate": f(ROWS, 8), "up": f(ROWS, 8), "grad_y": f(ROWS, 8)},
    "embedding_forward": lambda: {"tokens": [0, 2, 1], "table": f(3, 8), "scale": 2.0},
    "embedding_backward": lambda: {"tokens": [0, 2, 1], "grad_y": f(3, 8), "vocab": 3},
    "add": lambda: {"x": f(ROWS, 8), "y": f(ROWS, 8)},
    "gather_rows": lambda: {"x": f(ROWS, 8), "index": [4, 0]},
    "linear_loss": lambda: {
        "x": f(ROWS, 8),
        "weight": f(9, 8),
        "teacher_x": f(ROWS, 6),
        "teacher_weight": f(9, 6),
        "labels": [0, 8, -1, 3, 2],
        "row_weight": f(ROWS),
        "ce_weight": 0.5,
        "temperature": 2.0,
        "vocab": 9,
    },
    "relative_mse": lambda: {"x": f(ROWS, 8), "target": f(ROWS, 8) + 1},
    "adamw": lambda: {
        "master": f(3, 4),
        "grad": f(3, 4),
        "m": f(3, 4),
        "v": f(3, 4) + 1,
        "weight": f(3, 4).astype(np.float16),
        "step": 1,
        "learning_rate": 0.1,
    },
    "muon": lambda: {
        "master": f(6, 4),
        "grad": f(6, 4),
        "m": f(6, 4),
        "learning_rate": 0.1,
        "parts": np.array([2, 4]),
    },
    "sum_squares": lambda: {"x": f(3, 4)},
}

NUMBERS = [-1, 0, 1, 2, 3, 7, 2**31, 2**62, 2**64, -(2**63), 0.5, -1e30, 1e30, float("inf"), True]
JUNK = [None, "", "float32", b"\0" * 64, object(), {}, [], (), [None], [[]], float("nan"), 1j, ops]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 35]), max_size=5)
DTYPES = ["f4", "f4", "f4", "f4", "f8", "f2", "u2", "i4", "i8", "?", "O", ">f4", "M8[s]", "S4"]


@st.composite
def arrays(draw):
    """An array of any shape, dtype and layout, full of whatever numbers."""
    shape = tuple(draw(SHAPES))
    array = np.full(shape, draw(st.sampled_from([0, 1, 3, 40])), draw(st.sampled_from(DTYPES[:9])))
    array = array.astype(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else array
    layout = draw(
        st.sampled_from(["as it is", "transposed", "reversed", "read-only", "every other"])
    )
    if layout == "transposed":
        array = array.T
    elif layout == "reversed" and array.ndim:
        array = array[::-1]
    elif layout == "read-only":
        array.flags.writeable = False
    elif layout == "every other" and array.ndim:
        array = np.repeat(array, 2, axis=0)[::2]
    return array


def damaged(value):
    """Something in the place of a valid value: mostly of the same kind."""
    choices = [st.sampled_from(JUNK), st.sampled_from(NUMBERS), arrays()]
    if isinstance(value, np.ndarray) and value.ndim:
        axis = st.integers(0, value.ndim - 1)
        choices += [
            axis.map(lambda a: np.take(value, range(value.shape[a] - 1), axis=a)),
            axis.map(lambda a: np.concatenate([value, value], axis=a)),
            axis.map(lambda a: np.repeat(value, 2, axis=a)),
            st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 0]).map(
                lambda number: np.full_like(value, number)
            ),
        ]
    elif isinstance(value, list) and value and isinstance(value[0], int):
        bad = st.lists(st.sampled_from([*range(-2, 10), 16, 32, 2**31, 2**62]), max_size=4)
        choices += [bad, bad]
    elif isinstance(value, list):
        choices += [
            st.just(value[:1]),
            st.just(value * 2),
            st.builds(lambda item, v: [item, *value[1:]] if v else [item], arrays(), st.booleans()),
        ]
        if value and isinstance(value[0], dict):
            keys = st.sampled_from(sorted(value[0]))
            choices += [
                st.builds(lambda key, item: [{**value[0], key: item}, *value[1:]], keys, arrays()),
                st.builds(
                    lambda key: [{k: v for k, v in value[0].items() if k != key}, *value[1:]], keys
                ),
            ]
    return st.one_of(choices)


@pytest.mark.parametrize("name", CALLS)
def test_valid_calls_work(name):
    getattr(ops, name.split()[0])(**CALLS[name]())


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_calls_raise_ours(name, data):
    arguments = CALLS[name]()
    names = data.draw(
        st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)
    )
    for argument in names:
        arguments[argument] = data.draw(damaged(arguments[argument]))
    try:
        getattr(ops, name.split()[0])(**arguments)
    except mil.Error as error:
        assert "\n" not in str(error)
    except MemoryError:
        pass  # an output of an absurd size

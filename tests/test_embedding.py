"""Embedding, and the small operators over rows. Everything but the backward sum is exact."""

import numpy as np
import pytest
from reference import embedding as reference
from stepping import assert_same_bits, in_teams

from mambainllama import ops
from mambainllama.dtypes import from_float32, to_float32

CASES = [(1, 1, 1), (7, 5, 33), (300, 11, 200)]  # rows, vocab, hidden


def make(rows, vocab, hidden):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, vocab, rows)
    return tokens, *(
        rng.normal(size=s).astype(np.float32) for s in ((vocab, hidden), (rows, hidden))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, dtype):
    tokens, table, _ = make(*case)
    stored = from_float32(table, dtype)
    y = ops.embedding_forward(
        tokens, stored, scale=4.0, dtype="bfloat16" if dtype == "bfloat16" else None
    )
    assert np.array_equal(y, reference.forward(tokens, to_float32(stored, dtype), 4.0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_adds_in_row_order(case):
    tokens, table, grad_y = make(*case)
    start = table.copy()
    ops.embedding_backward(tokens, grad_y, case[1], scale=0.5, out={"grad_table": start})
    expected = (
        table + reference.backward(tokens, grad_y.astype(np.float64), case[1], 0.5)["grad_table"]
    )
    np.testing.assert_allclose(start, expected, atol=1e-5)  # up to 300 rows on one token

    assert_same_bits(in_teams(lambda: ops.embedding_backward(tokens, grad_y, case[1])))


def test_add_and_gather_rows():
    _, x, y = make(60, 60, 900)
    assert np.array_equal(ops.add(x, y), x + y)
    assert np.array_equal(ops.add(x[:, 100:203], y[:, 7:110]), x[:, 100:203] + y[:, 7:110])
    index = np.random.default_rng(0).integers(0, 60, 130)
    assert np.array_equal(ops.gather_rows(x, index), x[index])

"""What tests of operators share: closeness, teams of threads, and tokens piece by piece.

Operators with state are fed as decoding, verification and rollback feed them.
"""

from itertools import pairwise

import numpy as np

from mambainllama import ops


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def doubles(arguments):
    """The same arguments with float64 arrays."""
    return {
        n: v.astype(np.float64) if isinstance(v, np.ndarray) else v for n, v in arguments.items()
    }


def assert_close(got, expected, tolerance, name=""):
    """No entry is off by more than ``tolerance`` times the largest expected one (or 1)."""
    scale = max(1.0, np.abs(expected).max(initial=0))
    assert got.shape == expected.shape, name
    assert np.abs(got - expected).max(initial=0) <= tolerance * scale, name


def in_teams(run):
    """What ``run()`` returns with 1, 2 and 5 threads, which is more than some machines' cores."""
    before, results = ops.get_threads(), []
    try:
        for threads in (1, 2, 5):
            ops.set_threads(threads)
            results.append(run())
    finally:
        ops.set_threads(before)
    return results


def assert_same_bits(results):
    """All results hold the same arrays under the same names."""
    first, *others = results
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


class Stepper:
    """Several sequences with their states.

    ``forward(rows, **where)`` runs the operator on chosen rows of the whole packed input;
    ``where`` holds offsets, past, boundary and states.
    """

    def __init__(self, forward, lengths, new_state):
        self.forward = forward
        self.starts = offsets_of(lengths)[:-1]
        self.states = [new_state() for _ in lengths]
        self.past = [0] * len(lengths)
        self.boundary = [0] * len(lengths)

    def run(self, counts, rows=None):
        """Feed the next counts[i] tokens of sequence i, all in one call; returns packed rows.

        ``rows`` replaces the input's row numbers, to feed tokens that will be taken back.
        """
        if rows is None:
            rows = np.concatenate(
                [
                    start + past + np.arange(count)
                    for start, past, count in zip(self.starts, self.past, counts, strict=True)
                ]
            ).astype(np.int64)
        y = self.forward(
            rows,
            offsets=offsets_of(counts),
            past=self.past,
            boundary=self.boundary,
            states=self.states,
        )
        for i, count in enumerate(counts):
            if self.states[i].get("current_tokens") is not None and count:
                assert self.states[i]["current_tokens"][0] == self.past[i] + count
            self.boundary[i] = ops.boundary_after(self.past[i], count)
            self.past[i] += count
        return y

    def take_back(self, sequence, tokens):
        self.past[sequence] -= tokens
        assert self.past[sequence] >= self.boundary[sequence]


def run_alone_in_pieces(forward, length, new_state, cuts, start=0, rng=None, wrong_rows=None):
    """One sequence in pieces of the given sizes, the last cut to fit; returns all rows of y.

    With ``rng``, wrong tokens are fed between the pieces, and taken back.
    """
    stepper = Stepper(forward, [length], new_state)
    stepper.starts = [start]
    out, cuts = [], iter(cuts)
    while stepper.past[0] < length:
        if rng is not None and rng.random() < 0.7:
            count = int(rng.integers(1, ops.WINDOW + 1))
            stepper.run([count], rng.integers(0, wrong_rows, count))
            stepper.take_back(0, count)
        count = min(int(next(cuts)), length - stepper.past[0])
        out.append(stepper.run([count]))
    return np.concatenate(out), stepper


def cuts_to_try(rng):
    """Ways to cut some 130 rows: one by one, in verify windows, by the window, all at once."""
    return (
        np.ones(200),
        rng.integers(1, 6, 200),
        rng.integers(1, 40, 200),
        [16] * 20,
        [17] * 20,
        [200],
    )


def run_together_in_pieces(forward, lengths, new_state, rng):
    """Several sequences side by side, each in pieces of its own; returns all rows of y, packed."""
    stepper = Stepper(forward, lengths, new_state)
    packed = [[] for _ in lengths]
    while any(past < length for past, length in zip(stepper.past, lengths, strict=True)):
        counts = [
            int(min(rng.integers(0, 20), length - past))
            for past, length in zip(stepper.past, lengths, strict=True)
        ]
        y = stepper.run(counts)
        for i, (first, end) in enumerate(pairwise(offsets_of(counts))):
            packed[i].append(y[first:end])
    return np.concatenate([np.concatenate(pieces) for pieces in packed])

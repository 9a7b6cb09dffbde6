"""Feed operators with state piece by piece, as decoding, verification and rollback do."""

import numpy as np

from mambainllama import ops


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


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

"""The tokens of a training step: the same in every peer, from the step's number alone."""

import numpy as np


def batch(vocab: int, rows: int, length: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, length] and the label of each, int32; a row's last token has none (-1)."""
    random = np.random.Generator(np.random.PCG64([7, index]))
    tokens = random.integers(0, vocab, (rows, length), dtype=np.int32)
    labels = np.full_like(tokens, -1)
    labels[:, :-1] = tokens[:, 1:]
    return tokens, labels

"""One step of Muon in float64."""

import numpy as np


def orthogonalise(u, iterations=5):
    """Singular values of u driven towards 1 by the quintic a X + b (X X^T) X + c (X X^T)^2 X."""
    norm = np.linalg.norm(u)
    if norm == 0:
        return np.zeros_like(u)
    x = u / norm
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def step(
    master, grad, m, *, learning_rate, momentum=0.95, parts=None, weight_decay=0.0, grad_scale=1.0
):
    """Returns master and m after the step."""
    g = grad * grad_scale
    m = momentum * m + g
    u = g + momentum * m
    edges = np.cumsum([0, *(parts if parts is not None else [len(u)])])
    blocks = [u[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    x = np.concatenate([0.2 * np.sqrt(max(block.shape)) * orthogonalise(block) for block in blocks])
    return master - learning_rate * (x + weight_decay * master), m

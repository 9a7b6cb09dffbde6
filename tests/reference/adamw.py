"""One step of AdamW in float64."""

import numpy as np


def step(
    master, grad, m, v, *, step, learning_rate, beta1, beta2, eps, weight_decay, grad_scale=1.0
):
    """Returns master, m and v after the step."""
    g = grad * grad_scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    move = m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + eps)
    return master - learning_rate * (move + weight_decay * master), m, v

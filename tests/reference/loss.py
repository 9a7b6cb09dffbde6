"""Distillation loss with all logits at once, and relative error of states, in float64."""

import numpy as np


def log_softmax(z):
    shifted = z - z.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def linear_loss(
    x, weight, teacher_x=None, teacher_weight=None, labels=None, row_weight=None,
    kl_weight=1.0, ce_weight=0.0, temperature=1.0, scale=1.0, direction="forward",
    logit_scale=1.0, teacher_logit_scale=1.0, vocab=None,
):  # fmt: skip
    """The sums and gradients of `mambainllama.ops.linear_loss`, and `loss` itself."""
    rows, vocab = len(x), vocab or len(weight)
    w = np.ones(rows) if row_weight is None else np.asarray(row_weight, np.float64)
    w = np.where(w > 0, w, 0.0)
    z = logit_scale * x @ weight[:vocab].T
    grad_z = np.zeros_like(z)
    result = dict.fromkeys(
        ("kl", "ce", "teacher_ce", "kl_rows", "ce_rows", "agree", "correct", "loss"), 0.0
    )
    best = z.argmax(axis=1)

    if teacher_x is not None:
        teacher_z = teacher_logit_scale * teacher_x @ teacher_weight[:vocab].T
        ls, lt = log_softmax(z / temperature), log_softmax(teacher_z / temperature)
        s, t = np.exp(ls), np.exp(lt)
        if direction == "forward":
            kl, grad = (t * (lt - ls)).sum(axis=1), s - t
        else:
            kl = (s * (ls - lt)).sum(axis=1)
            grad = s * (ls - lt - kl[:, None])
        result |= {
            "kl": w @ kl,
            "kl_rows": w.sum(),
            "agree": w @ (best == teacher_z.argmax(axis=1)),
        }
        result["loss"] += scale * kl_weight * temperature**2 * (w @ kl)
        grad_z += (scale * kl_weight * temperature * w)[:, None] * grad
    if labels is not None:
        labels = np.asarray(labels)
        w_ce = np.where(labels >= 0, w, 0.0)
        at = (np.arange(rows), np.maximum(labels, 0))
        ce = -log_softmax(z)[at]
        result |= {"ce": w_ce @ ce, "ce_rows": w_ce.sum(), "correct": w_ce @ (best == labels)}
        if teacher_x is not None:
            result["teacher_ce"] = w_ce @ -log_softmax(teacher_z)[at]
        result["loss"] += scale * ce_weight * (w_ce @ ce)
        grad = np.exp(log_softmax(z))
        grad[at] -= 1
        grad_z += (scale * ce_weight * w_ce)[:, None] * grad

    result["grad_x"] = logit_scale * grad_z @ weight[:vocab]
    result["grad_weight"] = np.zeros(weight.shape)
    result["grad_weight"][:vocab] = logit_scale * grad_z.T @ x
    return result


def relative_mse(x, target, weight=1.0):
    scale = (target**2).sum()
    return {"value": ((x - target) ** 2).sum() / scale, "grad_x": weight * 2 * (x - target) / scale}

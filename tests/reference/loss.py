"""Distillation loss with all logits at once, and relative error of states, in float64."""

import numpy as np


def log_softmax(z):
    shifted = z - z.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(ls, lt, direction, mix):
    """Of rows of log-probabilities: values [rows], and derivatives by the logits behind ls."""
    s, t = np.exp(ls), np.exp(lt)
    if direction == "forward":
        return (t * (lt - ls)).sum(axis=1), s - t
    if direction == "reverse":
        kl = (s * (ls - lt)).sum(axis=1)
        return kl, s * (ls - lt - kl[:, None])
    lm = np.logaddexp(np.log(mix) + lt, np.log1p(-mix) + ls)
    to_student = (s * (ls - lm)).sum(axis=1)
    value = mix * (t * (lt - lm)).sum(axis=1) + (1 - mix) * to_student
    return value, (1 - mix) * s * (ls - lm - to_student[:, None])


def linear_loss(
    x, weight, teacher_x=None, teacher_weight=None, labels=None, row_weight=None,
    kl_weight=1.0, ce_weight=0.0, temperature=1.0, scale=1.0, direction="forward",
    logit_scale=1.0, teacher_logit_scale=1.0, vocab=None, mix=0.5, top_tokens=None,
    top_logprobs=None,
):  # fmt: skip
    """The sums and gradients of `mambainllama.ops.linear_loss`, and `loss` itself."""
    rows, vocab = len(x), vocab or len(weight)
    w = np.ones(rows) if row_weight is None else np.asarray(row_weight, np.float64)
    z = logit_scale * x @ weight[:vocab].T
    grad_z = np.zeros_like(z)
    result = dict.fromkeys(
        ("kl", "ce", "teacher_ce", "kl_rows", "ce_rows", "agree", "correct", "loss"), 0.0
    )
    best = z.argmax(axis=1)

    if teacher_x is not None:
        teacher_z = teacher_logit_scale * teacher_x @ teacher_weight[:vocab].T
        ls, lt = log_softmax(z / temperature), log_softmax(teacher_z / temperature)
        kl, grad = divergence(ls, lt, direction, mix)
        result |= {
            "kl": w @ kl,
            "kl_rows": w.sum(),
            "agree": w @ (best == teacher_z.argmax(axis=1)),
        }
        result["loss"] += scale * kl_weight * temperature**2 * (w @ kl)
        grad_z += (scale * kl_weight * temperature * w)[:, None] * grad
    if top_tokens is not None:
        # The buckets' distributions, and the derivative by z through each bucket's members.
        ls, lt = log_softmax(z), log_softmax(np.asarray(top_logprobs, np.float64))
        members = np.zeros((rows, top_tokens.shape[1] + 1, vocab))
        members[np.arange(rows)[:, None], np.arange(top_tokens.shape[1]), top_tokens] = 1
        members[:, -1] = 1 - members.sum(axis=1)
        if top_tokens.shape[1] == vocab:  # none are left for the last bucket
            members, lt = members[:, :-1], log_softmax(lt[:, :-1])
        share = (members * np.exp(ls)[:, None]).sum(axis=2)
        kl, slope = divergence(np.log(share), lt, direction, mix)
        within = members * np.exp(ls)[:, None] / share[:, :, None]
        grad_z += (scale * kl_weight * w)[:, None] * (slope[:, :, None] * within).sum(axis=1)
        first = np.asarray(top_logprobs)[:, : top_tokens.shape[1]].argmax(axis=1)
        likeliest = np.take_along_axis(top_tokens, first[:, None], axis=1)[:, 0]
        result |= {"kl": w @ kl, "kl_rows": w.sum(), "agree": w @ (best == likeliest)}
        result["loss"] += scale * kl_weight * (w @ kl)
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

"""Naive twins: each numerical function once more, in loops and float64, to be compared with."""

import math

# ---- entropy ---------------------------------------------------------------------------------------------------------


def naive_softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def naive_tsallis(logits, q):
    """S_q by its definition, with arithmetic of 60 digits, so that the limit q -> 1 does not cancel."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 60
        weights = [Decimal(x).exp() for x in logits]
        total = sum(weights)
        p = [w / total for w in weights]
        if q == 1.0:
            return float(-sum(x * x.ln() for x in p))
        order = Decimal(q)
        return float((1 - sum((x.ln() * order).exp() for x in p)) / (order - 1))


# ---- objectives ------------------------------------------------------------------------------------------------------


def naive_inverted_hinge(logits, label):
    p = naive_softmax(logits)
    return 1 + p[label] - max(x for v, x in enumerate(p) if v != label)


def naive_stopped_hinge(logits, label, margin):
    return max(0.0, naive_inverted_hinge(logits, label) - 1 + margin)


def naive_without(p, label):
    """The distribution without one outcome; None if that outcome had all the probability."""
    rest = math.fsum(x for v, x in enumerate(p) if v != label)
    if rest <= 1e-6:
        return None
    return [0.0 if v == label else x / rest for v, x in enumerate(p)]


def naive_divergence(p, logits, kept):
    """KL(p || softmax(logits)) with every outcome outside `kept` merged into one."""
    if p is None:
        return 0.0
    q = naive_softmax(logits)
    total = math.fsum(p[v] * math.log(p[v] / q[v]) for v in kept if p[v] > 0)
    p_tail = math.fsum(x for v, x in enumerate(p) if v not in kept)
    q_tail = math.fsum(x for v, x in enumerate(q) if v not in kept)
    return total + (p_tail * math.log(p_tail / q_tail) if p_tail > 1e-6 else 0.0)

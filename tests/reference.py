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
    if rest == 0:
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


# ---- metrics ---------------------------------------------------------------------------------------------------------


def naive_loss(logprob):
    return -math.fsum(logprob) / len(logprob)


def naive_normalised(loss, wrong, eps=0.0):
    out = []
    for right, others in zip(loss, wrong, strict=True):
        p = math.exp(-right)
        out.append(p / (p + math.fsum(math.exp(-x) for x in others) + eps))
    return out


def naive_truth_ratio(loss, wrong, eps=0.0):
    out = []
    for right, others in zip(loss, wrong, strict=True):
        product = 1.0
        for x in others:
            product *= math.exp(-x) ** (1 / len(others))
        out.append(product / (math.exp(-right) + eps))
    return out


def naive_ks(first, second):
    """The largest distance of two empirical distribution functions."""
    largest = 0.0
    for x in [*first, *second]:
        below = [sum(value <= x for value in side) / len(side) for side in (first, second)]
        largest = max(largest, abs(below[0] - below[1]))
    return largest


def naive_exact_memorization(correct):
    text = correct[:-1]
    return sum(text) / len(text) if text else math.nan


def naive_extraction_strength(correct, compat):
    """Try every k, from the definition."""
    text = list(correct[:-1])
    n = len(text)
    if n == 0:
        return 0.0
    for k in range(n + 1):
        if all(text[k:]) and (k < n or not compat):
            return 1 - k / n
    return 1 - (n - 1) / n


def naive_lcs(a, b):
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + naive_lcs(a[1:], b[1:])
    return max(naive_lcs(a[1:], b), naive_lcs(a, b[1:]))


def naive_min_k(values, k):
    lowest = sorted(values)[: max(1, int(k * len(values)))]
    return -math.fsum(lowest) / len(lowest)


def naive_mean(values):
    return math.fsum(values) / len(values)


def naive_auc(forget, holdout):
    wins = 0.0
    for x in forget:
        for y in holdout:
            wins += 1.0 if y > x else 0.5 if y == x else 0.0
    return wins / (len(forget) * len(holdout))


def naive_token_statistics(logits, label):
    """log p(label), whether it is the likeliest, mean and variance of log p under p; of one position's logits."""
    logp = [math.log(p) if p > 0 else -math.inf for p in naive_softmax(logits)]
    p = naive_softmax(logits)
    mean = math.fsum(x * y for x, y in zip(p, logp, strict=True) if x > 0)
    var = math.fsum(x * (y - mean) ** 2 for x, y in zip(p, logp, strict=True) if x > 0)
    return logp[label], max(range(len(logits)), key=lambda i: logits[i]) == label, mean, var


# ---- adapter ---------------------------------------------------------------------------------------------------------


def naive_gates(logits, high, temperature_high, temperature_low, top_k, evidence=True):
    """Weights of N + 1 experts for one token (Eqs. 7 and 9)."""
    if not evidence:
        return [1.0] + [0.0] * (len(logits) - 1)
    if not high:
        share = naive_softmax([x / temperature_low for x in logits])
        best = max(range(len(share)), key=lambda e: (share[e], logits[e], -e))
        return [float(e == best) for e in range(len(logits))]
    share = naive_softmax([x / temperature_high for x in logits])
    chosen = sorted(range(1, len(logits)), key=lambda e: -share[e])[:top_k]
    return [1.0] + [share[e] if e in chosen else 0.0 for e in range(1, len(logits))]


def naive_previous(mask):
    """Index of the last real token before each real token of a row, else -1."""
    return [max((s for s in range(t) if mask[s]), default=-1) if mask[t] else -1 for t in range(len(mask))]


def naive_pool(values, evidence, memory):
    """Weighted mean of the past and present values of one row, weight memory^k for k contributing tokens back."""
    pooled = []
    for t in range(len(values)):
        past = [s for s in range(t + 1) if evidence[s]] if memory > 0 else [t] * bool(evidence[t])
        weights = [memory ** (len(past) - 1 - i) for i in range(len(past))]
        total = math.fsum(weights)
        pooled.append(
            [
                math.fsum(w * values[s][d] for w, s in zip(weights, past, strict=True)) / total if past else 0.0
                for d in range(len(values[0]))
            ]
        )
    return pooled


def naive_masked_linear(x, weight, grad, mask):
    """y = x W^T, dx = dy W, dW = dy^T (x ⊙ mask) for rows x [T][in] and mask [T][E], each entry over in / E columns."""
    tokens, width, out = len(x), len(x[0]), len(weight)
    group = width // len(mask[0])
    y = [[math.fsum(x[t][i] * weight[o][i] for i in range(width)) for o in range(out)] for t in range(tokens)]
    dx = [[math.fsum(grad[t][o] * weight[o][i] for o in range(out)) for i in range(width)] for t in range(tokens)]
    dw = [
        [math.fsum(grad[t][o] * x[t][i] * mask[t][i // group] for t in range(tokens)) for i in range(width)]
        for o in range(out)
    ]
    return y, dx, dw

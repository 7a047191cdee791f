"""The kernel of a chunk's outputs: each query's past, read from the state, and its own chunk, joined by their masses.

A chunk whose keys span more than `REACH` is done by a second launch, with `EXACT`, 16 queries at a time: weights are
summed pair by pair, as in `naive.py`. Programs whose chunk is of the other kind return at once.

Letters: as in `states.py`.
"""

import triton
import triton.language as tl

from performer_lm.ops.linear.triton.blocks import (
    EMPTY,
    LENGTHS,
    REACH,
    SHIFT,
    fade,
    find_middle,
    load_if,
    load_projection,
    load_rows,
    multiply,
    narrow,
    project,
)


@triton.jit(do_not_specialize=LENGTHS)
def outputs(
    q, k, v, gain, origin, faded, documents, weight, rest, bias, S, Z, c, span, out, lse,
    q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, n, T, B, G,
    factor: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, TILES: tl.constexpr, ALL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, LOW: tl.constexpr,
    EXACT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Write the outputs of `BI` queries and log2 of their denominators; BI = C unless `EXACT`."""
    part, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = part * BI // C
    b, h = bh // (G * R), bh % (G * R)
    g = h // R
    x, bg = g * B + b, b * G + g
    spans = tl.arange(0, TILES)
    far = tl.max(tl.load(span + (x * T + t) * TILES + spans), axis=0) > REACH
    if far != EXACT:
        return
    i = part * BI + tl.arange(0, BI)
    inside = i < n
    queries = load_rows(q + b * q_b + h * q_h, i, inside, q_n, D, BD, LOW)
    faded_i = load_if(HAS_DECAY, faded + bg * n, i, inside)
    document_i = load_if(HAS_DOCUMENTS, documents + b * (n + 1) + 1, i, inside)
    base = tl.load(origin + bg * T + t)
    columns = tl.arange(0, BE)
    slot = (x * (T + 1) + t) * M
    every = tl.arange(0, ALL)
    top = tl.max(tl.load(c + slot + every, mask=every < M, other=EMPTY), axis=0)

    numerator, mass = tl.zeros([BI, BE], tl.float32), tl.zeros([BI], tl.float32)
    largest = tl.zeros([BI], tl.float32) - float("inf")
    scores, peak = tl.zeros([BI, C], tl.float32), tl.zeros([BI], tl.float32) - float("inf")
    if not EXACT:
        j = t * C + tl.arange(0, C)
        gains = tl.load(gain + bg * n + j, mask=j < n, other=-float("inf"))
        present = gains > -float("inf")
        keys = load_rows(k + b * k_b + g * k_g, j, present, k_n, D, BD, LOW)
    for start in range(0, M, BM):
        features = start + tl.arange(0, BM)
        real = features < M
        rows, low = load_projection(weight, rest, g, features, M, D, BD, LOW)
        logs = project(queries, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW)
        raised = logs + (tl.load(c + slot + features, mask=real, other=EMPTY) - top).to(tl.float32)[None, :]
        new = tl.maximum(largest, tl.max(raised, axis=1))
        share, remains = narrow(tl.exp2(raised - new[:, None]), LOW), tl.exp2(largest - new)
        held = tl.load(
            S + slot * E + features[:, None] * E + columns[None, :],
            mask=real[:, None] & (columns < E)[None, :],
            other=0.0,
        )
        numerator = numerator * remains[:, None] + multiply(share, held, LOW)
        masses = tl.load(Z + slot + features, mask=real, other=0.0)
        mass = mass * remains + tl.sum(share.to(tl.float32) * masses[None, :], axis=1)
        largest = new
        if not EXACT:
            own = project(keys, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW) + gains[:, None]
            middle = find_middle(own, present)
            raised = logs + middle[None, :]
            new = tl.maximum(peak, tl.max(raised, axis=1))
            share = tl.exp2(raised - new[:, None] + SHIFT)
            own = tl.exp2(own - middle[None, :])
            scores = scores * tl.exp2(peak - new)[:, None] + multiply(share, tl.trans(own), LOW)
            peak = new

    past = tl.where(mass > 0, tl.log2(tl.where(mass > 0, mass, 1.0)) + largest, -float("inf"))
    if HAS_DOCUMENTS:
        before = tl.load(documents + b * (n + 1) + t * C)
        past = tl.where(document_i == before, past, -float("inf"))
    past = past.to(tl.float64) + (top + faded_i)
    numerator = numerator / tl.where(mass > 0, mass, 1.0)[:, None]

    if EXACT:
        seen, total = tl.zeros([BI, BE], tl.float32), tl.zeros([BI], tl.float32)
        for first in range(t * C, (part + 1) * BI, BI):
            near = first + tl.arange(0, BI)
            logs, there = pair_logs(
                queries, k + b * k_b + g * k_g, gain + bg * n, near, k_n, n, weight, rest, g, bias + g * M, factor,
                M, D, BD, BI, HAS_BIAS, LOW,
            )  # fmt: skip
            faded_near = load_if(HAS_DECAY, faded + bg * n, near, near < n)
            document_near = load_if(HAS_DOCUMENTS, documents + b * (n + 1) + 1, near, near < n)
            logs += fade(i, near, faded_i, faded_near, there, document_i, document_near, HAS_DOCUMENTS)
            new = tl.maximum(peak, tl.max(logs, axis=1))
            safe = tl.where(new > -float("inf"), new, 0.0)
            share, remains = narrow(tl.exp2(logs - safe[:, None]), LOW), tl.exp2(peak - safe)
            held_values = load_rows(v + b * v_b + g * v_g, near, there, v_n, E, BE, LOW)
            seen = seen * remains[:, None] + multiply(share, held_values, LOW)
            total = total * remains + tl.sum(share.to(tl.float32), axis=1)
            peak = new
        recent = tl.where(total > 0, tl.log2(tl.where(total > 0, total, 1.0)) + peak, -float("inf"))
    else:
        values = load_rows(v + b * v_b + g * v_g, j, present, v_n, E, BE, LOW)
        faded_j = load_if(HAS_DECAY, faded + bg * n, j, j < n)
        document_j = load_if(HAS_DOCUMENTS, documents + b * (n + 1) + 1, j, j < n)
        left = fade(i, j, faded_i, faded_j, present, document_i, document_j, HAS_DOCUMENTS)
        most = tl.max(left, axis=1)
        most = tl.where(most > -float("inf"), most, 0.0)
        share = narrow(scores * tl.exp2(left - most[:, None]), LOW)
        seen, total = multiply(share, values, LOW), tl.sum(share.to(tl.float32), axis=1)
        recent = tl.where(total > 0, tl.log2(tl.where(total > 0, total, 1.0)) + peak - SHIFT + most, -float("inf"))
    recent = recent.to(tl.float64) + base
    seen = seen / tl.where(total > 0, total, 1.0)[:, None]

    both = tl.maximum(past, recent)
    safe = tl.where(both > -float("inf"), both, 0.0)
    one, other = tl.exp2((past - safe).to(tl.float32)), tl.exp2((recent - safe).to(tl.float32))
    joined = one + other
    found = (numerator * one[:, None] + seen * other[:, None]) / tl.where(joined > 0, joined, 1.0)[:, None]
    at = bh * n + i
    tl.store(out + at[:, None] * E + columns[None, :], found, mask=inside[:, None] & (columns < E)[None, :])
    mass_log = both + tl.log2(tl.where(joined > 0, joined, 1.0)).to(tl.float64)
    tl.store(lse + at, mass_log, mask=inside)


@triton.jit
def pair_logs(
    queries, k, gain, j, k_n, n, weight, rest, g, bias,
    factor: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr,
    HAS_BIAS: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Return log2 of the weights of queries and keys `(BI, BI)`, pair by pair, and which keys are present."""
    gains = tl.load(gain + j, mask=j < n, other=-float("inf"))
    present = gains > -float("inf")
    keys = load_rows(k, j, present, k_n, D, BD, LOW)
    peak, total = tl.zeros([BI, BI], tl.float32) - float("inf"), tl.zeros([BI, BI], tl.float32)
    for start in range(0, M, 16):
        features = start + tl.arange(0, 16)
        rows, low = load_projection(weight, rest, g, features, M, D, BD, LOW)
        one = project(queries, rows, low, bias, features, factor, M, HAS_BIAS, LOW)
        other = project(keys, rows, low, bias, features, factor, M, HAS_BIAS, LOW)
        logs = one[:, None, :] + other[None, :, :]
        new = tl.maximum(peak, tl.max(logs, axis=2))
        total = total * tl.exp2(peak - new) + tl.sum(tl.exp2(logs - new[:, :, None]), axis=2)
        peak = new
    return tl.log2(total) + peak + tl.where(present, gains, 0.0)[None, :], present

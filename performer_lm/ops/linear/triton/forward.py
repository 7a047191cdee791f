"""The forward of causal linear attention on a GPU, in three kernels.

`prepare` finds each key's gain and each token's share of decay; `states` walks over the chunks, one program for some
features of a head, and leaves the state before each; `outputs` reads it, and joins each query's past with its own chunk
by their masses. A chunk whose keys span more than `REACH` is done again by `outputs` with `EXACT`, 16 queries at a
time: weights are summed pair by pair, as in `naive.py`; programs whose chunk is of the other kind return at once.

Letters: as in `blocks.py`; `x` batch times key heads `(g b)`, `T` chunks, `R` queries per key.
"""

import triton
import triton.language as tl

from performer_lm.ops.linear.triton.blocks import (
    EMPTY,
    LENGTHS,
    LOG2_E,
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
def prepare(
    k, log_gain, log_decay, mask, gain, origin, faded,
    stride_b, stride_g, stride_n, n, T, G,
    norm: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
    HAS_GAIN: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write a key's log gain relative to its chunk's origin, the origin, and the decay since the chunk's start."""
    t, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    places = t * C + tl.arange(0, C)
    inside = places < n
    present = inside
    if HAS_MASK:
        present = present & (tl.load(mask + b * n + places, mask=inside, other=0) != 0)
    columns = tl.arange(0, BD)
    rows = k + b * stride_b + g * stride_g + places[:, None] * stride_n + columns[None, :]
    x = tl.load(rows, mask=present[:, None] & (columns < D)[None, :], other=0.0).to(tl.float64)
    logs = -norm * tl.sum(x * x, axis=1)
    at = bg * n + places
    if HAS_GAIN:
        logs += tl.load(log_gain + at, mask=present, other=0.0).to(tl.float64)
    logs = tl.where(present, logs * LOG2_E, -float("inf"))
    top = tl.max(logs, axis=0)
    top = tl.where(top > -float("inf"), tl.floor(top), 0.0)
    tl.store(origin + bg * T + t, top)
    tl.store(gain + at, (logs - top).to(tl.float32), mask=inside)
    if HAS_DECAY:
        decay = tl.load(log_decay + at, mask=inside, other=0.0).to(tl.float64) * LOG2_E
        tl.store(faded + at, tl.cumsum(decay, axis=0), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def states(
    k, v, gain, origin, faded, documents, weight, rest, bias, sums, exponent,
    S, Z, c, span, after,
    k_b, k_g, k_n, v_b, v_g, v_n, n, T, B, G,
    factor: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Write the sums S, Z over 2^c before each chunk and after the last, and how far each chunk's keys span."""
    x, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = x % B, x // B
    bg = b * G + g
    features, columns = tile * BM + tl.arange(0, BM), tl.arange(0, BE)
    real = features < M
    rows, low = load_projection(weight, rest, g, features, M, D, BD, LOW)
    cells = features[:, None] * (E + 1) + columns[None, :]
    held = real[:, None] & (columns < E)[None, :]
    first = x * M * (E + 1)
    total = tl.load(sums + first + cells, mask=held, other=0.0)
    mass = tl.load(sums + first + features * (E + 1) + E, mask=real, other=0.0)
    size = tl.load(exponent + x * M + features, mask=real, other=EMPTY)
    lift = tl.where(mass > 0, tl.floor(tl.log2(tl.where(mass > 0, mass, 1.0))), 0.0)  # masses are near 1
    total, mass, size = total * tl.exp2(-lift)[:, None], mass * tl.exp2(-lift), size + lift.to(tl.float64)
    for t in range(T):
        slot = (x * (T + 1) + t) * M
        out = S + slot * E + features[:, None] * E + columns[None, :]
        tl.store(out, total.to(S.dtype.element_ty), mask=held)
        tl.store(Z + slot + features, mass, mask=real)
        tl.store(c + slot + features, size, mask=real)
        places = t * C + tl.arange(0, C)
        inside = places < n
        gains = tl.load(gain + bg * n + places, mask=inside, other=-float("inf"))
        present = gains > -float("inf")
        base = tl.load(origin + bg * T + t)
        keys = load_rows(k + b * k_b + g * k_g, places, present, k_n, D, BD, LOW)
        values = load_rows(v + b * v_b + g * v_g, places, present, v_n, E, BE, LOW)
        logs = project(keys, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW) + gains[:, None]
        high = tl.max(logs, axis=0)
        least = tl.min(tl.where(present[:, None], logs, float("inf")), axis=0)
        reach = tl.max(tl.where(real & (high > -float("inf")), high - least, 0.0), axis=0)
        tl.store(span + (x * T + t) * TILES + tile, reach)
        last = tl.minimum((t + 1) * C, n) - 1
        past, kept = size, True
        if HAS_DECAY:
            at_end = tl.load(faded + bg * n + last)
            past = past + at_end
            logs += (at_end - tl.load(faded + bg * n + places, mask=inside, other=0.0)).to(tl.float32)[:, None]
        if HAS_DOCUMENTS:
            document = documents + b * (n + 1)
            final = tl.load(document + 1 + last)
            kept = tl.load(document + t * C) == final
            own = tl.load(document + 1 + places, mask=inside, other=-1) == final
            logs = tl.where(own[:, None], logs, -float("inf"))
            past = tl.where(kept, past, tl.zeros_like(past) + EMPTY)
        top = tl.max(logs, axis=0)
        new = tl.where(top > -float("inf"), tl.ceil(top).to(tl.float64) + base, EMPTY)
        new = tl.maximum(past, new)
        share = narrow(tl.exp2(logs - (new - base).to(tl.float32)[None, :]), LOW)
        remains = tl.where(kept, tl.exp2((past - new).to(tl.float32)), 0.0)
        total = total * remains[:, None] + multiply(tl.trans(share), values, LOW)
        mass = mass * remains + tl.sum(share.to(tl.float32), axis=0)
        size = new
    slot = (x * (T + 1) + T) * M
    tl.store(S + slot * E + features[:, None] * E + columns[None, :], total.to(S.dtype.element_ty), mask=held)
    tl.store(Z + slot + features, mass, mask=real)
    tl.store(c + slot + features, size, mask=real)
    tl.store(after + first + cells, total, mask=held)
    tl.store(after + first + features * (E + 1) + E, mass, mask=real)


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

"""The kernels of the gradients at a chunk's queries, and at its keys and values: from the states and the chunk itself.

Weights are relative to their query's denominator, so they are at most 1. As in `outputs.py`, a chunk whose keys span
too far is done by a second launch, with `EXACT`, pair by pair.

Letters: as in `states.py`.
"""

import triton
import triton.language as tl

from performer_lm.ops.linear.triton.blocks import (
    EMPTY,
    LENGTHS,
    REACH,
    fade,
    find_middle,
    load_if,
    load_mass,
    load_projection,
    load_rows,
    multiply,
    narrow,
    project,
)
from performer_lm.ops.linear.triton.outputs import pair_logs


@triton.jit(do_not_specialize=LENGTHS)
def pull_queries(
    q, k, v, dout, delta, lse, gain, origin, faded, documents, weight, rest, bias, S, Z, c, span, dq,
    q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, do_b, do_h, do_n, n, T, B, G,
    factor: tl.constexpr, scale: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, TILES: tl.constexpr, ALL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, LOW: tl.constexpr,
    EXACT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Write the gradient at `BI` queries."""
    part, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = part * BI // C
    b, h = bh // (G * R), bh % (G * R)
    g = h // R
    x, bg = g * B + b, b * G + g
    far = tl.max(tl.load(span + (x * T + t) * TILES + tl.arange(0, TILES)), axis=0) > REACH
    if far != EXACT:
        return
    i = part * BI + tl.arange(0, BI)
    inside = i < n
    at = bh * n + i
    queries = load_rows(q + b * q_b + h * q_h, i, inside, q_n, D, BD, LOW)
    grads = load_rows(dout + b * do_b + h * do_h, i, inside, do_n, E, BE, LOW)
    masses, sees = load_mass(lse, at, inside)
    own = tl.load(delta + at, mask=inside, other=0.0)
    faded_i = load_if(HAS_DECAY, faded + bg * n, i, inside)
    document_i = load_if(HAS_DOCUMENTS, documents + b * (n + 1) + 1, i, inside)
    sees_past = sees
    if HAS_DOCUMENTS:
        sees_past = sees & (document_i == tl.load(documents + b * (n + 1) + t * C))
    base = tl.load(origin + bg * T + t)
    columns = tl.arange(0, BE)
    slot = (x * (T + 1) + t) * M
    every = tl.arange(0, ALL)
    top = tl.max(tl.load(c + slot + every, mask=every < M, other=EMPTY), axis=0)
    to_past = (top - masses + faded_i).to(tl.float32)
    to_own = (base - masses).to(tl.float32)
    found = tl.zeros([BI, BD], tl.float32)
    if not EXACT:
        j = t * C + tl.arange(0, C)
        gains = tl.load(gain + bg * n + j, mask=j < n, other=-float("inf"))
        present = gains > -float("inf")
        keys = load_rows(k + b * k_b + g * k_g, j, present, k_n, D, BD, LOW)
        values = load_rows(v + b * v_b + g * v_g, j, present, v_n, E, BE, LOW)
        faded_j = load_if(HAS_DECAY, faded + bg * n, j, j < n)
        document_j = load_if(HAS_DOCUMENTS, documents + b * (n + 1) + 1, j, j < n)
        left = fade(i, j, faded_i, faded_j, present, document_i, document_j, HAS_DOCUMENTS)
        most = tl.max(left, axis=1)
        sees = sees & (most > -float("inf"))
        most = tl.where(sees, most, 0.0)
        left = tl.where(sees[:, None], tl.exp2(left - most[:, None]), 0.0)
        pulled = (multiply(grads, tl.trans(values), LOW) - own[:, None]) * left
        to_near = to_own + most
    for start in range(0, M, BM):
        features = start + tl.arange(0, BM)
        real = features < M
        rows, low = load_projection(weight, rest, g, features, M, D, BD, LOW)
        logs = project(queries, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW)
        raise_by = (tl.load(c + slot + features, mask=real, other=EMPTY) - top).to(tl.float32)
        share = tl.where(sees_past[:, None], tl.exp2(logs + raise_by[None, :] + to_past[:, None]), 0.0)
        held = tl.load(
            S + slot * E + features[:, None] * E + columns[None, :],
            mask=real[:, None] & (columns < E)[None, :],
            other=0.0,
        )
        massed = tl.load(Z + slot + features, mask=real, other=0.0)
        dlogs = share * (multiply(grads, tl.trans(held), LOW) - own[:, None] * massed[None, :])
        if not EXACT:
            key_logs = project(keys, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW) + gains[:, None]
            middle = find_middle(key_logs, present)
            share = tl.exp2(logs + middle[None, :] + to_near[:, None])
            share = tl.where(sees[:, None], share, 0.0)
            dlogs += share * multiply(pulled, tl.exp2(key_logs - middle[None, :]), LOW)
        found += multiply(dlogs, rows, LOW)
    if EXACT:
        for first in range(t * C, (part + 1) * BI, BI):
            near = first + tl.arange(0, BI)
            pairs, there = pair_logs(
                queries, k + b * k_b + g * k_g, gain + bg * n, near, k_n, n, weight, rest, g, bias + g * M, factor,
                M, D, BD, BI, HAS_BIAS, LOW,
            )  # fmt: skip
            near_values = load_rows(v + b * v_b + g * v_g, near, there, v_n, E, BE, LOW)
            near_gains = tl.load(gain + bg * n + near, mask=there, other=0.0)
            faded_near = load_if(HAS_DECAY, faded + bg * n, near, near < n)
            document_near = load_if(HAS_DOCUMENTS, documents + b * (n + 1) + 1, near, near < n)
            near_left = fade(i, near, faded_i, faded_near, there, document_i, document_near, HAS_DOCUMENTS)
            weights = tl.where(sees[:, None], tl.exp2(pairs + near_left + to_own[:, None]), 0.0)
            dpairs = weights * (multiply(grads, tl.trans(near_values), LOW) - own[:, None])
            near_keys = load_rows(k + b * k_b + g * k_g, near, there, k_n, D, BD, LOW)
            for start in range(0, M, 16):
                few = start + tl.arange(0, 16)
                few_rows, few_low = load_projection(weight, rest, g, few, M, D, BD, LOW)
                one = project(queries, few_rows, few_low, bias + g * M, few, factor, M, HAS_BIAS, LOW)
                other = (
                    project(near_keys, few_rows, few_low, bias + g * M, few, factor, M, HAS_BIAS, LOW)
                    + near_gains[:, None]
                )
                shares = tl.exp2(one[:, None, :] + other[None, :, :] - pairs[:, :, None])
                found += multiply(tl.sum(dpairs[:, :, None] * shares, axis=1), few_rows, LOW)
    wide = tl.arange(0, BD)
    tl.store(
        dq + at[:, None] * D + wide[None, :],
        (found * scale).to(dq.dtype.element_ty),
        mask=inside[:, None] & (wide < D)[None, :],
    )


@triton.jit(do_not_specialize=LENGTHS)
def pull_keys(
    q, k, v, dout, delta, lse, gain, origin, faded, documents, weight, rest, bias, dS, dZ, c, span, dk, dv, dgain,
    q_b, q_h, q_n, k_b, k_g, k_n, v_b, v_g, v_n, do_b, do_h, do_n, n, T, B, G,
    factor: tl.constexpr, scale: tl.constexpr, norm: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, LOW: tl.constexpr,
    EXACT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Write the gradients at `BI` keys, their values and the logarithms of their weights."""
    part, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = part * BI // C
    b, g = bg // G, bg % G
    x = g * B + b
    far = tl.max(tl.load(span + (x * T + t) * TILES + tl.arange(0, TILES)), axis=0) > REACH
    if far != EXACT:
        return
    j = part * BI + tl.arange(0, BI)
    gains = tl.load(gain + bg * n + j, mask=j < n, other=-float("inf"))
    present = gains > -float("inf")
    keys = load_rows(k + b * k_b + g * k_g, j, present, k_n, D, BD, LOW)
    values = load_rows(v + b * v_b + g * v_g, j, present, v_n, E, BE, LOW)
    base = tl.load(origin + bg * T + t)
    columns, wide = tl.arange(0, BE), tl.arange(0, BD)
    last = tl.minimum((t + 1) * C, n) - 1
    faded_j = load_if(HAS_DECAY, faded + bg * n, j, j < n)
    document_j = load_if(HAS_DOCUMENTS, documents + b * (n + 1) + 1, j, j < n)
    stays = present
    if HAS_DOCUMENTS:
        stays = stays & (document_j == tl.load(documents + b * (n + 1) + 1 + last))
    until = tl.zeros([BI], tl.float32)
    if HAS_DECAY:
        until = (tl.load(faded + bg * n + last) - faded_j).to(tl.float32)
    dkeys, dvalues = tl.zeros([BI, BD], tl.float32), tl.zeros([BI, BE], tl.float32)
    dlog = tl.zeros([BI], tl.float32)
    slot = (x * T + t) * M
    later = (x * (T + 1) + t + 1) * M
    for start in range(0, M, BM):
        features = start + tl.arange(0, BM)
        real = features < M
        rows, low = load_projection(weight, rest, g, features, M, D, BD, LOW)
        logs = project(keys, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW)
        size = (tl.load(c + later + features, mask=real, other=EMPTY) - base).to(tl.float32)
        share = tl.exp2(logs + (gains + until)[:, None] - size[None, :])
        share = tl.where(stays[:, None], share, 0.0)
        held = tl.load(
            dS + slot * E + features[:, None] * E + columns[None, :],
            mask=real[:, None] & (columns < E)[None, :],
            other=0.0,
        )
        massed = tl.load(dZ + slot + features, mask=real, other=0.0)
        dlogs = share * (multiply(values, tl.trans(held), LOW) + massed[None, :])
        dlog += tl.sum(dlogs, axis=1)
        dkeys += multiply(dlogs, rows, LOW)
        dvalues += multiply(share, held, LOW)

    for r in range(R):
        h = g * R + r
        bh = (b * G + g) * R + r
        if EXACT:
            for first in range(part * BI, (t + 1) * C, BI):
                i = first + tl.arange(0, BI)
                inside = i < n
                at = bh * n + i
                queries = load_rows(q + b * q_b + h * q_h, i, inside, q_n, D, BD, LOW)
                grads = load_rows(dout + b * do_b + h * do_h, i, inside, do_n, E, BE, LOW)
                masses, sees = load_mass(lse, at, inside)
                own = tl.load(delta + at, mask=inside, other=0.0)
                faded_i = load_if(HAS_DECAY, faded + bg * n, i, inside)
                document_i = load_if(HAS_DOCUMENTS, documents + b * (n + 1) + 1, i, inside)
                pairs, there = pair_logs(
                    queries, k + b * k_b + g * k_g, gain + bg * n, j, k_n, n, weight, rest, g, bias + g * M,
                    factor, M, D, BD, BI, HAS_BIAS, LOW,
                )  # fmt: skip
                left = fade(i, j, faded_i, faded_j, there, document_i, document_j, HAS_DOCUMENTS)
                weights = tl.exp2(pairs + left + (base - masses).to(tl.float32)[:, None])
                weights = tl.where(sees[:, None], weights, 0.0)
                dpairs = weights * (multiply(grads, tl.trans(values), LOW) - own[:, None])
                dvalues += multiply(tl.trans(weights), grads, LOW)
                dlog += tl.sum(dpairs, axis=0)
                for start in range(0, M, 16):
                    features = start + tl.arange(0, 16)
                    rows, low = load_projection(weight, rest, g, features, M, D, BD, LOW)
                    one = project(queries, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW)
                    other = project(keys, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW)
                    other += tl.where(present, gains, 0.0)[:, None]
                    shares = tl.exp2(one[:, None, :] + other[None, :, :] - pairs[:, :, None])
                    dkeys += multiply(tl.sum(dpairs[:, :, None] * shares, axis=0), rows, LOW)
        else:
            i = t * C + tl.arange(0, C)
            inside = i < n
            at = bh * n + i
            queries = load_rows(q + b * q_b + h * q_h, i, inside, q_n, D, BD, LOW)
            grads = load_rows(dout + b * do_b + h * do_h, i, inside, do_n, E, BE, LOW)
            masses, sees = load_mass(lse, at, inside)
            own = tl.load(delta + at, mask=inside, other=0.0)
            faded_i = load_if(HAS_DECAY, faded + bg * n, i, inside)
            document_i = load_if(HAS_DOCUMENTS, documents + b * (n + 1) + 1, i, inside)
            left = fade(i, j, faded_i, faded_j, present, document_i, document_j, HAS_DOCUMENTS)
            most = tl.max(left, axis=1)
            sees = sees & (most > -float("inf"))
            most = tl.where(sees, most, 0.0)
            left = tl.where(sees[:, None], tl.exp2(left - most[:, None]), 0.0)
            pulled = narrow((multiply(grads, tl.trans(values), LOW) - own[:, None]) * left, LOW)
            to_own = (base - masses).to(tl.float32) + most
            scores = tl.zeros([C, BI], tl.float32)
            for start in range(0, M, BM):
                features = start + tl.arange(0, BM)
                rows, low = load_projection(weight, rest, g, features, M, D, BD, LOW)
                logs = project(keys, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW) + gains[:, None]
                middle = find_middle(logs, present)
                near = tl.exp2(logs - middle[None, :])
                logs = project(queries, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW)
                share = tl.exp2(logs + middle[None, :] + to_own[:, None])
                share = narrow(tl.where(sees[:, None], share, 0.0), LOW)
                scores += multiply(share, tl.trans(near), LOW)
                dlogs = near * multiply(tl.trans(pulled), share, LOW)
                dlog += tl.sum(dlogs, axis=1)
                dkeys += multiply(dlogs, rows, LOW)
            scores = tl.where(left > 0, scores * left, 0.0)
            dvalues += multiply(tl.trans(scores), grads, LOW)

    dkeys = dkeys * scale - 2.0 * norm * dlog[:, None] * keys.to(tl.float32)
    at = bg * n + j
    inside = j < n
    tl.store(dgain + at, dlog, mask=inside)
    tl.store(
        dk + at[:, None] * D + wide[None, :],
        dkeys.to(dk.dtype.element_ty),
        mask=inside[:, None] & (wide < D)[None, :],
    )
    tl.store(
        dv + at[:, None] * E + columns[None, :],
        dvalues.to(dv.dtype.element_ty),
        mask=inside[:, None] & (columns < E)[None, :],
    )

"""The kernels that go along a sequence: numbers of each token, the state before each chunk, and the gradients there.

`prepare` and `pull_division` take each chunk by itself. `states` walks over the chunks, one program for some features
of a head, and leaves the state before each; `pull_states` walks back, and leaves the gradient at the state after each.
`pull_decay` sums up what the keys' gradients say of decay.

Letters: as in `blocks.py`; `x` batch times key heads `(g b)`, `T` chunks, `R` queries per key. `d` before a name is the
gradient there; `delta` is out . dout less the gradient at the mass.
"""

import triton
import triton.language as tl

from performer_lm.ops.linear.triton.blocks import (
    EMPTY,
    LENGTHS,
    LOG2_E,
    load_if,
    load_mass,
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
def pull_division(
    out, dout, dmass, delta, do_b, do_h, do_n, n, H,
    E: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, HAS_MASS: tl.constexpr,
):  # fmt: skip
    """Write out . dout less the gradient at log2 of the mass."""
    t, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, columns = t * C + tl.arange(0, C), tl.arange(0, BE)
    inside, at = i < n, bh * n + i
    where = inside[:, None] & (columns < E)[None, :]
    grads = dout + bh // H * do_b + bh % H * do_h + i[:, None].to(tl.int64) * do_n + columns[None, :]
    found = tl.load(out + at[:, None] * E + columns[None, :], mask=where, other=0.0)
    found = tl.sum(found * tl.load(grads, mask=where, other=0.0).to(tl.float32), axis=1)
    if HAS_MASS:
        found -= tl.load(dmass + at, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    tl.store(delta + at, found, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def pull_states(
    q, dout, delta, lse, faded, documents, weight, rest, bias, c, dafter,
    dS, dZ, dbefore,
    q_b, q_h, q_n, do_b, do_h, do_n, n, T, B, G,
    factor: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Write the gradients at the sums after each chunk and before the first, over 2^-c of their place."""
    x, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = x % B, x // B
    bg = b * G + g
    features, columns = tile * BM + tl.arange(0, BM), tl.arange(0, BE)
    real = features < M
    rows, low = load_projection(weight, rest, g, features, M, D, BD, LOW)
    held = real[:, None] & (columns < E)[None, :]
    first = x * M * (E + 1)
    cells = features[:, None] * (E + 1) + columns[None, :]
    total = tl.load(dafter + first + cells, mask=held, other=0.0)
    mass = tl.load(dafter + first + features * (E + 1) + E, mask=real, other=0.0)
    slot = (x * (T + 1) + T) * M
    after = tl.load(c + slot + features, mask=real, other=EMPTY)
    for back in range(T):
        t = T - 1 - back
        slot = (x * T + t) * M
        tl.store(dS + slot * E + features[:, None] * E + columns[None, :], total.to(dS.dtype.element_ty), mask=held)
        tl.store(dZ + slot + features, mass, mask=real)
        slot = (x * (T + 1) + t) * M
        size = tl.load(c + slot + features, mask=real, other=EMPTY)
        last = tl.minimum((t + 1) * C, n) - 1
        past = size
        if HAS_DECAY:
            past = past + tl.load(faded + bg * n + last)
        remains = tl.exp2((past - after).to(tl.float32))
        if HAS_DOCUMENTS:
            document = documents + b * (n + 1)
            before = tl.load(document + t * C)
            remains = tl.where(before == tl.load(document + 1 + last), remains, 0.0)
        total, mass, after = total * remains[:, None], mass * remains, size
        top = tl.max(size, axis=0)
        raise_by = (size - top).to(tl.float32)
        i = t * C + tl.arange(0, C)
        inside = i < n
        faded_i = load_if(HAS_DECAY, faded + bg * n, i, inside)
        for r in range(R):
            bh = (b * G + g) * R + r
            h = g * R + r
            queries = load_rows(q + b * q_b + h * q_h, i, inside, q_n, D, BD, LOW)
            grads = load_rows(dout + b * do_b + h * do_h, i, inside, do_n, E, BE, LOW)
            at = bh * n + i
            masses, sees = load_mass(lse, at, inside)
            if HAS_DOCUMENTS:
                sees = sees & (tl.load(document + 1 + i, mask=inside, other=-1) == before)
            own = tl.load(delta + at, mask=inside, other=0.0)
            logs = project(queries, rows, low, bias + g * M, features, factor, M, HAS_BIAS, LOW) + raise_by[None, :]
            logs += (top - masses + faded_i).to(tl.float32)[:, None]
            share = narrow(tl.where(sees[:, None], tl.exp2(logs), 0.0), LOW)
            total += multiply(tl.trans(share), grads, LOW)
            mass -= tl.sum(share.to(tl.float32) * own[:, None], axis=0)
    tl.store(dbefore + first + cells, total, mask=held)
    tl.store(dbefore + first + features * (E + 1) + E, mass, mask=real)


@triton.jit(do_not_specialize=LENGTHS)
def pull_decay(dgain, before, dlog_decay, n, T, B, G, C: tl.constexpr):
    """Write the gradient at log_decay: to fade at a token is to weaken all keys before it."""
    bg = tl.program_id(0).to(tl.int64)
    earlier = tl.load(before + (bg % G) * B + bg // G).to(tl.float64)
    for t in range(T):
        places = t * C + tl.arange(0, C)
        own = tl.load(dgain + bg * n + places, mask=places < n, other=0.0).to(tl.float64)
        found = earlier + tl.cumsum(own, axis=0) - own
        tl.store(dlog_decay + bg * n + places, found.to(dlog_decay.dtype.element_ty), mask=places < n)
        earlier += tl.sum(own, axis=0)

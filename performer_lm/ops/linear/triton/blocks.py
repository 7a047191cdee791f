"""Parts that the kernels of linear attention share: a chunk's tokens, their features, and what is left of a key.

Logarithms are base 2. Those of a chunk's keys are relative to its `origin`, a float64 number near the largest gain, as
float32 is finest near zero; an absent key's gain is -inf, so that it weighs nothing wherever it is loaded.

Letters: `C` tokens of a chunk, `i` queries, `j` keys, `BM` features of a tile, `BD`, `BE` widths of heads and values,
rounded up to what a product takes.
"""

import os

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2.0**100))
"""The exponent of nothing, as in `state.py`."""
SHIFT = tl.constexpr(40.0)
"""The exponent of a query's largest feature, as in `chunks.py`."""
REACH = tl.constexpr(120.0)
"""How many factors of 2 a feature's keys may span in a chunk, as in `chunks.py`."""
LOG2_E = tl.constexpr(1.4426950408889634)
LENGTHS = ["n", "T", "B", "G"]
"""Arguments of which a kernel is not compiled anew for each value."""
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether bfloat16 is rounded to but held in float32: the interpreter multiplies and sums bfloat16 wrongly."""


@triton.jit
def narrow(x, LOW: tl.constexpr):
    """Round an operand of a product to bfloat16 if `LOW`."""
    if LOW:
        x = x.to(tl.bfloat16)
        if WIDEN:
            x = x.to(tl.float32)
    return x


@triton.jit
def multiply(x, y, LOW: tl.constexpr):
    """Multiply two matrices, in bfloat16 if `LOW`, else to float32's precision, by three products of TF32."""
    if LOW:
        found = tl.dot(narrow(x, LOW), narrow(y, LOW))
    else:
        found = tl.dot(x, y, input_precision="tf32x3")
    return found


@triton.jit
def load_rows(pointer, places, there, stride, WIDTH: tl.constexpr, BWIDTH: tl.constexpr, LOW: tl.constexpr):
    """Load the rows of tokens `(C, BWIDTH)`, zeros where they are not there."""
    columns = tl.arange(0, BWIDTH)
    where = pointer + places[:, None] * stride + columns[None, :]
    x = tl.load(where, mask=there[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return narrow(x, True) if LOW else x.to(tl.float32)


@triton.jit
def load_projection(weight, rest, g, features, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, LOW: tl.constexpr):
    """Load the rows of a projection `(BM, BD)` and, if `LOW`, what their rounding left; zeros past the end."""
    columns = tl.arange(0, BD)
    there = (features < M)[:, None] & (columns < D)[None, :]
    cells = g * M * D + features[:, None] * D + columns[None, :]
    rows = tl.load(weight + cells, mask=there, other=0.0)
    low = rows
    if LOW:
        rows = narrow(rows, LOW)
        low = narrow(tl.load(rest + cells, mask=there, other=0.0), LOW)
    return rows, low


@triton.jit
def project(x, rows, low, bias, features, factor, M: tl.constexpr, HAS_BIAS: tl.constexpr, LOW: tl.constexpr):
    """Compute log features `(C, BM)`: factor W x + bias; -inf past the last feature.

    In bfloat16 the projection is two numbers, its rounding and what that left: x is exact, so features are float32.
    """
    if LOW:
        logs = tl.dot(x, tl.trans(rows)) + tl.dot(x, tl.trans(low))
    else:
        logs = tl.dot(x, tl.trans(rows), input_precision="tf32x3")
    logs = logs * factor
    if HAS_BIAS:
        logs += tl.load(bias + features, mask=features < M, other=0.0)[None, :] * LOG2_E
    return tl.where((features < M)[None, :], logs, -float("inf"))


@triton.jit
def find_middle(logs, present):
    """Return the scale of each feature `(BM,)`: midway between its loudest and its quietest key `(C, BM)`."""
    high = tl.max(logs, axis=0)
    low = tl.min(tl.where(present[:, None], logs, float("inf")), axis=0)
    return tl.where(high > -float("inf"), tl.floor((high + low) * 0.5), 0.0)


@triton.jit
def fade(i, j, faded_i, faded_j, present, document_i, document_j, HAS_DOCUMENTS: tl.constexpr):
    """Return log2 of what is left of key j at query i `(i, j)`; -inf for what i does not see."""
    visible = (j[None, :] <= i[:, None]) & present[None, :]
    if HAS_DOCUMENTS:
        visible = visible & (document_i[:, None] == document_j[None, :])
    return tl.where(visible, (faded_i[:, None] - faded_j[None, :]).to(tl.float32), -float("inf"))


@triton.jit
def load_if(HAS: tl.constexpr, pointer, places, there):
    """Load numbers of tokens, or zeros where there are none to load."""
    if HAS:
        found = tl.load(pointer + places, mask=there, other=0)
    else:
        found = tl.zeros_like(places)
    return found


@triton.jit
def load_mass(lse, at, inside):
    """Load log2 of the queries' denominators, and which queries see anything."""
    found = tl.load(lse + at, mask=inside, other=-float("inf"))
    sees = found > -float("inf")
    return tl.where(sees, found, 0.0), sees

"""Compile every kernel of linear attention for a GPU that is not here, and print what each takes, as JSON.

python compile_kernels.py CAPABILITY WIDTH [NAME ...]
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from performer_lm.ops.linear.triton import gradients, launch, outputs, states

WIDE = {"origin", "c", "lse", "exponent", "faded"}
NARROW = {"weight", "rest", "q", "k", "v", "dout", "dq", "dk", "dv", "S", "dS"}
STRIDES = re.compile(r".*_[bhgn]$")


def kind(name: str) -> str:
    """Return the type of an argument."""
    if name in ("n", "T", "B", "G", "H") or STRIDES.match(name):
        return "i32"
    return {"documents": "*i32", "mask": "*i8"}.get(
        name, "*fp64" if name in WIDE else "*bf16" if name in NARROW else "*fp32"
    )


def compile_kernel(kernel: Any, capability: int, width: int, *, exact: bool) -> dict[str, Any]:
    """Compile one kernel with decay and documents."""
    m = 2 * width
    chosen = {
        **{"factor": 0.5, "scale": 0.35, "norm": 0.06, "M": m, "D": width, "E": width, "BD": width, "BE": width},
        **{"C": launch.CHUNK, "TILES": max(1, m // 32), "ALL": m, "R": 1, "HAS_MASS": True},
        **{
            "HAS_BIAS": False,
            "HAS_DECAY": True,
            "HAS_DOCUMENTS": True,
            "HAS_GAIN": True,
            "HAS_MASK": True,
            "LOW": True,
        },
        **{"EXACT": exact, "BI": launch.EXACT_ROWS},
    }
    if not exact and kernel.__name__ in launch.OPTIONS:
        chosen["BI"] = launch.OPTIONS[kernel.__name__].rows
    options = {"num_warps": 4}
    if kernel.__name__ in launch.OPTIONS:
        options = launch.choose_options(kernel.__name__, m, wide=width > 64)
        chosen["BM"] = options.pop("BM")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in chosen else kind(name) for name in names}
    constants = {name: chosen[name] for name in names if name in chosen}
    aligned = [place for place, name in enumerate(names) if signature[name].startswith("*") or STRIDES.match(name)]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {(place,): [["tt.divisibility", 16]] for place in aligned}),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    code = compiled.asm["ptx"]
    architecture = code.split(".target ")[1].split()[0].strip(",")
    assembler = next((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas"))
    command = [str(assembler), "-v", "--gpu-name", architecture, "-", "-o", "/dev/null"]
    report = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert spilled is not None, report
    return {"shared": compiled.metadata.shared, "spilled": int(spilled[1]), "matrix": "mma" in code}


def main() -> None:
    """Compile the kernels named, or all, in both forms where there are two."""
    capability, width, *names = sys.argv[1:]
    twice = (outputs.outputs, gradients.pull_queries, gradients.pull_keys)
    once = (states.prepare, states.states, states.pull_division, states.pull_states, states.pull_decay)
    forms = [(kernel, exact) for kernel in twice for exact in (False, True)] + [(kernel, False) for kernel in once]
    found = {
        kernel.__name__ + " exactly" * exact: compile_kernel(kernel, int(capability), int(width), exact=exact)
        for kernel, exact in forms
        if not names or kernel.__name__ in names
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

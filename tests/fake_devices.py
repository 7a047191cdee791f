"""Run models on a device that this machine has not: python fake_devices.py LIBRARY JOB...

Tensors hold no numbers (`FakeTensorMode`), but devices and dtypes are checked: what stands on two devices, or is
float64 on an Apple GPU, is an error here as it is there. Where the host looks at a number, it is told 0, and the look
is counted. Kernels are not run: what they refuse is not seen.

A job is a device (cuda or mps) and overrides of configs/train.yaml, with blanks between. For each, a line of json says
how often the host looked in a training step and in a decoding step, or what failed.
"""

import ctypes
import json
import os
import subprocess
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
TINY = ["model.dim=32", "model.depth=2", "model.heads=4", "model.dim_head=8", "model.local.window=5", "data.context=64"]
TINY_PAIR = ["model.dim=32", "model.encoder.heads=4", "model.decoder.heads=4", "data.context=64"]  # of two stacks


def register_devices(library: Path) -> None:
    """Load what torch asks of an accelerator, compiled where it is not yet; torch must not be imported before."""
    assert "torch" not in sys.modules
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch = Path(found.origin).parent
    if not library.exists():
        words = ["-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
        source = HERE / "fake_devices.cpp"
        subprocess.run(["g++", *words, source, "-o", library, "-lc10", "-ltorch_cpu"], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def run(device: str, overrides: list[str], mode: Any) -> dict[str, int]:
    """Take a training step and decode a token in a `FakeTensorMode`; return the host's looks at numbers in each."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from performer_lm import checkpoint
    from performer_lm.attention.favor import FavorAttention
    from performer_lm.attention.joining import join_rows
    from performer_lm.data.windows import IGNORE
    from performer_lm.evaluation.approximation.layer import measure_approximation
    from performer_lm.training.callbacks.stability import StabilityMonitor
    from performer_lm.training.optim import parameter_groups
    from performer_lm.training.task import Sums

    class Watch(TorchDispatchMode):
        """Counts looks, which see 0, and refuses float64 where there is none."""

        looks = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                self.looks += 1
                return 0
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.device.type == "mps" and x.dtype == torch.float64:
                    raise TypeError(f"{func} makes float64 on mps, which has none")
            return out

    def place(module: torch.nn.Module) -> None:
        """Put parameters and buffers on the device; tied ones stay tied."""
        moved: dict[int, Any] = {}
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, value in held.items():
                    if value is not None:
                        there = moved.get(id(value), torch.empty_like(value, device=device, requires_grad=False))
                        is_new_weight = held is part._parameters and id(value) not in moved
                        moved[id(value)] = torch.nn.Parameter(there) if is_new_weight else there
                        held[name] = moved[id(value)]

    os.environ["FAKE_DEVICE"] = device
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *arguments, **options: (
        device == "cuda"
    )  # autocast asks
    with initialize_config_dir(str(HERE.parent / "configs"), version_base="1.3"):
        tiny = TINY_PAIR if "model=performer_seq2seq" in overrides else TINY
        cfg = compose("train", overrides=[*tiny, *overrides])
    section: Any = OmegaConf.to_container(cfg.model, resolve=True)
    with mode:
        model = checkpoint.build({**section, "vocab_size": 40})
        place(model)
        objective = instantiate(cfg.objective)
        objective.adopt(SimpleNamespace(special_id=lambda name: 39, num_pieces=39))
        optimizer = instantiate(cfg.optimizer)(parameter_groups(model, head=model.head))
        windows = torch.zeros(2, 34, dtype=torch.int64, device=device)
        with Watch() as training:
            with torch.autocast(device, torch.bfloat16):
                losses = objective(model, windows, step=0, separator=None)
            sums = Sums.zero(losses.nats.device, counts=1)
            sums.add(losses.nats, (losses.targets != IGNORE).sum())
            StabilityMonitor(window=2, threshold=1.0)._take_in((sums.nats / sums.counts[0]).float(), 1)
            objective.mean(losses).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        for layer in model.modules():
            is_moved = device == "mps"  # to the host, for float64; weights that are fake cannot be
            if isinstance(layer, FavorAttention) and not (is_moved and any(True for _ in layer.parameters())):
                q, k, v = torch.zeros(3, 2, layer.heads, 5, layer.dim_head, device=device).unbind()
                with Watch():
                    measure_approximation(layer, q, k, v, log_decay=torch.zeros(2, layer.heads, 5, device=device))
        with Watch() as decoding, torch.inference_mode():
            model.eval()
            if not model.decodes:
                return {"training": training.looks, "decoding": 0}
            _, state = model.start(windows, mask=None, max_len=40)
            decoding.looks = 0
            model.extend(windows[:, :1].repeat(2, 1), join_rows([state, state]))
            model.extend(windows[:, :1], state)
    return {"training": training.looks, "decoding": decoding.looks}


if __name__ == "__main__":
    library, *jobs = sys.argv[1:]
    register_devices(Path(library))
    from torch._subclasses import FakeTensorMode

    FakeTensorMode.__deepcopy__ = lambda self, memo: self  # a copy of a tensor is in the same mode
    mode = FakeTensorMode()  # one for all: projections are kept from job to job
    for job in jobs:
        device, *overrides = job.split()
        try:
            print(json.dumps(run(device, overrides, mode)), flush=True)
        except Exception:  # of any kind: the test shows it with its job
            print(json.dumps({"error": traceback.format_exc()}), flush=True)

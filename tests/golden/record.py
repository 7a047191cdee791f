"""Record golden checkpoints: `python tests/golden/record.py [NAME ...]` writes those that are missing, or those named.

A golden checkpoint is step 4 of a run of 8 steps. Beside it, in `backends.json`, stand its logits and the losses of
steps 5 to 8, which any later version has to give again. A file is recorded once, by the version that first could; those
whose words name no `attn` by one whose default was attn=favor.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).parent
ROOT = GOLDEN.parents[1]
RECORD = GOLDEN / "backends.json"
RUN = [
    *("data=files", "data.path=text.txt", "tokenizer=characters", "data.context=32", "data.batch_size=4"),
    *("data.validation_bytes=1024", "optimizer=adamw", "schedule=constant", "trainer.accelerator=cpu"),
    *("trainer.precision=32-true", "trainer.max_steps=8", "trainer.val_every=8", "trainer.log_every=1"),
    *("trainer.save_every=4", "~callbacks.samples", "model.dim=8", "model.tie_embeddings=true"),
]
STACK = ["model.depth=1", "model.heads=2"]
CASES: dict[str, list[str]] = {
    "favor": ["attn=favor", "attn.redraw_interval=3", *STACK],
    "hyperbolic": ["attn/features=hyperbolic", "attn.features.centred=true", "attn.num_features=8", *STACK],
    "optimal": ["attn/features=optimal", "attn.num_features=8", *STACK],
    "learned": ["attn/features=learned", "attn.num_features=8", "callbacks.ema.decay=0.9", *STACK],
    "taylor2": ["attn/features=taylor2", *STACK],
    "relu": ["attn=relu", "attn.num_features=8", *STACK],
    "linear": ["attn=linear", *STACK],
    "exact": ["attn=exact", "attn.dropout=0.1", *STACK],
    "chunked": ["attn=chunked", "attn.key_chunk_size=8", *STACK],
    "flash": ["attn=flash", *STACK],
    "flash_tiled": ["attn=flash_tiled", *STACK],
    "local": ["attn=local", "attn.window=6", *STACK],
    "delta": ["attn=delta", "attn/features=positive", "attn.num_features=8", *STACK],
    "hybrid": [
        *("attn=hybrid", "attn.pattern=[favor,local,flash]", "model.depth=3", "model.heads=2"),
        *("attn.backends.local.window=8", "attn.backends.favor.num_features=8"),
    ],
    "local_heads": ["model.local_heads=1", "model.local.window=6", "attn.num_features=8", *STACK],
    "reversible": ["model.reversible=true", "attn.num_features=8", "model.depth=2", "model.heads=2"],
    "classic": ["model=performer_classic", "attn.num_features=8", "model.local.window=6", "model.qk_norm=8", *STACK],
    "encoder": ["model=performer_encoder", "objective=mlm", "tokenizer.specials=[mask]", "attn.num_features=8", *STACK],
    "seq2seq": [
        *("model=performer_seq2seq", "objective=seq2seq", "attn.num_features=8"),
        *(f"model.{stack}.{size}" for stack in ("encoder", "decoder") for size in ("depth=1", "heads=2")),
    ],
}


def write_text(path: Path) -> None:
    """Write the text that the golden runs train on."""
    path.write_text("".join(f"line {index} says {index * 37 % 101}\n" for index in range(600)))


def logits_of(path: Path) -> list[float]:
    """Return what a checkpoint's model makes of fixed tokens, flattened."""
    from performer_lm import checkpoint
    from performer_lm.encoder_decoder import PerformerEncoderDecoder

    model, _ = checkpoint.open_model(checkpoint.read(path))
    tokens = (torch.arange(24)[None] * 37) % 256
    with torch.inference_mode():
        logits = model(tokens, tokens[:, :9]) if isinstance(model, PerformerEncoderDecoder) else model(tokens)
    return [round(float(value), 7) for value in logits[:, ::4, ::8].flatten()]


def losses_of(run: Path) -> list[float]:
    """Return the losses of steps 5 to 8 and the last validation's."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [row["train/loss"] for row in rows if "train/loss" in row and row["step"] > 4]
    return [*train, *(row["val/loss"] for row in rows if "val/loss" in row)]


def record(name: str) -> dict[str, list[float]]:
    """Train a case, keep its checkpoint of step 4, and return its logits and losses."""
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "text.txt")
        command = [sys.executable, str(ROOT / "train.py"), *RUN, *CASES[name], "run_dir=run"]
        subprocess.run(command, cwd=folder, check=True)
        file = GOLDEN / "backends" / f"{name}.ckpt"
        file.parent.mkdir(exist_ok=True)
        shutil.copy(next(Path(folder, "run/checkpoints").glob("step=000004*.ckpt")), file)
        return {"logits": logits_of(file), "losses": losses_of(Path(folder, "run"))}


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        if case not in known or case in sys.argv:
            known[case] = record(case)
            entries = (f" {json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known))
            RECORD.write_text("{\n" + ",\n".join(entries) + "\n}\n")

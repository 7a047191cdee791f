"""Generate as a config says: one text, printed as it is made, or many continuations as jsonl."""

import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from performer_lm.cli.errors import usage_errors
from performer_lm.cli.opening import Opened, open_from
from performer_lm.generation.batch import complete
from performer_lm.generation.decode import Prefix
from performer_lm.generation.interactive import interact
from performer_lm.generation.prompts import as_json_lines, read_prompts
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.session import Session
from performer_lm.generation.states import load_state, save_state
from performer_lm.writing import replacing


def generate(cfg: DictConfig) -> None:
    """Continue what a config names, and print it; notes go to stderr.

    Raises:
        UsageError: for the first mistake, before anything is printed.
    """
    with usage_errors():
        _check_together(cfg)
        options = _options(cfg)
        with redirect_stdout(sys.stderr):
            opened = open_from(cfg)
        after = load_state(Path(cfg.state), opened.model, opened.tokenizer) if cfg.state else None
        if _makes_lines(cfg):
            return _write_lines(cfg, opened, after, options)
        session = Session(opened.model, opened.tokenizer, **options)
        session.resume(after)
        prompt = _prompt(cfg)
        if prompt or not cfg.interactive:
            session.read(prompt)
        if cfg.save_state:
            save_state(Path(cfg.save_state), session.read(), opened.model, opened.tokenizer)
    if cfg.interactive:
        return interact(session, Console())
    print(prompt, end="", flush=True)
    for piece in session.write():
        print(piece, end="", flush=True)
    print()
    return None


def _check_together(cfg: DictConfig) -> None:
    if cfg.prompts and cfg.prompt:
        raise ValueError("prompts and prompt both say what to continue: give one of them")
    if cfg.interactive and cfg.prompt == "-":
        raise ValueError("interactive reads turns from standard input, which prompt=- reads to its end")
    for key in ("save_state", "interactive"):
        if cfg[key] and _makes_lines(cfg):
            raise ValueError(f"{key} is of one text: it goes with none of prompts, out, num_samples, best_of, beams")


def _makes_lines(cfg: DictConfig) -> bool:
    return bool(cfg.prompts or cfg.out) or (cfg.num_samples, cfg.best_of, cfg.beams) != (1, None, None)


def _options(cfg: DictConfig) -> dict[str, Any]:
    """Return the options that every way of generating takes."""
    plain: Any = OmegaConf.to_container(cfg)
    sampler = Sampler(**{field.name: plain[field.name] for field in fields(Sampler)})
    stop = [] if cfg.stop is None else [cfg.stop]
    return {"max_new_tokens": cfg.max_new_tokens, "sampler": sampler, "seed": cfg.seed, "stop": stop}


def _prompt(cfg: DictConfig) -> str:
    return sys.stdin.read() if cfg.prompt == "-" else cfg.prompt


def _write_lines(cfg: DictConfig, opened: Opened, after: Prefix | None, options: dict[str, Any]) -> None:
    """Write continuations as jsonl: to standard output as they are made, to a file all or none."""
    prompts = read_prompts(Path(cfg.prompts)) if cfg.prompts else [_prompt(cfg)]
    counts = {name: cfg[name] for name in ("num_samples", "best_of", "beams", "batch_size")}
    made = complete(opened.model, opened.tokenizer, prompts, after=after, **counts, **options)
    if cfg.out is None:
        for line in as_json_lines(prompts, made):
            print(line, end="", flush=True)
        return
    with replacing(Path(cfg.out)) as file:
        file.writelines(line.encode() for line in as_json_lines(prompts, made))

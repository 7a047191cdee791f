"""Serve a trained model over HTTP, as OpenAI's clients ask: `python serve.py ckpt=runs/latest`."""

import importlib.util
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from performer_lm.cli import main, usage_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig


NEEDED = ("starlette", "uvicorn", "jinja2")


def run(cfg: "DictConfig") -> None:
    """Serve the model that a config names, and end as a signal asks: answers being made are ended first."""
    from performer_lm.cli.errors import TERMINATED
    from performer_lm.cli.opening import open_from

    with usage_errors():
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"serve.py needs {', '.join(missing)}: pip install 'performer-lm[serve]'")
        from performer_lm.generation.decode import check_room
        from performer_lm.serving.scheduler import Scheduler
        from performer_lm.serving.server import Server, open_socket
        from performer_lm.serving.wire import Reader

        with redirect_stdout(sys.stderr):
            model, tokenizer, _ = open_from(cfg)
        check_room(model, 0, 0)
        name = cfg.model_name or Path(cfg.ckpt or "latest").name
        rows = {"max_rows": cfg.max_rows}
        scheduler = Scheduler(model, **rows, max_waiting=cfg.max_waiting, prefix_bytes=cfg.prefix_bytes)
        limits = {key: cfg[key] for key in ("max_prompt_tokens", "max_new_tokens", "timeout")}
        reader = Reader(model, tokenizer, name=name, **rows, **limits)
        server = Server(scheduler, reader, max_body_bytes=cfg.max_body_bytes)
        listening = open_socket(cfg.host, cfg.port)
    host, port = listening.getsockname()[:2]
    print(f"{name} is served at http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C ends it", flush=True)
    server.run(sockets=[listening])
    if server.signal is signal.SIGTERM:
        sys.exit(TERMINATED)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(
        run,
        config_name="serve",
        config_path=Path(__file__).parent / "configs",
        keys={
            "ckpt": str,
            "model_name": str | None,
            "host": str,
            "port": Annotated[int, Ge(0), Le(65535)],
            "max_rows": int,
            "max_waiting": int,
            "max_prompt_tokens": int,
            "max_new_tokens": int,
            "max_body_bytes": int,
            "prefix_bytes": int,
            "timeout": float,
            "device": str,
        },
    )

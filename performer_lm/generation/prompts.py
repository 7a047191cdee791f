"""Files of prompts, and the lines of JSON with their continuations."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from performer_lm.generation.text import Row
from performer_lm.wording import short


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: of a `.jsonl` each line's `text`, of any other each line.

    Raises:
        ValueError: for the first line that holds no prompt, by its number, or a file without any.
        OSError: where it cannot be read.
    """
    lines = path.read_bytes().splitlines()
    if not lines:
        raise ValueError(f"{path} holds no prompts")
    read = _text_of_json if path.suffix == ".jsonl" else _text
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(read(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: line {number} is not UTF-8: byte 0x{line[error.start]:02x}") from error
        except ValueError as error:
            raise ValueError(f"{path}: line {number} {error}") from error
    return prompts


def _text(line: str) -> str:
    if not line:
        raise ValueError('is empty; in a .jsonl file {"text": ""} begins a document')
    return line


def _text_of_json(line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {short(line)}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'has no text, as {{"text": "..."}} has: {short(line)}')
    return text


def as_json_lines(prompts: Sequence[str], made: Iterable[Sequence[Row]]) -> Iterator[str]:
    """Yield a line of JSON for each continuation of each prompt, in order."""
    for prompt, rows in zip(prompts, made, strict=True):
        for row in rows:
            yield (
                json.dumps(
                    {
                        "prompt": prompt,
                        "text": row.text,
                        "tokens": row.tokens,
                        "log_probs": row.log_probs,
                        "ending": row.ending,
                        "seconds": round(row.seconds, 3),
                    },
                    ensure_ascii=False,
                )
                + "\n"
            )

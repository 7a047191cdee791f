"""The parameters of OpenAI's requests: names, kinds, and JSON held against them."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final

from performer_lm.generation.sampling import Sampler
from performer_lm.wording import did_you_mean, short

Kind = tuple[type, ...]
NUMBER, WHOLE, FLAG, TEXT = (int, float), (int,), (bool,), (str,)
WORDS: Final[dict[Kind, str]] = {
    NUMBER: "a number",
    WHOLE: "a whole number",
    FLAG: "true or false",
    TEXT: "text",
    (dict,): "an object",
    (list,): "a list",
    (str, list): "text or a list",
}
SAMPLING: Final[dict[str, Kind]] = {
    **dict.fromkeys((each.name for each in fields(Sampler)), NUMBER),
    **dict.fromkeys(("top_k", "repetition_window", "no_repeat_ngram_size"), WHOLE),
    "banned_tokens": (list,),
    "logit_bias": (dict,),
}
COMMON: Final[dict[str, Kind]] = {
    **SAMPLING,
    **dict.fromkeys(("model", "user"), TEXT),
    **dict.fromkeys(("max_tokens", "n", "seed"), WHOLE),
    "stream": FLAG,
    "stream_options": (dict,),
    "stop": (str, list),
}
TEXTS: Final[dict[str, Kind]] = COMMON | {
    "prompt": (str, list),
    "echo": FLAG,
    "logprobs": WHOLE,
}
CHATS: Final[dict[str, Kind]] = COMMON | {
    "messages": (list,),
    "max_completion_tokens": WHOLE,
    "logprobs": FLAG,
    "top_logprobs": WHOLE,
}
MOST_STOPS: Final = 16


def parse(body: bytes, known: dict[str, Kind]) -> dict[str, Any]:
    """Return the parameters of a request that are not null.

    Raises:
        ValueError: for a body that is not JSON, a parameter that is not known, or one of another kind.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the body is not JSON") from error
    if not isinstance(given, dict):
        raise ValueError(f"the body must be an object, got {short(given)}")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"there is no parameter {short(name)} here{did_you_mean(name, known)}")
        if value is not None and type(value) not in known[name]:
            raise ValueError(f"{name}: wanted {WORDS[known[name]]}, got {short(value)}")
    return {name: value for name, value in given.items() if value is not None}


def sampling_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a sampler; JSON has names of ids as texts."""
    options = {name: value for name, value in given.items() if name in SAMPLING}
    if "logit_bias" in options:
        bias = options["logit_bias"]
        options["logit_bias"] = {int(key) if key.isascii() and key.isdigit() else key: bias[key] for key in bias}
    return options


def stop_strings(given: dict[str, Any]) -> Sequence[str]:
    """Return the texts that end a continuation."""
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if (stops and not all_are(stops, str)) or len(stops) > MOST_STOPS:
        raise ValueError(f"stop: wanted text or a list of at most {MOST_STOPS} texts, got {short(stop)}")
    return stops


def messages_of(messages: Any) -> list[dict[str, Any]]:
    """Return messages whose content is text: parts of text, as OpenAI's clients may send them, are put together."""
    if not messages:
        raise ValueError("messages: at least one is needed")
    found = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages: wanted objects with a role and a content of text, got {short(message)}")
        found.append({**message, "content": content})
    return found


def all_are(items: Sequence[Any], kind: type) -> bool:
    """Return True if there are items, all of one type."""
    return bool(items) and all(type(item) is kind for item in items)

"""OpenAI's answers: continuations, whole or token by token, as JSON."""

from collections.abc import Iterator
from typing import Any

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.serving.jobs import Choice, Likeliest, Told
from performer_lm.serving.wire import Asked

Json = dict[str, Any]


def whole_answer(asked: Asked, tokenizer: Tokenizer) -> Json:
    """Return the answer to a request whose continuations are all done."""
    written = []
    for index, choice in enumerate(asked.choices):
        text = _echo(asked, index) + choice.row.text
        told = range(len(choice.row.tokens))
        written.append(_choice(asked, tokenizer, choice, index, text=text, places=told, part="message"))
    return {**_head(asked), "choices": written, "usage": _usage(asked)}


def first_chunks(asked: Asked) -> Iterator[Json]:
    """Yield the first chunks of a streamed answer: a chat's role, and prompts that are given back."""
    for index in range(len(asked.choices)):
        if asked.is_chat:
            delta = {"role": "assistant", "content": ""}
            yield _chunk(asked, {"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        elif _echo(asked, index):
            plain = {"index": index, "text": _echo(asked, index), "logprobs": None, "finish_reason": None}
            yield _chunk(asked, plain)


def chunk(asked: Asked, tokenizer: Tokenizer, told: Told) -> Json | None:
    """Return the chunk of a streamed answer that a token makes; None where its text has not come yet."""
    if not told.text and not told.is_last and asked.log_probs is None:
        return None
    index = next(place for place, choice in enumerate(asked.choices) if choice is told.choice)
    places = range(told.place, told.place + 1)
    written = _choice(asked, tokenizer, told.choice, index, text=told.text, places=places, part="delta")
    return _chunk(asked, written if told.is_last else {**written, "finish_reason": None})


def last_chunks(asked: Asked) -> Iterator[Json]:
    """Yield the last chunks of a streamed answer: the counts of tokens, where asked for."""
    if asked.tells_usage:
        yield {**_head(asked, chunk=True), "choices": [], "usage": _usage(asked)}


def error_body(message: str, *, kind: str, code: str | None = None) -> Json:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _head(asked: Asked, *, chunk: bool = False) -> Json:
    chat = "chat.completion.chunk" if chunk else "chat.completion"
    kind = chat if asked.is_chat else "text_completion"
    return {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}


def _chunk(asked: Asked, choice: Json) -> Json:
    usage = {"usage": None} if asked.tells_usage else {}
    return {**_head(asked, chunk=True), "choices": [choice], **usage}


def _choice(
    asked: Asked, tokenizer: Tokenizer, choice: Choice, index: int, *, text: str, places: range, part: str
) -> Json:
    """Return tokens of a continuation as a choice; a chat's stand in a `message` or a `delta`."""
    ending = "stop" if choice.row.ending == "end" else choice.row.ending
    log_probs: Json | None = None
    if asked.log_probs is not None:
        write = _chat_log_probs if asked.is_chat else _text_log_probs
        log_probs = write(tokenizer, choice, places)
    if not asked.is_chat:
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": ending}
    content = {"role": "assistant", "content": text} if part == "message" else {"content": text}
    return {"index": index, part: content, "logprobs": log_probs, "finish_reason": ending}


def _text_log_probs(tokenizer: Tokenizer, choice: Choice, places: range) -> Json:
    row, tokens = choice.row, [token_text(tokenizer, choice.row.tokens[place]) for place in places]
    own = [row.log_probs[place] for place in places]
    likeliest: list[dict[str, float]] = []
    for place, text, log_prob in zip(places, tokens, own, strict=True):  # the token drawn is always among them
        told = {token_text(tokenizer, token): value for token, value in choice.likeliest[place]}
        likeliest.append({text: log_prob} | told)
    starts = [choice.starts[place] for place in places]
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": likeliest, "text_offset": starts}


def _chat_log_probs(tokenizer: Tokenizer, choice: Choice, places: range) -> Json:
    def told(token: int, log_prob: float) -> Json:
        piece = tokenizer.token_bytes(token)
        return {"token": token_text(tokenizer, token), "logprob": log_prob, "bytes": list(piece)}

    def with_likeliest(token: int, log_prob: float, likeliest: Likeliest) -> Json:
        return {**told(token, log_prob), "top_logprobs": [told(*each) for each in likeliest]}

    row = choice.row
    content = [with_likeliest(row.tokens[place], row.log_probs[place], choice.likeliest[place]) for place in places]
    return {"content": content}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""Return the name of a token: its text, `bytes:\xc3` for part of a character (OpenAI's way), `<|end|>`."""
    if token == tokenizer.end_id:
        return "<|end|>"
    piece = tokenizer.token_bytes(token)
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
    if text:
        return text
    named = {place: name for name, place in tokenizer.specials.items()}
    return f"<|{named.get(token, token)}|>"


def _echo(asked: Asked, index: int) -> str:
    return asked.echoes[index // asked.n] if asked.echoes else ""


def _usage(asked: Asked) -> Json:
    prompt = sum(len(job.ids) for job in asked.jobs)
    made = sum(len(choice.row.tokens) for job in asked.jobs for choice in job.choices)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

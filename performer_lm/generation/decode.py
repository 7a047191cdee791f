"""Decode: read the prompt in parallel once, then extend by one token at a time; no token is ever run twice.

Letters: `b` batch, `n` prompt tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from performer_lm.data.tokenizer import TextStream, Tokenizer
from performer_lm.generation.sampling import Sampler
from performer_lm.language_model import LanguageModel
from performer_lm.ranges import Count, ranged


def decode(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    mask: Tensor | None = None,
    end_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Return the next ids `(b,)` of every row one by one, until `max_new_tokens` or until all rows have ended.

    Args:
        model: in evaluation mode.
        prompt: `(b, n)` ids, on the model's device; shorter rows are padded on the left.
        max_new_tokens: how many to yield at most.
        sampler: how a token is chosen.
        mask: `(b, n)` bool or integer, False or 0 at the padding.
        end_id: the token that ends a row, which from then on yields only it; None: rows do not end.
        generator: source of randomness, on the model's device.

    Raises:
        ValueError: at once, for a model that does not decode, or whose positions end before the last token, and for
            prompts padded elsewhere (`LanguageModel.check_prompt`).
    """
    if not model.decodes:
        raise ValueError("this model sees both sides of a token (objective=mlm): it does not continue text")
    left = model.room_after(prompt.shape[1])
    if left is not None and max_new_tokens > left:
        raise ValueError(
            f"max_new_tokens ({max_new_tokens}) must be at most {left} after a prompt of {prompt.shape[1]} tokens: "
            "the model's learned positions end there"
        )
    mask = model.check_prompt(prompt, mask)

    @torch.inference_mode()
    def steps() -> Iterator[Tensor]:
        logits, state = model.start(prompt, mask=mask, max_len=prompt.shape[1] + max_new_tokens)
        ended = prompt.new_zeros(len(prompt), dtype=torch.bool)
        seen, kept = prompt, torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask
        for index in range(max_new_tokens):
            ids = sampler(logits[:, -1], generator, seen=seen, mask=kept)
            if end_id is not None:
                ids = torch.where(ended, end_id, ids)
                ended = ended | (ids == end_id)
            yield ids
            if index + 1 == max_new_tokens or (end_id is not None and bool(ended.all())):
                return
            last = slice(1 - sampler.repetition_window, None) if sampler.repetition_window > 1 else slice(0, 0)
            seen = torch.cat((seen[:, last], ids[:, None]), dim=1)
            kept = torch.cat((kept[:, last], torch.ones_like(ids[:, None], dtype=torch.bool)), dim=1)
            logits, state = model.extend(ids[:, None], state)

    return steps()


@ranged
def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: Count,
    sampler: Sampler,
    seed: int,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece as it is made; it stops where the model ends the document.

    An empty prompt begins a new document. The model keeps its training or evaluation mode.

    Raises:
        ValueError: at once, for a prompt that cannot be written as UTF-8, and as `decode` does.
    """
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_id]
    device = model.head.weight.device
    tokens = decode(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        end_id=tokenizer.end_id,
        generator=torch.Generator(device).manual_seed(seed),
    )
    stream = TextStream(tokenizer)

    def pieces() -> Iterator[str]:
        for token in tokens:
            yield stream.push(token.tolist())
        yield stream.finish()

    return pieces()

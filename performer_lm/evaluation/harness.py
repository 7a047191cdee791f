"""Models of this package under EleutherAI's lm-evaluation-harness, read and continued by our own engine.

    lm_eval.simple_evaluate(model=HarnessModel(model, tokenizer), tasks=["lambada_openai"])

Needs `pip install 'performer-lm[eval]'`; nothing else here imports it. Letters: `b` batch, `n` tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from performer_lm.data.tokenizer import Tokenizer
from performer_lm.data.windows import IGNORE
from performer_lm.evaluation.base import check_next_token
from performer_lm.evaluation.scoring import score_rows
from performer_lm.generation.batch import complete
from performer_lm.generation.sampling import Sampler
from performer_lm.language_model import LanguageModel
from performer_lm.ranges import Count, ranged

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ModuleNotFoundError(
        f"performer_lm.evaluation.harness needs lm-evaluation-harness: pip install 'performer-lm[eval]' ({error})"
    ) from error

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # names of one option, the first one given counts
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@ranged
@final
class HarnessModel(TemplateLM):
    """A model as lm-evaluation-harness asks it.

    Texts are read whole, from a document's start on, with a decoding state: no window cuts them.

    Args:
        model: in evaluation mode; it predicts each next token.
        tokenizer: the model's.
        batch_size: texts at a time.
        max_new_tokens: of tasks that name no length.

    Raises:
        ValueError: for a model of another objective.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, batch_size: Count = 8, max_new_tokens: Count = 256
    ) -> None:
        super().__init__()
        self.model = check_next_token(model, "lm-evaluation-harness")
        self.ids, self.batch_size, self.max_new_tokens = tokenizer, batch_size, max_new_tokens

    @property
    def device(self) -> torch.device:
        """Return the model's device."""
        return self.model.head.weight.device

    @property
    def eot_token_id(self) -> int:
        """Return the id that begins and ends a document."""
        return self.ids.end_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return the ids of a text."""
        return self.ids.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context + text, len(text)) for _, context, text in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, read once from the start of a document on."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        return [nats for nats, _ in self._score([([self.eot_token_id, *text], len(text)) for text in texts])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to its first stop string.

        Raises:
            ValueError: for an option of a task that our sampler does not have.
        """
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for group in groups.values():
            contexts = [requests[index].args[0] for index in group]
            options = self._options(requests[group[0]].args[1])
            made = complete(self.model, self.ids, contexts, batch_size=self.batch_size, **options)
            for index, (row,) in zip(group, made, strict=True):
                found[index] = row.text
        return found

    def _options(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of `complete` that a task's `generation_kwargs` ask for; greedy where they do not."""
        left = dict(asked)
        stop = left.pop("until", None) or []
        lengths = [length for name in LENGTHS if (length := left.pop(name, None)) is not None]
        sampling = {name: left.pop(name) for name in SAMPLING if left.get(name) is not None}
        if not left.pop("do_sample", sampling.get("temperature", 0) > 0):
            sampling["temperature"] = 0.0
        if left:
            raise ValueError(
                f"generation_kwargs.{next(iter(left))}: unknown; taken are until, do_sample, "
                f"{', '.join((*LENGTHS, *SAMPLING))}"
            )
        return {
            "stop": [stop] if isinstance(stop, str) else [text for text in stop if text],
            "max_new_tokens": (lengths or [self.max_new_tokens])[0],
            "sampler": Sampler(**sampling),
        }

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of the last ids of each row, so many, and whether each of them is the likeliest."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(
            range(len(rows)), key=lambda index: -len(rows[index][0])
        )  # rows of a batch are of about a length
        for first in range(0, len(order), self.batch_size):
            group = order[first : first + self.batch_size]
            longest = len(rows[group[0]][0])
            tokens = torch.full((len(group), longest), IGNORE)
            targets = torch.full((len(group), longest - 1), IGNORE)
            for row, (ids, count) in enumerate(rows[index] for index in group):
                tokens[row, : len(ids)] = torch.tensor(ids)
                targets[row, len(ids) - 1 - count : len(ids) - 1] = tokens[row, len(ids) - count : len(ids)]
            for index, own in zip(group, score_rows(self.model, tokens[:, :-1].clamp(min=0), targets), strict=True):
                found[index] = (-float(own.nats.sum()), bool(own.right.all()))
        return found

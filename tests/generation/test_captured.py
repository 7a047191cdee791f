"""Captured steps on a CPU: what a graph would repeat is recorded and repeated by stand-ins for CUDA's graphs."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from performer_lm import checkpoint
from performer_lm.attention.base import fork
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation import captured
from performer_lm.generation.beams import search_beams
from performer_lm.generation.captured import PATIENCE, Steps, advance
from performer_lm.generation.decode import Prefix, draw_tokens, read
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.session import Session
from performer_lm.generation.states import load_state, save_state
from performer_lm.model import PerformerLM
from performer_lm.performer import PerformerState
from performer_lm.serving.jobs import Job
from performer_lm.serving.scheduler import Scheduler

Build = Callable[..., PerformerLM]
Graphs = Callable[[], list["FakeGraph"]]
BYTES = ByteTokenizer()
DEFAULT = [
    "model.depth=1",
    "model.dim=64",
    "model.heads=2",
    "model.dim_head=32",
    "model.local_heads=1",
]  # wide heads, one of them local
FEATURES = ("generalized", "hyperbolic", "identity", "learned", "optimal", "positive", "taylor2")
FIXED = [
    *(f"attn={name}" for name in ("favor", "relu", "linear", "delta", "local")),
    *(" ".join([*DEFAULT, f"attn={name}"]) for name in ("favor", "delta")),
    *("attn=hybrid attn.pattern=[favor,delta] model.depth=2", "model.token_shift=true model/positions=rotary"),
    "model/absolute=learned model.absolute.max_len=64",
]
MORE = [
    *(f"attn=favor attn/features={name} attn.num_features=null" for name in FEATURES),
    *(
        f"attn=delta attn/features={name} attn.num_features=null"
        for name in FEATURES
        if name not in ("optimal", "taylor2")
    ),
    *(
        "attn=hybrid attn.pattern=[linear,local] model.depth=2",
        "attn=hybrid attn.pattern=[relu,delta,local] model.depth=3",
    ),
    *(f"model.key_heads=2 {more}" for more in ("attn=favor", "attn=delta", "model.local_heads=2")),
    *("model/absolute=sinusoidal", "model/absolute=axial model.absolute.shape=[8,8]", "model/positions=rotary"),
    *(f"model.{name}=false" for name in ("decay", "gate")),
    *(f"model.{option}" for option in ("convolution=0", "convolution=7", "token_shift=true", "qk_norm=8")),
    *("model.reversible=true", "model.tie_embeddings=true", "model=performer_classic"),
]
GROWING = ["attn=flash", "attn=exact", "attn=hybrid attn.pattern=[favor,flash]", "attn=chunked model.local_heads=1"]


class FakeGraph(TorchDispatchMode):
    """Records operations, and repeats them with the arguments and into the memory of the first time, as CUDA graphs do.

    As in a capture, no number may be looked at, and nothing is left of having run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.undo: list[tuple[Tensor, Tensor]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs[argument.name]
                self.undo.append((given, given.clone()))
        out = func(*args, **kwargs)
        is_new = all(returned.alias_info is None for returned in func._schema.returns)
        self.calls.append((func, args, kwargs, [x for x in tree_leaves(out) if isinstance(x, Tensor) and is_new]))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for *_, made in self.calls:
            for x in made:
                x.fill_(math.nan if x.is_floating_point() else 0)
        for x, before in reversed(self.undo):
            x.copy_(before)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self.calls:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for x, new in zip(made, again, strict=bool(made)):
                x.copy_(new)


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no step look at a number, in captured steps and in those that these are compared with."""
    monkeypatch.setattr("performer_lm.ops.linear.step._must_look_blindly", lambda x: True)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Return a function from which on the CPU's steps are captured; it returns the list of the graphs to come."""
    made: list[FakeGraph] = []

    def graph() -> FakeGraph:
        made.append(FakeGraph())
        return made[-1]

    def start() -> list[FakeGraph]:
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(captured, "DEVICE", "cpu")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda own, *, stream, capture_error_mode: own)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda given: nullcontext())
        return made

    return start


def prompt_of(rows: int = 2, vocab: int = 40) -> Tensor:
    return torch.randint(0, vocab, (rows, 9), generator=torch.Generator().manual_seed(0))


def draws(model: PerformerLM, prefix: Prefix, count: int = 30, **options: Any) -> list[tuple[Tensor, Tensor]]:
    own = {"sampler": Sampler(temperature=0), **options}
    return [(each.ids, each.logits) for each in draw_tokens(model, prefix, max_new_tokens=count, **own)]


def assert_same(found: list[tuple[Tensor, Tensor]], wanted: list[tuple[Tensor, Tensor]]) -> None:
    assert torch.equal(torch.stack([ids for ids, _ in found]), torch.stack([ids for ids, _ in wanted]))
    for (_, one), (_, other) in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("overrides", [*FIXED, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE)])
@torch.no_grad()
def test_a_step_traced_once_decodes_fifty_tokens(lively_model: Build, overrides: str) -> None:
    """A trace keeps the values that Python had in one step, as a graph does: nothing of a step may live in Python."""
    model, ids = lively_model("model.depth=1", *overrides.split()), torch.randint(0, 40, (2, 59))
    _, state = model.start(ids[:, :9])
    leaves, structure = tree_flatten(fork(state))

    def step(ids: Tensor, *leaves: Tensor | None) -> Tensor:
        return advance(model, ids, tree_unflatten(leaves, structure))

    traced = make_fx(step)(ids[:, 9], *tree_leaves(fork(state)))
    for place in range(9, 59):
        wanted, state = model.extend(ids[:, place : place + 1], state)
        found = traced(ids[:, place], *leaves)
        torch.testing.assert_close(found, wanted[:, -1], atol=1e-12, rtol=1e-12)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "an end": lambda: {"end_id": 7},
    "an end for each row": lambda: {"end_id": torch.tensor([7, 3])},
    "drawn": lambda: {"sampler": Sampler(top_k=20), "generator": torch.Generator().manual_seed(3)},
    "a generator for each row": lambda: {
        "sampler": Sampler(top_p=0.9),
        "generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)],
    },
    "penalties": lambda: {"sampler": Sampler(temperature=0, frequency_penalty=0.5, no_repeat_ngram_size=2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("attn", ["favor", "delta"])
def test_captured_draws_are_those_of_the_model(
    lively_model: Build, graphs: Graphs, attn: str, options: Callable[[], dict[str, Any]]
) -> None:
    model = lively_model(*DEFAULT, f"attn={attn}")
    prefix = read(model, prompt_of())
    wanted = draws(model, fork(prefix), **options())
    made = graphs()
    assert_same(draws(model, prefix, **options()), wanted)
    assert len(made) == (len(wanted) >= PATIENCE + 2)
    for graph in made:
        assert graph.replays == 2 + len(wanted) - (PATIENCE + 2)  # two check the graph


@pytest.mark.parametrize("overrides", ["model.token_shift=true", "attn=local", "model.convolution=9"])
@pytest.mark.parametrize("rows", [1, 3])
def test_ragged_rows_are_captured_as_they_are(lively_model: Build, graphs: Graphs, overrides: str, rows: int) -> None:
    model, mask = lively_model(overrides), torch.arange(9) >= torch.tensor([[7], [0], [4]])[:rows]
    prefix = read(model, prompt_of(rows), mask=mask)
    wanted = draws(model, fork(prefix))
    made = graphs()
    assert_same(draws(model, prefix), wanted)
    assert len(made) == 1


@pytest.mark.parametrize("overrides", GROWING)
def test_a_state_that_grows_is_left_to_the_model(lively_model: Build, graphs: Graphs, overrides: str) -> None:
    model = lively_model(*overrides.split())
    prefix = read(model, prompt_of())
    wanted = draws(model, fork(prefix))
    made = graphs()
    assert_same(draws(model, prefix), wanted)
    assert made == []


def test_beams_are_captured(lively_model: Build, graphs: Graphs) -> None:
    model = lively_model(*DEFAULT)
    search = partial(search_beams, model, read(model, prompt_of(1)), beams=4, max_new_tokens=25, end_id=7)
    wanted = search(sampler=Sampler(banned_tokens=[7]))
    made = graphs()
    found = search(sampler=Sampler(banned_tokens=[7]))
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.log_probs, wanted.log_probs)
    assert made[0].replays > 10


def test_a_target_is_written_by_captured_steps(model_section: Callable[..., dict[str, Any]], graphs: Graphs) -> None:
    small = ["model.dim=32", "model.encoder.heads=4", "model.decoder.heads=4"]
    model = checkpoint.build(model_section("model=performer_seq2seq", *small, tiny=[])).double().eval()
    torch.nn.init.normal_(model.head.weight)
    prefix = read(model, prompt_of())
    wanted = draws(model, fork(prefix))
    made = graphs()
    assert_same(draws(model, prefix), wanted)
    assert len(made) == 1


def converse(model: PerformerLM, file: Path) -> list[str]:
    """Return what sessions write: turn after turn, broken off, and from states kept in memory and in a file."""
    options: dict[str, Any] = {"max_new_tokens": 14, "sampler": Sampler(top_k=9)}
    one, other = (Session(model, BYTES, seed=seed, **options) for seed in (0, 1))
    one.read("a text")
    texts = ["".join(one.write())]
    kept, state = one.prefix, fork(one.prefix)  # of a turn that was captured
    other.read("another text")
    texts += ["".join(islice(other.write(), 12)), "".join(one.write()), "".join(other.write())]
    save_state(file, other.read(" and"), model, BYTES)
    assert kept is not None
    for prefix in (state, load_state(file, model, BYTES), fork(other.prefix)):
        one.resume(prefix)
        texts.append("".join(one.write()))
    return [*texts, one.text, other.text]


def test_states_that_captured_steps_hand_out_go_on_as_others(
    lively_model: Build, graphs: Graphs, tmp_path: Path
) -> None:
    model = lively_model(*DEFAULT, vocab_size=257)
    wanted = converse(model, tmp_path / "wanted.state")
    made = graphs()
    assert converse(model, tmp_path / "found.state") == wanted
    assert (tmp_path / "found.state").read_bytes() == (tmp_path / "wanted.state").read_bytes()
    assert len(made) >= 6


def serve(model: PerformerLM) -> list[tuple[list[int], list[float]]]:
    """Return the tokens of rows that join and leave while others run."""
    scheduler = Scheduler(model, max_rows=3, max_waiting=9, prefix_bytes=2**20)
    jobs = []
    for count in (40, 12, 26, 14):
        jobs.append(
            Job(ids=[*range(count, count + 9)], sampler=Sampler(), max_new_tokens=count, tell=lambda told: None)
        )
        jobs[-1].add_choices(BYTES, [count], (), device=torch.device("cpu"))
    scheduler.submit(jobs)
    scheduler.start()
    scheduler.close()
    scheduler.join()
    return [(choice.row.tokens, choice.row.log_probs) for job in jobs for choice in job.choices]


def test_rows_that_join_and_leave_are_captured_anew(lively_model: Build, graphs: Graphs) -> None:
    model = lively_model(*DEFAULT, "attn=favor", vocab_size=257)
    wanted = serve(model)
    made = graphs()
    assert serve(model) == [(tokens, pytest.approx(log_probs)) for tokens, log_probs in wanted]
    assert len(made) >= 3


class LookingModel(PerformerLM):
    """Looks at a number in each step."""

    def extend(
        self, tokens: Tensor, state: PerformerState, *, mask: Tensor | None = None, last_only: bool = False
    ) -> tuple[Tensor, PerformerState]:
        assert int(tokens.sum()) >= 0
        return super().extend(tokens, state, mask=mask, last_only=last_only)


class CountingModel(PerformerLM):
    """Keeps in Python how many steps there were."""

    steps = 0

    def extend(
        self, tokens: Tensor, state: PerformerState, *, mask: Tensor | None = None, last_only: bool = False
    ) -> tuple[Tensor, PerformerState]:
        self.steps += 1
        logits, state = super().extend(tokens, state, mask=mask, last_only=last_only)
        return logits + 0.01 * self.steps, state


FAILURES: list[tuple[type[PerformerLM], str]] = [
    (LookingModel, r"failed \(RuntimeError: operation not permitted when stream is capturing\)"),
    (CountingModel, r"differs from the model's own by 0\.\d+ of the largest number"),
]


@pytest.mark.parametrize(("kind", "reason"), FAILURES)
def test_a_model_goes_on_without_a_captured_step_that_fails_or_differs_and_says_so_once(
    lively_model: Build, graphs: Graphs, kind: type[PerformerLM], reason: str
) -> None:
    model = lively_model(*DEFAULT)
    prefix = read(model, prompt_of())
    wanted = draws(model, fork(prefix))
    model.__class__ = kind
    made = graphs()
    with pytest.warns(UserWarning, match=f"^decoding goes on without a captured step, which {reason}$"):
        found = draws(model, fork(prefix))
    again = draws(model, prefix)  # without a warning, which would be an error here
    assert len(made) == 1
    for each in (found, again):
        assert torch.equal(torch.stack([ids for ids, _ in each]), torch.stack([ids for ids, _ in wanted]))


def test_what_a_graph_would_not_repeat_is_left_to_the_model(lively_model: Build, graphs: Graphs) -> None:
    model = lively_model("model.dropout=0.5").float()
    made = graphs()
    with torch.autocast("cpu", torch.bfloat16):
        draws(model, read(model, prompt_of()))
    draws(model.train(), read(model, prompt_of()))
    assert made == []


@torch.inference_mode()
def test_steps_take_a_state_that_changes_between_them(lively_model: Build, graphs: Graphs) -> None:
    """Another state of the same layout goes through the same graph, another layout waits for a graph of its own."""
    model = lively_model(*DEFAULT)
    made, steps = graphs(), Steps(model)
    for rows, count in ((2, 2 + PATIENCE), (2, 5), (3, 5), (2, 2 + PATIENCE)):
        _, state = model.start(prompt_of(rows))
        own = fork(state)
        for place in range(count):
            ids = torch.full((rows,), place)
            wanted, own = model.extend(ids[:, None], own)
            found, state = steps.extend(ids, state)
            torch.testing.assert_close(found, wanted[:, -1], atol=1e-12, rtol=1e-12)
    assert [graph.replays for graph in made] == [2 + 1 + 5, 2 + 1]  # two of each check the graph

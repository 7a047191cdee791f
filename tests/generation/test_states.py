import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from performer_lm import checkpoint
from performer_lm.data.tokenizer import ByteTokenizer
from performer_lm.generation.decode import Prefix, draw_tokens, read
from performer_lm.generation.sampling import Sampler
from performer_lm.generation.states import fork, load_state, save_state
from performer_lm.model import PerformerLM

Build = Callable[..., PerformerLM]
BYTES = ByteTokenizer()
FILE = "a.state"
SAMPLER = Sampler(temperature=0, repetition_penalty=1.5, no_repeat_ngram_size=2)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def prefix_of(model: PerformerLM, *, rows: int = 2, ragged: bool = False) -> Prefix:
    tokens = torch.randint(0, 256, (rows, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9)[None] >= torch.tensor([[0], [3]]) if ragged else None
    return read(model, tokens, mask=mask, max_new_tokens=50)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for item in tree for tensor in tensors_of(item)] if isinstance(tree, tuple) else []


def draws(model: PerformerLM, prefix: Prefix, count: int = 6) -> list[torch.Tensor]:
    return [drawn.logits for drawn in draw_tokens(model, prefix, max_new_tokens=count, sampler=SAMPLER)]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("attn", ["favor", "relu", "delta", "exact", "flash", "local", "hybrid"])
def test_a_state_goes_on_bit_for_bit_saved_loaded_and_forked(lively_model: Build, attn: str, ragged: bool) -> None:
    model = lively_model(f"attn={attn}", "model.token_shift=true", vocab_size=257)
    for each in (model, model.float()):
        prefix = prefix_of(each, ragged=ragged)
        save_state(Path(FILE), prefix, each, BYTES)
        loaded, forked = load_state(Path(FILE), each, BYTES), fork(prefix)
        assert torch.equal(loaded.tokens, prefix.tokens)
        assert torch.equal(loaded.mask, prefix.mask)
        save_state(Path("b.state"), loaded, each, BYTES)
        assert Path("b.state").read_bytes() == Path(FILE).read_bytes()
        wanted = draws(each, prefix)
        for other in (loaded, forked):
            assert all(map(torch.equal, draws(each, other), wanted))


def test_a_source_that_was_read_goes_on_too(model_section: Callable[..., dict[str, Any]]) -> None:
    small = ["model.dim=32", "model.encoder.heads=4", "model.decoder.heads=4", "attn=exact"]
    model = checkpoint.build(model_section("model=performer_seq2seq", *small, vocab_size=257, tiny=[])).eval()
    torch.nn.init.normal_(model.head.weight)
    prefix = prefix_of(model, ragged=True)
    save_state(Path(FILE), prefix, model, BYTES)
    loaded = load_state(Path(FILE), model, BYTES)
    assert all(map(torch.equal, draws(model, loaded), draws(model, prefix)))


def test_a_state_is_as_large_whatever_the_text_but_for_its_tokens(lively_model: Build) -> None:
    model = lively_model("model.depth=1", vocab_size=257).float()
    sizes = []
    for length in (10, 1010):
        save_state(Path(FILE), read(model, torch.zeros(1, length).long()), model, BYTES)
        sizes.append(Path(FILE).stat().st_size)
    assert sizes[1] - sizes[0] < 1000 * 5 + 64  # an id and a mask


def change_weights(model: PerformerLM) -> None:
    with torch.no_grad():
        model.performer.norm.gain[0] += 1e-3  # type: ignore[union-attr,operator]


def change_projections(model: PerformerLM) -> None:
    for module in model.modules():
        if hasattr(module, "projection"):
            module.projection.neg_()


@pytest.mark.parametrize(
    ("options", "change", "part"),
    [
        (["model.dim=16", "model.dim_head=4"], None, "layers differ"),
        (["model/positions=rotary"], None, "layers differ"),
        (["attn=exact"], None, "attention backend differs"),
        (["attn.chunk_size=16"], None, "attention backend differs"),
        ([], change_weights, "weights differ"),
        ([], change_projections, "projections differ"),
    ],
)
def test_a_state_of_another_model_is_refused_in_one_line(
    lively_model: Build, options: list[str], change: Callable[[PerformerLM], None] | None, part: str
) -> None:
    model = lively_model(vocab_size=257)
    save_state(Path(FILE), prefix_of(model), model, BYTES)
    other = lively_model(*options, vocab_size=257) if change is None else copy.deepcopy(model)
    if change is not None:
        change(other)
    with pytest.raises(ValueError, match=f"^a.state is a state of another model: its {part}$"):
        load_state(Path(FILE), other, BYTES)


def test_a_state_of_another_tokenizer_is_refused(lively_model: Build) -> None:
    model = lively_model(vocab_size=257)
    save_state(Path(FILE), prefix_of(model), model, BYTES)
    with pytest.raises(ValueError, match="its tokenizer differs"):
        load_state(Path(FILE), model, ByteTokenizer(specials=["mask"]))


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    with safe_open(FILE, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(FILE)
    change(tensors)
    save_file(tensors, FILE, metadata)


def test_a_damaged_state_is_refused(lively_model: Build) -> None:
    model = lively_model(vocab_size=257)
    save_state(Path(FILE), prefix_of(model), model, BYTES)
    good = Path(FILE).read_bytes()
    for place in (len(good) - 1, len(good) // 2):
        Path(FILE).write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match=r"a.state is damaged: its content does not match its hash"):
            load_state(Path(FILE), model, BYTES)
    for cut in (0, 5, len(good) // 2, len(good) - 1):
        Path(FILE).write_bytes(good[:cut])
        with pytest.raises(ValueError, match=r"a.state is no state of performer_lm, or is cut short"):
            load_state(Path(FILE), model, BYTES)
    for metadata in (None, {"performer_lm_state": '{"format": 2}'}, {"performer_lm_state": "3"}):
        save_file({"tokens": torch.zeros(1)}, FILE, metadata)
        with pytest.raises(ValueError, match=r"a.state is no state of performer_lm in format 1"):
            load_state(Path(FILE), model, BYTES)
    save_file({"tokens": torch.zeros(1)}, FILE, {"performer_lm_state": "[" * 100_000})
    with pytest.raises(ValueError, match=r"a.state is no state of performer_lm"):
        load_state(Path(FILE), model, BYTES)
    for name in (".", "none.state"):
        with pytest.raises(OSError, match=f"'{name}'$"):
            load_state(Path(name), model, BYTES)


@pytest.mark.parametrize("attn", ["favor", "flash"])
def test_tensors_that_do_not_fit_are_refused_whatever_their_hash(
    lively_model: Build, monkeypatch: pytest.MonkeyPatch, attn: str
) -> None:
    monkeypatch.setattr("performer_lm.generation.states._hash_tensors", lambda tensors: "")
    model = lively_model(f"attn={attn}", vocab_size=257)
    save_state(Path(FILE), prefix_of(model), model, BYTES)
    good, names = Path(FILE).read_bytes(), list(load_file(FILE))
    changes: list[Callable[[dict[str, torch.Tensor]], object]] = [
        lambda tensors: tensors.update(more=torch.zeros(1)),
        lambda tensors: tensors["tokens"].fill_(257),
        lambda tensors: tensors["tokens"].fill_(-1),
        *(lambda tensors, name=name: tensors.pop(name) for name in names),
        *(lambda tensors, name=name: tensors.update({name: tensors[name][:1]}) for name in names),
        *(lambda tensors, name=name: tensors.update({name: tensors[name][..., None]}) for name in names),
        *(lambda tensors, name=name: tensors.update({name: tensors[name].half()}) for name in names),
    ]
    for change in changes:
        Path(FILE).write_bytes(good)
        rewritten(change)
        with pytest.raises(ValueError, match=r"a.state does not fit the model: its [\w.]+ is missing, unknown or of"):
            load_state(Path(FILE), model, BYTES)
    Path(FILE).write_bytes(good)
    load_state(Path(FILE), model, BYTES)

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from performer_lm import checkpoint
from performer_lm.attention.base import Attention
from performer_lm.attention.favor import FavorAttention
from performer_lm.checkpoint import files
from performer_lm.data.tokenizer import ByteTokenizer, Tokenizer
from performer_lm.model import PerformerLM
from performer_lm.objectives import MaskedTokens, NextToken, Objective

Section = Callable[..., dict[str, Any]]


@pytest.fixture
def saved(model_section: Section, tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "day" / "hour" / "checkpoints" / "last.ckpt"
    write(path, model_section("attn=favor", "attn.num_features=16", vocab_size=257))
    return path


def write(path: Path, section: dict[str, Any], step: int = 0) -> PerformerLM:
    model: PerformerLM = checkpoint.build(section)
    torch.nn.init.normal_(model.head.weight)
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "performer_lm": checkpoint.describe(model=section, tokenizer=ByteTokenizer(), fingerprint={}, seed=0),
        "global_step": step,
    }
    checkpoint.save(content, path)
    return model.eval()


@torch.no_grad()
def test_opens_to_the_same_model(model_section: Section, tmp_path: Path) -> None:
    section = model_section("attn=favor", vocab_size=257)
    model = write(tmp_path / "a.ckpt", section)
    opened, tokenizer = checkpoint.open_model(checkpoint.read(tmp_path / "a.ckpt"))
    ids = torch.randint(0, 257, (1, 9))
    assert torch.equal(opened(ids), model(ids))
    assert tokenizer.vocab_size == 257


@torch.no_grad()
@pytest.mark.parametrize(("trained", "opened"), [("favor", "exact"), ("exact", "favor"), ("favor", "hybrid")])
def test_opens_with_another_backend(
    trained: str, opened: str, model_section: Section, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write(tmp_path / "a.ckpt", model_section(f"attn={trained}", vocab_size=257))
    other, _ = checkpoint.open_model(checkpoint.read(tmp_path / "a.ckpt"), attn=model_section(f"attn={opened}")["attn"])
    assert "backend changed" in capsys.readouterr().out
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in other.named_parameters())


def test_projections_drawn_anew_are_those_of_the_step(model_section: Section, tmp_path: Path) -> None:
    redrawing = model_section("attn=favor", "attn.redraw_interval=10", vocab_size=257)
    write(tmp_path / "a.ckpt", {**redrawing, "attn": model_section("attn=exact")["attn"]}, step=25)
    opened, _ = checkpoint.open_model(checkpoint.read(tmp_path / "a.ckpt"), attn=redrawing["attn"])
    wanted: PerformerLM = checkpoint.build(redrawing)
    wanted.redraw(25)
    first: PerformerLM = checkpoint.build(redrawing)
    for name, value in opened.named_buffers():
        assert torch.equal(value, wanted.get_buffer(name))
        assert value.ndim == 0 or not torch.equal(value, first.get_buffer(name))


@pytest.mark.parametrize("cut", [0, 1, 0.5, -1])
def test_a_truncated_file_is_named(saved: Path, cut: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(cut * len(content)) if cut == 0.5 else int(cut)])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        checkpoint.read(saved)
    checkpoint.sidecar_of(saved).unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is not a checkpoint of performer_lm, or is cut short"):
        checkpoint.read(saved)


def test_one_flipped_bit_is_found(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read(saved)


def test_one_flipped_bit_without_a_checksum_is_found_or_changes_nothing(saved: Path) -> None:
    checkpoint.sidecar_of(saved).unlink()
    whole, content = checkpoint.read(saved).content, saved.read_bytes()
    places = {*range(0, len(content), len(content) // 40), *range(len(content) - 400, len(content))}
    refused = 0
    for place in places:
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            found = checkpoint.read(saved).content
        except ValueError:
            refused += 1
            continue
        assert found.keys() == whole.keys()
        assert all(torch.equal(value, found["state_dict"][name]) for name, value in whole["state_dict"].items())
        assert found["performer_lm"] == whole["performer_lm"]
    assert refused > 40


def test_a_checksum_that_is_none_is_no_reason_to_wait_or_to_believe(saved: Path) -> None:
    sidecar = checkpoint.sidecar_of(saved)
    for make in (
        os.mkfifo,
        Path.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        Path.touch,
        lambda path: path.symlink_to("x"),
    ):
        sidecar.unlink()
        make(sidecar)
        with pytest.raises(ValueError, match=r"last\.ckpt (is damaged|cannot be read)"):
            checkpoint.read(saved)
        if sidecar.is_dir():
            sidecar.rmdir()
            sidecar.touch()


def test_saving_keeps_nothing_of_a_foreign_sidecar_and_follows_no_link(saved: Path) -> None:
    secret = saved.parent / "secret"
    secret.write_text("a line of theirs\n")
    content = checkpoint.read(saved).content
    sidecar = checkpoint.sidecar_of(saved)
    sidecar.unlink()
    sidecar.symlink_to(secret)
    written: list[str] = []
    replace_text = files.replace_text
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "replace_text", lambda path, text: (written.append(text), replace_text(path, text)))
        checkpoint.save(content, saved)
    assert secret.read_text() == "a line of theirs\n"
    assert not any("theirs" in text for text in written)
    assert checkpoint.read(saved).path == saved


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    for name in ("text.ckpt", "other.ckpt"):
        with pytest.raises(ValueError, match="is not a checkpoint of performer_lm"):
            checkpoint.read(tmp_path / name)
    torch.save({"state_dict": {}, "performer_lm": {"format": 99}}, tmp_path / "future.ckpt")
    with pytest.raises(ValueError, match="has checkpoint format 99; this version reads format 1"):
        checkpoint.read(tmp_path / "future.ckpt")


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.marker),))


@pytest.mark.parametrize("force", ["0", "1"])
def test_nothing_in_a_file_is_run(tmp_path: Path, force: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    marker = tmp_path / "touched"
    torch.save({"performer_lm": Payload(marker), "state_dict": {}}, tmp_path / "zip.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("zip.ckpt", "pickle.ckpt"):
        with pytest.raises(ValueError, match="is not a checkpoint"):
            checkpoint.read(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "shutil.copy",
        "builtins.open",
        "torch.load",
        "torch.nn.Linear",
        "performer_lm.checkpoint.shutil.copy",
        "performer_lm.model.nn.Linear",
        "performer_lm.model.torch.load",
        "performer_lm.model.partial",
        "performer_lm.modelling.PerformerLM",
        "performer_lm.nn.nothing.Here",
        "performer_lm.model",
        "",
        None,
    ],
)
def test_only_model_classes_of_this_package_are_built(target: Any) -> None:
    with pytest.raises(ValueError, match="is not a model class of performer_lm"):
        checkpoint.build({"inner": [{"_target_": target}]})


def test_find_takes_a_file_a_run_folder_or_latest(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved.parents[1]
    monkeypatch.chdir(run.parents[2])
    os.symlink(run.relative_to(run.parents[1]), "runs/latest")
    for name in (str(saved), "runs/day/hour", "runs/day/hour/checkpoints", "runs/latest", "latest"):
        assert checkpoint.find(name).resolve() == saved
    write_best = saved.with_name("best.ckpt")
    write_best.write_bytes(b"")
    assert checkpoint.find("latest").name == "best.ckpt"
    assert checkpoint.find("latest", prefer=("last", "best")).name == "last.ckpt"


def test_a_wrong_path_lists_the_nearest_checkpoints(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parents[4])
    with pytest.raises(ValueError, match=r"does not exist; nearest: runs/day/hour/checkpoints/last\.ckpt"):
        checkpoint.find("runs/day/houn/checkpoints/last.ckpt")
    monkeypatch.chdir(saved.parent)
    with pytest.raises(ValueError, match="there are no checkpoints yet"):
        checkpoint.find("elsewhere/best.ckpt")


def test_the_folder_that_holds_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step=000001.ckpt").touch()
    (folder / "last.ckpt").symlink_to("step=000001.ckpt")
    (tmp_path / "latest").symlink_to("a")
    assert checkpoint.holder(tmp_path / "latest" / "checkpoints" / "last.ckpt") == tmp_path / "a"
    assert checkpoint.holder(tmp_path / "loose.ckpt") == tmp_path


@pytest.mark.parametrize("attn", ["exact", "relu"])
def test_every_stack_of_an_encoder_decoder_opens_with_another_backend(
    model_section: Section, tmp_path: Path, attn: str
) -> None:
    tiny = [f"model.{stack}.{size}" for stack in ("encoder", "decoder") for size in ("depth=1", "heads=4")]
    options = {"vocab_size": 257, "tiny": ["model=performer_seq2seq", "model.dim=32", *tiny]}
    write(tmp_path / "a.ckpt", model_section("attn=favor", **options))
    other = model_section(f"attn={attn}", **options)["encoder"]["attn"]
    opened, _ = checkpoint.open_model(checkpoint.read(tmp_path / "a.ckpt"), attn=other)
    backends = [type(module).__name__ for module in opened.modules() if isinstance(module, Attention)]
    assert backends == [{"exact": "ExactAttention", "relu": "FavorAttention"}[attn]] * 3


@pytest.mark.parametrize("asked", [["attn.num_features=32"], ["attn/features=hyperbolic"]])
def test_other_features_are_drawn_in_the_place_of_those_that_do_not_fit(
    model_section: Section, saved: Path, asked: list[str]
) -> None:
    opened, _ = checkpoint.open_model(checkpoint.read(saved), attn=model_section("attn=favor", *asked)["attn"])
    backends = [module for module in opened.modules() if isinstance(module, FavorAttention)]
    expected = [
        module
        for module in checkpoint.build(model_section("attn=favor", *asked)).modules()
        if isinstance(module, FavorAttention)
    ]
    for one, other in zip(backends, expected, strict=True):
        assert torch.equal(one.features.projection, other.features.projection)  # type: ignore[arg-type]


def test_a_file_says_what_its_model_predicts(model_section: Section, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer(specials=["mask"])
    masked = {"masked": 0.3, "hidden": 0.8, "replaced": 0.1, "seed": 0, "chunk_size": None}
    told = {"objective": {"_target_": "performer_lm.objectives.MaskedTokens", **masked}}
    section = model_section("model=performer_encoder", vocab_size=tokenizer.vocab_size)
    found = reopened(tmp_path, section, tokenizer, told)
    assert isinstance(found, MaskedTokens)
    assert (found.share, found.mask_id) == (0.3, tokenizer.special_id("mask"))
    assert isinstance(reopened(tmp_path, model_section(vocab_size=257), ByteTokenizer(), {}), NextToken)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"_target_": "shutil.rmtree", "path": "/"}, "'shutil.rmtree', which is no objective of performer_lm"),
        ({"_target_": "performer_lm.objectives.NextToken", "chunk": 1}, "unexpected keyword argument 'chunk'"),
        ({"_target_": "performer_lm.objectives.SourceToTarget", "chunk_size": None}, "needs an encoder and a decoder"),
    ],
)
def test_other_objectives_are_refused(
    model_section: Section, tmp_path: Path, objective: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reopened(tmp_path, model_section(vocab_size=257), ByteTokenizer(), {"objective": objective})


def reopened(tmp_path: Path, section: dict[str, Any], tokenizer: Tokenizer, training: dict[str, Any]) -> Objective:
    path = tmp_path / "told.ckpt"
    write(path, section)
    content = checkpoint.read(path).content
    content["performer_lm"] |= {"training": training, "tokenizer": tokenizer.to_dict()}
    checkpoint.save(content, path)
    opened = checkpoint.read(path)
    return checkpoint.open_objective(opened, *checkpoint.open_model(opened))


def test_weights_that_do_not_fit_are_named(saved: Path, model_section: Section) -> None:
    opened = checkpoint.read(saved)
    opened.section["model"]["dim"] = 16
    with pytest.raises(ValueError, match=r"last\.ckpt does not fit the model: size mismatch for embedding\.weight"):
        checkpoint.open_model(opened)

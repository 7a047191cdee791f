import pickle

import pytest
import torch

from performer_lm.building import build, did_you_mean
from performer_lm.cli.errors import JobFailed, UsageError, report, usage_errors
from performer_lm.wording import nearest_key


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("a: wanted int", "b: wanted str"), 2, "error: a: wanted int\nerror: b: wanted str\n"),
        (FloatingPointError("loss is nan at step 3"), 3, "error: loss is nan at step 3\n"),
        (MemoryError("no more"), 4, "error: out of memory: no more\n  raise trainer.accumulate_grad_batches"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            4,
            "error: out of memory: CUDA out of memory. Tried\n",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            4,
            "error: out of memory",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (JobFailed(3), 3, ""),
        (SystemExit(7), 7, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_every_ending_has_its_exit_code(capsys, error, code, words):
    assert report(error) == code
    shown = capsys.readouterr().err
    assert shown.startswith(words)
    assert "Traceback" not in shown


def test_an_error_of_ours_shows_where(capsys):
    with pytest.raises(TypeError) as raised:
        len(3)
    assert report(raised.value) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: TypeError: object of type 'int' has no len()\n")


def test_mistakes_show_a_traceback_on_request(capsys):
    assert report(UsageError("a"), show_traceback=True) == 2
    assert "UsageError: a" in capsys.readouterr().err


def test_an_interrupt_that_lightning_turned_into_exit_1_is_still_one():
    leaving = SystemExit(1)
    leaving.__context__ = KeyboardInterrupt()
    assert report(leaving) == 130


def fail_after_interrupt(failure):
    """Raise a library's failure in a clean-up that Ctrl-C led to, told as a mistake of the user's."""
    try:
        try:
            raise KeyboardInterrupt
        finally:
            raise failure
    except (AttributeError, OSError) as error:
        raise UsageError("a: no such key") from error


@pytest.mark.parametrize("failure", [AttributeError("'NoneType' object has no flags"), OSError("no flags")])
def test_what_fails_in_the_wake_of_an_interrupt_is_one(capsys, failure):
    with pytest.raises(UsageError) as raised:
        fail_after_interrupt(failure)
    assert report(raised.value) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_file_that_could_not_be_written_after_an_interrupt_is_told(capsys):
    full = OSError(28, "No space left on device", "runs/a/last.ckpt")
    full.__context__ = KeyboardInterrupt()
    assert report(full) == 1
    assert "runs/a/last.ckpt: no space left on device" in capsys.readouterr().err


@pytest.mark.slow
def test_lightning_s_sigterm_is_143(capsys):
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    assert report(SIGTERMException()) == 143
    assert capsys.readouterr().err == "error: terminated\n"


def test_a_job_of_a_sweep_is_named(capsys):
    report(UsageError("dim"), job="job 2 (attn=flash): ")
    assert capsys.readouterr().err == "error: job 2 (attn=flash): dim\n"


@pytest.mark.parametrize(("tty", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)])
def test_colour_only_on_a_terminal_that_wants_it(capsys, monkeypatch, tty, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: tty)
    report(UsageError("a"))
    assert ("\033[" in capsys.readouterr().err) == coloured


def test_what_a_constructor_refuses_is_a_usage_error_with_its_key(sample):
    section = {"_target_": "performer_lm.sample.Whole", "dim": 5, "vocab_size": 3}
    with pytest.raises(UsageError, match=r"^model: dim \(5\) must be a multiple of heads \(2\)$"), usage_errors():
        build(section, key="model")


def test_a_file_that_cannot_be_opened_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=f"^{tmp_path / 'gone'}: no such file or directory$"), usage_errors():
        (tmp_path / "gone").read_text()


def test_usage_errors_pass_through_and_bugs_stay_bugs(sample):
    with pytest.raises(UsageError) as raised, usage_errors():
        raise UsageError("a", "b")
    assert raised.value.problems == ("a", "b")
    with pytest.raises(TypeError), usage_errors():
        raise TypeError
    section = {"_target_": "performer_lm.sample.Whole", "dim": 4, "vocab_size": 3, "heads": 0}
    with pytest.raises(ZeroDivisionError), usage_errors():
        build(section)


def test_errors_survive_a_trip_between_processes():
    assert pickle.loads(pickle.dumps(UsageError("a", "b"))).problems == ("a", "b")
    assert pickle.loads(pickle.dumps(JobFailed(3))).code == 3


def test_the_nearest_name():
    assert did_you_mean("falsh", ["flash", "favor"], prefix="attn=") == "; did you mean attn=flash?"
    assert did_you_mean("zzz", ["flash", "favor"]) == ""
    assert nearest_key("zzz", ["flash", "favor"]) == " (known: flash, favor)"
    assert nearest_key("zzz", []) == ""


def test_each_line_that_a_constructor_refuses_is_a_problem_of_its_own():
    with pytest.raises(UsageError) as raised, usage_errors():
        raise ValueError("one thing\nanother")
    assert raised.value.problems == ("one thing", "another")

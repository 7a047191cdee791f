import pytest

from performer_lm.evaluation.base import print_table


def test_a_name_in_a_table_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("losses", ["", "runs/[red]", "[/b]"], [["a[b]", "1.0", "2.0"]])
    out = capsys.readouterr().out
    assert all(name in out for name in ("runs/[red]", "[/b]", "a[b]"))

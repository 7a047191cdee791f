import pytest

from performer_lm.training.schedule import warmup_constant, warmup_cosine


def test_cosine_at_its_ends() -> None:
    share = warmup_cosine(100, warmup=0.1, final=0.2)
    assert share(0) == pytest.approx(0.1)
    assert share(9) == share(10) == pytest.approx(1.0)
    assert share(55) == pytest.approx(0.6)
    assert share(100) == share(150) == pytest.approx(0.2)


def test_cosine_rises_then_falls() -> None:
    shares = [warmup_cosine(50, warmup=0.2, final=0.0)(step) for step in range(51)]
    assert shares[:10] == sorted(shares[:10])
    assert shares[10:] == sorted(shares[10:], reverse=True)


def test_constant_stays() -> None:
    share = warmup_constant(100, warmup=0.1)
    assert [share(step) for step in (4, 9, 10, 99)] == pytest.approx([0.5, 1.0, 1.0, 1.0])
    assert warmup_constant(100, warmup=0.0)(0) == 1.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: warmup_cosine(10, warmup=1.5, final=0.1), r"schedule\.warmup is a share"),
        (lambda: warmup_cosine(10, warmup=0.1, final=-1), r"schedule\.final is a share"),
        (lambda: warmup_constant(10, warmup=-0.1), r"schedule\.warmup is a share"),
    ],
)
def test_shares_outside_0_to_1_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]

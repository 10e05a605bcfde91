"""Calls that cannot be meant: each ends in a message of ours, which says what was expected."""

import warnings

import pytest
from _bad_distillers import OF_DISTILLER
from _bad_others import OF_OTHERS
from _bad_pairs import OF_PAIRS

CASES = [
    pytest.param(call, error, begins, id=f"{begins} {number}")
    for error, begins, *calls in (*OF_DISTILLER, *OF_PAIRS, *OF_OTHERS)
    for number, call in enumerate(calls)
]


@pytest.mark.parametrize(("call", "error", "begins"), CASES)
def test_what_cannot_be_meant_is_said(call, error, begins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for caches
    warnings.simplefilter("ignore")  # of torch: TorchScript is on its way out
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(begins)
    said = message.removeprefix(begins)
    assert said.strip(" ."), "says no more than what is wrong"
    assert "expected" in message or "Call " in message or "Build " in message


def test_most_kinds_are_there():
    assert len(CASES) > 150

import pytest


@pytest.fixture
def uncounted(monkeypatch):
    """Leaves out what is run to prove what is kept, where the teacher's samples are counted."""
    monkeypatch.setattr("vid_loss.cache._checks.proven", lambda teacher, batch, *_: batch)

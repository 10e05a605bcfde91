import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("train_like_timm.py")


@pytest.fixture
def fresh_state():
    """Accelerate's state outlives an Accelerator, and its settings with it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def accelerator():
    from _accelerate import make_accelerator

    return make_accelerator()


@pytest.fixture
def script(tmp_path):
    """A train script in a folder of its own."""
    folder = tmp_path / "clone"
    folder.mkdir()
    return Path(shutil.copy(SCRIPT, folder / "train.py"))

"""What a distiller out of a file has in place of its models."""

from typing import Any


class Absent:
    """Stands for student, teacher and hooks in a pickle, and says so when they are needed."""

    closed = True

    @property
    def tap(self) -> "Absent":
        """The teacher's tap, which is not there either."""
        return self

    def close(self) -> None:
        """There is no hook to remove."""

    def clear(self) -> None:
        """There is no feature to forget."""

    def move(self, _: Any) -> None:
        """There is no teacher to move."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            "Distiller: expected the process that built it; got a pickle, which has the heads but "
            "neither the teacher nor the hooks on the student. Build another one here (with "
            "ddp_spawn: inside the function that is spawned), and give it "
            "load_state_dict(pickled.state_dict())."
        )

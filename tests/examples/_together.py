"""Programs that start together, as threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any


def together(work: Callable[[], Any], count: int = 4) -> None:
    """Does the same several times at once; raises what one of them raises."""
    start = Barrier(count)

    def one(_):
        start.wait()
        work()

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))

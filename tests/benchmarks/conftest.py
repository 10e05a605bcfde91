"""Benchmarks: every figure is a ratio of two things that took turns in one process.

Absolute times of one machine mean little on another, and drift on a shared one. Nothing here
asserts a time; the ordinary test run leaves these files out, by their names.
"""

import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from time import perf_counter

import pytest
import torch

PACKAGES = ("torch", "torchvision", "torchdistill", "safetensors")


@pytest.fixture
def compare(benchmark):
    """Measures one function against another, in turns; the median of the turns' ratios counts."""

    def run(
        measured: Callable[[], object], reference: Callable[[], object], *, rounds: int = 25, **info
    ) -> None:
        times: list[float] = []

        def turn() -> None:
            start = perf_counter()
            _finished(reference)
            times.append(perf_counter() - start)

        for warm_up in (measured, reference, measured, reference):
            _finished(warm_up)
        benchmark.pedantic(_finished, args=(measured,), setup=turn, rounds=rounds)
        ratios = [a / b for a, b in zip(benchmark.stats.stats.data, times, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        benchmark.extra_info.update(info, ratio=median, quartiles=[low, high])

    return run


def _finished(function: Callable[[], object]) -> None:
    """Calls it, and waits for the GPU, which goes on after the call."""
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.fixture
def count(benchmark):
    """Records figures that are counted, not timed."""

    def run(**figures: float) -> None:
        benchmark.pedantic(lambda: None)
        benchmark.extra_info.update(figures)

    return run


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Keeps what a reader needs of the machine, and not its name."""
    cpu = machine_info.get("cpu", {}).get("brand_raw", platform.processor())
    machine_info.clear()
    machine_info.update(
        cpu=cpu,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        **{name: version(name) for name in PACKAGES if find_spec(name)},
    )


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Keeps the ratios, and of the times the medians."""
    output_json["command"] = " ".join(["pytest", *config.invocation_params.args])
    output_json["benchmarks"] = [
        {"name": b["name"], "median_s": b["stats"]["median"], **b["extra_info"]}
        for b in output_json["benchmarks"]
    ]


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Prints what pytest-benchmark's own table does not have."""
    terminalreporter.section("ratios and counts")
    for benchmark in config._benchmarksession.benchmarks:
        figures = {
            name: f"{value:.3g}" if isinstance(value, float) else value
            for name, value in benchmark.extra_info.items()
            if name != "quartiles"
        }
        terminalreporter.write_line(f"{benchmark.name:60} {figures}")

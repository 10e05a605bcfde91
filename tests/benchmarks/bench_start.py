"""What there is before the first step."""

import statistics
import subprocess
import sys

from _tasks import Task, pairs

from vid_loss import Distiller

CODE = """
from time import perf_counter
import torch
start = perf_counter()
import vid_loss
print(perf_counter() - start)
"""


def bench_import_after_torch(count):
    times = [
        float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True).stdout)
        for _ in range(7)
    ]
    count(milliseconds=1e3 * statistics.median(times))


def bench_building_a_distiller_over_a_step(compare):
    task = Task("wrn", pairs("wrn", "all-stages"))

    def build():
        Distiller(
            task.student, task.teacher, pairs("wrn", "all-stages"), example=task.images[:1]
        ).close()

    compare(build, task.step, rounds=15)

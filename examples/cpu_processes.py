"""Several processes on CPU, which ``accelerate launch`` starts through MPI alone."""

import argparse
import os
import sys
from collections.abc import Sequence

import psutil
from accelerate import Accelerator


def start_those_asked_for(accelerator: Accelerator) -> None:
    """Goes on under torchrun, if ``accelerate launch --cpu --num_processes N`` started one process.

    Without ``--mpirun_hostfile`` Accelerate 1.15 starts one process on CPU whatever N is, and does
    not tell it N, which is read off the launcher's command line. A launch whose N is elsewhere
    (in a file of ``accelerate config``) goes on as one process and is told so.
    """
    asked = "MASTER_ADDR" in os.environ and "RANK" not in os.environ
    if accelerator.num_processes > 1 or not asked:
        return
    launcher = psutil.Process().parent()
    count = processes_of(launcher.cmdline() if launcher else [])
    if count > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        sys.stdout.flush()
        os.execv(sys.executable, [*torchrun, "--nproc_per_node", str(count), *sys.argv])
    print(
        "One process: on CPU, accelerate launch starts several with MPI only (--mpirun_hostfile). "
        f"Without: ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 {' '.join(sys.argv)}",
        file=sys.stderr,
    )


def processes_of(command: Sequence[str]) -> int:
    """Returns how many processes a command line of ``accelerate launch`` asks one machine for.

    1 if it does not say, or asks for several machines, which need an address each.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int, default=1)
    parser.add_argument("--num_machines", "--num-machines", type=int, default=1)
    known, _ = parser.parse_known_args(command)
    return known.num_processes if known.num_machines == 1 else 1

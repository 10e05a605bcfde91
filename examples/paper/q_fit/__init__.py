"""Evidence that q(t|s) is fitted, by setting, task, seed and version: ``python -m paper.q_fit``.

- ``program``: the command line; ``report``: the table of its lines.
- ``runs``: what a run is, and the line that it leaves; ``training``: of teachers and students.
- ``tasks``: who teaches whom from which few samples.
"""

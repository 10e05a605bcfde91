"""Machinery behind the programs of the paper's tables.

- ``program``: the command line that ``cub.py`` and ``mit67.py`` share; ``demo``: their ``--demo``.
- ``settings``: what a run is; ``training``: trains and tests the student of one run.
- ``methods``: the rows of the paper's tables as pairs of layers; ``models``: its networks;
  ``weights``: trained weights, from a file or published.
- ``datasets/``: reading data sets, splitting them, loading batches.
- ``tables/``: whole tables for ``tables.py``, from the runs that they have to the report.
- ``q_fit/``: how well q(t|s) is fitted, whatever optimizer, precision and teacher there are.
- ``results/``: what the runs of this repository's tables came to.
"""

"""Whole tables, for ``examples/tables.py``.

- ``plans``: the paper's tables and the small ones, as data; ``grids``: the hyper-parameters that
  each method chooses from.
- ``cells``: a method in a regime, and the runs that it takes; ``runner``: makes one run;
  ``origin``: what it was made with; ``workers``: shares the runs among any number of workers;
  ``estimate``: the hours that they may take.
- ``results``: records of finished runs sorted into tables; ``report``: these as a page and a
  picture, with the paper's figures (``published.csv``) beside ours.
"""

"""Sweeps: a grid of recipes, done by many workers, killed and resumed at will, in one folder.

>>> from vss.sweep import Grid, sweep
>>> sweep(Grid(name="small", criteria=["l1", "taylor"], budgets=[0.5]), "runs/small")  # doctest: +SKIP
"""

from vss.sweep.executors import LocalExecutor, Settings
from vss.sweep.experiment import EXPERIMENTS, Experiment, TrialDirs
from vss.sweep.grid import Grid, Trial, load_grid
from vss.sweep.run import sweep
from vss.sweep.store import Store

__all__ = [
    "EXPERIMENTS", "Experiment", "Grid", "LocalExecutor", "Settings", "Store", "Trial", "TrialDirs", "load_grid",
    "sweep",
]  # fmt: skip

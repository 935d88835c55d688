"""Sweeps: a grid of recipes, done by many workers, killed and resumed at will, in one folder.

>>> from vss.sweep import Grid, sweep
>>> sweep(Grid(name="small", criteria=["l1", "taylor"], budgets=[0.5]), "runs/small")  # doctest: +SKIP
"""

from vss.sweep.grid import Cell, Grid, load_grid
from vss.sweep.local import LocalExecutor
from vss.sweep.run import Settings, sweep
from vss.sweep.store import Store
from vss.sweep.study import STUDIES, Place, Study

__all__ = ["STUDIES", "Cell", "Grid", "LocalExecutor", "Place", "Settings", "Store", "Study", "load_grid", "sweep"]

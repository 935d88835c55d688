"""`fit`: training and fine-tuning, one function, on Lightning.

Lightning owns devices, precision, processes and resuming. Here is only what it cannot know: the loss, the schedule, the
metric, and that a run killed at any moment and started again ends in the very same weights. For that, everything
random is a function of (seed, epoch, image), the resume file is written whole at the end of every epoch, and a folder
remembers what its training was made from: it never goes on with another one.
"""

from __future__ import annotations

from vss.core.errors import VssError

try:
    import lightning  # noqa: F401
except ModuleNotFoundError as error:
    raise VssError(f"training needs {error.name}; install it with: pip install lightning tensorboard") from error

from vss.train.fit.folder import check_norms, check_settings
from vss.train.fit.loop import fit
from vss.train.fit.module import FitData, Moment, Phase, precision_of

__all__ = ["FitData", "Moment", "Phase", "check_norms", "check_settings", "fit", "precision_of"]

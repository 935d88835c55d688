"""What a network is for: the parts of training, evaluation, gates and reports that differ between tasks."""

from __future__ import annotations

from vss.train.tasks.base import TASKS, SegmentationTask, Task, task_of
from vss.train.tasks.defect import DefectTask

__all__ = ["TASKS", "DefectTask", "SegmentationTask", "Task", "task_of"]

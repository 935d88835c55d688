"""Data sets: files to pairs, pairs to tensors, checks, and generated sets to try everything on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vss.core.registry import lazy_names

if TYPE_CHECKING:
    from vss.data.base import IGNORE, LabelTable, Pair, SegData, UnknownLabelsError, require_classes
    from vss.data.counts import class_weights, count_classes
    from vss.data.defects import DefectSplit, Targets, choose_annotated, labels_of, read_split_file
    from vss.data.doubts import check_labels
    from vss.data.images import BadSampleError
    from vss.data.layouts import guess_layout
    from vss.data.preprocess import Preprocess
    from vss.data.readers import DATASETS, open_data
    from vss.data.synthetic import write_defects, write_street
    from vss.data.transforms import Augment, BalancedSampler, EpochSampler, SegSplit, make_loader

__getattr__ = lazy_names(
    __name__,
    {
        "base": ["IGNORE", "LabelTable", "Pair", "SegData", "UnknownLabelsError", "require_classes"],
        "counts": ["class_weights", "count_classes"],
        "defects": ["DefectSplit", "Targets", "choose_annotated", "labels_of", "read_split_file"],
        "doubts": ["check_labels"],
        "images": ["BadSampleError"],
        "layouts": ["guess_layout"],
        "preprocess": ["Preprocess"],
        "readers": ["DATASETS", "open_data"],
        "synthetic": ["write_defects", "write_street"],
        "transforms": ["Augment", "BalancedSampler", "EpochSampler", "SegSplit", "make_loader"],
    },
)

__all__ = [
    "DATASETS",
    "IGNORE",
    "Augment",
    "BadSampleError",
    "BalancedSampler",
    "DefectSplit",
    "EpochSampler",
    "LabelTable",
    "Pair",
    "Preprocess",
    "SegData",
    "SegSplit",
    "Targets",
    "UnknownLabelsError",
    "check_labels",
    "choose_annotated",
    "class_weights",
    "count_classes",
    "guess_layout",
    "labels_of",
    "make_loader",
    "open_data",
    "read_split_file",
    "require_classes",
    "write_defects",
    "write_street",
]

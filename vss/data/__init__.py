"""Data sets: files to pairs, pairs to tensors, checks, and generated sets to try everything on."""

from __future__ import annotations

from vss.data.images import BadSampleError
from vss.data.labels import IGNORE, LabelTable, UnknownLabelsError, require_classes
from vss.data.loader import BalancedSampler, EpochSampler, make_loader
from vss.data.presence import check_labels, class_frequencies, class_weights, count_classes
from vss.data.readers import DATASETS, Pair, SegData, guess_layout, open_data, read_split_file
from vss.data.synthetic import write_defects, write_street
from vss.data.transforms import Augment, DefectSplit, Preprocess, SegSplit, Targets, choose_annotated, labels_of

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
    "class_frequencies",
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

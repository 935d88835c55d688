"""Sharing images out over splits: by fractions and a hash of their names, or by files that list them."""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from vss.core.errors import VssError, counted, listed
from vss.core.sections import DataOptions
from vss.data.base import Pair, SegData, counts_of, read_lines
from vss.data.classes import found_file
from vss.data.counts import count_classes
from vss.data.images import gone, sha256_files
from vss.data.layouts import SPLITS

FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}
"""Where neither the folder nor the recipe says."""

ALL = "all"
"""The one split of a layout that found none; `with_splits` shares it out."""


def with_splits(data: SegData, options: DataOptions) -> SegData:
    """The data set with the splits and the fold of the options; `FRACTIONS` share out one that has no splits.

    Fractions share out the images of the splits that they name, and of those that no run would use; a split of the
    folder that they do not name, such as a published test split, stays as it is.
    """
    wanted: dict[str, float | str] = {str(split): part for split, part in options.split.items()}
    if not wanted and list(data.splits) == [ALL]:
        wanted = {**FRACTIONS}
    shared = _shared_out(data, wanted) if wanted else data
    return with_fold(shared, options.fold) if options.fold else shared


def with_fold(data: SegData, fold: str) -> SegData:
    """Train and val together, shared out again: val is part K of N equal ones, `fold` being "K/N", train is the rest.

    A pure function of names and contents: every image is in the val of exactly one of the N folds.
    """
    number, count = map(int, fold.split("/"))
    found = [(split, pair) for split in ("train", "val") for pair in data.splits.get(split, [])]
    twice = len({pair.id for _, pair in found}) < len(found)
    pairs = [dataclasses.replace(pair, id=f"{split}/{pair.id}") if twice else pair for split, pair in found]
    pairs.sort(key=lambda pair: pair.id)
    present = count_classes(data, pairs).rows > 0
    parts = share_out(pairs, present, {str(index): 1 / count for index in range(1, count + 1)})
    val = parts[str(number)]
    if not all(parts.values()):
        raise VssError(
            f"data.fold is {fold} and {data.root} has {counted(len(pairs), 'image')} in train and val, which do not "
            f"make {count} parts; give fewer folds."
        )
    chosen = {pair.id for pair in val}
    others = {split: found for split, found in data.splits.items() if split not in ("train", "val")}
    splits = {"train": [pair for pair in pairs if pair.id not in chosen], "val": val, **others}
    return in_splits(data, splits, f", val part {number} of {count}")


def in_splits(data: SegData, splits: dict[str, list[Pair]], how: str = "") -> SegData:
    """The data set in other splits; its protocol counts them and says `how` they came about."""
    after, before = (counts_of(each) for each in (splits, data.splits))
    protocol = data.protocol.replace(f"{before} images", f"{after} images{how}")
    return dataclasses.replace(data, splits=splits, protocol=protocol)


def _shared_out(data: SegData, wanted: Mapping[str, float | str]) -> SegData:
    files = {name: part for name, part in wanted.items() if isinstance(part, str)}
    stays = {} if files else {s: found for s, found in data.splits.items() if s in SPLITS and s not in wanted}
    shared = {split: found for split, found in data.splits.items() if split not in stays}
    pairs = [
        dataclasses.replace(pair, id=f"{split}/{pair.id}") if len(shared) > 1 else pair
        for split, found in shared.items()
        for pair in found
    ]
    pairs.sort(key=lambda pair: pair.id)
    if files:
        lists = {split: found_file(files[split], data.root, "data.split") for split in SPLITS if split in files}
        return dataclasses.replace(data, splits={split: listed_pairs(pairs, path) for split, path in lists.items()})
    shares = {name: float(part) for name, part in wanted.items()}
    present = count_classes(data, pairs).rows > 0  # a bad mask is refused: without it others would be shared out
    found = share_out(pairs, present, shares) | stays
    splits = {split: found[split] for split in SPLITS if split in found}
    return in_splits(
        data, splits, f" split by a hash of their names{', but for ' + listed(list(stays)) if stays else ''}"
    )


def share_out(pairs: Sequence[Pair], present: np.ndarray, shares: Mapping[str, float]) -> dict[str, list[Pair]]:
    """Splits of about these sizes with about the same share of every class, a pure function of names and contents.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML 2011): the images of the rarest class first, each
    to the split that lacks it most, ties by what lacks images most; in the order of the SHA-256 of their names. Images
    of equal contents stay together. A class of as many images as there are splits, or more, is owed one in each.

    Args:
        present: (n, K) bool.
        shares: split, or part of another name, -> fraction, together 1.
    """
    names = [split for split in SPLITS if split in shares] or list(shares)
    weights = np.array([shares[name] for name in names])
    groups: dict[str, list[int]] = {}
    for index, digest in enumerate(sha256_files([pair.image for pair in pairs])):
        groups.setdefault(digest, []).append(index)
    order = sorted(groups.values(), key=lambda group: hashlib.sha256(pairs[group[0]].id.encode()).digest())
    shows = np.array([present[group].any(0) for group in order]).reshape(len(order), present.shape[1])
    room = weights * len(pairs)
    owed = weights[:, None] * shows.sum(0)
    scarce = (owed < 1) & (shows.sum(0) >= len(names))
    owed[weights.argmax()] -= np.where(scarce, 1 - owed, 0).sum(0)
    owed[scarce] = 1
    chosen = np.full(len(order), -1)
    while (left := np.flatnonzero(chosen < 0)).size:
        rarity = shows[left].sum(0)
        rare = [int(c) for c in np.argsort(rarity, kind="stable") if rarity[c]]
        batch = left[shows[left, rare[0]]] if rare else left
        for index in batch.tolist():
            lack = (owed[:, rare[0]] if rare else room).round(9)
            best = int(np.lexsort((-room.round(9), -lack))[0])
            chosen[index] = best
            room[best] -= len(order[index])
            owed[best] -= shows[index]
    splits: dict[str, list[Pair]] = {}
    for number, name in enumerate(names):
        taken = sorted(index for place in np.flatnonzero(chosen == number) for index in order[place])
        splits[name] = [pairs[index] for index in taken]
    return splits


def shared_images(splits: Mapping[str, Sequence[Pair]]) -> list[list[tuple[str, Pair]]]:
    """(split, pair) of images whose files are equal and that lie in more than one split, by contents.

    Only files of a size that two splits have are read, and what was read is remembered, see `vss.data.images`: a
    training reads all of them anyway, for the key of its step. Raises `BadSampleError` for a file that is gone.
    """
    by_size: dict[int, list[tuple[str, Pair]]] = {}
    for split, pairs in splits.items():
        for pair in pairs:
            try:
                size = pair.image.stat().st_size
            except OSError as error:
                raise gone(pair.image, error) from error
            by_size.setdefault(size, []).append((split, pair))
    alike = [member for group in by_size.values() if len({split for split, _ in group}) > 1 for member in group]
    equal: dict[str, list[tuple[str, Pair]]] = {}
    for member, digest in zip(alike, sha256_files([pair.image for _, pair in alike]), strict=True):
        equal.setdefault(digest, []).append(member)
    return [group for group in equal.values() if len({split for split, _ in group}) > 1]


def listed_pairs(pairs: Sequence[Pair], path: Path) -> list[Pair]:
    """The pairs that a file lists, one a line: its id, name or path, with or without suffix; what follows is not read.

    Raises:
        VssError: a line that is no image of the folder, or one that may be several.
    """
    by_name: dict[str, list[Pair]] = {}
    for pair in pairs:
        for key in {pair.id, PurePosixPath(pair.id).name, pair.image.name, pair.image.stem}:
            by_name.setdefault(unicodedata.normalize("NFC", key), []).append(pair)
    found: dict[str, Pair] = {}
    missing = []
    for line in read_lines(path, "one image a line"):
        if not line:
            continue
        word = line if line in by_name else line.split()[0]
        name = PurePosixPath(word)
        keys = (word, str(name.with_suffix("")), name.name, name.stem)
        match = next((by_name[key] for key in keys if key in by_name), [])
        if len(match) > 1:
            names = listed([pair.id for pair in match[:3]])
            raise VssError(f"{word!r} in {path} may be {names}; write the path of the image in the list.")
        if match:
            found[match[0].id] = match[0]
        else:
            missing.append(word)
    if missing:
        raise VssError(
            f"{path} lists {missing[0]!r} ({counted(len(missing), 'such line')}), of which there is no pair of image "
            "and mask; correct the list or add the files."
        )
    return [found[key] for key in sorted(found)]

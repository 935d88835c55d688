"""How much a criterion's order of channels depends on the calibration images: many draws of few, beside 160 others.

    python benchmarks/bench_calibration.py --ckpt NET --data-root CAMVID [--batch-sizes 8,1] [--seeds 0,1,2] [--write]

Training images alone, in an order drawn by a seed. The first 160 give the scores that all others are compared with; the
next 160 are shared out into 20 draws of 8, 4 of 40 and one of 160, so that no two draws of a size, and none of them
and the 160, have an image in common. A row has, over draws and seeds: Spearman's rank correlation with the scores of
the 160 within layers (mean over layers by channels; mean and least over draws), the same between two draws of a size,
and how many of the channels that a cut of every layer to half keeps are kept by the 160 as well (chance: 0.5).
`vss run calibration` says what it is worth in mIoU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import facts, write
from torch import Tensor

from vss.core.config import load_recipe
from vss.core.errors import VssError
from vss.prune import quality
from vss.prune.criteria import parse_methods
from vss.run.quality import Subject

LOG = logging.getLogger("bench_calibration")
CRITERIA = "taylor,taylor_fo,obd,dcfp,wanda,sirfp"
WHOLE, SIZES = 160, (8, 40, 160)
Scores = dict[str, Tensor]


def draws_of(subject: Subject, sizes: Sequence[int], batch_size: int) -> tuple[Subject, dict[int, list[Subject]]]:
    """The network with the first `WHOLE` images, and with every draw of each size from the next ones."""
    whole = WHOLE // batch_size
    rest = subject.batches[whole:]

    def draws(count: int) -> list[Subject]:
        return [dataclasses.replace(subject, batches=rest[at : at + count]) for at in range(0, len(rest), count)]

    first = dataclasses.replace(subject, batches=subject.batches[:whole])
    return first, {size: draws(size // batch_size) for size in sizes}


def kept_alike(a: Scores, b: Scores) -> float:
    """Fraction of the channels that stay by `a`, half of every layer, that stay by `b`."""
    counts = {name: len(value) for name, value in a.items()}
    found = sum(counts[name] * quality.overlap(a[name], b[name], share=0.5) for name in a)
    return found / sum(counts.values())


def within(a: Scores, b: Scores) -> float:
    rho = quality.correlations(a, b)["within"]
    if rho is None:
        raise VssError("all scores of every layer are equal; there is no order to compare.")
    return rho


def compare(arguments: argparse.Namespace, batch_size: int, seed: int) -> dict[tuple[str, int], dict[str, list[float]]]:
    """(criterion, images) -> figures of every draw of one order of the images."""
    settings = [f"prune.batches={2 * WHOLE // batch_size}", f"prune.batch_size={batch_size}", f"seed={seed}"]
    recipe = load_recipe(None, settings)
    subject = Subject.open(arguments.ckpt, recipe, dataset=None, data_root=str(arguments.data_root), channels=1)
    seen = sum(len(images) for images, _ in subject.batches)
    if seen != 2 * WHOLE:
        raise VssError(f"{arguments.data_root} gives {seen} training images; this comparison needs {2 * WHOLE}.")
    whole, draws = draws_of(subject, SIZES, batch_size)
    criteria = parse_methods(arguments.criteria)
    truth, found = whole.scores(criteria), {}
    for size, subjects in draws.items():
        scores = [each.scores(criteria) for each in subjects]
        LOG.info("seed %d, batches of %d: %d draws of %d images scored", seed, batch_size, len(subjects), size)
        for name in criteria:
            own = [each[name] for each in scores]
            found[name, size] = {
                "correlation": [within(each, truth[name]) for each in own],
                "between": [within(a, b) for a, b in itertools.pairwise(own)],
                "kept_alike": [kept_alike(each, truth[name]) for each in own],
            }
    return found


def rows_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every criterion, size of a batch and number of images, over all seeds."""
    rows = []
    for batch_size in arguments.batch_sizes:
        start = time.perf_counter()
        runs = [compare(arguments, batch_size, seed) for seed in arguments.seeds]
        LOG.info("batches of %d: %.0f s", batch_size, time.perf_counter() - start)
        for criterion, size in runs[0]:
            figures = {key: [v for run in runs for v in run[criterion, size][key]] for key in runs[0][criterion, size]}
            row = {"criterion": criterion, "batch_size": batch_size, "images": size,
                   "draws": len(figures["correlation"]), "rank_correlation": statistics.fmean(figures["correlation"]),
                   "rank_correlation_least": min(figures["correlation"]),
                   "between_draws": statistics.fmean(figures["between"]) if figures["between"] else None,
                   "kept_alike": statistics.fmean(figures["kept_alike"])}  # fmt: skip
            rows.append(row)
            shown = ", ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float))
            LOG.info("%-16s %3d images in batches of %d: %s", criterion, size, batch_size, shown)
    return rows


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, help="a trained network")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of its data, 320 training images or more")
    parser.add_argument("--criteria", type=lambda text: text.split(","), default=CRITERIA.split(","))
    parser.add_argument("--batch-sizes", type=numbers, default=[8, 1], help="images of a batch, divisors of 8")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="orders of the images")
    parser.add_argument("--write", action="store_true", help="write results/<machine>/<version>--calibration.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    LOG.setLevel(logging.INFO)
    torch.manual_seed(0)
    rows = rows_of(arguments)
    if arguments.write:
        about = {"whole": WHOLE, "seeds": arguments.seeds, "rows": rows}
        LOG.info("written: %s", write("calibration", "cpu", facts("cpu"), about))


if __name__ == "__main__":
    main()

"""Reading images, labels and heads of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vss.core.errors import VssError
from vss.prune.stats.taps import heads_of, images_of, labels_of

IMAGES, LABELS = torch.zeros(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize("batch", [(IMAGES, LABELS), [IMAGES, LABELS[:, None]], {"image": IMAGES, "mask": LABELS}])
def test_images_and_labels(batch: object) -> None:
    assert torch.equal(images_of(batch, nn.Identity()), IMAGES)
    assert torch.equal(labels_of(batch), LABELS)


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), {"image": IMAGES}])
def test_batches_without_labels(batch: object) -> None:
    assert images_of(batch, nn.Identity()) is IMAGES and labels_of(batch) is None


@pytest.mark.parametrize("batch", [{"pixels": IMAGES}, ("a.png", LABELS), ()])
def test_other_batches_are_refused(batch: object) -> None:
    with pytest.raises(VssError, match=r"a calibration batch must be images, \(images, labels\) or a mapping"):
        images_of(batch, nn.Identity())


def test_the_main_head_comes_first() -> None:
    main, other, decision = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2), torch.zeros(2, 3)
    assert [tuple(h.shape[2:]) for h in heads_of(main)] == [(4, 4)]
    assert [tuple(h.shape[2:]) for h in heads_of({"aux": other, "out": main})] == [(4, 4), (2, 2)]
    assert [tuple(h.shape[2:]) for h in heads_of((decision, main))] == [(4, 4), (1, 1)]
    assert [tuple(h.shape[2:]) for h in heads_of({"decision": decision, "seg": main})] == [(4, 4), (1, 1)]
    with pytest.raises(VssError, match=r"heads of \(N, K, h, w\) with one K, got"):
        heads_of((main, torch.zeros(2, 5, 4, 4)))

"""Every criterion finds in two processes what it finds in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from vss.core.errors import VssError
from vss.prune import CRITERIA, collect, find_groups
from vss.prune.criteria import score_groups
from vss.prune.stats.base import Stats

from ..criteria.test_invariants import batches_of, loss, make, net_for
from ..scoring import scores_of

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
NAMES = [name for name in CRITERIA.names() if make(name).needs]


def score(batches: list) -> dict[str, Tensor]:
    """All criteria of one network share one pass; feature norms have their own."""
    found = {}
    for names in ([name for name in NAMES if name != "fn"], ["fn"]):
        net, groups = net_for(names[0])
        criteria = [make(name) for name in names]
        needs = [need for criterion in criteria for need in criterion.needs]
        collected, count = collect(net, list(groups), needs, batches, loss)
        assert count == 5
        for name, criterion in zip(names, criteria, strict=True):
            for key, value in score_groups(criterion, list(groups), Stats(net, collected)).items():
                found[f"{name} {key}"] = value
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = batches_of(5)
    torch.save(score(batches[:2] if rank == 0 else batches[2:]), f"{folder}/{rank}.pt")
    net, groups = net_for("taylor")
    with pytest.raises(VssError, match="a process got no calibration batch"):
        scores_of(net, groups, "taylor", batches[:rank], loss=loss)
    torch.distributed.destroy_process_group()


def test_shares_of_two_processes_add_up_for_every_criterion(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    whole = score(batches_of(5))
    assert {key.split()[0] for key in whole} == set(NAMES) >= {"taylor", "sirfp", "fgp", "defect", "corr", "fn"}
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"{rank}.pt")
        for key, value in whole.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-8, msg=key)


def test_the_network_of_the_test_has_a_group_of_every_kind() -> None:
    net, groups = net_for("taylor")
    members = {group.id: len(group.module_names("producer")) for group in groups}
    assert members == {"backbone.stem.0": 2, "backbone.one.0": 1, "branch.0": 1, "merge.0": 1}
    assert [group.id for group in find_groups(net.float(), torch.zeros(1, 3, 12, 12))] == [g.id for g in groups]

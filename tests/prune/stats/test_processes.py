"""Two processes, each with its own share of the batches, find what one process finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from vss.prune import find_groups, make_plan

from ..nets import Residual, randomise
from ..scoring import batches_of, mean_loss, scores_of

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")


def score(batches: list) -> tuple[dict[str, torch.Tensor], dict]:
    torch.manual_seed(0)
    net = randomise(Residual())
    groups = find_groups(net, torch.zeros(1, 3, 12, 12))
    net = net.double()
    scores = scores_of(net, groups, "taylor", batches)
    example = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    plan = make_plan(net, example, criterion="taylor", batches=batches, loss=mean_loss, groups=groups)
    return scores, plan.to_dict()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = batches_of(5)
    torch.save(score(batches[:2] if rank == 0 else batches[2:]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_shares_of_two_processes_add_up_exactly(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    scores, plan = score(batches_of(5))
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for theirs, _ in shares:
        for key, value in scores.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-12, atol=0)
    assert shares[0][1] == shares[1][1] == plan
    assert plan["calibration"]["batches"] == 5

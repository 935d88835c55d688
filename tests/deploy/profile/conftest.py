"""A small U-Net with uneven norms, its exported file sliced, and a clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deploy.profile.clockwork import Clockwork
from tests.prune.nets import randomise
from vss import models
from vss.data.preprocess import Preprocess
from vss.deploy.profile.setting import SlicedVariants, make_variants
from vss.prune import find_groups

SIZE = (48, 64)


@pytest.fixture(scope="session")
def net() -> Any:
    torch.manual_seed(0)
    return randomise(models.build("unet", 5, width=16, depth=2))


@pytest.fixture(scope="session")
def preprocess() -> Preprocess:
    return Preprocess(size=SIZE)


@pytest.fixture(scope="session")
def variants(net: Any, preprocess: Preprocess, tmp_path_factory: pytest.TempPathFactory) -> SlicedVariants:
    groups = list(find_groups(net, torch.zeros(1, 3, *SIZE)))
    folder = tmp_path_factory.mktemp("variants")
    made = make_variants(net, groups, folder, preprocess=preprocess, options={"labels": False})
    assert isinstance(made, SlicedVariants)
    return made


@pytest.fixture
def clockwork() -> Clockwork:
    return Clockwork()


@pytest.fixture
def table_path(tmp_path: Path) -> Path:
    return tmp_path / "table.json"

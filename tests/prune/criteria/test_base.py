"""The table of criteria and the checks on what they return."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune import CRITERIA, Criterion, Group, Slot, make_criterion
from vss.prune.criteria import score_groups
from vss.prune.stats.base import Stats

GROUP = Group("layer", 3, (Slot("layer.weight", 0),))
STATS = Stats(nn.Identity())


@dataclass(frozen=True, kw_only=True)
class Fixed(Criterion):
    """Returns what it was given."""

    values: tuple[float, ...] = (1.0, 2.0, 6.0)

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        return torch.tensor(self.values)


class Mean(Fixed):
    normalize = "mean"


class Broken(Fixed):
    """Values that no option may have."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        object.__setattr__(self, "values", (1.0, bad, 2.0))


def test_aliases_lead_to_the_published_names() -> None:
    assert {"l1", "l2", "random", "taylor"} <= set(CRITERIA.names())
    assert (CRITERIA.canonical("naive_l1"), CRITERIA.canonical("bn_taylor")) == ("l1", "taylor")


def test_unknown_names_and_options_name_the_closest() -> None:
    with pytest.raises(VssError, match=r"unknown criterion 'tailor'\. Did you mean 'taylor'"):
        make_criterion("tailor")
    with pytest.raises(VssError, match=r"option of criterion 'l1' 'member_rmz'\. Did you mean 'member_rms'"):
        make_criterion("l1", member_rmz=True)


def test_options_are_data() -> None:
    assert Fixed(values=(1.0,)).options() == {"values": (1.0,)}


def test_scores_and_their_normalisation() -> None:
    assert score_groups(Fixed(), [GROUP], STATS)["layer"].tolist() == [1.0, 2.0, 6.0]
    torch.testing.assert_close(
        score_groups(Mean(), [GROUP], STATS)["layer"], torch.tensor([1 / 3, 2 / 3, 2.0], dtype=torch.float64)
    )
    assert score_groups(Mean(values=(0.0, 0.0, 0.0)), [GROUP], STATS)["layer"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_name_the_layer(bad: float) -> None:
    with pytest.raises(VssError, match="criterion 'Broken' gave NaN or infinite scores for layer 'layer'"):
        score_groups(Broken(bad), [GROUP], STATS)


def test_scores_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(VssError, match=r"gave \(2,\) scores for the 3 channels of layer"):
        score_groups(Fixed(values=(1.0, 2.0)), [GROUP], STATS)


OPTIONS = [(name, field.name) for name in CRITERIA.names() for field in dataclasses.fields(CRITERIA[name])]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
@pytest.mark.parametrize("bad", ["1e-3x", float("nan"), -7.5, {"a": "b"}])
def test_every_option_of_every_criterion_refuses_what_it_is_not(name: str, option: str, bad: object) -> None:
    if (name, option, bad) == ("dmcp", "order", "1e-3x"):
        pytest.skip("a text; judged when the criterion is looked up")
    with pytest.raises(VssError, match=rf"{option} of criterion '{name}'|{option}\[.*\] of criterion"):
        make_criterion(name, **{option: bad})


def test_numbers_and_lists_are_what_their_annotations_say() -> None:
    assert make_criterion("corr", lam=1).options()["lam"] == 1.0
    assert make_criterion("fgp", exclude=[0, 3]).options()["exclude"] == (0, 3)
    for bad in ("0.5", True, None):
        with pytest.raises(VssError, match=r"option lam of criterion 'corr' is .*; Input should be a valid number"):
            make_criterion("corr", lam=bad)
    with pytest.raises(VssError, match="unknown preset of criterion 'corr' '3'"):
        make_criterion("corr", preset=3)  # type: ignore[arg-type]

"""One pass over calibration data for every criterion that was asked for.

A criterion names the collectors it needs; `collect` runs each batch once (one forward, one backward where any collector
needs gradients) and hands every collector its turn. Collectors keep running sums per group, never feature maps, in
float64, and sum them over the processes of a distributed run. The network is in evaluation mode (batch norms use their
running statistics), so that scores do not depend on how images are batched; weights, buffers, `.grad`, the training
flag and the hooks are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vss.errors import VssError
from vss.prune.groups import Group
from vss.registry import Registry

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]


class Collector(Protocol):
    """Running statistics of one kind.

    Attributes:
        gradients: whether a loss and a backward pass are needed.
        labels: whether the batches must carry labels.
    """

    gradients: ClassVar[bool]
    labels: ClassVar[bool]

    def __init__(self, model: nn.Module, groups: list[Group]) -> None: ...

    def step(self) -> None:
        """After the forward (and backward) of one batch."""
        ...

    def finish(self) -> dict[str, Tensor]:
        """Group id -> statistic, after sums over all processes."""
        ...


COLLECTORS: Registry[type[Collector]] = Registry("statistic")


class Stats:
    """What a criterion may read: the tensors of the network and what collectors found."""

    def __init__(self, model: nn.Module, collected: dict[str, dict[str, Tensor]] | None = None, *, seed: int = 0):
        self.model = model
        self.seed = seed
        self._tensors = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}
        self._collected = collected or {}

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its full name."""
        return self._tensors[name]

    def rows(self, group: Group) -> list[Tensor]:
        """For each producer of a group its filters, (C, D) float64: one row per channel, biases left out."""
        rows = []
        for slot in group.by_role("producer"):
            value = self.tensor(slot.tensor)
            if value.ndim > 1:
                channels = slot.indices(torch.arange(group.channels)).to(value.device)
                rows.append(value.index_select(slot.dim, channels).movedim(slot.dim, 0).flatten(1).double())
        return rows

    def collected(self, name: str, group: Group) -> Tensor:
        """The statistic `name` of a group."""
        return self._collected[name][group.id]


def collect(
    model: nn.Module, groups: list[Group], needs: Iterable[str], batches: Iterable[Batch] | None, loss: Loss | None
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Run the calibration pass.

    Args:
        model: the network to score.
        groups: its groups.
        needs: names of collectors.
        batches: what `loss` takes, batch by batch; in a distributed run each process gives its own share.
        loss: (model, batch) -> scalar mean loss of the batch over *all* heads.

    Returns:
        ({collector: {group id: statistic}}, number of batches that all processes have seen).
    """
    needs = sorted(set(needs))
    if not needs:
        return {}, 0
    if batches is None or loss is None:
        raise VssError(f"the criterion needs {', '.join(needs)}, from calibration images; give batches and a loss.")
    count = 0
    with _scoring_mode(model):
        collectors = {name: COLLECTORS[name](model, groups) for name in needs}
        gradients = any(collector.gradients for collector in collectors.values())
        for batch in batches:
            count += 1
            model.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(gradients):
                value = loss(model, batch)
            if gradients:
                value.backward()
            for collector in collectors.values():
                collector.step()
        results = {name: collector.finish() for name, collector in collectors.items()}
    seen = int(sum_over_processes(torch.tensor(float(count))))
    if seen == 0:
        raise VssError("the calibration set is empty; give at least one batch.")
    return results, seen


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum over processes where a process group runs; every process must call it in the same order.

    NCCL only moves device memory, so a value on the CPU travels by way of the current CUDA device.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    home = value.device
    if home.type == "cpu" and torch.distributed.get_backend() == "nccl":
        value = value.cuda()
    torch.distributed.all_reduce(value)
    return value.to(home)


@contextmanager
def _scoring_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with all gradients on; everything is put back."""
    training = {module: module.training for module in model.modules()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.eval().requires_grad_(True)
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, requires_grad, grad in before:
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)


@COLLECTORS.register("gate")
class GateGradient:
    """Mean over batches of (sum over members of dL/dgate)^2, the gate being a factor 1 on a channel.

    For a member that ends in a norm layer, dL/dgate = gamma * g_gamma + beta * g_beta (the sum over positions of
    output times gradient, methods: NVlabs Taylor, gate variant). For a producer without a norm it is the sum over its
    filter of w * g plus b * g_b. Signed contributions of coupled members add before squaring: they leave together.
    """

    gradients = True
    labels = True

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.groups = groups
        self.slots = {group.id: gate_slots(model, group) for group in groups}
        self.total = {group.id: torch.zeros(group.channels, dtype=torch.float64) for group in groups}
        self.count = torch.zeros((), dtype=torch.float64)

    def step(self) -> None:
        """Add the squared gate gradient of the batch just seen."""
        for group in self.groups:
            gate = torch.zeros(group.channels, dtype=torch.float64)
            for slot in self.slots[group.id]:
                gate += self._contribution(slot, group)
            self.total[group.id] += gate.square()
        self.count += 1

    def _contribution(self, slot: Any, group: Group) -> Tensor:
        value = self.parameters[slot.tensor]
        if value.grad is None:
            layer = slot.tensor.rpartition(".")[0]
            raise VssError(
                f"layer {layer!r} got no gradient: its head is outside the loss; "
                "include every head in the loss or keep that layer out of pruning."
            )
        product = (value.detach().double() * value.grad.double()).movedim(slot.dim, 0)
        product = product.reshape(len(product), -1).sum(dim=1).cpu()
        return product[slot.indices(torch.arange(group.channels))].reshape(group.channels, -1).sum(dim=1)

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        count = sum_over_processes(self.count)
        return {group.id: sum_over_processes(self.total[group.id]) / count for group in self.groups}


def gate_slots(model: nn.Module, group: Group) -> list[Any]:
    """Affine parameters of the group's norm layers; where it has none, the producers' weights and biases."""
    parameters = {name for name, _ in model.named_parameters()}
    norms = [
        slot
        for slot in group.by_role("norm")
        if slot.tensor in parameters and not isinstance(_owner(model, slot.tensor), nn.modules.conv._ConvNd)
    ]
    return norms or group.by_role("producer")


def _owner(model: nn.Module, tensor: str) -> nn.Module:
    return model.get_submodule(tensor.rpartition(".")[0])

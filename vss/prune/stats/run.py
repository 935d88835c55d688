"""The calibration pass: every batch once, for all collectors that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import evaluating
from vss.core.errors import VssError
from vss.core.example import Forward, default_forward, image_of, mapped
from vss.core.networks import hooked
from vss.prune.apply import BatchNorm
from vss.prune.plan import Group
from vss.prune.stats import BatchNormMode, Need, gradients, maps  # noqa: F401  (registers)
from vss.prune.stats.base import COLLECTORS as COLLECTORS
from vss.prune.stats.base import Collector, max_over_processes, sum_over_processes
from vss.prune.stats.taps import Batch, Layout, images_of

Loss = Callable[[nn.Module, Batch], Tensor]
Statistics = tuple[Mapping[str, Mapping[str, Tensor]], int]
"""{need: {group id: statistic}} and the number of batches behind it: what `collect` returns."""


def collect(
    model: nn.Module,
    groups: list[Group],
    needs: Iterable[Need | str],
    batches: Iterable[Batch] | None,
    loss: Loss | None,
    *,
    batch_norm: BatchNormMode = "eval",
    forward: Forward | None = None,
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Run the calibration pass.

    Args:
        model: the network to score.
        groups: its groups.
        needs: collectors, by name or with options.
        batches: what `loss` takes, batch by batch; in a distributed run each process gives its own share. Collectors
            that read images or labels themselves take them as `vss.prune.stats.taps` says.
        loss: (model, batch) -> scalar mean loss of the batch over *all* heads; needed for gradients alone.
        batch_norm: "train" lets batch norms use each batch's own statistics; their running ones are put back.
        forward: (model, images of a batch) -> outputs, where collectors call the network themselves; default: as
            `default_forward` does.

    Returns:
        ({need: {group id: statistic}}, number of batches that all processes have seen).
    """
    wanted = {str(need): need if isinstance(need, Need) else Need(need) for need in needs}
    if not wanted:
        return {}, 0
    if batches is None:
        raise VssError(f"the criterion needs {_list(wanted)}, from calibration images; give batches and a loss.")
    collectors = {
        key: COLLECTORS[wanted[key].name](model, groups, **dict(wanted[key].options)) for key in sorted(wanted)
    }
    graded = [key for key, collector in collectors.items() if collector.gradients]
    if graded and loss is None:
        raise VssError(f"the criterion needs {_list(graded)}, from gradients; give batches with labels and a loss.")
    count = 0
    outputs = forward or default_forward
    with _scoring_mode(model, batch_norm):
        for batch in batches:
            if count == 0:
                _prepare(model, list(collectors.values()), batch, loss, outputs)
            count += 1
            _pass(model, list(collectors.values()), batch, loss, outputs)
        _check_count(count)
        results = {key: collector.finish() for key, collector in collectors.items()}
    return results, int(sum_over_processes(torch.tensor(float(count))))


def _pass(model: nn.Module, collectors: Sequence[Collector], batch: Batch, loss: Loss | None, forward: Forward) -> None:
    """One batch through the network, for all collectors."""
    plain = [collector for collector in collectors if not collector.outputs]
    for collector in collectors:
        collector.begin(batch)
    if plain:
        with_gradients = any(collector.gradients for collector in plain)
        model.zero_grad(set_to_none=True)
        with hooked(handle for each in plain for handle in each.attach()), torch.set_grad_enabled(with_gradients):
            value = _forward(model, batch, loss, forward)
            if with_gradients:
                value.backward()
    examiners = [collector for collector in collectors if collector.outputs]
    if examiners:
        inputs = mapped(images_of(batch, model), lambda value: value.detach().clone())
        images = image_of(inputs).requires_grad_()
        with hooked(handle for each in examiners for handle in each.attach()), torch.enable_grad():
            outputs = forward(model, inputs)
            for collector in examiners:
                collector.examine(images, outputs, batch)
    for collector in collectors:
        collector.step()


def _forward(model: nn.Module, batch: Batch, loss: Loss | None, forward: Forward) -> Any:
    """The loss of a batch; without a loss the network's outputs."""
    return loss(model, batch) if loss is not None else forward(model, images_of(batch, model))


def _prepare(
    model: nn.Module, collectors: Sequence[Collector], batch: Batch, loss: Loss | None, forward: Forward
) -> None:
    lookers = [collector for collector in collectors if collector.layout]
    if lookers:
        layout = Layout.measure(model, lambda: _forward(model, batch, loss, forward))
        for collector in lookers:
            collector.prepare(layout)


def _check_count(count: int) -> None:
    """Every process needs a batch, or none of them goes on; all raise together."""
    least = -int(max_over_processes(torch.tensor(-float(count))))
    most = int(max_over_processes(torch.tensor(float(count))))
    if most == 0:
        raise VssError("the calibration set is empty; give at least one batch.")
    if least == 0:
        raise VssError("a process got no calibration batch; give at least one batch a process.")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


@contextmanager
def _scoring_mode(model: nn.Module, batch_norm: BatchNormMode) -> Iterator[None]:
    """Evaluation mode with all gradients on; everything is put back."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()] if batch_norm == "train" else []
    with evaluating(model):
        model.requires_grad_(True)
        for module in model.modules():
            if batch_norm == "train" and isinstance(module, BatchNorm):
                module.training = True
        try:
            yield
        finally:
            for parameter, requires_grad, grad in before:
                parameter.grad = grad
                parameter.requires_grad_(requires_grad)
            for buffer, value in buffers:
                buffer.copy_(value)

"""One pass over calibration data for every criterion that was asked for.

A criterion names the collectors it needs; `collect` runs each batch once (one forward, one backward where any collector
needs gradients) and hands every collector its turn. Collectors that look at classes share one more forward a batch and
run one backward to the images per class. Sums are float64, on the network's device, and added up over the processes of
a distributed run. The network is in evaluation mode (batch norms use their running statistics), so that scores do not
depend on how images are batched; weights, buffers, `.grad`, the training flags and the hooks are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune.plan import Group
from vss.prune.stats.base import COLLECTORS, Collector, Need, TapCollector, max_over_processes, sum_over_processes
from vss.prune.stats.taps import Batch, Layout, images_of
from vss.prune.trace import default_forward

Loss = Callable[[nn.Module, Batch], Tensor]
BatchNormMode = Literal["eval", "train"]
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

    Returns:
        ({need: {group id: statistic}}, number of batches that all processes have seen).
    """
    wanted = {str(need): need if isinstance(need, Need) else Need(need) for need in needs}
    if not wanted:
        return {}, 0
    if batches is None:
        raise VssError(f"the criterion needs {_list(wanted)}, from calibration images; give batches and a loss.")
    collectors = {key: COLLECTORS[need.name](model, groups, **dict(need.options)) for key, need in wanted.items()}
    keys = sorted(collectors)
    graded = [key for key in keys if collectors[key].gradients]
    if graded and loss is None:
        raise VssError(f"the criterion needs {_list(graded)}, from gradients; give batches with labels and a loss.")
    count = 0
    with _scoring_mode(model, batch_norm):
        for batch in batches:
            if count == 0:
                _prepare(model, list(collectors.values()), batch, loss)
            count += 1
            _pass(model, [collectors[key] for key in keys], batch, loss)
        _check_count(count)
        results = {key: collectors[key].finish() for key in keys}
    return results, int(sum_over_processes(torch.tensor(float(count))))


def _pass(model: nn.Module, collectors: Sequence[Collector], batch: Batch, loss: Loss | None) -> None:
    """One batch through the network, for all collectors."""
    plain = [collector for collector in collectors if not collector.outputs]
    for collector in collectors:
        collector.begin(batch)
    if plain:
        gradients = any(collector.gradients for collector in plain)
        model.zero_grad(set_to_none=True)
        with _hooks(plain), torch.set_grad_enabled(gradients):
            value = forward(model, batch, loss)
            if gradients:
                value.backward()
    examiners = [collector for collector in collectors if collector.outputs]
    if examiners:
        images = images_of(batch, model).detach().clone().requires_grad_()
        with _hooks(examiners), torch.enable_grad():
            outputs = default_forward(model, images)
            for collector in examiners:
                collector.examine(images, outputs, batch)
    for collector in collectors:
        collector.step()


def forward(model: nn.Module, batch: Batch, loss: Loss | None) -> Any:
    """The loss of a batch; without a loss the network's outputs."""
    return loss(model, batch) if loss is not None else default_forward(model, images_of(batch, model))


def _prepare(model: nn.Module, collectors: Sequence[Collector], batch: Batch, loss: Loss | None) -> None:
    lookers = [collector for collector in collectors if collector.layout]
    if lookers:
        layout = Layout.measure(model, lambda: forward(model, batch, loss))
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
def _hooks(collectors: Sequence[Collector]) -> Iterator[None]:
    """The collectors' hooks for one forward and backward."""
    handles = [handle for collector in collectors for handle in collector.attach()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _scoring_mode(model: nn.Module, batch_norm: BatchNormMode) -> Iterator[None]:
    """Evaluation mode with all gradients on; everything is put back."""
    training = {module: module.training for module in model.modules()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()] if batch_norm == "train" else []
    model.eval().requires_grad_(True)
    for module in model.modules():
        if batch_norm == "train" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, requires_grad, grad in before:
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
        for buffer, value in buffers:
            buffer.copy_(value)


# Statistics collected while a network trains, for methods that watch the training itself.


class Recorder:
    """Keep collectors attached to a network in training.

    >>> with Recorder(model, groups, criterion.requests(), example) as recorder:   # doctest: +SKIP
    ...     for batch in batches:
    ...         loss(model, batch).backward()      # hooks look at forwards in training mode only
    ...         recorder.step()                    # after gradients were unscaled, before the optimiser clears them
    ...     stats = Stats(model, recorder.finish())

    Args:
        model: the network; every forward in training mode counts.
        groups: its groups.
        needs: collectors of maps and gradients; those that read labels or outputs need `collect`.
        example: (N, 3, H, W), to find call order and shapes.
    """

    def __init__(self, model: nn.Module, groups: list[Group], needs: Iterable[Need | str], example: Tensor) -> None:
        wanted = {str(need): need if isinstance(need, Need) else Need(need) for need in needs}
        self.collectors = {
            key: COLLECTORS[wanted[key].name](model, groups, **dict(wanted[key].options)) for key in sorted(wanted)
        }
        for key, collector in self.collectors.items():
            if collector.outputs or (collector.labels and isinstance(collector, TapCollector)):
                raise VssError(f"the statistic {key!r} cannot be recorded during training; use a calibration set.")
        flags = {module: module.training for module in model.modules()}
        layout = Layout.measure(model.eval(), lambda: default_forward(model, example))
        for module, flag in flags.items():
            module.training = flag
        for collector in self.collectors.values():
            collector.prepare(layout)
            if isinstance(collector, TapCollector):
                collector.only_training = True
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [handle for collector in self.collectors.values() for handle in collector.attach()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def step(self) -> None:
        """After a backward pass: gradients are in `.grad`, unscaled."""
        for collector in self.collectors.values():
            collector.step()

    def finish(self) -> dict[str, dict[str, Tensor]]:
        """What `Stats` takes."""
        return {key: collector.finish() for key, collector in self.collectors.items()}

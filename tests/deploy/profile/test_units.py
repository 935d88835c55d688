"""Names and sizes of units: against the network's own MAC count, and for names that onnxruntime gives."""

from __future__ import annotations

from typing import Any

import torch

from vss.deploy.profile.setting import SlicedVariants, cut_to
from vss.deploy.profile.units import Graph, lookup_shape, unit_shapes
from vss.prune import CostModel


def test_macs_and_channels_are_those_of_the_cut_network(variants: SlicedVariants, net: Any) -> None:
    widths = [max(1, group.channels * 2 // 3) for group in variants.groups]
    shapes = unit_shapes(variants.graph(widths, empty=True), 2)
    cut: Any = cut_to(net, variants.groups, widths)
    cost = CostModel.measure(cut, torch.zeros(1, 3, 48, 64))
    assert sum(shape.macs for shape in shapes.values()) == 2 * cost.total("macs", [], [])
    for name, module in cut.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            assert (shapes[name].cin, shapes[name].cout) == (module.in_channels, module.out_channels), name
            assert shapes[name].macs == 2 * cost.positions[f"{name}.weight"] * module.weight.numel()


def test_fused_and_inserted_nodes_get_lasting_names(variants: SlicedVariants) -> None:
    graph = Graph.of(variants.model)
    conv = next(node for node in variants.model.graph.node if "encoder.0.0.0" in "".join(node.input))
    relu = next(node for node in variants.model.graph.node if node.input[0] == conv.output[0])
    assert relu.op_type == "Relu"
    names = [(f"{relu.output[0]}_nchwc", "Conv"), (f"{conv.output[0]}_nchwc", "Conv"), (conv.name, "FusedConv")]
    assert {graph.resolve(name, op) for name, op in names} == {"encoder.0.0.0"}
    found = graph.resolve("ReorderOutput_token_3", "ReorderOutput", ["reorder_7", relu.output[0]])
    assert found == f"ReorderOutput:{relu.output[0]}"
    shapes = unit_shapes(variants.model, 1)
    assert (lookup_shape(found, shapes).cin, lookup_shape(found, shapes).cout) == (16, 16)  # type: ignore[union-attr]
    assert graph.resolve("something", "Copy", []) == "Copy:other"
    assert lookup_shape("Copy:other", shapes) is None

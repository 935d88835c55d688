"""What TensorRT refuses or runs badly in an ONNX file, found without TensorRT: every rule over one `View`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vss.deploy.lint.quant import QUANT_RULES
from vss.deploy.lint.rules import RULES
from vss.deploy.lint.view import PLUGINS, Severity, look

__all__ = ["PLUGINS", "Finding", "lint", "rows"]


@dataclass(frozen=True)
class Finding:
    """One place: `node` is the name of a node or tensor, `detail` what is there, `reason` why it matters, `fix` what
    to do. An "error" keeps TensorRT from building the file; a "warning" costs time, memory or accuracy."""

    rule: str
    severity: Severity
    node: str
    detail: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.detail}: {self.reason}; {self.fix}."


def lint(model: Any, *, plugins: Sequence[str] = PLUGINS) -> list[Finding]:
    """Check an ONNX file against every rule.

    Args:
        model: a path or a ModelProto.
        plugins: op types that TensorRT plugins will implement, whatever their domain.

    Returns:
        Findings, errors first, in the order of the rules.

    Raises:
        VssError: not an ONNX file.
    """
    view = look(model, plugins=plugins)
    found = [
        Finding(rule.name, rule.severity, node, detail, rule.reason, rule.fix)
        for rule in (*RULES, *QUANT_RULES)
        for node, detail in rule.find(view)
    ]
    return sorted(found, key=lambda finding: finding.severity != "error")


def rows(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """The findings as JSON-ready rows."""
    return [asdict(finding) for finding in findings]

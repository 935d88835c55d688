"""The lint beside the real parser and builder of TensorRT for RTX.

`python -m tests.deploy.lint_table` writes the list of ops that the rules read (vss/deploy/parser_ops.json) and the
table of the docs (docs/reference/lint.md).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from tests.deploy.lint_planted import CLEAN, NOT_BUILT, OTHERS, PLANTED
from tests.deploy.real_parser import Verdict, judge, parser_ops
from vss.deploy.lint import QUANT_RULES, lint
from vss.deploy.lint_rules import FLAVOURS, RULES, Rule

ROOT = Path(__file__).resolve().parents[2]
OPS, PAGE = ROOT / "vss/deploy/parser_ops.json", ROOT / "docs/reference/lint.md"
TARGETS = {"fp8": "sm89"}
"""Graphs that are judged for another GPU than sm86."""
SHORT = {"refused": "error", "builds another engine": "error: another engine", "warning": "warning"}
HEAD = """# Rules of the lint

<!-- made by `python -m tests.deploy.lint_table` -->
`vss lint FILE.onnx` looks for these. Columns 10 and 11 are TensorRT by the public ONNX parser of 10.1 and its changes
up to 10.6, the headers of 10.16 and 11.1 and the documentation: no builder of either has judged them. Column rtx is
TensorRT for RTX, and its real parser and builder said of a graph of every rule what stands beside it. "Error: another
engine" means that TensorRT builds the file, and the engine is another one than the file says.

"""


def graphs() -> dict[str, onnx.ModelProto]:
    """All graphs by a name: of every rule, in other forms, without findings, and of ops that are never built."""
    made = {rule: make() for rule, (_, _, make) in PLANTED.items()}
    made |= {f"{rule}, {words}": make() for rule, words, make in OTHERS}
    made |= {f"clean: {name}": make() for name, make in CLEAN.items() if name != "plugin"}
    return made | {f"op: {name}": make() for name, make in NOT_BUILT.items()}


def judged(models: Mapping[str, onnx.ModelProto]) -> dict[str, Verdict]:
    with tempfile.TemporaryDirectory(prefix="vss-lint-") as folder:
        found: dict[str, Verdict] = {}
        for target in {"sm86", *TARGETS.values()}:
            part = {name: model for name, model in models.items() if TARGETS.get(name, "sm86") == target}
            found |= judge(part, Path(folder), target=target)
    return found


def refused_by_rules(name: str, model: onnx.ModelProto) -> list[str]:
    """The rules that say that TensorRT for RTX refuses the graph."""
    found = lint(model, flavours=["rtx"], targets=[TARGETS.get(name, "sm86")])
    return sorted({finding.rule for finding in found if finding.flavours["rtx"] == "refused"})


def disagreements(models: Mapping[str, onnx.ModelProto], verdicts: Mapping[str, Verdict]) -> list[str]:
    """Graphs that the rules and TensorRT for RTX judge differently."""
    return [name for name, model in models.items() if bool(refused_by_rules(name, model)) == verdicts[name].built]


def ops(verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    """What `parser_ops.json` holds."""
    names = sorted({schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain})
    version, known = parser_ops(names)
    not_built = {name: verdicts[f"op: {name}"].reason for name in NOT_BUILT if not verdicts[f"op: {name}"].built}
    unsupported = [name for name in names if name not in known]
    return {"tensorrt_rtx": version, "onnx": onnx.__version__, "unsupported": unsupported, "not_built": not_built}


def page(models: Mapping[str, onnx.ModelProto], verdicts: Mapping[str, Verdict], version: str) -> str:
    lines = [f"| rule | 10 | 11 | rtx | TensorRT for RTX {version} | why |", "|---|---|---|---|---|---|"]
    lines += [_row(rule, verdicts[rule.name]) for rule in (*RULES, *QUANT_RULES)]
    wrong = disagreements(models, verdicts)
    tail = (
        f"{len(models)} graphs were judged: one for each of the {len(lines) - 2} rules, other forms of the same\n"
        f"faults, graphs without any, and ops that are never built ({', '.join(NOT_BUILT)}).\n"
        f"Column rtx and TensorRT for RTX disagree on {len(wrong)} of them{': ' if wrong else ''}{', '.join(wrong)}."
    )
    return f"{HEAD}{chr(10).join(lines)}\n\n{tail}\n"


def _row(rule: Rule, verdict: Verdict) -> str:
    does = rule.does()
    target = f" for {TARGETS[rule.name]}" if rule.name in TARGETS else ""
    said = f"builds it{target}" if verdict.built else f"refuses it: {verdict.reason}"
    cells = [f"`{rule.name}`", *(SHORT.get(does.get(each, ""), "") for each in FLAVOURS), _cut(said), rule.reason]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cut(text: str, limit: int = 150) -> str:
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."


def main() -> None:
    models = graphs()
    verdicts = judged(models)
    OPS.write_text(json.dumps(ops(verdicts), indent=1) + "\n")
    PAGE.write_text(page(models, verdicts, parser_ops([])[0]))


if __name__ == "__main__":
    main()

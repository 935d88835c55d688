"""The page of a sweep: one offline HTML file with a sortable table, trade-offs, classes, widths, ranks and exports.

The figures are embedded as JSON and drawn by the page's own script (`templates/sweep.js.j2`, 20 kB, shared by all
figures), which loads nothing; a plotting library would weigh megabytes in every page.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vss.core.errors import need
from vss.core.files import atomic, read_json, write_text
from vss.run.page.charts import pareto
from vss.run.page.panels import panels
from vss.run.page.words import block, label, number, signed, template

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND, SCHEMA = "vss.sweep_results", 1
UNLIKE = 1.2  # times of one network that differ by more were taken at another load of the machine
OTHER_MACS = "not at equal MACs"  # how the labels of such runs begin
COSTS = ("macs_g", "params_m", "latency_ms_p50")
MAIN = ("macs_g", "params_m", "latency_ms_p50", "speedup")


def write_page(results_path: Path | str, html_path: Path | str) -> Path:
    """Read results.json and write the page, whole or not at all; pictures lie beside results.json."""
    results_path = Path(results_path)
    return write_text(html_path, render(read_json(results_path, kind=KIND, schema=SCHEMA), results_path.parent))


def render(results: Mapping[str, Any], root: Path) -> str:
    """The page as HTML; pictures are read below `root` and embedded."""
    pictures = panels({"panels": results["panels"], "classes": results["classes"], "palette": results["palette"]}, root)
    environment = results.get("environment", {})
    machine = [environment.get("machine"), (environment.get("cpu") or {}).get("model")]
    return template("sweep.html.j2").render(
        data=results,
        json=json.dumps(_shown(results), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        head=headline(results),
        sections=_sections(results),
        two_way=two_way(results),
        folds=folds(results),
        panels=pictures,
        missing=missing(results),
        environment=block(environment),
        machine=" · ".join(dict.fromkeys(str(part) for part in machine if part)),
        created=str(results.get("created") or "")[:16].replace("T", " "),
    )


def _shown(results: Mapping[str, Any]) -> dict[str, object]:
    metric = results["metric"]
    keys = (
        "name", "metric", "title", "columns", "axes", "rows", "groups", "baselines", "classes", "ranking", "protocol",
    )  # fmt: skip
    costs = [cost for cost in COSTS if any(cost in group["values"] for group in results["groups"])]
    main = [key for key in (metric, f"{metric}_change", *MAIN) if key in results["columns"]]
    labels = {key: label(key) for key in [*results["columns"], metric, *costs]}
    labels |= {f"{key}_change": f"{label(key)}, change" for key in results["columns"]}
    labels |= {f"pruned_{key}": f"{label(key)}, before fine-tuning" for key in results["columns"]}
    extra = {"seconds": "time (s)", "latency_ms_p50": "latency (ms)", "macs_kept": "MACs kept"}
    note = "Latency: torch, one image at a time, one network after another, medians." if len(costs) == 3 else ""
    digits = {key: 2 for key in results["columns"] if "_pct" in key}
    return {key: results[key] for key in keys} | {
        "costs": costs, "main": main, "labels": labels | extra, "digits": digits, "latency_note": note,
        "other_macs": OTHER_MACS,
    }  # fmt: skip


def _sections(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    groups = results["groups"]
    axis = "Criteria" if "criterion" in results["axes"] else "Variants"
    found = {
        "ranking": (f"{axis} ranked", bool(results["ranking"]["rows"])),
        "effects": ("Criteria by variants", two_way(results) is not None),
        "folds": ("Cross-validation", bool(results.get("over_folds"))),
        "tradeoff": ("Trade-offs", bool(groups)),
        "table": ("Every run", bool(results["rows"])),
        "classes": ("IoU per class", any(group["iou_pct"] for group in groups)),
        "widths": ("Widths", any(group["widths"] for group in groups)),
        "pictures": ("Pictures", bool(results["panels"])),
        "missing": ("Missing figures", bool(missing(results))),
        "reproduce": ("Reproduce", True),
    }
    return [(name, title) for name, (title, there) in found.items() if there]


def headline(results: Mapping[str, Any]) -> dict[str, object]:
    """What the sweep came to: one sentence, more of them, tiles."""
    rows, ranking = results["rows"], results["ranking"]
    failed = [row for row in rows if row["status"] == "failed"]
    done = [row for row in rows if row["status"] == "ok"]
    text, told = f"{len(done)} of {len(rows)} runs done", ""
    if ranking["rows"]:
        text, told = _ranked(ranking, results["title"])
    sentences = [told] if told else []
    for case in results["unequal"]:
        low, high = number(100 * case["low_kept"], 1), number(100 * case["high_kept"], 1)
        ends = f"from {low} % ({case['low']}) to {high} % ({case['high']})"
        sentences.append(f"{case['name'] or 'All runs'}: not at equal MACs, {ends} kept.")
    if said := spread_over(results.get("effects"), results["title"]):
        sentences.append(said)
    if failed:
        sentences.append(f"Failed: {', '.join(row['id'] for row in failed)}.")
    judged = {_folded(case): case for case in results.get("over_folds", []) if case.get("checks")}
    missed = {name: sum(not check["passed"] for check in case["checks"]) for name, case in judged.items()}
    for name, case in judged.items():
        count = len(case["checks"])
        verdict = f"failed {missed[name]} of {count} checks" if missed[name] else f"passed all checks ({count})"
        sentences.append(f"{name} {verdict} of the ship rule over {case['folds']} folds.")
    tiles = [(f"{len(done)} of {len(rows)}", "runs done"), (str(len(results["groups"])), "networks compared")]
    best = _best(results)
    if best:
        tiles.append((signed(best[1], 2), f"points, best mean change: {best[0]}"))
    sentences += [f"{figure} is missing." for figure, _ in missing(results) if figure.startswith("Latency")]
    sentences += _loads(done)
    tone = "bad" if failed else "warn" if any(missed.values()) else "good"
    return {"headline": text, "sentences": sentences, "tiles": tiles, "tone": tone}


def _loads(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each network whose own time, measured beside every trial, says that the machine was not alike."""
    times: dict[str, list[float]] = {}
    for row in rows:
        if (value := row["values"].get("baseline_latency_ms_p50")) is not None:
            times.setdefault(row["coords"].get("network", "network"), []).append(value)
    return [
        f"The uncut {name} took {number(min(own), 2)} to {number(max(own), 2)} ms beside its trials: compare speedups, "
        "not milliseconds."
        for name, own in times.items()
        if max(own) > UNLIKE * min(own)
    ]


def two_way(results: Mapping[str, Any]) -> dict[str, object] | None:
    """Mean scores of every criterion (rows) under every variant (columns), with their intervals; None where the sweep
    does not vary these two alone, or in seeds. A star marks a mean that holds a run of other MACs."""
    cells = {(g["coords"].get("criterion"), g["coords"].get("variant")): g for g in results["groups"]}
    rows, columns = ([name for name in dict.fromkeys(key[i] for key in cells)] for i in (0, 1))
    others = {(g["coords"].get("network"), g["coords"].get("budget")) for g in results["groups"]}
    if None in rows or None in columns or min(len(rows), len(columns)) < 2 or len(others) > 1:
        return None

    def text(group: Mapping[str, Any] | None) -> str:
        value = group and group["values"].get(results["metric"])
        if not group or not value:
            return ""
        star = "*" if any(label.startswith(OTHER_MACS) for label in group["labels"]) else ""
        half = f" ± {number(value['half'], 2)}" if value["half"] is not None else ""
        return f"{number(value['mean'], 2)}{half}{star}"

    table = [[row, *(text(cells.get((row, column))) for column in columns)] for row in rows]
    starred = any(cell.endswith("*") for row in table for cell in row[1:])
    sentence = spread_over(results.get("effects"), results["title"])
    sentence += f" *: holds runs that are {OTHER_MACS}, see the table of runs." if starred else ""
    return {"columns": columns, "rows": table, "sentence": sentence}


def folds(results: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Cross-validation: `rows` of [network, missed defects, false alarms, AP], those that networks share only once, and
    `verdicts` of [network, sentence]."""
    rows: list[list[str]] = []
    verdicts: list[list[str]] = []
    for case in results.get("over_folds", []):
        name = _folded(case)
        if "missing" in case:
            verdicts.append([name, f"folds {', '.join(case['missing'])} are not done."])
            continue
        last = list(case["rows"])[-1]
        for stage, row in case["rows"].items():
            low, high = (number(end, 1) for end in row["fnr_interval_pct"])
            missed = f"{row['fn']} of {row['positives']} ({low} to {high} %)"
            alarms = f"{row['fp']} of {row['negatives']}"
            own = _folded(case, "" if stage == last else stage)
            line = [own, missed, alarms, number(row["ap_pct"], 2)]
            rows += [line] if line not in rows else []
        verdicts += [[name, f"{check['what']} {check['sentence']}"] for check in case["checks"]]
        verdicts += [] if case["checks"] else [[name, "no limits are set (gate)."]]
    return {"rows": rows, "verdicts": verdicts}


def _folded(case: Mapping[str, Any], name: str = "") -> str:
    """Name and seed of a network that was cross-validated."""
    return " · ".join([name or case["name"], *([f"seed {case['seed']}"] if case["seed"] else [])])


def spread_over(effects: Mapping[str, Any] | None, title: str) -> str:
    """What the scores' spread goes with, in a sentence."""
    if not effects:
        return ""
    shares = [(each["name"], each["share"], each.get("friedman_p")) for each in [*effects["axes"], *effects["pairs"]]]
    said = [f"{name} {number(100 * share, 1)} %" + (f" (p = {p:.3g})" if p is not None else "")
            for name, share, p in shares]  # fmt: skip
    left = f"; left out, as some combinations are missing: {', '.join(effects['left_out'])}"
    rest = f"rest {number(100 * effects['rest'], 1)} %{left if effects['left_out'] else ''}"
    return f"Of the spread of {title} over {effects['cells']} runs: {', '.join(said)}, {rest}. p: Friedman."


LEVEL = 0.05


def _ranked(ranking: Mapping[str, Any], title: str) -> tuple[str, str]:
    """A headline and a sentence: a first place is named only where the tests tell it from chance."""
    first, *others = ranking["rows"]
    least, friedman, blocks = ranking["least_p"], ranking["friedman_p"], ranking["blocks"]
    of = f"{len(ranking['rows'])} compared in {blocks} block{'' if blocks == 1 else 's'}"
    means = f"The best mean rank is that of {first['name']}, {number(first['rank'], 1)}"
    if least is not None and least >= LEVEL:
        return f"So few comparisons rank nothing ({of})", f"{means}, and no test can tell it from chance."
    worse = [row["name"] for row in others if row["p"] is not None and row["p"] < LEVEL]
    if not worse or (friedman is not None and friedman >= LEVEL):
        same = f"No other is worse than {first['name']} in {title} beyond chance (p < {LEVEL} after Holm)."
        return f"None is better in {title} beyond chance ({of})", f"{means}. {same}"
    same_as = [row["name"] for row in others if row["name"] not in worse]
    sentence = f"Worse than {first['name']} in {title} beyond chance (p < {LEVEL} after Holm): {', '.join(worse)}"
    if same_as:
        sentence = f"{sentence}; not so {', '.join(same_as)}. {means}."
        return f"{first['name']} leads, and {', '.join(same_as)} cannot be told from it ({of})", sentence
    return f"{first['name']} comes first ({of})", f"{sentence}. {means}."


def missing(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, which runs lack it and why)."""
    done = [row for row in results["rows"] if row["status"] == "ok"]
    lacking = [row for row in done if "latency_ms_p50" not in row["values"]]
    found = []
    if lacking and "macs_g" in results["columns"]:
        noisy = [row for row in lacking if "latency_spread_pct" in row["values"]]
        others = [row["id"] for row in lacking if row not in noisy]
        told = [f"{row['id']} (too noisy: spread {number(row['values']['latency_spread_pct'], 1)} %)" for row in noisy]
        if others:
            told.append(f"{', '.join(others) if len(others) < len(done) else 'all'} (not timed)")
        why = f"{'; '.join(told)}. The same command times them again, where latency_seconds is above 0."
        found.append((f"Latency of {len(lacking)} of {len(done)} runs", why))
    for row in results["rows"]:
        if row["status"] != "ok":
            why = row.get("error") or "the run is not done; the same command goes on"
            found.append((f"Every figure of {row['id']}", why))
    return found


def _best(results: Mapping[str, Any]) -> tuple[str, float] | None:
    key = f"{results['metric']}_change"
    found = [(group["name"], group["values"][key]["mean"]) for group in results["groups"] if key in group["values"]]
    return max(found, key=lambda pair: pair[1]) if found else None


MISSES = "fnr_pct"
LETTERS = 15  # of a title, on an inch


def write_chart(results: Mapping[str, Any], rows: Sequence[Mapping[str, object]], path: Path) -> Path | None:
    """The master table as PNG: bars of the score and the miss rate, and the trade-off against MACs.

    `rows` are its lines, those of pruned networks of kind "groups"; None where there are none.
    """
    metric, title = results["metric"], results["title"]
    rows = [row for row in rows if row.get(metric) is not None]
    if not any(row["kind"] == "groups" for row in rows):
        return None
    matplotlib = need("matplotlib", "the picture of a sweep")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    misses = any(row.get(MISSES) is not None for row in rows)
    with matplotlib.rc_context({"text.parse_math": False}):  # names hold $ as they like
        figure = Figure(figsize=(max(8.0, 0.5 * len(rows)), 8.0), dpi=150, layout="constrained")
        upper, lower = figure.subplots(2, 1)
        _bars(upper, rows, [(metric, title)] + ([(MISSES, "missed defects")] if misses else []))
        _trade_off(lower, rows, metric, title)
        about = f"{results['name']}: {results['protocol'].split(';')[0]}"
        figure.suptitle(textwrap.fill(about, int(LETTERS * figure.get_figwidth())), fontsize=8)
        with atomic(path) as temporary:
            FigureCanvasAgg(figure).print_png(str(temporary))
    return path


def _bars(axes: Axes, rows: Sequence[Mapping[str, Any]], series: Sequence[tuple[str, str]]) -> None:
    """Bars of one or two figures in percent, with 95 % intervals over seeds."""
    width = 0.8 / len(series)
    for place, (key, name) in enumerate(series):
        places = [index + (place - (len(series) - 1) / 2) * width for index in range(len(rows))]
        heights = [row.get(key) or 0.0 for row in rows]
        halves = [row.get(f"{key}_half") or 0.0 for row in rows]
        axes.bar(places, heights, width, yerr=halves if any(halves) else None, capsize=2, label=name)
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("%")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, ncols=len(series), fontsize=8)


def _trade_off(axes: Axes, rows: Sequence[Mapping[str, Any]], metric: str, title: str) -> None:
    """Score against MACs, methods by colour, the front that nothing beats as a line."""
    from matplotlib import colormaps

    known = [row for row in rows if row.get("macs_g") is not None]
    names = list(dict.fromkeys(_method(row) for row in known))
    axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
    for name in names:
        own = [row for row in known if _method(row) == name]
        axes.plot([row["macs_g"] for row in own], [row[metric] for row in own], "o", markersize=5, label=name)
    front = [known[index] for index in pareto([(row["macs_g"], row[metric]) for row in known])]
    axes.plot(
        [row["macs_g"] for row in front], [row[metric] for row in front], "-", color="0.5", linewidth=1, zorder=0,
        label="not beaten",
    )  # fmt: skip
    axes.set_xlabel("GMAC")
    axes.set_ylabel(f"{title} (%)")
    axes.legend(frameon=False, ncols=4, fontsize=7)


def _method(row: Mapping[str, object]) -> str:
    return str(row.get("criterion") or row.get("variant") or row["name"])

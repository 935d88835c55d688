"""`vss methods` and `vss quality`: what criteria there are, and how good they are on a network."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import Progress

from vss.cli.console import Ckpt, Data, ReportFile, Root, Seed, err, out, recipe_of, show_table, write_figures

methods_app = typer.Typer()


@methods_app.command()
def methods() -> None:
    """List pruning criteria: what each needs, how its paper ranks, its presets and its source."""
    from vss.run.quality import method_rows

    heads = {
        "name": "criterion", "aliases": "also", "needs": "needs", "sparse_phase": "sparse phase", "ranking": "ranking",
        "presets": "presets", "source": "source",
    }  # fmt: skip
    show_table(method_rows(), heads)


@methods_app.command()
def quality(
    ckpt: Ckpt,
    methods: Annotated[str, typer.Option(help="criteria, with commas between; METHOD:PRESET takes a preset")],
    channels: Annotated[
        int, typer.Option(min=1, max=100_000, help="channels that the oracle leaves out, one at a time")
    ] = 64,
    batches: Annotated[int, typer.Option(help="calibration batches")] = 4,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 8,
    macs: Annotated[
        float, typer.Option(min=0.001, max=1, help="fraction of the MACs that stays, for the reconstruction error")
    ] = 0.5,
    sensitivity: Annotated[str | None, typer.Option(help="also scan every group with this criterion")] = None,
    dataset: Data = None,
    data_root: Root = None,
    seed: Seed = None,
    report: ReportFile = None,
) -> None:
    """Judge criteria without fine-tuning: overlap with an oracle, reconstruction error, correlations, sensitivity."""
    from vss.run import quality as judge

    judge.parse_methods([*methods.split(","), *([sensitivity] if sensitivity else [])])
    job = recipe_of(None, None, prune__batches=batches, prune__batch_size=batch_size, seed=seed)
    subject = judge.Subject.open(ckpt, job, dataset=dataset, data_root=data_root, channels=channels)
    out.print(subject.cost_sentence(), highlight=False)
    with Progress(console=err, transient=True) as bar:
        task = bar.add_task("oracle", total=len(subject.sample))
        figures = judge.compare(subject, methods.split(","), keep=macs, tick=lambda: bar.advance(task))
    if sensitivity:
        figures["sensitivity"] = judge.scan(subject, sensitivity)
    heads = {
        "name": "criterion", "overlap_25": "top 25 %", "overlap_50": "top 50 %", "rank_correlation": "oracle rank",
        "relative_error": "output error", "note": "note",
    }  # fmt: skip
    show_table(figures["methods"], heads, "against the oracle (chance: 0.25, 0.50, 0, -)")
    names = [row["name"] for row in figures["methods"]]
    pairs = [{"name": row["name"], **row["correlations"]} for row in figures["methods"]]
    show_table(pairs, {"name": "rank correlation", **{name: name for name in names}})
    if sensitivity:
        rows = [{"name": row["group"], **row} for row in figures["sensitivity"]]
        show_table(rows, {"name": "group", "ratio": "removed", "value": "loss", "change": "change"}, "sensitivity")
    write_figures(report, "vss.quality", figures)

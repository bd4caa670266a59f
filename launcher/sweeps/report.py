"""report.html at the end of a sweep, with Optuna's plots, as one file that needs no network."""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Iterable
from typing import Any

import matplotlib
from matplotlib import pyplot
from optuna.visualization import matplotlib as plots

from launcher.runs import RunDirectory, write_text
from launcher.sweeps import records
from launcher.sweeps.search import display_values
from launcher.sweeps.space import plain_text
from launcher.sweeps.study import Study

_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>body{{font:15px/1.4 sans-serif;margin:2em auto;max-width:70em}}table{{border-collapse:collapse}}
td,th{{padding:.15em .8em;text-align:left;border-bottom:1px solid #ddd}}img{{max-width:100%}}</style>
<h1>{name}</h1>
{body}
</html>
"""


def write_report(directory: RunDirectory, study: Study) -> None:
    """Write report.html: best trial, importances, parallel coordinates, history, repeats and all trials."""
    parts = [_best(study)]
    for heading, picture in _plots(study):
        parts.append(f'<h2>{heading}</h2>\n<img alt="{heading}" src="data:image/png;base64,{picture}">')
    if study.space.over:
        parts.append(_repeats(study))
    columns = records.columns(study.space)
    parts.append(_table("Trials", columns, ([row.get(column) for column in columns] for row in records.rows(study))))
    page = _PAGE.format(name=html.escape(directory.name), body="\n".join(parts))
    write_text(directory.path / "report.html", page)


def _best(study: Study) -> str:
    best = study.best()
    assert best is not None
    goals = ", ".join(
        f"{objective.tag} {value:.6g}" for objective, value in zip(study.objectives, best.values, strict=True)
    )
    repeats = study.repeats_of(best.number)
    if repeats is not None:
        spread = "" if repeats.spread is None else f" ± {repeats.spread:.2g}"
        goals += f" (mean {repeats.mean:.6g}{spread} of {len(repeats.objectives)})"
    values = display_values(study.values(best), study.space)
    words = " ".join(f"{key}={plain_text(value)}" for key, value in values.items())
    text = f"<p>Best: trial {best.number}, {html.escape(goals)}<br><code>{html.escape(words)}</code></p>"
    importances = study.importances()
    if importances:
        rows = ((key, f"{value:.3f}") for key, value in importances.items())
        text += "\n" + _table("Parameter importance", [], rows)
    return text


def _plots(study: Study) -> list[tuple[str, str]]:
    """Return (heading, PNG in base64) of each plot, without those that Optuna cannot draw, as of a single trial."""
    matplotlib.use("Agg")
    several = len(study.objectives) > 1
    target: dict[str, Any] = {"target": lambda trial: trial.values[0]} if several else {}
    name = {"target_name": study.objectives[0].tag}
    chosen: list[tuple[str, Any, dict[str, Any]]] = [
        ("Importance", plots.plot_param_importances, target | name),
        ("Parallel coordinates", plots.plot_parallel_coordinate, target | name),
        ("History", plots.plot_optimization_history, target | name),
        *([("Pareto front", plots.plot_pareto_front, {})] if len(study.objectives) in (2, 3) else []),
    ]
    found = []
    for heading, draw, options in chosen:
        if heading == "Importance" and not study.importances():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                draw(study.inner, **options)
                stream = io.BytesIO()
                pyplot.savefig(stream, format="png", dpi=90, bbox_inches="tight")
                found.append((heading, base64.b64encode(stream.getvalue()).decode()))
            except Exception:  # a plot that cannot be drawn must not fail a completed sweep
                continue
            finally:
                pyplot.close("all")
    return found


def _repeats(study: Study) -> str:
    """Return the table of mean and spread for each combination of the keys that are not repeated, best mean first."""
    keys = [key for key in study.space.keys if key not in study.space.over]
    groups = {id(group): group for group in study.repeats().values() if group.objectives}.values()
    sign = 1 if study.objectives[0].direction == "min" else -1
    rows = [
        [group.mean, group.spread, f"{len(group.objectives)} of {len(group.used)}", *(shown.get(key) for key in keys)]
        for group in sorted(groups, key=lambda group: sign * group.mean)
        for shown in [display_values(group.values, study.space)]
    ]
    heading = f"Mean {study.objectives[0].tag} over {', '.join(study.space.over)}"
    return _table(heading, ["mean", "spread", "completed", *keys], rows)


def _table(heading: str, columns: list[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{html.escape(column)}" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(records.cell(value))}" for value in row) for row in rows)
    return f"<h2>{html.escape(heading)}</h2>\n<table><tr>{head}\n{body}</table>"

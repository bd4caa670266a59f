"""report.html at the end of a sweep: Optuna's own pictures of it, in one file that needs no network."""

from __future__ import annotations

import base64
import html
import io
import warnings
from typing import Any

from launcher.runs import RunDirectory, write_text
from launcher.sweeps import records
from launcher.sweeps.search import display_values
from launcher.sweeps.study import Study
from launcher.sweeps.syntax import plain_text

_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>body{{font:15px/1.4 sans-serif;margin:2em auto;max-width:70em}}table{{border-collapse:collapse}}
td,th{{padding:.15em .8em;text-align:left;border-bottom:1px solid #ddd}}img{{max-width:100%}}</style>
<h1>{name}</h1>
{body}
</html>
"""


def write_report(directory: RunDirectory, study: Study) -> None:
    """Write report.html: the best trial, parameter importance, parallel coordinates, history and all trials."""
    parts = [_best(study)]
    for heading, picture in _pictures(study):
        parts.append(f'<h2>{heading}</h2>\n<img alt="{heading}" src="data:image/png;base64,{picture}">')
    parts.append(_table(study))
    page = _PAGE.format(name=html.escape(directory.name), body="\n".join(parts))
    write_text(directory.path / "report.html", page)


def _best(study: Study) -> str:
    best = study.best()
    assert best is not None
    goals = ", ".join(
        f"{objective.tag} {value:.6g}" for objective, value in zip(study.objectives, best.values, strict=True)
    )
    values = display_values(study.values(best), study.space)
    words = " ".join(f"{key}={plain_text(value)}" for key, value in values.items())
    importances = study.importances()
    text = f"<p>Best: trial {best.number}, {html.escape(goals)}<br><code>{html.escape(words)}</code></p>"
    if importances:
        rows = "".join(f"<tr><td>{html.escape(key)}<td>{value:.3f}" for key, value in importances.items())
        text += f"\n<h2>Parameter importance</h2>\n<table>{rows}</table>"
    return text


def _pictures(study: Study) -> list[tuple[str, str]]:
    """Return (heading, PNG in base64). What cannot be drawn (one trial, one value) is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    several = len(study.objectives) > 1
    target: dict[str, Any] = {"target": lambda trial: trial.values[0]} if several else {}
    name = {"target_name": study.objectives[0].tag}
    found = []
    wanted: list[tuple[str, Any, dict[str, Any]]] = [
        ("Importance", plots.plot_param_importances, target | name),
        ("Parallel coordinates", plots.plot_parallel_coordinate, target | name),
        ("History", plots.plot_optimization_history, target | name),
        *([("Pareto front", plots.plot_pareto_front, {})] if len(study.objectives) in (2, 3) else []),
    ]
    for heading, draw, options in wanted:
        if heading == "Importance" and not study.importances():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                draw(study.inner, **options)
                stream = io.BytesIO()
                pyplot.savefig(stream, format="png", dpi=90, bbox_inches="tight")
                found.append((heading, base64.b64encode(stream.getvalue()).decode()))
            # A picture is a courtesy: whatever Optuna cannot draw must not fail a sweep that has succeeded.
            except Exception:
                continue
            finally:
                pyplot.close("all")
    return found


def _table(study: Study) -> str:
    found = records.rows(study)
    columns = [*records.COLUMNS, *(axis.key for axis in study.space.axes)]
    head = "".join(f"<th>{html.escape(column)}" for column in columns)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(records.cell(row.get(column)))}" for column in columns) for row in found
    )
    return f"<h2>Trials</h2>\n<table><tr>{head}\n{rows}</table>"

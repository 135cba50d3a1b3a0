"""The figures of the Tucker paper over rank factors, networks and devices, from the CSV files that our commands write.

./run.sh -m studies.paper_figures -o figures --fidelity hippocampus=table.csv --pruning hippocampus=pruning.csv \\
    --timings grid_gpu.csv grid_cpu.csv --metrics hippocampus:dense=dense.csv hippocampus:0.3=third.csv \\
    --errors hippocampus=errors/errors.csv
fidelity: of studies.fidelity; pruning: of benchmarks/pruning.py; timings: of scripts/02_full_benchmark.py; metrics: of
nnslim evaluate; errors: of scripts/06_tucker_rec_error.py. What is given is drawn; options but -o may be left out;
see docs/benchmark.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from nnslim.benchmark.timing_figures import SERIES
from nnslim.benchmark.timings import DENSE, read_timings, way_of
from nnslim.errors import InputError
from nnslim.evaluation.classes import group_classes, read_groups
from nnslim.figures import new_figure, own_style, save_figure
from nnslim.files import make_folder, write_bytes
from nnslim.tables import read_table, write_table
from studies.command import new_parser, run_command

_METRICS = {"dice": "Dice", "nsd": "NSD"}
_PANELS = 4  # in a row


def named(texts: Sequence[str], what: str) -> Iterator[tuple[str, Path]]:
    """Yield name and file of texts NAME=FILE, or raise an InputError."""
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise InputError(f"--{what} {text}: expected NAME=FILE.csv")
        yield name, Path(path)


def numeric(path: Path, *columns: str, text: Sequence[str] = ()) -> pandas.DataFrame:
    """Return a table with these columns as numbers, and others as text; an InputError names the file."""
    table = read_table(path, (*text, *columns))
    try:
        return table.assign(**{name: pandas.to_numeric(table[name].replace("", "nan")) for name in columns})
    except ValueError as error:
        raise InputError(f"{path}: expected numbers in {', '.join(columns)}: {error}") from error


@own_style
def quality_lines(fidelity: Sequence[str], pruning: Sequence[str]) -> Any:
    """Draw Dice against parameters: a line per network and stage, or pruning method (mean and SD over seeds)."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for name, path in named(fidelity, "fidelity"):
        for row in numeric(path, "parameters", "dice", text=("setting", "stage")).itertuples():
            lines.setdefault(
                f"{name}, {row.stage}" if row.stage == DENSE else f"{name}, Tucker {row.stage}", []
            ).append((row.parameters, row.dice, math.nan))
    for name, path in named(pruning, "pruning"):
        grouped = numeric(path, "parameters", "dice", text=("row", "seed")).groupby("row")
        for method, rows in grouped:
            point = (rows["parameters"].mean(), rows["dice"].mean(), rows["dice"].std())
            lines.setdefault(f"{name}, {method}", []).append(point)
    if not lines:
        return None
    figure = new_figure((9, 5))
    axes = figure.add_subplot(xscale="log", xlabel="million parameters", ylabel="Dice")
    for number, (label, points) in enumerate(lines.items()):
        x, y, spread = np.array(sorted(points)).T * [[1e-6], [1], [1]]
        style = {"marker": "os^vD"[number // len(SERIES) % 5], "color": SERIES[number % len(SERIES)], "label": label}
        axes.errorbar(x, y, np.nan_to_num(spread), capsize=2, linewidth=1, **style)
    _plain_numbers(axes.xaxis)
    axes.grid(color="0.92")
    axes.legend(fontsize=7)
    return figure


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis by numbers; powers of ten would need the letters of formulas, which are switched off."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def timing_table(paths: Sequence[Path]) -> pandas.DataFrame:
    """Return ms of a pass: a row per network and rank factor (dense: 1), a column per device, backend and autocast."""
    rows = []
    for row in (row for path in paths for row in read_timings(path) if row["status"] == "done"):
        network = Path(row["nnunet_path"]).name or ("3 mm" if row["3mm"] == "True" else "1.5 mm")
        tucker = row["apply_tucker"] == "True"
        where = f"{row['device_name'].strip() or row['device']}, {way_of(row)}"
        where += ", autocast" if row["autocast"] == "True" else ""
        rule = f" ({row['rule']})" if tucker and row["rule"] != "nnslim" else ""
        factor, batch = float(row["rank_factor"]) if tucker else 1.0, float(row["batch_size"])
        if batch == 1:
            rows.append((network + rule, factor, where, float(row["exec_time_mean"]), float(row["m_params"])))
    table = pandas.DataFrame(rows, columns=["network", "rank_factor", "where", "ms", "m_params"])
    wide = table.pivot_table(index=["network", "rank_factor"], columns="where", values="ms", sort=False)
    wide.insert(0, "M params", table.groupby(["network", "rank_factor"])["m_params"].first())
    return wide.sort_index(ascending=[True, False])


@own_style
def timing_lines(table: pandas.DataFrame) -> Any:
    """Draw ms against the rank factor: a panel per network, a line per device."""
    networks = list(dict.fromkeys(table.index.get_level_values("network")))
    figure = new_figure((5.5 * len(networks) + 2, 4.5))
    for place, network in enumerate(networks, 1):
        axes = figure.add_subplot(1, len(networks), place, yscale="log", title=network)
        for number, where in enumerate(table.columns[1:]):
            times = table.loc[network, where].dropna()
            axes.plot(times.index, times, "o-", color=SERIES[number % len(SERIES)], label=where, linewidth=1)
        axes.set(xlabel="rank factor (1: dense)", ylabel="ms per pass")
        _plain_numbers(axes.yaxis)
        axes.grid(which="both", color="0.92")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    return figure


def read_runs(texts: Sequence[str]) -> dict[str, dict[str, pandas.DataFrame]]:
    """Return network -> rank factor (dense first, then falling) -> scores, from texts NETWORK:FACTOR=FILE."""
    runs: dict[str, dict[str, pandas.DataFrame]] = {}
    for name, path in named(texts, "metrics"):
        network, _, factor = name.rpartition(":")
        if not network or not (factor == DENSE or factor.replace(".", "", 1).isdigit()):
            raise InputError(f"--metrics {name}: expected NETWORK:FACTOR=FILE.csv, FACTOR a number or {DENSE}")
        table = numeric(path, *_METRICS, text=("case", "name"))
        runs.setdefault(network, {})[factor] = table.set_index(["case", "name"])[list(_METRICS)]
    return {network: dict(sorted(found.items(), key=_falling)) for network, found in runs.items()}


def _falling(run: tuple[str, Any]) -> float:
    return -math.inf if run[0] == DENSE else -float(run[0])


@own_style
def group_boxes(runs: dict[str, pandas.DataFrame], groups: dict[str, list[str]], less: pandas.DataFrame | None) -> Any:
    """Draw a box per rank factor in a panel per group and metric; `less`: scores to subtract, case by case."""
    figure = new_figure((2 + 1.6 * max(3, len(groups)) + 0.3 * len(runs) * len(groups), 6))
    panels = figure.subplots(len(_METRICS), len(groups), sharey="row", squeeze=False)
    for line, (metric, title) in zip(panels, _METRICS.items(), strict=True):
        for axes, (group, members) in zip(line, groups.items(), strict=True):
            columns = []
            for scores in runs.values():
                values = scores[metric] if less is None else scores[metric] - less[metric].reindex(scores.index)
                columns.append(values[values.index.get_level_values("name").isin(members)].dropna().to_numpy())
            axes.boxplot(columns, flierprops={"markersize": 2})
            axes.set_xticks(range(1, len(runs) + 1), list(runs), fontsize=7, rotation=45)
            axes.set_title(f"{group} ({len(members)})", fontsize=9)
            axes.grid(axis="y", color="0.92")
        line[0].set_ylabel(title if less is None else f"{title}, minus {DENSE}")
    return figure


@own_style
def energy_maps(path: Path) -> Any:
    """Draw the energy error of the weights over both ranks, a panel per layer."""
    table = numeric(path, "rank_out", "rank_in", "energy_error", text=("layer",))
    layers = list(table.groupby("layer", sort=False))
    columns = min(_PANELS, len(layers))
    figure = new_figure((3.1 * columns, 2.7 * math.ceil(len(layers) / columns)))
    for place, (layer, rows) in enumerate(layers, 1):
        grid = rows.pivot(index="rank_out", columns="rank_in", values="energy_error")
        axes = figure.add_subplot(math.ceil(len(layers) / columns), columns, place)
        ends = (0, grid.columns[-1], 0, grid.index[-1])  # a layer with one input has one column
        image = axes.imshow(grid, vmin=0, vmax=1, origin="lower", aspect="auto", extent=ends)
        axes.set_title(layer, fontsize=7)
        axes.tick_params(labelsize=6)
    figure.supxlabel("rank of the inputs", fontsize=9)
    figure.supylabel("rank of the outputs", fontsize=9)
    figure.colorbar(image, ax=figure.axes, label="energy error", shrink=0.5)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    for option in ("fidelity", "pruning", "metrics", "errors"):
        parser.add_argument(f"--{option}", nargs="+", default=[], metavar="NAME=CSV")
    parser.add_argument("--timings", type=Path, nargs="+", default=[], metavar="CSV")
    parser.add_argument("--groups", default="totalseg", help="YAML, group: [class, ...]; default: TotalSegmentator's")
    args = parser.parse_args(arguments)
    figures = {"dice_parameters": quality_lines(args.fidelity, args.pruning)}
    make_folder(args.output)
    if args.timings:
        table = timing_table(args.timings)
        figures["time"] = timing_lines(table)
        write_table(table.round(3).reset_index(), args.output / "time.csv")
        latex = table.reset_index().to_latex(index=False, escape=True, na_rep="", float_format="%.4g")
        write_bytes(args.output / "time.tex", latex.encode())
    for network, runs in read_runs(args.metrics).items():
        names = list(dict.fromkeys(name for scores in runs.values() for _, name in scores.index))
        groups = _groups(args.groups, names)
        figures[f"groups_{network}"] = group_boxes(runs, groups, None)
        if DENSE in runs and len(runs) > 1:
            others = {factor: scores for factor, scores in runs.items() if factor != DENSE}
            figures[f"difference_{network}"] = group_boxes(others, groups, runs[DENSE])
    figures |= {f"energy_{name}": energy_maps(path) for name, path in named(args.errors, "errors")}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        for ending in (".png", ".pdf"):
            save_figure(figure, args.output / f"{name.replace('/', '_')}{ending}")
    if not drawn:
        raise InputError("nothing to draw; give --fidelity, --pruning, --timings, --metrics or --errors")
    print(f"written: {args.output} ({', '.join(drawn)})")


def _groups(text: str, names: Sequence[str]) -> dict[str, list[str]]:
    if text != "totalseg":
        return read_groups(Path(text), names, names)
    from nnslim.hosts.totalseg.tasks import organ_groups

    return group_classes(organ_groups(), names)


if __name__ == "__main__":
    run_command(main)

"""What happened while a network was pruned: a table, the original's tables of widths, and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnslim.figures import new_figure, own_style, save_figure
from nnslim.methods.base import narrowed
from nnslim.tables import write_table

TABLE, PROGRESS, WIDTHS = "pruning.csv", "pruning.png", "pruning_widths.png"
IN_FILTERS, OUT_FILTERS = "in_filters", "out_filters"
_COUNTS = ("macs", "parameters", "filters_left")
_EPOCH = ("epoch", "seconds", *_COUNTS, "train_loss", "distance_loss", "validation_loss", "dice")


class PruningHistory:
    """One row per epoch, with a part per layer; JSON values, so that a checkpoint can hold them.

    Attributes:
        rows: epoch values, and under "layers" the values of each group of filters, and under "widths" the (outputs,
            inputs) of each convolution, after the epoch's removal.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        """Begin, or go on after the rows of a checkpoint."""
        self.rows = list(rows)

    def add(self, pruner: Any, scores: Mapping[str, Sequence[float]], **epoch: float) -> None:
        """Note an epoch.

        Args:
            pruner: after the removal, see `nnslim.methods.sauron.Pruner`. scores: those that decided, by group.
            epoch: epoch, seconds, train_loss, distance_loss, validation_loss, dice.
        """
        layers = {}
        for name, group in pruner.channels.groups.items():
            state, found = pruner.states[name], np.asarray(scores.get(name, ()))
            others = np.sort(found)[1:]  # without the reference, which is at 0
            layers[name] = {
                "filters": group.channels,
                "removed": state.removed,
                "threshold": round(pruner.config.grid[state.step], 6),
                "patience": state.patience,
                "layer_macs": sum(pruner.cost.layer_macs.get(one, 0) for one in group.producers),
                "nearest": round(float(others[0]), 6) if others.size else None,
                "median": round(float(np.median(others)), 6) if others.size else None,
            }
        counts = {"macs": pruner.cost.macs, "parameters": pruner.cost.parameters}
        counts["filters_left"] = sum(layer["filters"] for layer in layers.values())
        widths = {name: list(shape[:2]) for name, (shape, _) in pruner.cost.shapes.items()}
        self.rows.append({**epoch, **counts, "layers": layers, "widths": widths})

    def line(self) -> str:
        """Return the last epoch in one line."""
        row = self.rows[-1]
        removed = {name: layer["removed"] for name, layer in row["layers"].items() if layer["removed"]}
        thresholds = sorted({layer["threshold"] for layer in row["layers"].values()})
        return (
            f"epoch {row['epoch']}: {sum(removed.values())} filters removed in {len(removed)} layers, "
            f"{row['filters_left']} left, {row['macs']:,} MACs, {row['parameters']:,} parameters, thresholds "
            f"{thresholds[0]:g} to {thresholds[-1]:g}, distance {row['distance_loss']:.4f}, "
            f"Dice {row['dice']:.4f}, {row['seconds']:.1f} s"
        )

    def write(self, folder: Path) -> None:
        """Write pruning.csv (a row per epoch and layer), in_filters and out_filters (a row per epoch), all whole.

        Raises:
            OutputError: they cannot be written.
        """
        table = [
            {key: "nan" if math.isnan(row[key]) else row[key] for key in _EPOCH} | {"layer": name} | values
            for row in self.rows
            for name, values in row["layers"].items()
        ]
        write_table(table, folder / TABLE)
        for name, side in ((OUT_FILTERS, 0), (IN_FILTERS, 1)):
            widths = [{layer: pair[side] for layer, pair in row["widths"].items()} for row in self.rows]
            write_table(widths, folder / name, sorted(widths[-1]), separator="\t")

    def draw(self, folder: Path) -> None:
        """Draw the epochs, and the widths at the first and the last."""
        if self.rows:
            _draw_progress(self.rows, folder / PROGRESS)
            _draw_widths(self.rows, folder / WIDTHS)

    def summary(self, pruner: Any) -> dict[str, Any]:
        """Return what nnslim.json holds for every slim model: counts and layers, before and after."""
        before, after = pruner.before, pruner.cost
        return {
            "input_shape": list(pruner.shape),
            "dense": vars(before.counts),
            "slim": vars(after.counts),
            "layers": [vars(decision) for decision in narrowed(before, after)],
            "epochs": len(self.rows),
            "seconds": round(sum(row["seconds"] for row in self.rows), 1),
        }


@own_style
def _draw_progress(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    epochs = [row["epoch"] for row in rows]
    figure = new_figure((7, 7))
    axes = figure.subplots(3, 1, sharex=True)
    for count, label in zip(_COUNTS, ("MACs", "parameters", "filters"), strict=True):
        axes[0].plot(epochs, [row[count] / rows[0][count] for row in rows], label=label)
    axes[0].set(ylabel="share of the first epoch's", ylim=(0, 1.05))
    axes[1].plot(epochs, [row["dice"] for row in rows], label="pseudo-Dice")
    axes[1].plot(epochs, [row["distance_loss"] for row in rows], label="distance")
    axes[1].set(ylabel="on validation patches")
    axes[2].plot(epochs, [row["seconds"] for row in rows], label="epoch")
    axes[2].set(ylabel="seconds", xlabel="epoch", ylim=(0, None))
    for one in axes:
        one.legend(frameon=False)
        one.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


@own_style
def _draw_widths(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the filters of each group, before (outline) and after (filled)."""
    names = list(rows[0]["layers"])
    first = [rows[0]["layers"][name]["filters"] + rows[0]["layers"][name]["removed"] for name in names]
    last = [rows[-1]["layers"][name]["filters"] for name in names]
    figure = new_figure((7, 1 + 0.25 * len(names)))
    axes = figure.subplots()
    places = range(len(names))
    axes.barh(places, first, color="#d8e3e8", label="before")
    axes.barh(places, last, color="#00b7eb", height=0.5, label="after")
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="filters", title="Filters of each layer before and after")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)

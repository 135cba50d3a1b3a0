"""The figures of the Tucker paper, drawn from tables in the columns of our commands."""

from __future__ import annotations

import sys

import pandas
import pytest

from nnslim.benchmark.timings import COLUMNS
from nnslim.errors import InputError
from nnslim.evaluation.scores import COLUMNS as SCORE_COLUMNS
from nnslim.methods.tucker.error_grid import error_grid, write_grid
from nnslim.network.cost import measure_cost
from nnslim.tables import write_table
from studies import paper_figures

CLASSES = ("liver", "rib_left_1")


@pytest.fixture
def tables(tmp_path, tiny_net, tiny_shape):
    """A table of each command, by its option."""
    half = "rank_factor=0.5"
    rows = [("dense", "dense", 5600, 0.84), (half, "weights", 2000, 0.7), (half, "data", 2000, 0.8)]
    write_table(rows, tmp_path / "fidelity.csv", ("setting", "stage", "parameters", "dice"))
    pruned = [{"row": "L1", "seed": seed, "parameters": 1000, "dice": 0.6 + 0.1 * seed} for seed in (0, 1)]
    write_table(pruned, tmp_path / "pruning.csv")
    for device in ("A100", "a CPU"):
        timed = [
            {"status": "done", "device_name": device, "backend": "stock", "precision": "f32", "batch_size": 1}
            | {"3mm": three, "nnunet_path": "", "apply_tucker": factor < 1, "rank_factor": factor, "rule": "nnslim"}
            | {"exec_time_mean": 100 * factor, "m_params": 5 * factor, "autocast": False}
            for three in (False, True)
            for factor in (1.0, 0.5, 0.3)
        ]
        write_table([*timed, {"status": "failed"}], tmp_path / f"{device}.csv", COLUMNS)
    for factor, dice in (("dense", 0.9), ("0.3", 0.6), ("0.5", 0.8)):
        scores = [
            {"case": case, "label": 1, "name": name, "dice": dice + place / 100, "nsd": dice, "hd95": 1, "empty": ""}
            for place, case in enumerate("abc")
            for name in CLASSES
        ]
        write_table(scores, tmp_path / f"metrics_{factor}.csv", SCORE_COLUMNS)
    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    write_grid(error_grid(network, measure_cost(network, shape)), tmp_path / "errors.csv")
    return tmp_path


def draw(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["paper_figures", *map(str, arguments)])
    paper_figures.main()


def test_all_figures_and_the_table_of_times_as_latex(tables, monkeypatch, capsys):
    (tables / "groups.yml").write_text("organs: [liver]\nribs: [rib_left_1]\n")
    metrics = [f"net:{factor}={tables / f'metrics_{factor}.csv'}" for factor in ("0.3", "dense", "0.5")]
    given = ["--fidelity", f"net={tables / 'fidelity.csv'}", "--pruning", f"net={tables / 'pruning.csv'}"]
    given += ["--timings", tables / "A100.csv", tables / "a CPU.csv", "--metrics", *metrics]
    given += ["--errors", f"net={tables / 'errors.csv'}", "--groups", tables / "groups.yml"]
    draw(monkeypatch, "-o", tables / "out", *given)
    names = {"dice_parameters", "time", "groups_net", "difference_net", "energy_net"}
    assert capsys.readouterr().out.startswith("written: ")
    files = {path.name for path in (tables / "out").iterdir()}
    assert files == {f"{name}{end}" for name in names for end in (".png", ".pdf")} | {"time.csv", "time.tex"}
    table = pandas.read_csv(tables / "out" / "time.csv")
    assert table["network"].tolist() == ["1.5 mm"] * 3 + ["3 mm"] * 3
    assert table["rank_factor"].tolist() == [1.0, 0.5, 0.3] * 2
    assert table["A100, stock f32"].tolist() == pytest.approx([100, 50, 30] * 2)
    latex = (tables / "out" / "time.tex").read_text()
    assert r"\begin{tabular}" in latex and r"rank\_factor" in latex and "a CPU, stock f32" in latex


def test_figures_show_what_the_tables_say(tables):
    lines = paper_figures.quality_lines([f"net={tables / 'fidelity.csv'}"], [f"net={tables / 'pruning.csv'}"])
    drawn = {bars.get_label(): bars[0].get_xydata().tolist() for bars in lines.axes[0].containers}
    assert drawn["net, Tucker weights"] == [[pytest.approx(0.002), 0.7]] and drawn["net, L1"] == [
        [0.001, pytest.approx(0.65)]
    ]
    runs = paper_figures.read_runs([f"net:{f}={tables / f'metrics_{f}.csv'}" for f in ("0.3", "dense", "0.5")])["net"]
    assert list(runs) == ["dense", "0.5", "0.3"]
    less = paper_figures.group_boxes({"0.3": runs["0.3"]}, {"organs": ["liver"]}, runs["dense"])
    medians = [line.get_ydata()[0] for line in less.axes[0].lines if len(set(line.get_ydata())) == 1]
    assert pytest.approx(-0.3) in medians
    maps = paper_figures.energy_maps(tables / "errors.csv")
    rows = pandas.read_csv(tables / "errors.csv")
    assert len(maps.axes) == rows["layer"].nunique() + 1  # and the colour bar
    first = rows[rows["layer"] == rows["layer"][0]]
    assert sorted(maps.axes[0].images[0].get_array().ravel()) == pytest.approx(sorted(first["energy_error"]))


def test_wrong_input_is_named(tables, monkeypatch):
    for option, text, expected in (
        ("--metrics", "net=a.csv", "expected NETWORK:FACTOR=FILE.csv"),
        ("--fidelity", "a.csv", "expected NAME=FILE.csv"),
        ("--errors", f"net={tables / 'pruning.csv'}", "no column layer"),
    ):
        with pytest.raises(InputError, match=expected):
            draw(monkeypatch, "-o", tables / "out", option, text)
    with pytest.raises(InputError, match="nothing to draw"):
        draw(monkeypatch, "-o", tables / "out")

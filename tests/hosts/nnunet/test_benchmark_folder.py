"""`nnslim benchmark` on tiny model folders, and the stages of a prediction."""

from __future__ import annotations

import json
import sys

import pytest

from nnslim.benchmark.grid import GridPoint
from nnslim.benchmark.passes import Way
from nnslim.benchmark.timings import COLUMNS, read_timings
from nnslim.cli import main
from nnslim.compression.compress_network import compress
from nnslim.compression.config import load_config
from nnslim.errors import NNSlimError
from nnslim.hosts.nnunet.judge.benchmark_models import BenchmarkSettings, benchmark_models, ways_of
from nnslim.hosts.nnunet.judge.stages import STAGES, STARTS, profile_case, start_times
from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, read_trained_model
from nnslim.hosts.nnunet.predict.directory import predict_folder
from nnslim.hosts.nnunet.predict.load import load_predictor
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.hosts.totalseg.grid_points import grid_network, tucker_config
from nnslim.network.cost import measure_cost
from nnslim.prediction.case import Case

HALF = "version: 1\nmethods:\n  - method: tucker\n    rank_factor: 0.5\n    rank_min: 2\n"


@pytest.fixture
def half(tmp_path):
    path = tmp_path / "half.yml"
    path.write_text(HALF)
    return path


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["nnslim", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_command_writes_table_report_and_pictures(make_model, case_folder, half, tmp_path, monkeypatch, capsys):
    starts = "nnslim.hosts.nnunet.judge.benchmark_models.start_times"  # imports take long
    monkeypatch.setattr(starts, lambda: {"python": 0.1})
    model, output = make_model(), tmp_path / "out"
    arguments = ("benchmark", "-m", model, "-c", half, "--backend", "stock", "--rounds", 2, "--threads", 1)
    assert call(monkeypatch, *arguments, "-i", case_folder, "--cases", 2, "-o", output, "-q") in (0, 1)
    rows = read_timings(output / "benchmark.csv")
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["name"], row["backend"]) for row in rows] == [
        ("dense", "stock"),
        ("dense", "openvino-plain"),
        ("half", "stock"),
    ]
    source = read_trained_model(model)
    dense = build_network(source)
    slim = compress(dense, source.weights, load_config(half), input_shape(source)).network
    for row, network in ((rows[0], dense), (rows[2], slim)):
        cost = measure_cost(network, input_shape(source))
        assert (int(row["macs"]), int(row["parameters"])) == (cost.macs(), cost.parameters)
        assert row["status"] == "done" and float(row["peak_memory_mb"]) > 50 and row["eval_passes"] == "2"
    assert rows[2]["rank_factor"] == "0.5" and rows[2]["apply_tucker"] == "True" and rows[0]["apply_tucker"] == "False"
    assert float(rows[0]["end_to_end_s"]) > 0 and float(rows[2]["speedup_stock"]) > 0
    report = json.loads((output / "benchmark.json").read_text())
    assert set(report["stages"]["dense, stock f32"]) == set(STAGES) and report["roofline"]["threads"] == 1
    assert [len(entry["seconds"]) for entry in report["passes"]][::2] == [2, 2]
    assert {case["case"] for case in report["cases"][0]["cases"]} == {"a", "b"}
    assert all((output / name).stat().st_size > 5000 for name in ("time.png", "stages.png"))
    shown = capsys.readouterr().out
    assert "half" in shown and "GMAC" in shown and "preprocess" in shown
    assert call(monkeypatch, *arguments, "-o", output) == 2
    assert "is not overwritten" in capsys.readouterr().err


def test_faults_are_named(make_model, half, tmp_path, monkeypatch, capsys):
    model = make_model()
    for arguments, message in (
        (("-c", half, "-c", half), "two networks would be named 'half'"),
        (("--backend", "stok"), "unknown backend 'stok'; nearest: stock"),
        (("--dice", tmp_path / "none.csv"), "none.csv cannot be read"),
        (("-c", "nonsense"), "no config preset or file 'nonsense'"),
    ):
        assert call(monkeypatch, "benchmark", "-m", model, *arguments, "-o", tmp_path / "out", "-q") == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "benchmark.csv").exists()


def test_a_row_that_fails_is_recorded_and_the_rest_is_measured(make_model, tmp_path):
    settings = BenchmarkSettings((Way("stock", threads=1), Way("stock", "f16", 1)), rounds=1)
    measured = benchmark_models(make_model(), [], tmp_path / "out", settings)
    good, bad = (row for row in measured.rows if row["backend"] == "stock")
    assert good["status"] == "done" and bad["status"] == "failed"
    assert bad["reason"] in measured.failed[-1] and "precision f16 needs the openvino backend" in bad["reason"]


def test_slim_folder_is_a_row(make_model, half, tmp_path):
    from nnslim.hosts.nnunet.compress.compress_model import compress_model

    model = make_model()
    slim = tmp_path / "slimmed" / model.name
    compress_model(read_trained_model(model), slim, load_config(half))
    settings = BenchmarkSettings((Way("stock", threads=1),), rounds=1)
    rows = benchmark_models(model, [str(slim)], tmp_path / "out", settings).rows
    assert [row["name"] for row in rows if row["backend"] == "stock"] == ["dense", "slimmed"]
    assert rows[-1]["macs"] < rows[0]["macs"]


def test_ways_combine_precisions_with_openvino_alone():
    ways = ways_of(["stock", "openvino"], ["f32", "int8"], 2)
    assert [(way.backend, way.precision, way.threads) for way in ways] == [
        ("stock", "f32", 2),
        ("openvino", "f32", 2),
        ("openvino", "int8", 2),
    ]


@pytest.mark.parametrize("backend", ["stock", "eager"])
def test_stages_add_up_and_the_result_is_that_of_predict(make_model, case_folder, tmp_path, backend):
    import nibabel as nib
    import numpy as np

    model, settings = make_model(folds=(0, 1)), PredictSettings(backend=backend)
    predictor = load_predictor(model, None, settings)
    reader = predictor.plans_manager.image_reader_writer_class
    before = vars(reader).copy()
    case = Case("a", (case_folder / "a_0000.nii.gz",), "a.nii.gz")
    stages = profile_case(predictor, case, tmp_path, settings)
    assert tuple(stages) == STAGES and all(seconds > 0 for seconds in stages.values())
    assert dict(vars(reader)) == before and "predict_logits_from_preprocessed_data" not in vars(predictor)
    predict_folder(case_folder, tmp_path / "out", model, None, settings)
    made, expected = (np.asarray(nib.load(file).dataobj) for file in (tmp_path / "a.nii.gz", tmp_path / "out/a.nii.gz"))
    assert np.array_equal(made, expected)


def test_start_times_name_what_is_imported():
    for program in STARTS.values():
        exec(program, {})
    times = start_times(1, {"python": "pass", "json": "import json"})
    assert list(times) == ["python", "json"] and all(0 < seconds < 60 for seconds in times.values())
    with pytest.raises(NNSlimError, match="'import nothing_such' fails: ModuleNotFoundError"):
        start_times(1, {"broken": "import nothing_such"})


@pytest.mark.parametrize(
    ("low_resolution", "factor", "parameters"),
    [(False, 0.3, 3_698_556), (True, 0.3, 1_981_569), (False, None, 31_194_809)],
)
def test_grid_has_the_published_networks(low_resolution, factor, parameters):
    point = GridPoint(
        apply_tucker=factor is not None,
        rank_factor=factor or 1.0,
        rule="published",
        low_resolution=low_resolution,
        batch_size=2,
    )
    network, shape = grid_network(point)
    assert shape == (2, 1, *((112, 112, 128) if low_resolution else (128, 128, 128)))
    assert measure_cost(network, (1, *shape[1:])).parameters == parameters


def test_rule_decides_the_configuration():
    published = tucker_config(GridPoint(rule="published", rank_factor=0.3)).methods[0].settings
    own = tucker_config(GridPoint(rule="nnslim", rank_factor=0.3)).methods[0].settings
    assert published.heads and published.rank_multiple == 1
    assert not own.heads and own.rank_multiple == 8

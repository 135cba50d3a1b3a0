"""`nnslim plan` and `nnslim distill` on tiny model folders: tables that come back, answers that come nearer."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import slim_model

from nnslim.compression.config import load_config
from nnslim.compression.storage import half_precision
from nnslim.errors import ConfigError, ModelError, OutputError
from nnslim.files import read_json, write_json
from nnslim.hosts.nnunet.compress import distill_model as distill_module
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.compress.distill_model import distill_config, distill_model, read_pair
from nnslim.hosts.nnunet.compress.plan_model import error_grid_folder, plan_model
from nnslim.hosts.nnunet.model.trained_model import read_trained_model

METHOD = {"method": "tucker", "rank_factor": 0.4, "rank_min": 2}
LAYER = "encoder.stages.1.0.convs.1.conv"


@pytest.fixture
def nnslim(command):
    """Run the command and return what it printed: (stdout, last line of stderr)."""

    def run(*arguments, expect=0):
        _, out, err = command(*arguments, expect=expect)
        return out, (err.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(json.dumps({"version": 1, "methods": [METHOD]}))
    return path


def distance(one: torch.Tensor, other: torch.Tensor, regions: bool) -> float:
    p, q = (x.sigmoid() if regions else x.softmax(0) for x in (one, other))
    return float((p - q).square().mean())


# --- the error grid of a folder ---


@pytest.mark.parametrize("kind", ["plain", "residual", "2d", "anisotropic"])
def test_error_grid_of_every_kind_with_images(make_model, case_folder, tmp_path, kind):
    grids = error_grid_folder(read_trained_model(make_model(kind)), tmp_path / "out", images=case_folder, step=16)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"errors.csv", "weights.pdf", "outputs.pdf", "equal_factor.png"} <= names
    lines = list(csv.DictReader((tmp_path / "out" / "errors.csv").open()))
    assert {line["layer"] for line in lines} == {grid.name for grid in grids}
    assert all(0 <= float(line["outputs_error"]) <= 1 for line in lines)


def test_error_grid_faults_leave_nothing(make_model, tmp_path):
    source = make_model()
    with pytest.raises(ConfigError, match="found 0"):
        error_grid_folder(read_trained_model(source), tmp_path / "out" / "grid", step=0)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ModelError, match="slim model already"):
        error_grid_folder(read_trained_model(slim_model(source, tmp_path / "slim")), tmp_path / "out" / "grid")


# --- plan ---


def test_plan_edit_compress_gives_those_ranks(make_model, config, tmp_path, nnslim):
    source, table = make_model(folds=(0, 1)), tmp_path / "plans" / "plan.csv"
    nnslim("plan", "-m", source, "-c", config, "-o", table)
    lines = list(csv.DictReader(table.open()))
    line = next(line for line in lines if line["layer"] == LAYER)
    assert (line["action"], line["rank_out"], line["rank_in"]) == ("tucker", "7", "7")
    line["rank_out"], line["rank_in"] = "3", "16"
    other = next(line for line in lines if line["action"] == "tucker" and line["layer"] != LAYER)
    other["action"] = "dense"
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(line))
        writer.writeheader()
        writer.writerows(lines)
    (table.parent / "edited.yml").write_text("methods: [{method: tucker, plan: plan.csv}]\n")
    nnslim("compress", "-m", source, "-o", tmp_path / "slim", "-c", table.parent / "edited.yml", "-q")
    decisions = {layer["layer"]: layer for layer in read_json(tmp_path / "slim" / "nnslim.json")["layers"]}
    assert decisions[LAYER]["ranks"] == [3, 16]
    assert decisions[other["layer"]]["action"] == "dense"
    for fold in (0, 1):
        path = tmp_path / "slim" / f"fold_{fold}" / "checkpoint_final.pth"
        weights = torch.load(path, weights_only=False)["network_weights"]
        assert weights[f"{LAYER}.core.weight"].shape[:2] == (3, 16)  # full rank: no factor on that side


@pytest.mark.parametrize("method", [METHOD, {"method": "tucker", "macs": 0.6, "rank_min": 4, "rank_multiple": 4}])
def test_plan_totals_are_those_of_compress(make_model, case_folder, tmp_path, method):
    source = read_trained_model(make_model())
    config = load_config({"methods": [method], "calibration": {"images": str(case_folder), "tiles_per_image": 1}})
    planned = plan_model(source, tmp_path / "plan.csv", config)
    slimmed = compress_model(source, tmp_path / "slim", config)
    assert planned.parameters == (slimmed.dense.parameters, slimmed.slim.parameters)
    assert planned.macs == (slimmed.dense.macs, slimmed.slim.macs)
    tables = [read_table(path) for path in (tmp_path / "plan.csv", tmp_path / "slim" / "plan.csv")]
    for table in tables:
        for row in table:
            del row["error"]  # predicted by the plan, measured by the compression
    assert tables[0] == tables[1]
    text = "\n".join(planned.lines())
    assert f"{slimmed.slim.parameters:,}" in text and "MACs per 16x16x16 patch" in text


def read_table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_plan_faults_exit_2(make_model, config, tmp_path, nnslim):
    source, table = make_model(), tmp_path / "plan.csv"
    (tmp_path / "drop.yml").write_text("methods: [{method: tucker, max_drop: 0.01}]\n")
    _, line = nnslim("plan", "-m", source, "-c", tmp_path / "drop.yml", "-o", table, expect=2)
    assert "max_drop cannot be planned alone" in line and "use nnslim compress -i IMAGES" in line
    (tmp_path / "none.yml").write_text("apply: false\nmethods: [{method: tucker}]\n")
    _, line = nnslim("plan", "-m", source, "-c", tmp_path / "none.yml", "-o", table, expect=2)
    assert "nothing to plan" in line
    slim = slim_model(source, tmp_path / "slim")
    assert "slim model already" in nnslim("plan", "-m", slim, "-c", config, "-o", table, expect=2)[1]
    assert not table.exists()
    table.write_text("mine")
    assert "not overwritten" in nnslim("plan", "-m", source, "-c", config, "-o", table, expect=2)[1]
    assert table.read_text() == "mine"


def test_config_plan_path_counts_from_the_current_folder_then_from_the_file(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "work").mkdir()
    file = tmp_path / "configs" / "mine.yml"
    file.write_text("methods: [{method: tucker, plan: plan.csv}, {method: tucker, rank_factor: 0.5}]\n")
    monkeypatch.chdir(tmp_path / "work")
    assert load_config(file).methods[0].settings.plan == tmp_path / "configs" / "plan.csv"
    (tmp_path / "work" / "plan.csv").write_text("x")
    assert load_config(file).methods[0].settings.plan == Path("plan.csv")
    file.write_text(f"methods: [{{method: tucker, plan: {tmp_path}/nowhere.csv}}]\n")
    assert load_config(file).methods[0].settings.plan == tmp_path / "nowhere.csv"
    assert load_config({"methods": [{"method": "tucker", "plan": "other.csv"}]}).methods[0].settings.plan == Path(
        "other.csv"
    )


# --- distill ---


@pytest.mark.parametrize(("kind", "folds"), [("plain", (0, 1)), ("regions", (0, 1)), ("2d", (0,))])
def test_distill_comes_nearer_to_the_dense_answers(
    make_model, stock_logits, case_folder, tmp_path, nnslim, kind, folds
):
    source = make_model(kind, folds=folds)
    slim = slim_model(source, tmp_path / "slim")
    write_json(slim / "nnslim.json", read_json(slim / "nnslim.json") | {"agreement": {"of": "the old weights"}})
    target = tmp_path / "nnUNetTrainer__nnUNetPlansBetter__x"
    out, _ = nnslim(
        "distill", "-m", slim, "--teacher", source, "-i", case_folder, "-o", target,
        "--steps", 90, "--block-steps", 10, "--learning-rate", 3e-3, "--no-mirrored-teacher", "--live-teacher",
        "--disable_tta",
    )  # fmt: skip
    for fold in folds:
        assert f"fold {fold}: 100 steps" in out
        dense, before, after = (stock_logits(folder, (fold,)) for folder in (source, slim, target))
        near, far = (distance(logits, dense, kind == "regions") for logits in (after, before))
        assert near < 0.9 * far
    old, new = read_json(slim / "nnslim.json"), read_json(target / "nnslim.json")
    assert "agreement" not in new and set(old) - {"agreement"} <= set(new)
    assert [entry["steps"] for entry in new["recovery"]] == [100] * len(folds)
    assert {key: old[key] for key in ("spec", "config", "layers", "slim")} == {
        key: new[key] for key in ("spec", "config", "layers", "slim")
    }
    assert (new["distill"]["teacher"], new["distill"]["images"]) == (source.name, 3)
    assert read_json(target / "plans.json")["plans_name"] == "nnUNetPlansBetter"
    assert (target / "plan.csv").read_bytes() == (slim / "plan.csv").read_bytes()
    assert not list(tmp_path.glob(".*recovery*"))


def test_distill_keeps_half_precision(make_model, case_folder, tmp_path):
    source = make_model()
    slim = slim_model(source, tmp_path / "slim")
    path = slim / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    torch.save(content | {"network_weights": half_precision(content["network_weights"])}, path)
    distill_model(*read_pair(slim, source), tmp_path / "out", distill_config(case_folder, steps=4))
    made = tmp_path / "out" / "fold_0" / "checkpoint_final.pth"
    weights = torch.load(made, weights_only=False)["network_weights"]
    assert {value.dtype for value in weights.values()} == {torch.half}
    assert made.stat().st_size < 1.2 * path.stat().st_size  # tensors under two names are stored once


def test_distill_goes_on_where_it_stopped(make_model, case_folder, tmp_path, monkeypatch):
    source = make_model(folds=(0, 1))
    slim = slim_model(source, tmp_path / "slim")
    config, pair = distill_config(case_folder, steps=8, every=4), read_pair(slim, source)
    whole = distill_model(*pair, tmp_path / "whole", config)

    def stop(what: str, done: int, total: int) -> None:
        if what == "recovery":
            stop.steps += 1
            if stop.steps == 14:  # step 6 of the second fold
                raise KeyboardInterrupt

    stop.steps = 0
    with pytest.raises(KeyboardInterrupt):
        distill_model(*pair, tmp_path / "parts", config, progress=stop)
    assert not (tmp_path / "parts").exists()
    steps = []
    parts = distill_model(
        *pair, tmp_path / "parts", config, progress=lambda what, done, total: steps.append((what, done))
    )
    assert [step for step in steps if step[0] == "recovery"] == [("recovery", n) for n in (5, 6, 7, 8)]
    assert [r.to_dict() for r in parts] == [r.to_dict() for r in whole]
    for fold in (0, 1):
        one, two = (
            torch.load(tmp_path / name / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)["network_weights"]
            for name in ("whole", "parts")
        )
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not list(tmp_path.glob(".*"))


def test_distill_reports_the_estimated_drop(make_model, case_folder, tmp_path):
    source = make_model()
    pair = read_pair(slim_model(source, tmp_path / "slim"), source)
    recovery = distill_model(*pair, tmp_path / "out", distill_config(case_folder, steps=20, learning_rate=3e-3))[0]
    assert np.isnan(recovery.before) or recovery.after <= recovery.before  # the best state is kept


def test_distill_refuses_a_teacher_that_does_not_belong(make_model, tmp_path):
    source = make_model(folds=(0,))
    slim = slim_model(source, tmp_path / "slim")
    for kind, message in (
        ("residual", "of another structure"),
        ("anisotropic", "other labels or another preprocessing|of another structure"),
        ("regions", "other labels"),
    ):
        with pytest.raises(ModelError, match=message):
            read_pair(slim, make_model(kind, parent=kind))
    with pytest.raises(ModelError, match="is a slim model, too"):
        read_pair(slim, slim)
    with pytest.raises(ModelError, match=r"has no nnslim\.json"):
        read_pair(source, source)
    lacking = make_model(folds=(1,), parent="other")
    with pytest.raises(ModelError, match="fold_1"):
        read_pair(slim, lacking)


def test_distill_faults_exit_2_before_the_work(make_model, case_folder, tmp_path, nnslim, monkeypatch):
    source = make_model()
    slim, out = slim_model(source, tmp_path / "slim"), tmp_path / "out"
    common = ("distill", "-m", slim, "--teacher", source, "-i", case_folder, "-o")
    assert "nothing to do" in nnslim(*common, out, "--steps", 0, expect=2)[1]
    assert "learning_rate" in nnslim(*common, out, "--learning-rate", -1, expect=2)[1]
    assert "recovery.batch_size" in nnslim(*common, out, "--batch-size", 0, expect=2)[1]
    assert "does not exist" in nnslim(*common[:5], "-i", tmp_path / "none", "-o", out, expect=2)[1]
    if not torch.cuda.is_available():
        assert "finds no CUDA device" in nnslim(*common, out, "--device", "cuda", expect=2)[1]
    assert not out.exists()
    shutil.copytree(slim, out)
    monkeypatch.setattr(distill_module, "recover", lambda *a, **k: pytest.fail("worked in vain"))
    assert "exists and is not overwritten" in nnslim(*common, out, expect=2)[1]
    with pytest.raises(OutputError, match="exists"):
        distill_model(*read_pair(slim, source), slim, distill_config(case_folder, steps=1))

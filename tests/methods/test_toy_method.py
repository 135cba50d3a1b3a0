"""A method that lives outside the package goes all the way: compress, write, stock nnU-Net, predict, resume, report."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest
import torch
import toy_method
from helpers import make_predictor

from nnslim import NNSlimContext
from nnslim.caches import read_kept
from nnslim.compression.config import from_dict
from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import read_trained_model
from nnslim.network.spec import spec_of
from nnslim.network.walk import LayerIndex

RECOVERY = {"steps": 4, "every": 2}


def toy(**settings):
    methods = [{"method": "toy", "include": ["decoder.stages.*"], **settings}]
    return from_dict({"methods": methods, "recovery": RECOVERY, "run": {"guard": False}})


def test_toy_method_is_short():
    assert len(Path(toy_method.__file__).read_text().splitlines()) <= 80


def test_toy_method_from_compress_to_report(make_model, case_folder, stock_logits, command, tmp_path):
    source, slim = make_model(), tmp_path / "nnUNetTrainer__slimPlans__3d_fullres"
    model, config = read_trained_model(source), toy()

    def stop(what, done, total):
        if (what, done) == ("recovery", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(model, slim, config, images=case_folder, progress=stop)
    kept = read_kept(slim.with_name(f".{slim.name}.recovery.fold0"))
    state = torch.load(io.BytesIO(kept), weights_only=True)["slim"]
    steps = []
    made = compress_model(model, slim, config, images=case_folder, progress=lambda what, *d: steps.append((what, *d)))
    assert [done for what, done, _ in steps if what == "recovery"] == [3, 4]
    whole = compress_model(model, tmp_path / "whole", config, images=case_folder)
    assert all(torch.equal(value, whole.weights[0][key]) for key, value in made.weights[0].items())
    assert made.slim.macs == made.dense.macs - sum(d.macs_before - d.macs_after for d in made.decisions)
    assert {d.error is None for d in made.decisions if d.action == "centre"} == {False}  # `fit` ran

    # Learning changed the weights, and the hook kept the biases.
    layers = [edit.layer for edit in made.spec.edits]
    assert len(layers) == 4 and {edit.kind for edit in made.spec.edits} == {"toy_centre"}
    for name in layers:
        old = model.weights[0]
        assert torch.equal(state[f"{name}.bias"], old[f"{name}.bias"])
        assert not torch.equal(state[f"{name}.weight"], old[f"{name}.weight"][..., 1:2, 1:2, 1:2])

    assert json.loads((slim / "plans.json").read_text())["plans_name"] == "slimPlans"
    assert torch.isfinite(stock_logits(slim, (0,))).all()
    predictor = make_predictor()  # nnU-Net's own, with the network that plans.json names
    predictor.initialize_from_trained_model_folder(str(slim), (0,))
    assert spec_of(predictor.network) == made.spec
    assert LayerIndex(predictor.network)[layers[0]].module.kernel_size == (1, 1, 1)

    command("predict", "-q", "-i", case_folder, "-o", tmp_path / "out", "-m", slim, expect=0)
    assert {nib.load(tmp_path / "out" / f"{name}.nii.gz").shape for name in "abc"} == {(18, 20, 17)}
    command("report", "-q", "-m", slim, "-o", tmp_path / "page.html", expect=0)
    page = (tmp_path / "page.html").read_text()
    assert "toy" in page and "centre" in page and layers[0] in page


def test_toy_method_changes_plans_of_a_folder_and_is_refused_for_a_model_in_memory(make_model, stock_logits, tmp_path):
    source = make_model()
    compress_model(read_trained_model(source), tmp_path / "slim", toy(patch=12))
    plans, record = (json.loads((tmp_path / "slim" / name).read_text()) for name in ("plans.json", "nnslim.json"))
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [12] * 3
    assert record["resolution"]["patch"] == [[16] * 3, [12] * 3]
    assert torch.isfinite(stock_logits(tmp_path / "slim", (0,))).all()
    with NNSlimContext(toy(patch=12)), pytest.raises(ConfigError, match="changes spacing or patch in the plans"):
        make_predictor().initialize_from_trained_model_folder(str(source), (0,))
    with NNSlimContext(toy()) as slim:
        make_predictor().initialize_from_trained_model_folder(str(source), (0,))
    assert slim.report.models[0].slimmed.decisions[0].action == "centre"


def test_installed_package_with_an_entry_point_is_known_in_every_process(tmp_path):
    """What `[project.entry-points."nnslim.methods"]` of a package leaves in site-packages."""
    made = tmp_path / "toy-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text("[nnslim.methods]\ntoy = toy_method\n")
    folders = [str(tmp_path), str(Path(__file__).parent), *sys.path]
    code = "import nnslim.methods; from nnslim.methods.base import methods; print(sorted(methods()))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
    )
    assert "'toy'" in ran.stdout and "'tucker'" in ran.stdout

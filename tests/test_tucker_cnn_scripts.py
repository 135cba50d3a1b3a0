"""tucker-cnn's own commands, with its configuration files, as its README writes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from helpers import write_ball_dataset

from nnslim.compression.config import from_dict, load_config, presets
from nnslim.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TUCKER = {"tucker_args": {"rank_mode": "relative", "rank_factor": 0.5, "rank_min": 2}, "apply_tucker": True}


def run_script(name: str, *arguments: object, expect: int = 0, cwd: Path) -> str:
    python = "bash" if name.endswith(".sh") else sys.executable
    command = [python, str(ROOT / "scripts" / name), *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd, check=False)
    assert ran.returncode == expect, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def shipped(name: str, **changes) -> str:
    """Return the file that we ship as text, with some values changed."""
    return yaml.safe_dump({**yaml.safe_load((ROOT / "configs" / name).read_text()), **changes})


@pytest.fixture
def scans(ct, home, tmp_path):
    """Two CTs named as nnU-Net and as TotalSegmentator's data set name them, label maps, stand-in weights."""
    pytest.importorskip("totalsegmentator", reason="TotalSegmentator is not installed (pip install nnslim[ts])")
    from nnslim.hosts.totalseg.stand_in import write_stand_in
    from nnslim.hosts.totalseg.task_weights import weights_folder

    write_stand_in(297, weights_folder(), base_features=4, patch_size=(64, 64, 64))
    (tmp_path / "cts" / "s0001").mkdir(parents=True)
    (tmp_path / "labels").mkdir()
    image = nib.load(ct)
    for name, subject, part in (
        ("spleen_2_0000.nii.gz", "spleen_2", slice(40)),
        ("s0001/ct.nii.gz", "s0001", slice(44)),
    ):
        crop = image.slicer[part]
        nib.save(crop, tmp_path / "cts" / name)
        labels = np.zeros(crop.shape, np.uint8)
        labels[8:20, 8:20, 8:20] = 5
        nib.save(nib.Nifti1Image(labels, crop.affine), tmp_path / "labels" / f"{subject}.nii.gz")
    return tmp_path


def test_predict_and_evaluate_by_one_configuration(scans):
    """The scripts took neither a configuration with files, nor label maps as references."""
    (scans / "predict.yml").write_text(shipped("predict_config.yml", tucker_config=TUCKER))
    files = [scans / "cts" / "spleen_2_0000.nii.gz", scans / "cts" / "s0001" / "ct.nii.gz"]
    assert "2 predicted" in run_script("03_predict_files.py", "predict.yml", *files, cwd=scans)
    out = scans / "tucker_predictions" / "dummy_run"
    assert {path.name for path in out.iterdir()} == {"manifest.jsonl", "s0001", "spleen_2"}
    assert len(list((out / "spleen_2").glob("*.nii.gz"))) == 117
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert {line["status"] for line in lines} == {"done"}
    run_script("04_eval.py", "predict.yml", cwd=scans)
    table = (scans / "inference.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 117 and any(line.startswith("spleen_2,5,liver,") for line in table)
    (scans / "run").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (scans / "run").chmod(0o755)
    (scans / "inference.csv").unlink()
    os.environ["NNSLIM_RUN"] = str(scans / "run")
    try:
        folder = run_script("03_predict_folder.sh", "-c", "predict.yml", "-d", "cts", "-n", 1, "-e", cwd=scans)
    finally:
        del os.environ["NNSLIM_RUN"]
    assert "2 there already" in folder and (scans / "inference.csv").read_text().splitlines() == table


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "no files to predict"),
        (("gone.nii.gz",), "gone.nii.gz: expected an image"),
        (("s.nii.gz", "s_0000.nii.gz"), "are both subject 's'"),
    ],
)
def test_predict_names_what_is_wrong_with_the_files(tmp_path, arguments, expected):
    (tmp_path / "predict.yml").write_text(shipped("predict_config.yml"))
    for name in ("s.nii.gz", "s_0000.nii.gz"):
        (tmp_path / name).touch()
    assert expected in run_script("03_predict_files.py", "predict.yml", *arguments, expect=2, cwd=tmp_path)


def test_finetune_by_configuration_trains_the_factored_network(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net plans with so many threads
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_ball_dataset(tmp_path / "raw" / "Dataset998_Ball")
    from studies.short_training import ShortTraining, train_short

    trained = train_short(998, "3d_fullres", 0, ShortTraining(1, 1, 1, 2)).parent
    model = Path(shutil.move(trained, tmp_path / "dense"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    changes = {"dataset_id": 998, "pretrained_weights": str(model / "fold_0" / "checkpoint_final.pth"), "epochs": 1}
    (tmp_path / "finetune.yml").write_text(shipped("finetune_baseline.yml", tucker_config=TUCKER, **changes))
    short = ("--iterations", 2, "--validation-iterations", 1, "--batch-size", 2, "-q")
    run_script("05_finetune.py", "finetune.yml", *short, cwd=tmp_path)
    place = tmp_path / "results" / "Dataset998_Ball"
    names = {f"nnUNetTrainerNoMirroring__nnUNetPlansTucker{end}__3d_fullres" for end in ("", "Start")}
    assert {path.name for path in place.iterdir()} == names
    tuned = torch.load(place / min(names, key=len) / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert tuned["trainer_name"] == "nnUNetTrainerNoMirroring"
    assert any(name.endswith("core.weight") for name in tuned["network_weights"])
    group = tuned["optimizer_state"]["param_groups"][0]
    assert "betas" in group and tuned["logging"]["lrs"] == [1e-5]
    # As tucker-cnn's script itself takes it; a finished run is refused by name, not overwritten.
    assert "exists" in run_script("05_finetune.py", "-c", "finetune.yml", *short, expect=2, cwd=tmp_path)
    changes["pretrained_weights"] = "elsewhere.pth"
    (tmp_path / "finetune.yml").write_text(shipped("finetune_baseline.yml", **changes))
    assert "elsewhere.pth: expected a file" in run_script("05_finetune.py", "finetune.yml", expect=2, cwd=tmp_path)


def test_files_of_tucker_cnn_are_configurations_and_unknown_keys_are_named():
    for name in ("predict_config", "finetune_baseline"):
        assert load_config(name) == load_config(presets()[name]) and load_config(name).methods[0].method == "tucker"
    with pytest.raises(ConfigError, match=r"unknown key 'fast_modle'; nearest: fast_model"):
        from_dict({"tucker_config": TUCKER, "fast_modle": True})
    with pytest.raises(ConfigError, match=r"method tucker: unknown key 'rank'"):
        from_dict({"tucker_config": {"tucker_args": {"rank": 3}}})

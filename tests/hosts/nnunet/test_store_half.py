"""Model folders in half precision: stock nnU-Net loads them, sizes and agreement are written down."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from helpers import make_predictor, random_data

from nnslim.cli import main
from nnslim.compression.config import from_dict, load_config
from nnslim.errors import ModelError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import read_trained_model

SLIM = {"methods": [{"method": "tucker", "rank_factor": 0.5, "rank_min": 2}], "run": {"guard": False}}


def logits(folder, data=None):
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    data = random_data(predictor) if data is None else data
    return predictor.predict_logits_from_preprocessed_data(data).float()


def test_dense_copy_in_half_needs_no_nnslim_and_says_how_large_it_is(make_model, case_folder, tmp_path):
    source, target = make_model(folds=(0, 1)), tmp_path / "half"
    made = compress_model(read_trained_model(source), target, load_config("embedded-half"), images=case_folder)
    assert json.loads((target / "plans.json").read_text()) == json.loads((source / "plans.json").read_text())
    assert not (target / "plan.csv").exists() and not read_trained_model(target).is_slim
    weights = read_trained_model(target).weights
    assert len(weights) == 2 and {value.dtype for state in weights for value in state.values()} == {torch.half}
    dense = read_trained_model(source).weights
    for state, fold in zip(weights, dense, strict=True):
        assert all(torch.equal(state[name], value.half()) for name, value in fold.items())
    assert (logits(target).argmax(0) == logits(source).argmax(0)).float().mean() > 0.995
    found = json.loads((target / "nnslim.json").read_text())["stored"]
    files = [sum(path.stat().st_size for path in folder.glob("fold_*/*.pth")) for folder in (source, target)]
    assert (found["source_checkpoint_bytes"], found["checkpoint_bytes"]) == tuple(files) == made.file_bytes
    assert found["precision"] == "half" and 2 * found["weight_bytes"] == found["source_weight_bytes"]
    assert set(found["agreement"]["classes"]) == {"one", "two"} and found["agreement"]["mean_dice"] > 0.98


def test_slim_model_in_half_and_its_copy(make_model, tmp_path, monkeypatch):
    source = make_model()
    compress_model(read_trained_model(source), tmp_path / "single", from_dict(SLIM))
    (tmp_path / "slim.yml").write_text(yaml.safe_dump(SLIM))
    command = ("compress", "-q", "-m", source, "-o", tmp_path / "half", "-c", tmp_path / "slim.yml", "--store", "half")
    monkeypatch.setattr("sys.argv", ["nnslim", *map(str, command)])
    with pytest.raises(SystemExit, match="0"):
        main()
    single = read_trained_model(tmp_path / "single")
    compress_model(single, tmp_path / "copy", load_config("embedded-half"))
    half, copy = (read_trained_model(tmp_path / name) for name in ("half", "copy"))
    assert half.is_slim and copy.is_slim and copy.plans == single.plans
    assert all(torch.equal(value, copy.weights[0][name]) for name, value in half.weights[0].items())
    record = json.loads((tmp_path / "copy" / "nnslim.json").read_text())
    written = json.loads((tmp_path / "single" / "nnslim.json").read_text())
    assert record["spec"] == written["spec"] and record["layers"] == written["layers"]
    assert record["stored"]["precision"] == "half" and written["stored"]["precision"] == "single"
    assert torch.equal(logits(tmp_path / "copy"), logits(tmp_path / "half"))
    with pytest.raises(ModelError, match="slim model already"):
        compress_model(single, tmp_path / "again", from_dict({**SLIM, "store": "half"}))

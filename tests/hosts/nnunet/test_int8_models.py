"""int8 in the context and in `nnslim predict`: found beside checkpoints, calibrated on the fly, kept, refused."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import make_predictor, random_data

from nnslim import NNSlimContext
from nnslim.cli import main
from nnslim.errors import BackendError, ConfigError
from nnslim.hosts.nnunet.export import export_model as int8
from nnslim.hosts.nnunet.export.export_model import keep_int8
from nnslim.hosts.nnunet.model.trained_model import read_trained_model
from nnslim.running.openvino import OpenVINOEngine

pytest.importorskip("nncf")
INT8 = {"backend": "openvino", "precision": "int8", "guard": False}
SLIM = {"methods": [{"method": "tucker", "rank_factor": 0.5, "rank_min": 2}], "run": INT8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_calibration(monkeypatch):
    """Make any calibration from now on an error."""

    def forbid() -> None:
        def refuse(*arguments, **options):
            raise AssertionError("calibrated again")

        monkeypatch.setattr(int8, "quantize", refuse)

    return forbid


def load(folder, folds=(0,)):
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def logits(predictor):
    return predictor.predict_logits_from_preprocessed_data(random_data(predictor)).float()


def test_model_compressed_on_the_fly_is_calibrated_once_for_each_fold(make_model, case_folder, no_calibration):
    source = make_model(folds=(0, 1))
    with NNSlimContext({**SLIM, "run": {"backend": "eager", "guard": False}}, images=case_folder):
        wanted = logits(load(source, (0, 1))).argmax(0)
    with NNSlimContext(SLIM, images=case_folder) as slim:
        predictor = load(source, (0, 1))
        found = logits(predictor).argmax(0)
    assert slim.report.models[0].slimmed is not None
    engines = list(predictor.network.engines.values())
    assert len(engines) == 2 and all(isinstance(engine, OpenVINOEngine) for engine in engines)
    assert 0.9 < float((found == wanted).float().mean()) < 1, "close to single precision, and not the same"
    no_calibration()
    with NNSlimContext(SLIM, images=case_folder):
        again = logits(load(source, (0, 1))).argmax(0)
    assert torch.equal(again, found)


def test_models_beside_the_checkpoints_are_used(make_model, case_folder, no_calibration, tmp_path, monkeypatch):
    source = make_model(folds=(0, 1))
    checked = keep_int8(read_trained_model(source), case_folder)
    assert list(checked) == ["0", "1"] and all(found.passed for found in checked.values())
    assert (source / "fold_1" / "nnslim_int8.xml").is_file() and (source / "fold_1" / "nnslim_int8.bin").is_file()
    no_calibration()
    with NNSlimContext({"methods": [], "run": INT8}) as slim:
        assert torch.isfinite(logits(load(source, (0, 1)))).all()
    assert "left as it is (no method is named; it runs in int8)" in str(slim.report)
    path = source / "fold_1" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["network_weights"]["decoder.seg_layers.1.bias"] += 1
    torch.save(content, path)
    with (
        NNSlimContext({"methods": [], "run": INT8}),
        pytest.raises(ConfigError, match=r"fold_0/nnslim_int8\.xml was made from other weights"),
    ):
        load(source, (0, 1))


def test_without_images_it_is_refused_before_anything_is_predicted(make_model):
    with NNSlimContext(SLIM), pytest.raises(ConfigError, match=r"int8 is calibrated on images: name a folder of them"):
        load(make_model())


@pytest.mark.parametrize(("backend", "precision"), [("stock", "int8"), ("eager", "bf16"), ("compile", "f16")])
def test_precision_is_never_ignored(make_model, backend, precision):
    run = {"backend": backend, "precision": precision}
    with NNSlimContext({"methods": [], "run": run}), pytest.raises(BackendError, match="needs the openvino backend"):
        load(make_model())


def test_predict_command_calibrates_and_predicts(make_model, case_folder, tmp_path, monkeypatch, capfd):
    source = make_model()
    (tmp_path / "slim.yml").write_text(
        "methods: [{method: tucker, rank_factor: 0.5, rank_min: 2}]\nrun: {guard: false}"
    )

    def predict(*more, expect: int = 0) -> str:
        command = ("predict", "-q", "-i", case_folder, "-m", source, "--backend", "openvino", "--precision", *more)
        monkeypatch.setattr("sys.argv", ["nnslim", *map(str, command)])
        monkeypatch.setattr("rich.console.Console.width", 1000)
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == expect
        return capfd.readouterr().err

    slim, images = ("-c", tmp_path / "slim.yml"), ("--calibration", case_folder)
    assert "int8 is calibrated on images" in predict("int8", "-o", tmp_path / "none", *slim, expect=2)
    assert not (tmp_path / "none").exists()
    predict("int8", "-o", tmp_path / "int8", *slim, *images)
    predict("f32", "-o", tmp_path / "f32", *slim, *images)
    for name in "abc":
        one, two = (np.asarray(nib.load(tmp_path / k / f"{name}.nii.gz").dataobj) for k in ("int8", "f32"))
        assert np.mean(one == two) > 0.9

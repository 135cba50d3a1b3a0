"""`nnslim report` on model folders: what the page shows is what the models do."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from helpers import slim_model
from html_tree import numbers, parse, rows

from nnslim.cli import main
from nnslim.errors import InputError, ModelError
from nnslim.evaluation.agreement import CaseAgreement
from nnslim.files import sha256_of
from nnslim.hosts.nnunet.judge.agree_models import agreement_of_models, write_agreement
from nnslim.hosts.nnunet.judge.report_data import ReportSettings, gather, write_page
from nnslim.hosts.nnunet.judge.scenes import representative, to_canonical
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
from nnslim.hosts.nnunet.predict.directory import predict_folder
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings
from nnslim.methods.tucker.edit import TuckerConv, kernel_of
from nnslim.network.walk import LayerIndex

SCRIPT = "(function(a){})(globalThis);/* Niivue */"


@pytest.fixture
def niivue(tmp_path) -> Path:
    """What the page takes for the viewer's script, without its 2 MB."""
    path = tmp_path / "niivue.umd.js"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def labels(case_labels):
    return case_labels


def canonical(path: Path) -> nib.Nifti1Image:
    return nib.as_closest_canonical(nib.load(path))


def test_page_shows_what_both_models_predict(make_model, case_folder, labels, niivue, tmp_path, monkeypatch, capsys):
    source = make_model(folds=(0, 1))
    slim = slim_model(source, tmp_path / "slim", guard=False)
    page = tmp_path / "out.html"
    arguments = ["-m", slim, "-o", page, "--dense", source, "-i", case_folder, "-l", labels]
    monkeypatch.setattr(
        sys, "argv", ["nnslim", "report", *map(str, arguments), "--viewer", "--niivue", str(niivue), "-q"]
    )
    main_exits_with(0)
    assert f"written: {page}" in capsys.readouterr().out
    tree = parse(page.read_text())
    mirrored = PredictSettings(mirroring=True)
    agreement = agreement_of_models(source, slim, case_folder, labels, mirrored)
    ordered = [case.name for case in agreement.ordered()]
    heads = [head.text for head in tree.one("section", id="cases").all("h3")]
    assert heads == [f"Worst case: {ordered[0]}", f"Median case: {ordered[1]}"]
    volumes = json.loads(tree.one("script", id="viewer-data").content[0])["cases"]
    for model, name in ((source, "dense"), (slim, "slim")):
        predict_folder(case_folder, tmp_path / name, model, settings=mirrored)
    for shown, case in zip(volumes, ordered[:2], strict=True):
        made = {one["name"]: unpack(one["data"]) for one in shown["maps"]}
        assert ("label" in made) == (case in "ab")
        folders = {"dense": tmp_path / "dense", "slim": tmp_path / "slim", "label": labels}
        for name in made.keys() & folders.keys():
            expected = canonical(folders[name] / f"{case}.nii.gz")
            assert np.array_equal(made[name].dataobj, expected.dataobj)
            assert np.allclose(made[name].affine, expected.affine, atol=1e-5)
        image = canonical(case_folder / f"{case}_0000.nii.gz").get_fdata()
        low, high = np.percentile(image, (0.5, 99.5))
        assert np.abs(unpack(shown["image"]).get_fdata() - image.clip(low, high)).max() < (high - low) / 500
    assert volumes[0]["labels"]["labels"] == ["", "one", "2" if len(volumes[0]["labels"]["I"]) < 2 else "two"]
    table = rows(tree.one("table", id="class-table"))
    assert [float(line["Dice, slim against dense"]) for line in table] == pytest.approx(
        agreement.class_means("dice"), abs=5e-5
    )
    assert sha256_of(slim / "fold_1" / "checkpoint_final.pth") in tree.one("section", id="origin").text
    assert "agreement" not in json.loads((slim / "nnslim.json").read_text())  # a report changes no model


def unpack(text: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def main_exits_with(expected: int) -> None:
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    assert code == expected


@pytest.mark.parametrize("kind", ["2d", "regions", "anisotropic", "residual"])
def test_report_of_every_kind_of_model(make_model, case_folder, niivue, tmp_path, kind):
    source = make_model(kind)
    slim = slim_model(source, tmp_path / "slim", guard=False)
    settings = ReportSettings(source, case_folder, viewer=True, niivue=niivue)
    page, data = write_page(slim, None, settings)
    assert page == slim / "report.html"
    tree = parse(page.read_text())
    record = json.loads((slim / "nnslim.json").read_text())
    layers = rows(tree.one("table", id="layer-table"))
    assert [line["layer"] for line in layers] == [layer["layer"] for layer in record["layers"]]
    names = ["whole", "core"] if kind == "regions" else ["one", "two"]
    assert [line["class"] for line in rows(tree.one("table", id="class-table"))] == names
    shown = json.loads(tree.one("script", id="viewer-data").content[0])["cases"][0]["labels"]["labels"]
    assert set(shown[1:]) <= ({"whole", "whole, core"} if kind == "regions" else {"one", "two"})
    assert len(tree.all("img")) == 6
    assert data.scenes[0].image.shape == canonical(case_folder / "a_0000.nii.gz").shape


def test_recorded_agreement_is_used_where_it_has_all_cases(make_model, case_folder, labels, tmp_path):
    source = make_model()
    slim = slim_model(source, tmp_path / "slim", guard=False)
    agreement = agreement_of_models(source, slim, case_folder, labels)
    agreement.cases[1].classes["one"] = replaced = agreement.cases[1].classes["two"]  # to be known again
    write_agreement(slim, agreement, figure=False)
    steps = []
    data = gather(slim, ReportSettings(source, case_folder, labels), lambda *step: steps.append(step))
    assert data.record.agreement.cases[1].classes["one"] == replaced
    assert [what for what, _, _ in steps] == ["predicting cases to show"] * 2
    (case_folder / "c_0000.nii.gz").rename(case_folder / "d_0000.nii.gz")  # a case that was not compared
    data = gather(slim, ReportSettings(source, case_folder, labels))
    assert [case.name for case in data.record.agreement.cases] == ["a", "b", "d"]


def test_errors_of_layers_are_those_of_their_weights(make_model, tmp_path):
    source = make_model()
    slim = slim_model(source, tmp_path / "slim", guard=False)
    dense, made = (LayerIndex(build_network(read_trained_model(path))) for path in (source, slim))
    record = json.loads((slim / "nnslim.json").read_text())
    checked = 0
    for layer in record["layers"]:
        if layer["action"] == "dense":
            assert layer["error"] is None
            continue
        chain, kernel = made[layer["layer"]].module, kernel_of(dense[layer["layer"]].module)
        assert isinstance(chain, TuckerConv)
        expected = float((chain.kernel() - kernel.detach()).norm() / kernel.detach().norm())
        assert layer["error"] == pytest.approx(expected, abs=2e-6) and 0 < layer["error"] < 1
        checked += 1
    assert checked > 3


def test_errors_of_layers_that_are_fitted_are_those_of_the_fit(make_model, case_folder, tmp_path):
    source = make_model()
    fitted, plain = (
        {layer["layer"]: layer["error"] for layer in json.loads((slim / "nnslim.json").read_text())["layers"]}
        for slim in (
            slim_model(source, tmp_path / "fitted", images=case_folder, guard=False),
            slim_model(source, tmp_path / "plain", guard=False),
        )
    )
    known = [name for name, error in fitted.items() if error is not None]
    assert known == [name for name, error in plain.items() if error is not None]
    assert all(0 < fitted[name] < 1 and fitted[name] != pytest.approx(plain[name], abs=1e-4) for name in known)
    page = parse((write_page(tmp_path / "fitted")[0]).read_text())
    assert "outputs on the calibration images" in page.one("p", id="error-note").text


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_volumes_are_turned_as_nibabel_turns_them(tmp_path, reader):
    from nnunetv2.imageio import nibabel_reader_writer, simpleitk_reader_writer

    module = simpleitk_reader_writer if reader == "SimpleITKIO" else nibabel_reader_writer
    affine = np.array([[0, -1.1, 0.05, 5], [1.2, 0, 0, -3], [0, 0.04, -0.9, 2], [0, 0, 0, 1]])
    affine[:3, :3] = np.linalg.qr(affine[:3, :3])[0] * (1.2, 1.1, 0.9)  # SimpleITK takes orthogonal axes only
    data = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    path = tmp_path / "x.nii.gz"
    nib.save(nib.Nifti1Image(data, affine), path)
    read, properties = getattr(module, reader)().read_images([str(path)])
    (turned,), found = to_canonical([read[0]], properties)
    expected = canonical(path)
    assert np.array_equal(turned, expected.get_fdata())
    assert np.allclose(found, expected.affine, atol=1e-4)


def test_volumes_without_directions_keep_their_axes(tmp_path):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    flat = SimpleITK.GetImageFromArray(np.arange(12, dtype=np.float32).reshape(3, 4))
    flat.SetSpacing((0.5, 0.25))
    SimpleITK.WriteImage(flat, str(tmp_path / "flat.nrrd"))
    read, properties = SimpleITKIO().read_images([str(tmp_path / "flat.nrrd")])
    (turned,), affine = to_canonical([read[0]], properties)
    assert turned.shape == (4, 3, 1)
    assert np.allclose(np.linalg.norm(affine[:3, :3], axis=0), (0.5, 0.25, 1))
    (turned,), affine = to_canonical([read[0]], {"spacing": (999.0, 1.0, 1.0)})  # as natural images are read
    assert np.array_equal(turned[:, :, 0], read[0, 0].T) and np.array_equal(affine, np.eye(4))


def test_representative_cases():
    cases = [CaseAgreement(name, {}) for name in "abcde"]
    shown = {count: [(role, one.name) for role, one in representative(cases[:count])] for count in (0, 1, 2, 5)}
    assert shown == {
        0: [],
        1: [("Only case", "a")],
        2: [("Worst case", "a"), ("Median case", "b")],
        5: [("Worst case", "a"), ("Median case", "c")],
    }


def test_names_of_models_and_tables(make_model, tmp_path):
    source = make_model()
    slim = slim_model(source, tmp_path / "mine" / source.name, guard=False)
    other = slim_model(source, tmp_path / "other" / source.name, guard=False)
    scores = tmp_path / "scores.csv"
    scores.write_text("case,label,dice,nsd\na,1,0.5,0.6\n")
    data = gather(slim, ReportSettings(others=[str(other), f"x={other}"], scores=[str(scores), f"dense={scores}"]))
    assert (data.model, list(data.others)) == ("mine", ["other", "x"])
    assert [table.name for table in data.scores] == ["scores", "dense"]
    assert list(data.scores[0].classes) == ["one"]  # named by dataset.json
    with pytest.raises(InputError, match=r"two models are named 'other'.*NAME="):
        gather(slim, ReportSettings(others=[str(other), str(other)]))


def test_sizes_of_checkpoints(make_model, tmp_path):
    source = make_model(folds=(0, 1))
    slim = slim_model(source, tmp_path / "slim", guard=False)
    data = write_page(slim)[1]
    files = [[folder / f"fold_{fold}" / "checkpoint_final.pth" for fold in "01"] for folder in (source, slim)]
    dense, small = ([path.stat().st_size for path in paths] for paths in files)
    assert [(file.name, file.bytes) for file in data.files] == [
        ("fold_0/checkpoint_final.pth", small[0]),
        ("fold_1/checkpoint_final.pth", small[1]),
    ]
    models = [build_network(read_trained_model(folder)) for folder in (source, slim)]
    weights = [sum(p.numel() for p in network.parameters()) * 4 * 2 / 1e6 for network in models]

    def shown():
        tile = parse(write_page(slim)[0].read_text()).one("li", id="tile-size")
        assert tile.one("p", class_="big").text == f"{weights[1]:.2f} MB"
        assert tile.one("span", class_="before").text == f"dense {weights[0]:.2f} MB"
        return tile.one("p", class_="note").text

    note = shown()  # these files have no optimiser's state
    assert numbers(note) == [float(f"{sum(small) / 1e6:.2f}")] and "single" in note and "optimiser" not in note
    for path in files[1]:  # as a fine-tuning writes them: larger than the dense ones, with weights of the same size
        content = torch.load(path, weights_only=False)
        torch.save(content | {"optimizer_state": {"state": {0: torch.zeros(500_000)}}}, path)
    note = shown()
    assert numbers(note)[0] > sum(dense) / 1e6 and "with the optimiser's state" in note


@pytest.mark.parametrize(
    "fault", ["dense folder", "no dense", "no images", "no checkpoint", "other model", "cut record"]
)
def test_faults_exit_2_with_one_line(make_model, case_folder, niivue, tmp_path, monkeypatch, capsys, fault):
    source = make_model()
    slim = slim_model(source, tmp_path / "slim", guard=False)
    arguments: list[object] = ["-m", slim]
    if fault == "dense folder":
        arguments, expected = ["-m", source], "has no nnslim.json"
    elif fault == "no dense":
        arguments, expected = [*arguments, "-i", case_folder], "name the dense one with --dense"
    elif fault == "no images":
        arguments, expected = [*arguments, "--viewer", "--niivue", niivue], "the viewer shows cases: name their folder"
    elif fault == "no checkpoint":
        shutil.rmtree(slim / "fold_0")
        expected = "has no fold_X folder with checkpoint_final.pth"
    elif fault == "other model":
        other = make_model("regions", parent="others")
        write_agreement(slim, agreement_of_models(source, slim, case_folder), figure=False)
        arguments += ["--dense", other, "-i", case_folder]
        expected = "the slim model was not made from this dense one"
    else:
        content = json.loads((slim / "nnslim.json").read_text())
        (slim / "nnslim.json").write_text(json.dumps({**content, "layers": [{"layer": "x"}]}))
        expected = "is not what nnslim writes"
    monkeypatch.setattr(sys, "argv", ["nnslim", "report", *map(str, arguments), "-q"])
    monkeypatch.setattr("rich.console.Console.width", 1000)
    main_exits_with(2)
    printed = capsys.readouterr().err.strip()
    assert expected in printed and "\n" not in printed
    assert not (slim / "report.html").exists()


def test_cascade_is_shown_with_the_stage_before(make_model, case_folder, labels, tmp_path):
    source = make_model("cascade")
    slim = slim_model(source, tmp_path / "slim", guard=False)
    (case_folder / "c_0000.nii.gz").unlink()
    with pytest.raises(ModelError, match="3d_lowres"):
        gather(slim, ReportSettings(source, case_folder))
    data = gather(slim, ReportSettings(source, case_folder, predict=PredictSettings(previous_stage=labels)))
    assert {scene.name for scene in data.scenes} == {"a", "b"}

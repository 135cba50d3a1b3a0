"""Calibration images: nnU-Net's preprocessing, window and augmentation, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile

import numpy as np
import pytest
import torch
from helpers import images_source, make_predictor

import nnslim.hosts.nnunet.cases.prepared_images as module
from nnslim import NNSlimContext
from nnslim.cli import main
from nnslim.compression.config import from_dict
from nnslim.errors import InputError, ModelError
from nnslim.hosts.nnunet.cases.augmented_patches import AugmentedPatches
from nnslim.hosts.nnunet.cases.calibration_tiles import ImageTiles, calibration_of, images_fingerprint
from nnslim.hosts.nnunet.cases.prepared_images import PreparedImages, Source, prepare_images
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import read_trained_model
from nnslim.network.spec import spec_of

KINDS = ["plain", "residual", "2d", "anisotropic", "regions", "old plans"]
HALF = {"method": "tucker", "rank_factor": 0.5, "rank_min": 2}


def predictor_of(folder):
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    return predictor


def write_image(folder, name, shape, seed=0):
    import nibabel as nib

    folder.mkdir(exist_ok=True)
    image = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), folder / name)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder in which temporary folders are made; what is left in it was forgotten."""
    folder = tmp_path / "scratch"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # torch makes it when it likes
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_images_equals_nnunets_preprocessing(make_model, case_folder, scratch, kind):
    folder = make_model(kind)
    predictor = predictor_of(folder)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    with prepare_images(images_source(folder), case_folder, 10) as images:
        assert len(images) == 3 and list(scratch.iterdir())
        for number, name in enumerate("abc"):
            wanted, *_ = preprocessor.run_case(
                [str(case_folder / f"{name}_0000.nii.gz")],
                None,
                predictor.plans_manager,
                predictor.configuration_manager,
                predictor.dataset_json,
            )
            assert images.load(number).dtype == np.float32
            np.testing.assert_allclose(images.load(number), wanted, rtol=0, atol=1e-6)
    assert not list(scratch.iterdir())


def test_source_of_a_predictor_equals_that_of_its_folder(make_model):
    folder = make_model("regions")
    one, other = images_source(folder), Source.of(predictor_of(folder))
    assert (one.patch, one.regions, one.mirror_axes) == (other.patch, other.regions, other.mirror_axes)
    assert one.patch == (16, 16, 16) and one.regions and one.mirror_axes == (0, 1, 2)
    assert not images_source(make_model("2d", parent="flat")).regions


@pytest.mark.parametrize("kind", ["plain", "2d", "anisotropic"])
@pytest.mark.parametrize("shape", [(20, 26, 17), (12, 20, 9), (16, 16, 16), (5, 7, 30)], ids=str)
def test_tiles_are_those_of_nnunets_sliding_window(make_model, prepared, kind, shape):
    from acvl_utils.cropping_and_padding.padding import pad_nd_image

    folder = make_model(kind)
    predictor, images = predictor_of(folder), prepared(folder, shape)
    patch = predictor.configuration_manager.patch_size
    whole, _ = pad_nd_image(torch.from_numpy(images.load(0).copy()), patch, "constant", {"value": 0}, True, None)
    slicers = predictor._internal_get_sliding_window_slicers(whole.shape[1:])
    theirs = {whole[slicer].numpy().tobytes() for slicer in slicers}
    tiles = list(ImageTiles(images, 10_000))
    assert all(tuple(tile.shape) == (1, 1, *patch) and tile.dtype == torch.float32 for tile in tiles)
    ours = [tile[0].numpy().tobytes() for tile in tiles]
    assert len(ours) == len(slicers) == len(set(ours)) and set(ours) == theirs
    some = [tile[0].numpy().tobytes() for tile in ImageTiles(images, 2)]
    assert len(some) == min(2, len(ours)) and set(some) <= theirs


def test_tiles_are_the_same_each_time_and_chosen_by_the_seed(make_model, prepared):
    images = prepared(make_model(), (40, 40, 40), (30, 40, 20))
    tiles = ImageTiles(images, 3, seed=1)
    first, second = [torch.cat(list(tiles)) for _ in range(2)]
    assert len(tiles) == len(first) == 6 and torch.equal(first, second)
    assert torch.equal(first, torch.cat(list(ImageTiles(images, 3, seed=1))))
    assert not torch.equal(first, torch.cat(list(ImageTiles(images, 3, seed=2))))


@pytest.mark.parametrize("kind, axes", [("plain", 3), ("2d", 2)])
def test_mirrored_tiles_follow_their_originals_where_the_model_may_be_mirrored(make_model, prepared, kind, axes):
    images = prepared(make_model(kind), (40, 40, 40))
    plain, both = list(ImageTiles(images, 4, seed=1)), ImageTiles(images, 4, seed=1, mirrored=True)
    made = list(both)
    assert len(both) == len(made) == 2 * len(plain) == 8
    assert all(torch.equal(one, two) for one, two in zip(plain, made[::2], strict=True))
    choices = [tuple(a + 2 for a in range(axes) if number >> a & 1) for number in range(1, 2**axes)]
    for tile, mirrored in zip(plain, made[1::2], strict=True):
        assert any(torch.equal(tile.flip(chosen), mirrored) for chosen in choices)
    assert all(torch.equal(one, two) for one, two in zip(made, both, strict=True))
    images = dataclasses.replace(images, source=dataclasses.replace(images.source, mirror_axes=None))
    assert len(list(ImageTiles(images, 4, seed=1, mirrored=True))) == 4


def test_tiles_of_air_are_passed_over_where_there_is_something(make_model, prepared):
    images = prepared(make_model(), (64, 16, 16), (32, 16, 16))
    for number, fill in ((0, slice(16, None)), (1, slice(None))):
        data = np.load(images.paths[number])
        data[:, fill] = -1.5
        np.save(images.paths[number], data)
    tiles = list(ImageTiles(images, 10))
    assert len(tiles) == 2 + 1  # two windows touch the part that is not air; an image of nothing still gives one
    assert tiles[0].std() > 0.1 and tiles[1].std() > 0.1 and tiles[2].std() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_the_same_each_time_and_all_different(make_model, prepared, kind):
    folder = make_model(kind)
    images = prepared(folder, (24, 20, 18), (9, 20, 30))
    patches = AugmentedPatches(images, 5, seed=3)
    state = np.random.get_state()[1].tolist(), torch.get_rng_state()
    made = [patches[index] for index in range(5)]
    assert np.random.get_state()[1].tolist() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert all(tuple(one.shape) == (1, *images_source(folder).patch) and one.dtype == torch.float32 for one in made)
    assert all(one.isfinite().all() for one in made)
    again = AugmentedPatches(images, 9, seed=3)  # whatever was drawn before, and however many there are
    np.random.seed(7)
    torch.manual_seed(7)
    assert all(torch.equal(again[index], made[index]) for index in (4, 0, 2))
    assert len({one.numpy().tobytes() for one in made}) == 5
    assert not torch.equal(AugmentedPatches(images, 5, seed=4)[0], made[0])
    with pytest.raises(IndexError):
        patches[5]


def test_patches_are_mirrored_along_the_models_axes_only(make_model, prepared, monkeypatch):
    """With all but mirroring switched off, patches of one image of patch size are that image, mirrored."""
    images = prepared(make_model(), (16, 16, 16))
    whole = torch.from_numpy(images.load(0).copy())

    def only_mirroring(transforms):
        made = transforms.transforms if hasattr(transforms, "transforms") else None
        kept = [one for one in made if "Mirror" in type(one).__name__]
        transforms.transforms = kept
        return transforms

    trainer = pytest.importorskip("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    real = trainer.get_training_transforms
    monkeypatch.setattr(trainer, "get_training_transforms", staticmethod(lambda *a, **k: only_mirroring(real(*a, **k))))
    initial = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size
    monkeypatch.setattr(
        trainer,
        "configure_rotation_dummyDA_mirroring_and_inital_patch_size",
        lambda self: (*initial(self)[:2], np.array([16, 16, 16]), initial(self)[3]),
    )
    for axes in ((0, 2), (1,), None):
        source = copy.copy(images.source)
        object.__setattr__(source, "mirror_axes", axes)
        patches = AugmentedPatches(PreparedImages(source, images.paths), 24)
        allowed = {whole.numpy().tobytes()}
        for axis in axes or ():
            allowed |= {
                torch.flip(torch.frombuffer(bytearray(one), dtype=torch.float32).view_as(whole), (axis + 1,))
                .contiguous()
                .numpy()
                .tobytes()
                for one in allowed
            }
        seen = {patches[index].contiguous().numpy().tobytes() for index in range(24)}
        assert seen == allowed, axes


def test_prepare_images_count_is_chosen_by_the_seed(make_model, tmp_path, scratch):
    folder = make_model()
    for number in range(6):
        write_image(tmp_path / "many", f"case{number}_0000.nii.gz", (10, 10, 10), number)

    def chosen(seed, count=3):
        with prepare_images(images_source(folder), tmp_path / "many", count, seed=seed) as images:
            assert len(images) == count
            return images.fingerprint

    assert chosen(0) == chosen(0)
    assert len({chosen(seed) for seed in range(4)}) > 1
    assert chosen(0, 6) == chosen(1, 6)


def test_prepare_images_plain_names_do_for_one_channel(make_model, tmp_path, scratch):
    write_image(tmp_path / "plain", "patient.nii.gz", (10, 12, 14))
    write_image(tmp_path / "numbered", "patient_0000.nii.gz", (10, 12, 14))
    source, made = images_source(make_model()), []
    for where in ("plain", "numbered", "plain/patient.nii.gz"):
        with prepare_images(source, tmp_path / where, 4) as images:
            made.append(images.fingerprint)
    assert len(set(made)) == 1


def two_channels(source):
    dataset = {**source.dataset_json, "channel_names": {"0": "T1", "1": "T2"}}
    plans = copy.deepcopy(source.plans_manager.plans)
    properties = plans["foreground_intensity_properties_per_channel"]
    properties["1"] = properties["0"]
    manager = type(source.plans_manager)(plans)
    settings = source.configuration_manager.configuration
    settings["normalization_schemes"], settings["use_mask_for_norm"] = ["ZScoreNormalization"] * 2, [False] * 2
    return Source(manager, source.configuration_manager, dataset, source.label_manager, source.mirror_axes)


def test_prepare_images_two_channels_are_kept_in_order(make_model, tmp_path, scratch):
    source = two_channels(images_source(make_model()))
    for channel in (0, 1):
        write_image(tmp_path / "pairs", f"a_000{channel}.nii.gz", (18, 18, 18), channel)
    with prepare_images(source, tmp_path / "pairs", 4) as images:
        assert images.load(0).shape == (2, 18, 18, 18)
        assert next(iter(ImageTiles(images, 1))).shape == (1, 2, 16, 16, 16)
        assert AugmentedPatches(images, 1)[0].shape == (2, 16, 16, 16)
        raw = np.random.default_rng(1).standard_normal((18, 18, 18)).transpose(2, 1, 0)
        assert np.corrcoef(images.load(0)[1].ravel(), raw.ravel())[0, 1] > 0.999
    write_image(tmp_path / "single", "a.nii.gz", (18, 18, 18))
    with pytest.raises(InputError, match=r"needs 2 channel\(s\) \(T1, T2\), found 1 file"):
        prepare_images(source, tmp_path / "single", 4).__enter__()
    write_image(tmp_path / "single", "b_0000.nii.gz", (18, 18, 18))
    with pytest.raises(InputError, match=r"needs 2 channel\(s\) \(T1, T2\), found 1 file"):
        prepare_images(source, tmp_path / "single", 4).__enter__()
    assert not list(scratch.iterdir())


def test_prepare_images_faults_are_named_and_leave_nothing(make_model, case_folder, tmp_path, scratch):
    source = images_source(make_model())
    with pytest.raises(InputError, match="nowhere does not exist"):
        prepare_images(source, tmp_path / "nowhere", 4).__enter__()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image named"):
        prepare_images(source, tmp_path / "empty", 4).__enter__()
    victim = case_folder / "b_0000.nii.gz"
    victim.write_bytes(victim.read_bytes()[:3000])
    with pytest.raises(InputError, match="b_0000"):
        prepare_images(source, case_folder, 4).__enter__()
    assert not list(scratch.iterdir())


def test_prepare_images_cascade_is_refused(make_model, case_folder, scratch):
    with pytest.raises(ModelError, match="second stage of a cascade"):
        prepare_images(images_source(make_model("cascade")), case_folder, 4).__enter__()


def test_prepare_images_full_disk_is_named(make_model, case_folder, scratch, monkeypatch):
    import errno

    from nnslim.errors import OutputError

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(OutputError, match="the disk is full"):
        prepare_images(images_source(make_model()), case_folder, 4).__enter__()
    assert not list(scratch.iterdir())


def test_calibration_folder_goes_away_after_an_exception(make_model, case_folder, scratch):
    config = from_dict({"methods": [HALF], "calibration": {"images": str(case_folder)}})
    model = read_trained_model(make_model())
    with pytest.raises(ZeroDivisionError), calibration_of(model, config) as data:
        assert len(list(scratch.iterdir())) == 1 and data.images == 3
        _ = 1 / 0
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(("images", "held"), [(3, 3), (4, 1), (6, 1), (12, 2)])
def test_calibration_holds_images_out_where_there_are_enough(make_model, tmp_path, scratch, images, held):
    for number in range(images):
        write_image(tmp_path / "many", f"case{number:02d}_0000.nii.gz", (16, 16, 16), number)
    config = {"methods": [HALF], "recovery": {"steps": 3}, "calibration": {"count": 20, "tiles_per_image": 1}}
    config = from_dict(config).with_images(tmp_path / "many").judged_as(False)
    progress = []
    with calibration_of(read_trained_model(make_model()), config, lambda *step: progress.append(step)) as data:
        learned, judged = ({tile.numpy().tobytes() for tile in tiles} for tiles in (data.tiles, data.held_out))
        assert len(judged) == held and len(learned) == (images if held == images else images - held)
        assert held == images or not learned & judged
        assert len(data.patches(7)) == 7 and data.patches(7)[0].shape == (1, 16, 16, 16)
    assert progress == [("images", number, images) for number in range(1, images + 1)]


def test_calibration_without_images_or_methods_is_none(make_model, case_folder, scratch):
    model = read_trained_model(make_model())
    off = from_dict({"apply": False, "methods": [HALF], "calibration": {"images": str(case_folder)}})
    for config in (from_dict({"methods": [HALF]}), off):
        with calibration_of(model, config) as data:
            assert data is None


def test_fingerprint_changes_with_content_and_names(case_folder, tmp_path):
    def key():
        return images_fingerprint(from_dict({"methods": [HALF], "calibration": {"images": str(case_folder)}}))

    keys = [key()]
    write_image(case_folder, "d_0000.nii.gz", (8, 8, 8))
    keys.append(key())
    (case_folder / "d_0000.nii.gz").rename(case_folder / "e_0000.nii.gz")
    keys.append(key())
    write_image(case_folder, "e_0000.nii.gz", (8, 8, 8), 1)
    keys.append(key())
    assert len(set(keys)) == 4 and keys[-1] == key()
    assert images_fingerprint(from_dict({"methods": [HALF]})) == ""
    with pytest.raises(InputError, match="does not exist"):
        images_fingerprint(from_dict({"methods": [HALF], "calibration": {"images": str(tmp_path / "no")}}))


@pytest.mark.parametrize("kind", ["plain", "2d"])
def test_context_with_images_compresses_with_data_and_keeps_it(make_model, case_folder, tmp_path, scratch, kind):
    source = make_model(kind)
    config = {
        "methods": [HALF],
        "calibration": {"images": str(case_folder), "tiles_per_image": 1},
        "cache": {"folder": str(tmp_path / "cache")},
    }

    def load(settings):
        with NNSlimContext(settings) as slim:
            predictor = predictor_of(source)
        return predictor.list_of_parameters[0], slim.report.models[0]

    weights, first = load(config)
    again, second = load(config)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert len(first.slimmed.recovery) == 1 and first.slimmed.recovery == second.slimmed.recovery
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
    plain, _ = load({"methods": [HALF], "cache": config["cache"]})
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in weights.items()}
    assert not all(torch.equal(value, plain[key]) for key, value in weights.items())
    write_image(case_folder, "d_0000.nii.gz", (20, 18, 17), 9)
    other, third = load(config)
    assert not third.from_cache and not all(torch.equal(value, other[key]) for key, value in weights.items())
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 3
    assert not list(scratch.iterdir())


def run_cli(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["nnslim", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_cli_compress_with_images_writes_plan_and_recovery(make_model, case_folder, tmp_path, scratch, monkeypatch):
    source, config = make_model("regions"), tmp_path / "config.yml"
    config.write_text(json.dumps({"methods": [HALF], "recovery": {"steps": 2, "every": 1}}))
    target = tmp_path / "slim" / "nnUNetTrainer__slimPlans__3d_fullres"
    arguments = ["compress", "-m", source, "-o", target, "-c", config, "-i", case_folder, "-q"]
    assert run_cli(monkeypatch, *arguments) == 0
    record = json.loads((target / "nnslim.json").read_text())
    assert record["recovery"][0]["steps"] == 2 and record["config"]["calibration"]["images"] == str(case_folder)
    table = (target / "plan.csv").read_text().splitlines()
    assert table[0].startswith("layer,action,rank_out,rank_in") and len(table) == len(record["layers"]) + 1
    predictor = predictor_of(target)  # stock nnU-Net
    assert spec_of(predictor.network) is not None
    assert {p.name for p in target.parent.iterdir()} == {target.name}  # no state of the recovery is left
    assert not list(scratch.iterdir())
    again = tmp_path / "again"
    arguments[4] = again
    config.write_text(json.dumps({"methods": [{"method": "tucker", "plan": str(target / "plan.csv")}]}))
    assert run_cli(monkeypatch, *arguments) == 0
    assert json.loads((again / "nnslim.json").read_text())["spec"] == record["spec"]


def test_compress_folder_twice_gives_the_same_weights(make_model, case_folder, tmp_path, scratch):
    model = read_trained_model(make_model(folds=(0, 1)))
    config = from_dict({"methods": [HALF], "recovery": {"steps": 2, "every": 1, "norms": True}})
    made = []
    for name in ("one", "two"):
        compress_model(model, tmp_path / name, config, images=case_folder)
        made.append(read_trained_model(tmp_path / name).weights)
    for one, other in zip(*made, strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_compress_folder_interrupted_recovery_goes_on_and_ends_the_same(make_model, case_folder, tmp_path, scratch):
    model = read_trained_model(make_model())
    config = from_dict({"methods": [HALF], "recovery": {"steps": 4, "every": 2}})

    def stop(what, done, total):
        if (what, done) == ("recovery", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(model, tmp_path / "slim", config, images=case_folder, progress=stop)
    assert not (tmp_path / "slim").exists() and (tmp_path / ".slim.recovery.fold0").is_file()
    assert not list(scratch.iterdir())
    steps = []
    compress_model(model, tmp_path / "slim", config, images=case_folder, progress=lambda w, d, t: steps.append((w, d)))
    assert [done for what, done in steps if what == "recovery"] == [3, 4]
    compress_model(model, tmp_path / "whole", config, images=case_folder)
    one, other = (read_trained_model(tmp_path / name).weights[0] for name in ("slim", "whole"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not list(tmp_path.glob(".slim*"))

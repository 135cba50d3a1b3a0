"""Streamed export and lean preprocessing against nnU-Net's own functions, in one process and in spawned workers."""

from __future__ import annotations

import copy
import inspect
import pickle

import nnunetv2.inference.export_prediction as export_module
import nnunetv2.inference.predict_from_raw_data as predict_module
import numpy as np
import pytest
import SimpleITK
import torch
from helpers import make_plans, make_predictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling import default_resampling
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnslim import NNSlimContext
from nnslim.hosts.nnunet.cases import write_labels as streamed
from nnslim.hosts.nnunet.cases.resampling_functions import grid_of, lean_configuration
from nnslim.hosts.nnunet.predict.directory import predict_folder
from nnslim.hosts.nnunet.predict.predict_settings import PredictSettings

CONVERT = "convert_predicted_logits_to_segmentation_with_correct_shape"
RUNS_STREAMED = {"run": {"backend": "stock"}}
RUNS_STOCK = {"run": {"backend": "stock", "export": "stock"}}


def managers_of(labels, regions=None, transpose=(0, 1, 2), spacing=(1.0, 1.0, 1.0), **resampling):
    plans, name = make_plans("2d" if len(spacing) == 2 else "plain")
    plans["transpose_forward"] = list(transpose)
    plans["transpose_backward"] = np.argsort(transpose).tolist()
    plans["configurations"][name] |= {"spacing": list(spacing), **resampling}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    if regions:
        dataset["regions_class_order"] = regions
    manager = PlansManager(copy.deepcopy(plans))
    return manager, manager.get_configuration(name), dataset


def _properties(rng, plans, shape, spacing):
    """Return nnU-Net's properties of an image whose outermost voxels are zero and were cut off."""
    forward = plans.transpose_forward
    box = [[int(rng.integers(0, 3)), 0] for _ in range(3)]
    for edge, size in zip(box, shape, strict=True):
        edge[1] = edge[0] + size
    before = tuple(edge[1] + int(rng.integers(0, 3)) for edge in box)
    original = [spacing[forward.index(axis)] for axis in range(3)]  # properties hold the image's own order
    return {
        "spacing": original,
        "shape_before_cropping": before,
        "bbox_used_for_cropping": box,
        "shape_after_cropping_and_before_resampling": tuple(shape),
    }


THREE = {"background": 0, "one": 1, "two": 2}
FINER = (1, 1, 1), (8, 10, 12), np.float16
OVERLAPPING = {"background": 0, "all": [1, 2], "in": 2, "ignore": 3}
CASES = {
    # labels, regions, transpose, spacing of the model, size there, spacing of the image (transposed), size there, dtype
    "finer": (THREE, None, (0, 1, 2), (3, 3, 3), (9, 10, 11), (1.5, 1.5, 1.5), (18, 21, 22), np.float16),
    "coarser": (THREE, None, (0, 1, 2), (1, 1, 1), (19, 20, 35), (1.9, 2.1, 3), (10, 9, 12), np.float16),
    "float32": (THREE, None, (0, 1, 2), (3, 3, 3), (9, 10, 11), (1.5, 1.5, 1.5), (18, 21, 22), np.float32),
    "transposed": (THREE, None, (2, 0, 1), (3, 3, 3), (9, 10, 11), (1.5, 1.4, 1.3), (18, 21, 22), np.float16),
    "thick slices": (THREE, None, (0, 1, 2), (5, 1, 1), (6, 30, 31), (5, 0.7, 0.7), (6, 43, 44), np.float16),
    "thick slices move": (THREE, None, (1, 0, 2), (5, 1, 1), (6, 30, 31), (7, 0.7, 0.7), (4, 43, 44), np.float16),
    "thick slices of the last axis": (
        THREE,
        None,
        (0, 1, 2),
        (1, 1, 5),
        (30, 31, 6),
        (1, 1, 7),
        (29, 33, 4),
        np.float16,
    ),
    "same grid": (THREE, None, (0, 1, 2), (1, 1, 1), (9, 10, 11), (1, 1, 1), (9, 10, 11), np.float16),
    "one voxel thin": (THREE, None, (0, 1, 2), (1, 1, 1), (1, 20, 1), (1.2, 1.2, 1.2), (1, 16, 2), np.float16),
    "2D": (THREE, None, (0, 1, 2), (1, 1), (5, 20, 21), (4, 0.8, 0.7), (5, 25, 30), np.float16),
    "one class": ({"background": 0}, None, (0, 1, 2), (2, 2, 2), (5, 6, 7), (1, 1, 1), (10, 12, 14), np.float16),
    "ignore": ({**THREE, "ignore": 3}, None, (0, 1, 2), (2, 2, 2), (5, 6, 7), (1, 1, 1), (10, 12, 14), np.float16),
    "many": ({f"c{n}" if n else "background": n for n in range(300)}, None, (0, 1, 2), (2, 2, 2), (4, 5, 6), *FINER),
    "regions": (
        {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "in": 3},
        [1, 2, 3],
        (2, 1, 0),
        (3, 3, 3),
        (9, 10, 11),
        (1.5, 1.5, 1.5),
        (18, 21, 22),
        np.float16,
    ),
    "regions, ignore": (OVERLAPPING, [2, 1], (0, 1, 2), (2, 2, 2), (5, 6, 7), (1, 1, 1), (10, 12, 14), np.float32),
}


@pytest.fixture(params=CASES)
def case(request):
    """(logits, properties, plans, configuration, dataset) of a made-up prediction; smooth, with noise on it."""
    labels, regions, transpose, spacing, size, new_spacing, new_size, dtype = CASES[request.param]
    plans, configuration, dataset = managers_of(labels, regions, transpose, spacing)
    rng = np.random.default_rng(0)
    heads = plans.get_label_manager(dataset).num_segmentation_heads
    coarse = torch.from_numpy(rng.normal(size=(1, heads, 3, 3, 3)).astype(np.float32)) * 6
    logits = torch.nn.functional.interpolate(coarse, size, mode="trilinear")[0].numpy()
    logits = (logits + rng.normal(size=logits.shape)).astype(dtype)
    return logits, _properties(rng, plans, new_size, new_spacing), plans, configuration, dataset


streams = pytest.mark.skipif(
    "dtype_out" not in inspect.signature(default_resampling.resample_data_or_seg).parameters,
    reason="the resampling of nnU-Net before 2.5 is left to nnU-Net",
)


def _convert(function, case, *rest):
    logits, properties, plans, configuration, dataset = case
    labels = plans.get_label_manager(dataset)
    return function(logits.copy(), plans, configuration, labels, copy.deepcopy(properties), *rest)


def test_converted_labels_equal_nnunet(case, monkeypatch):
    expected = _convert(getattr(export_module, CONVERT), case)
    found = _convert(getattr(streamed, CONVERT), case)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert len(np.unique(expected)) > 1 or len(case[4]["labels"]) == 1
    assert np.array_equal(found, expected)


@streams
def test_converted_labels_do_not_come_from_full_size_scores(case, monkeypatch):
    """The stock function would resample all scores: it must not be asked to."""
    configuration = case[3]
    monkeypatch.setattr(type(configuration), "resampling_fn_probabilities", _RefusingProperty(configuration))
    _convert(getattr(streamed, CONVERT), case)


class _RefusingProperty:
    """Gives nnU-Net's partial, whose function refuses to be called but is recognised."""

    def __init__(self, configuration):
        class Partial(type(configuration.resampling_fn_probabilities)):
            def __call__(self, *given, **named):
                raise AssertionError("nnU-Net's own resampling was called")

        stock = configuration.resampling_fn_probabilities
        self._value = Partial(stock.func, **stock.keywords)

    def __get__(self, *_):
        return self._value

    def __set__(self, *_):
        raise AttributeError


def test_exported_file_equals_nnunets(case, tmp_path):
    logits, properties, plans, configuration, dataset = case
    size = np.array(properties["shape_before_cropping"])[plans.transpose_backward].tolist()
    spacing = properties["spacing"][::-1]
    properties["sitk_stuff"] = {
        "spacing": spacing,
        "origin": (1.0, -2.0, 3.5),
        "direction": (0, 1, 0, 1, 0, 0, 0, 0, 1),
    }
    for module, name in ((export_module, "stock"), (streamed, "ours")):
        module.export_prediction_from_logits(
            logits.copy(), copy.deepcopy(properties), configuration, plans, dataset, str(tmp_path / name)
        )
    stock, ours = (SimpleITK.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in ("stock", "ours"))
    assert SimpleITK.GetArrayFromImage(ours).shape == tuple(size)
    assert np.array_equal(SimpleITK.GetArrayFromImage(stock), SimpleITK.GetArrayFromImage(ours))
    assert (tmp_path / "stock.nii.gz").read_bytes() == (tmp_path / "ours.nii.gz").read_bytes()


def _small_case(**resampling):
    plans, configuration, dataset = managers_of(THREE, **resampling)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 8, 9, 10)).astype(np.float16)
    return logits, _properties(rng, plans, (11, 12, 13), (0.7, 0.7, 0.7)), plans, configuration, dataset


def test_saved_probabilities_are_nnunets_own(tmp_path):
    logits, properties, plans, configuration, dataset = _small_case()
    properties["sitk_stuff"] = {"spacing": (1, 1, 1), "origin": (0, 0, 0), "direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}
    for module, name in ((export_module, "stock"), (streamed, "ours")):
        given = (logits, properties, configuration, plans, dataset, str(tmp_path / name), True)
        module.export_prediction_from_logits(*given)
    stock, ours = (np.load(tmp_path / f"{name}.npz")["probabilities"] for name in ("stock", "ours"))
    assert np.array_equal(stock, ours) and (tmp_path / "ours.pkl").is_file()
    for name in (".pkl", ".nii.gz"):
        assert (tmp_path / f"stock{name}").read_bytes() == (tmp_path / f"ours{name}").read_bytes()


TORCH = {
    "resampling_fn_probabilities": "resample_torch_fornnunet",
    "resampling_fn_probabilities_kwargs": {"is_seg": False, "force_separate_z": False},
}
CUBIC = {"resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}}
UNKNOWN = {"resampling_fn_probabilities": "no_resampling_hack", "resampling_fn_probabilities_kwargs": {}}


@streams
@pytest.mark.parametrize(("resampling", "known"), [(TORCH, True), (CUBIC, True), (UNKNOWN, False)])
def test_other_resampling_functions_give_nnunets_labels(resampling, known):
    if resampling is UNKNOWN:
        pytest.importorskip("nnunetv2.preprocessing.resampling.no_resampling", reason="nnU-Net before 2.6")
    case = _small_case(**resampling)
    if not known:  # nothing is resampled: the sizes must fit
        case = (case[0], {**case[1], "shape_after_cropping_and_before_resampling": (8, 9, 10)}, *case[2:])
        case[1]["bbox_used_for_cropping"] = [[0, 8], [0, 9], [0, 10]]
    grid = grid_of(case[3].resampling_fn_probabilities, (8, 9, 10), (11, 12, 13), (1, 1, 1), (0.7, 0.7, 0.7))
    assert (grid is not None) == known
    expected, found = (_convert(getattr(module, CONVERT), case) for module in (export_module, streamed))
    assert np.array_equal(expected, found)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_left_to_nnunet(value):
    case = _small_case()
    case[0][1, 4, 4, 4] = value
    expected, found = (_convert(getattr(module, CONVERT), case) for module in (export_module, streamed))
    assert np.array_equal(expected, found)


def test_wrong_number_of_heads_fails_as_in_nnunet():
    case = _small_case()
    case = (case[0][:2], *case[1:])
    for module in (export_module, streamed):
        with pytest.raises(AssertionError, match="unexpected number of channels"):
            _convert(getattr(module, CONVERT), case)


def test_previous_stage_of_a_cascade_is_saved_as_by_nnunet(tmp_path):
    from nnunetv2.training.dataloading import nnunet_dataset

    kind = getattr(nnunet_dataset, "nnUNetDatasetNumpy", None)  # nnU-Net before 2.6 takes none
    logits, properties, plans, configuration, dataset = _small_case()
    for module, name in ((export_module, "stock"), (streamed, "ours")):
        given = (logits.copy(), (12, 14, 15), str(tmp_path / name), plans, configuration, properties, dataset)
        module.resample_and_save(*given, 2, *([kind] if kind else []))
    stock, ours = (np.load(tmp_path / f"{name}.npz")["seg"] for name in ("stock", "ours"))
    assert ours.dtype == stock.dtype and ours.shape == (12, 14, 15) and np.array_equal(stock, ours)


GEOMETRIES = [
    ((20, 22, 24), (1.0, 1.0, 1.0), (1.5, 1.5, 1.5)),
    ((20, 22, 24), (1.0, 1.0, 1.0), (0.7, 0.5, 1.0)),
    ((6, 40, 42), (5.0, 0.8, 0.8), (5.0, 1.0, 1.0)),
    ((6, 40, 42), (5.0, 0.8, 0.8), (2.5, 1.0, 1.0)),
    ((40, 42, 6), (0.8, 0.8, 6.0), (1.0, 1.0, 4.0)),
    ((9, 1, 7), (1.0, 3.0, 1.0), (0.5, 1.0, 1.0)),
]


@pytest.mark.parametrize(("shape", "spacing", "target"), GEOMETRIES)
@pytest.mark.parametrize("labels", [None, 5])
def test_preprocessing_equals_nnunets(shape, spacing, target, labels):
    """Images to 1e-5 of their range; the mask, or the segmentation of a cascade's stage before, exactly."""
    plans, configuration, dataset = managers_of({f"c{n}" if n else "background": n for n in range(5)}, spacing=target)
    rng = np.random.default_rng(2)
    image = rng.normal(size=(1, *shape)).astype(np.float32)
    image[:, :2] = 0  # zeros on one side are cut off, zeros inside are part of the mask
    image[:, shape[0] // 2] *= rng.random(shape[1:]) > 0.3
    seg = None if labels is None else rng.integers(0, labels, (1, *shape)).astype(np.int8)

    def run(configuration):
        given = image.copy(), None if seg is None else seg.copy(), {"spacing": list(spacing)}
        found = DefaultPreprocessor(verbose=False).run_case_npy(*given, plans, configuration, dataset)
        return *found[:2], given[2]

    data, found, properties = run(lean_configuration(configuration))
    stock, expected, stock_properties = run(configuration)
    assert data.dtype == stock.dtype and data.shape == stock.shape and found.dtype == expected.dtype
    np.testing.assert_allclose(data, stock, atol=1e-5 * np.ptp(stock))
    assert np.array_equal(found, expected)
    assert properties["bbox_used_for_cropping"] == stock_properties["bbox_used_for_cropping"]


def test_choice_sent_to_another_process_is_the_function_wanted_when_sent():
    with NNSlimContext(RUNS_STREAMED):
        sent = pickle.dumps(predict_module.export_prediction_from_logits)
        with NNSlimContext(RUNS_STOCK):
            stock = pickle.dumps(predict_module.export_prediction_from_logits)
    assert pickle.loads(sent) is streamed.export_prediction_from_logits
    assert pickle.loads(stock) is predict_module.export_prediction_from_logits  # nnU-Net's, once we are out
    assert not hasattr(predict_module.export_prediction_from_logits, "__nnslim_original__")


def _array(folder, name):
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / f"{name}.nii.gz")))


def _alike(stock, ours, name):
    """What the network sees differs in the last digit, which moves a label where untrained scores are equal."""
    stock, ours = _array(stock, name), _array(ours, name)
    return stock.shape == ours.shape and len(np.unique(stock)) > 1 and (stock == ours).mean() > 0.999


@pytest.fixture
def counted(monkeypatch):
    """Count the cases whose labels were made in our way in this process."""
    seen = []
    original = streamed.labels_of

    def labels_of(*given):
        seen.append(original(*given))
        return seen[-1]

    monkeypatch.setattr(streamed, "labels_of", labels_of)
    return seen


@streams
@pytest.mark.parametrize("kind", ["plain", "regions", "anisotropic", "2d"])
def test_context_sequential_prediction_equals_stock(make_model, case_folder, tmp_path, counted, kind):
    model = make_model(kind)
    files = [[str(path)] for path in sorted(case_folder.glob("*.nii.gz"))]

    def predict(where):
        predictor = make_predictor()
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        (tmp_path / where).mkdir()
        predictor.predict_from_files_sequential(files, [str(tmp_path / where / name) for name in "abc"])

    predict("stock")
    assert not counted
    with NNSlimContext(RUNS_STREAMED):
        predict("ours")
    assert len(counted) == 3 and all(one is not None for one in counted)
    with NNSlimContext(RUNS_STOCK):
        predict("switched off")
    assert len(counted) == 3
    for name in "abc":
        assert _alike(tmp_path / "stock", tmp_path / "ours", name)
        assert np.array_equal(_array(tmp_path / "stock", name), _array(tmp_path / "switched off", name))


def test_context_leaves_functions_and_preprocessor_as_they_were(make_model):
    def state():
        owners = (export_module, predict_module, DefaultPreprocessor)
        return [{name: id(value) for name, value in vars(owner).items()} for owner in owners]

    before = state()
    with pytest.raises(ZeroDivisionError), NNSlimContext(RUNS_STREAMED):
        make_predictor().initialize_from_trained_model_folder(str(make_model()), (0,))
        assert state() != before
        _ = 1 / 0
    assert state() == before and not streamed.originals


@streams
def test_predict_folder_streams_unless_told_otherwise(make_model, case_folder, tmp_path, counted):
    settings = PredictSettings(backend="stock")
    for name, config in (("ours", None), ("stock", RUNS_STOCK)):
        results = predict_folder(case_folder, tmp_path / name, make_model(parent=f"for {name}"), config, settings)
        assert [result.status for result in results] == ["done"] * 3
        assert len(counted) == 3
    assert all(_alike(tmp_path / "stock", tmp_path / "ours", name) for name in "abc")


@pytest.mark.data
def test_spawned_workers_of_nnunet_give_stock_files(data_root, tmp_path):
    """nnUNetv2_predict's own route, with processes for preprocessing and export, on the trained hippocampus model."""
    model = next((data_root / "models" / "Dataset004_Hippocampus").glob("nnUNetTrainer__*"))
    images = sorted((data_root / "data" / "Dataset004_Hippocampus" / "imagesTs").glob("*.nii.gz"))[:3]

    def predict(where):
        predictor = make_predictor(tile_step_size=1.0)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        names = [str(tmp_path / where / path.name.removesuffix("_0000.nii.gz")) for path in images]
        predictor.predict_from_files([[str(path)] for path in images], names, False, True, 1, 1)

    predict("stock")
    with NNSlimContext(RUNS_STREAMED):
        predict("ours")
    for path in images:
        name = path.name.removesuffix("_0000.nii.gz")
        stock, ours = _array(tmp_path / "stock", name), _array(tmp_path / "ours", name)
        assert len(np.unique(stock)) == 3 and np.array_equal(stock, ours)

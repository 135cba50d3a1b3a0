"""Predictions of whole images that recovery learns from: as nnU-Net makes them, and augmented with their images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import load_stock

from nnslim.compression.config import from_dict
from nnslim.hosts.nnunet.cases.augmented_patches import AugmentedPatches, DenseAnswers
from nnslim.hosts.nnunet.cases.prepared_images import PreparedImages
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model

HALF = {"method": "tucker", "rank_factor": 0.5, "rank_min": 2}


@pytest.mark.parametrize("kind", ["plain", "2d", "regions"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_answers_are_what_nnunet_predicts_and_follow_their_patches(make_model, prepared, monkeypatch, kind, mirrored):
    folder = make_model(kind)
    images = prepared(folder, (24, 20, 18), (9, 20, 30))
    network = build_network(read_trained_model(folder)).eval()
    axes = tuple(images.source.mirror_axes) if mirrored else ()
    answers = DenseAnswers(images, 3)
    with torch.no_grad():
        patches = answers(network, network, axes, 10**6)
        assert answers(network, None, axes, 10**6)(2)._answers is patches(2)._answers  # made once
        assert answers(copy.deepcopy(network), network, axes, 1) is None  # too many passes
    predictor = load_stock(folder, use_mirroring=mirrored)
    for number in range(len(images)):
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(images.load(number).copy())).float()
        wanted = logits.sigmoid() if kind == "regions" else logits.softmax(0)
        found = torch.from_numpy(patches(1)._answers.load(number)).float()
        # nnU-Net weighs and sums in half precision, which tells at the corners, where all weights are small.
        assert (found - wanted).abs().flatten().quantile(0.95) < 4e-3
    alone = AugmentedPatches(images, 6, seed=3)
    for index in range(6):
        image, likely = patches(6)[index]
        assert torch.equal(image, alone[index])  # the same patch, whether answers come with it or not
        assert likely.shape[1:] == image.shape[1:] and likely.min() >= 0 and likely.max() <= 1
        if kind != "regions":
            torch.testing.assert_close(likely.sum(0), torch.ones(image.shape[1:]), rtol=0, atol=2e-3)
    monkeypatch.setattr("nnslim.hosts.nnunet.cases.augmented_patches._PATCH_VALUES", 10)
    assert answers(network, network, axes, 10**6) is None


def test_probabilities_go_where_their_image_goes(make_model, prepared):
    """An image that is its own probability stays so under rotation, scaling and mirroring; intensities change."""
    images = prepared(make_model(), (20, 20, 20))
    blob = np.zeros((1, 20, 20, 20), np.float32)
    blob[:, 4:13, 6:15, 5:9] = 1
    np.save(images.paths[0], blob)
    np.save(images.paths[0].with_name("answer.npy"), np.concatenate([1 - blob, blob, 0 * blob]).astype(np.float16))
    answers = PreparedImages(images.source, [images.paths[0].with_name("answer.npy")])
    patches = AugmentedPatches(images, 12, seed=1, answers=answers)
    for index in range(12):
        image, likely = patches[index]
        inside = likely[1] > 0.9
        if inside.sum() > 50 and (likely[1] < 0.1).sum() > 50:
            assert image[0][inside].mean() > image[0][likely[1] < 0.1].mean() + 0.2


def test_learning_from_predictions_comes_nearer_to_the_mirrored_answer(make_model, case_folder, stock_logits, tmp_path):
    source = make_model()
    content = {"methods": [HALF], "run": {"guard": False}, "calibration": {"images": str(case_folder)}}
    wanted = stock_logits(source, (0,), use_mirroring=True).softmax(0)
    distances = []
    for name, steps in (("before", 0), ("after", 40)):
        recovery = {"steps": steps, "every": 40, "learning_rate": 3e-3, "precision": "f32"}
        recovery |= {"target": "mirrored"} if steps else {}
        compress_model(read_trained_model(source), tmp_path / name, from_dict(content | {"recovery": recovery}))
        distances.append(float((stock_logits(tmp_path / name, (0,)).softmax(0) - wanted).square().mean()))
    assert distances[1] < distances[0]

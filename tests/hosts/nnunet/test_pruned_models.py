"""Models whose weights decide their widths, as Sauron writes them: compressed, planned and predicted with."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from helpers import final_of, stock_prediction

from nnslim.compression.config import tucker
from nnslim.context import NNSlimContext
from nnslim.errors import ModelError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.compress.plan_model import error_grid_folder, plan_model
from nnslim.hosts.nnunet.model.slim_plans import with_architecture
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
from nnslim.network.spec import SlimSpec
from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import channel_map
from nnslim.surgery.narrow import ElasticEdit, narrow_layers

HALF = tucker(rank_factor=0.5, rank_min=2)


def narrower(network, step):
    """Remove every so many-th channel, the first of each layer."""
    channels = channel_map(network, (1, 1, 16, 16, 16))
    keep = {name: [c for c in range(group.channels) if c % step] for name, group in channels.groups.items()}
    narrow_layers(LayerIndex(network), channels.narrowing(keep))
    return network.state_dict()


@pytest.fixture
def pruned(make_model):
    """A model of two folds of other widths, and plans that let the weights decide."""
    folder = make_model(folds=(0, 1))
    model = read_trained_model(folder)
    plans = with_architecture(model.plans, model.configuration, SlimSpec((ElasticEdit(),)))
    (folder / "plans.json").write_text(json.dumps(plans))
    for fold, step in (("0", 4), ("1", 3)):
        content = final_of(folder, fold) | {"network_weights": narrower(build_network(model, fold), step)}
        torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


@pytest.fixture
def one(pruned):
    """The same with fold 0 alone."""
    shutil.rmtree(pruned / "fold_1")
    return pruned


def test_context_factors_a_pruned_model_further_as_compress_does(one, tmp_path):
    compress_model(read_trained_model(one), tmp_path / "both", HALF, allow_slower=True)
    written = stock_prediction(tmp_path / "both")[1]
    config = HALF.model_copy(update={"run": HALF.run.model_copy(update={"guard": False, "backend": "stock"})})
    for cached in (False, True):
        with NNSlimContext(config) as slim:
            logits = stock_prediction(one)[1]
        (report,) = slim.report.models
        assert report.slimmed.slim.macs < report.slimmed.dense.macs and report.from_cache is cached
        torch.testing.assert_close(logits, written)


def test_pruned_model_is_planned_and_surveyed(one, tmp_path):
    planned = plan_model(read_trained_model(one), tmp_path / "plan.csv", HALF)
    assert planned.macs[1] < planned.macs[0] and {decision.shape[0] for decision in planned.decisions} & {6, 12, 24}
    grids = error_grid_folder(read_trained_model(one), tmp_path / "grid", step=8)
    assert len(grids) > 5


def test_folds_of_other_widths_are_compressed_one_by_one(pruned, tmp_path):
    with pytest.raises(ModelError, match=r"3d_fullres: it is pruned, and its folds have widths of their own"):
        compress_model(read_trained_model(pruned), tmp_path / "out", HALF)
    with NNSlimContext(HALF) as slim:
        stock_prediction(pruned, (0, 1))
    assert "left as it is (it is pruned, and its folds have widths of their own" in str(slim.report)
    compress_model(read_trained_model(pruned, [1]), tmp_path / "out", HALF, allow_slower=True)
    assert torch.isfinite(stock_prediction(tmp_path / "out", (1,))[1]).all()


def test_context_with_sauron_warns_once_that_it_does_nothing_to_trained_models(one, caplog):
    with NNSlimContext("sauron") as slim, caplog.at_level(logging.WARNING, "nnslim"):
        for _ in range(2):
            stock_prediction(one)
    assert caplog.text.count("works while a network trains, and does nothing to a trained model") == 1
    assert all("left as it is (its method works while" in line for line in str(slim.report).splitlines())

"""Models whose weights decide their widths, as Sauron writes them: compressed, planned and predicted with."""

from __future__ import annotations

import json
import logging
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import final_of, stock_prediction

from nnslim.compression.config import RunConfig, tucker
from nnslim.context import NNSlimContext
from nnslim.errors import ModelError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.compress.plan_model import error_grid_folder, plan_model
from nnslim.hosts.nnunet.model.slim_plans import with_architecture
from nnslim.hosts.nnunet.model.trained_model import build_network, read_trained_model
from nnslim.network.spec import SlimSpec
from nnslim.network.walk import LayerIndex
from nnslim.surgery.channels import channel_map
from nnslim.surgery.narrow import ElasticEdit, narrow_layers, widths_of
from nnslim.tables import write_table

HALF = tucker(rank_factor=0.5, rank_min=2).model_copy(update={"run": RunConfig(guard=False)})


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


def test_predict_takes_in_filters_and_out_filters_where_the_plans_are_dense(
    pruned, case_folder, tmp_path, command, monkeypatch
):
    """The original's predict.py built its network from the last rows of these tables."""
    widths = {fold: widths_of(build_network(read_trained_model(pruned, [fold]))) for fold in (0, 1)}
    convolutions = sorted(name for name, (_, inputs) in widths[1].items() if inputs is not None)
    for side, name in enumerate(("out_filters", "in_filters")):
        rows = [{layer: table[layer][side] for layer in convolutions} for table in widths.values()]
        write_table(rows, tmp_path / name, separator="\t")
    common = ("predict", "-i", case_folder, "-m", pruned, "-q", "--backend", "stock")
    command(*common, "-o", tmp_path / "elastic", "-f", 1, expect=0)
    plans = json.loads((pruned / "plans.json").read_text())
    dense = read_trained_model(pruned).configuration_manager.network_arch_init_kwargs
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = dense["nnslim_base"]
    architecture["arch_kwargs"] = {k: v for k, v in dense.items() if not k.startswith("nnslim")}
    (pruned / "plans.json").write_text(json.dumps(plans))
    assert "does not fit its checkpoint" in command(*common, "-o", tmp_path / "no", "-f", 1, expect=2)[2]
    monkeypatch.chdir(tmp_path)
    tables = ("--in-filters", "in_filters", "--out-filters", "out_filters")
    command(*common, *tables, "-o", tmp_path / "tables", "-f", 1, expect=0)
    for path in sorted((tmp_path / "elastic").glob("*.nii.gz")):
        assert np.array_equal(*[nib.load(tmp_path / one / path.name).get_fdata() for one in ("elastic", "tables")])
    told = command(*common, *tables, "-o", tmp_path / "no", expect=2)[2]  # both folds
    assert "out_filters: layer 'decoder.stages.0.convs.0.conv' has 10 filters, the weights of fold 0 have 12" in told
    (tmp_path / "out_filters").write_text("enc_ConvBlock_1\n")
    assert "out_filters has no row; expected" in command(*common, *tables, "-o", tmp_path / "no", expect=2)[2]
    (tmp_path / "out_filters").write_text("enc_ConvBlock_1\n48\n")
    assert "'enc_ConvBlock_1' is no layer of" in command(*common, *tables, "-o", tmp_path / "no", expect=2)[2]
    task = command("predict", "-i", case_folder, "-o", tmp_path / "no", "--task", "total", *tables, expect=2)
    assert "--out-filters goes with -m" in task[2]


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

"""The names that saved models carry: found as nnU-Net finds them, today's and those of older models."""

from __future__ import annotations

import json
import pydoc

import pytest
import torch

import nnslim.architectures
from nnslim.compression.config import tucker
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.checked_plans import base_class, locate_trusted
from nnslim.hosts.nnunet.model.trained_model import read_trained_model

# Models on users' disks name these. A name may be added here, never changed or removed.
FROZEN = (
    "nnslim.architectures.slim_network",
    "nnslim.architectures.PlannedPrimus",
    "nnslim.architectures.PlannedPrimusV2",
    "nnslim.architectures.PlannedPrimusV3",
    "nnslim.architectures.PlannedUNETR",
    "nnslim.architectures.PlannedDAEFormer",
    "nnslim.architectures.PlannedWindowNet",
)
FORMER = (
    "nnslim.hosts.nnunet.network.slim_network",
    "nnslim.hosts.nnunet.planned.PlannedPrimus",
    "nnslim.hosts.nnunet.planned.PlannedPrimusV2",
    "nnslim.hosts.nnunet.planned.PlannedUNETR",
    "nnslim.hosts.nnunet.planned.PlannedDAEFormer",
    "nnslim.hosts.nnunet.inflation.window.PlannedWindowNet",
)


@pytest.mark.parametrize("name", [*FROZEN, *FORMER])
def test_saved_name_is_found_by_stock_nnunet_and_trusted_by_nnslim(name):
    found = pydoc.locate(name)  # what nnU-Net calls
    assert found is not None and found.__name__ == name.rsplit(".", 1)[-1]
    assert locate_trusted(name, "plans") is found and base_class(name) is found


def test_every_public_architecture_is_frozen():
    assert [f"nnslim.architectures.{name}" for name in nnslim.architectures.__all__] == list(FROZEN)


@pytest.mark.parametrize("name", ["nnslim.architectures.PlannedNothing", "nnslim.hosts.nnunet.gone.slim_network"])
def test_name_that_was_never_saved_is_not_found(name):
    assert pydoc.locate(name) is None


def test_older_model_is_predicted_by_stock_nnunet_and_known_as_slim(make_model, stock_logits, tmp_path):
    folder = tmp_path / "slim"
    compress_model(read_trained_model(make_model()), folder, tucker(rank_factor=0.5, rank_min=2))
    expected = stock_logits(folder)
    plans = json.loads((folder / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    assert architecture["network_class_name"] == FROZEN[0]
    architecture["network_class_name"] = FORMER[0]
    (folder / "plans.json").write_text(json.dumps(plans))
    assert torch.equal(stock_logits(folder), expected)
    assert read_trained_model(folder).is_slim

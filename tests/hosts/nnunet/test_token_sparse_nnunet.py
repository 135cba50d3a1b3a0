"""Token sparsity inside nnU-Net: trainers, model folders that stock nnU-Net loads, the context."""

from __future__ import annotations

import json

import pytest
import torch
from dynamic_network_architectures.architectures import primus
from helpers import make_plans, make_predictor, random_data, write_ball_dataset
from torch import nn

import nnslim.hosts.nnunet.train.ext as trainers
from nnslim import NNSlimContext
from nnslim.compression.config import from_dict, load_config
from nnslim.errors import ConfigError, ModelError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.planned import PlannedUNETR, architecture_entry, built_from_plans, planned_architecture
from nnslim.hosts.nnunet.model.trained_model import build_network, build_untrained, read_trained_model
from nnslim.hosts.nnunet.train.described import RateSchedule, parameter_groups
from nnslim.hosts.nnunet.train.ext.nnslim_trainers import trainer_named, trainer_names
from nnslim.hosts.nnunet.train.settings import settings_in_force
from nnslim.hosts.nnunet.train.token_sparse_trainer import token_sparse_trainer_class, unetr_trainer_class
from nnslim.methods.token_sparse import TokenSparseConfig, set_ratio
from nnslim.methods.token_sparse.config import RecipeConfig, UNETRConfig
from nnslim.methods.token_sparse.scorers import SupervisedLoss
from nnslim.network.spec import spec_of
from studies.short_training import ShortTraining, train_short

TINY = ShortTraining(epochs=2, iterations=2, validation_iterations=1, batch_size=2, learning_rate=1e-3)


def build_tiny(plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision):
    patch = configuration_manager.patch_size
    options = {"scale_attn_inner": True, "init_values": 0.1}
    return primus.Primus(num_input_channels, 48, (8, 8, 8), num_output_channels, 4, 4, patch, **options)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A made dataset, and a Primus trainer of a few thousand parameters under a name that nnU-Net knows."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    write_ball_dataset(tmp_path / "raw" / "Dataset998_Ball")
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer

    monkeypatch.setattr(nnUNet_Primus_S_Trainer, "build_network_architecture", staticmethod(build_tiny))
    return nnUNet_Primus_S_Trainer


def logits(folder, data=None):
    predictor = make_predictor()
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    data = random_data(predictor) if data is None else data
    return predictor, data, predictor.predict_logits_from_preprocessed_data(data)


def test_dense_primus_is_compressed_warm_started_and_predicted_by_stock_nnunet(dataset, tmp_path):
    dense = train_short(998, "3d_fullres", 0, TINY, trainer_base=dataset).parent
    _, data, expected = logits(dense)

    # training-free: a folder whose checkpoint names nnU-Net's default trainer
    settings = from_dict({"methods": [{"method": "token_sparse", "ratio": 0.5}], "run": {"guard": False}})
    slimmed = compress_model(read_trained_model(dense), tmp_path / "slim", settings)
    assert slimmed.slim.macs < slimmed.dense.macs
    predictor, _, found = logits(tmp_path / "slim", data)
    assert predictor.trainer_name == "nnUNetTrainer"
    assert spec_of(predictor.network) == slimmed.spec
    assert not torch.equal(found, expected)
    set_ratio(predictor.network, 0)
    assert torch.equal(predictor.predict_logits_from_preprocessed_data(data), expected)

    # the context does the same in memory
    with NNSlimContext(settings):
        inside = logits(dense, data)[2].float()
    middle = (slice(None), *[slice(6, 14)] * 3)  # stock nnU-Net adds in half precision, coarse at the edges of tiles
    assert torch.allclose(inside[middle], found[middle].float(), atol=2e-2)

    # trained: from the dense weights, with a ratio that rises
    sparse = TokenSparseConfig(
        ratio=0.5,
        scorer="mlp",
        completion="fusion",
        schedule_epochs=2,
        supervision=0.5,
        warm_start=dense / "fold_0" / "checkpoint_final.pth",
        recipe=RecipeConfig(layer_decay=0.75, schedule="cosine"),
    )
    seen = []
    trainer = token_sparse_trainer_class(dataset, sparse, "nnUNet_Primus_S_TokenSparse_Trainer")
    watched = type(
        trainer.__name__, (trainer,), {"on_train_epoch_end": lambda self, outputs: _note(self, outputs, seen)}
    )
    folder = train_short(998, "3d_fullres", 0, TINY, trainer_base=watched).parent
    assert seen == [((0.25,) * 3, 0.5), ((0.5,) * 3, 0.5)]
    assert folder.name == "nnUNet_Primus_S_TokenSparse_Trainer__nnUNetPlans__3d_fullres"
    predictor, _, trained = logits(folder, data)
    assert predictor.trainer_name == "nnUNetTrainer" and torch.isfinite(trained).all()
    assert spec_of(predictor.network).edits[0].ratios == [0.5] * 3
    model = read_trained_model(folder)
    assert model.is_slim and spec_of(build_network(model)) is not None

    # compressed further: low-rank linear layers come after the edit that the training began with
    lower = from_dict({"methods": [{"method": "linear", "rank_factor": 0.3}], "run": {"guard": False}})
    low = compress_model(model, tmp_path / "low", lower)
    assert low.slim.macs < low.dense.macs and low.dense.macs < slimmed.dense.macs
    predictor, _, found = logits(tmp_path / "low", data)
    kinds = [edit.kind for edit in spec_of(predictor.network).edits]
    assert kinds[0] == "token_sparse" and set(kinds[1:]) == {"low_rank"}
    assert torch.isfinite(found).all() and not torch.equal(found, trained)

    # resumed, as nnUNetv2_train --c does; nnU-Net's own Primus trainers cannot
    (folder / "fold_0" / "checkpoint_latest.pth").write_bytes((folder / "fold_0" / "checkpoint_final.pth").read_bytes())
    longer = ShortTraining(epochs=3, iterations=2, validation_iterations=1, batch_size=2, learning_rate=1e-3)
    (folder / "fold_0" / "checkpoint_final.pth").unlink()
    train_short(998, "3d_fullres", 0, longer, trainer_base=watched, resume=True)
    assert len(seen) == 3
    assert read_trained_model(folder).checkpoints["0"]["current_epoch"] == 3


def _note(trainer, outputs, seen):
    super(type(trainer).__mro__[1], trainer).on_train_epoch_end(outputs)
    assert isinstance(trainer.loss, SupervisedLoss) and not trainer.network.eva.reduction.heard
    seen.append((trainer.network.eva.reduction.ratios, trainer.loss.weight))


def test_unetr_is_trained_and_predicted_by_stock_nnunet(dataset):
    unetr = UNETRConfig(decoder="x8", dim=24, depth=9, heads=2, features=4)
    learned = {"scorer": "mlp", "completion": "fusion", "supervision": 1.0}
    settings = TokenSparseConfig(ratio=0.5, skips="completed", unetr=unetr, **learned)
    folder = train_short(998, "3d_fullres", 0, TINY, trainer_base=unetr_trainer_class(settings)).parent
    predictor, _, found = logits(folder)
    assert isinstance(predictor.network, PlannedUNETR)
    assert predictor.network.encoder.reduction.ratios == (0.5,) * 3
    assert torch.isfinite(found).all()


MONAI_TRAINER = """
from monai.networks.nets import UNETR
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainerTinyUNETR(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        sizes = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2}
        return UNETR(num_input_channels, num_output_channels, configuration_manager.patch_size, **sizes)
"""


@pytest.mark.parametrize("kind", ["MONAI's", "ours"])
def test_context_makes_a_dense_unetr_sparse_in_memory(kind, tmp_path, monkeypatch):
    plans, configuration = make_plans("plain")
    settings = plans["configurations"][configuration]
    settings["patch_size"] = [32, 32, 32]
    trainer = "nnUNetTrainer"
    if kind == "ours":
        arguments = {"image_size": [32, 32, 32], "decoder": "x8", "dim": 24, "depth": 9, "heads": 2, "features": 4}
        settings["architecture"] = architecture_entry(PlannedUNETR, {**arguments, "ratios": 0.0})
    else:
        (tmp_path / "ext").mkdir()
        (tmp_path / "ext" / "tiny_unetr.py").write_text(MONAI_TRAINER)
        monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "ext"))
        trainer = "nnUNetTrainerTinyUNETR"
    dataset = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    arguments = {"plans": plans, "configuration": configuration, "fold": 0, "dataset_json": dataset}
    folder = tmp_path / f"{trainer}__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    for name, content in (("plans", plans), ("dataset", dataset)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    content = {"network_weights": {}, "init_args": arguments, "trainer_name": trainer}
    model = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**content, "inference_allowed_mirroring_axes": None}, model)
    torch.manual_seed(0)
    network = build_untrained(read_trained_model(folder))
    torch.save({**content, "network_weights": network.state_dict(), "inference_allowed_mirroring_axes": None}, model)

    _, data, expected = logits(folder, torch.randn(1, 32, 40, 32))
    found = {}
    for ratio in (0.0, 0.5):
        methods = {"methods": [{"method": "token_sparse", "ratio": ratio}], "run": {"guard": False, "backend": "stock"}}
        with NNSlimContext(methods) as slim:
            predictor, _, found[ratio] = logits(folder, data)
        assert len(slim.report.models) == 1 and not slim.report.models[0].note
        assert [edit.kind for edit in spec_of(predictor.network).edits] == ["token_sparse"]
    assert torch.equal(found[0.0], expected) and not torch.equal(found[0.5], expected)


@pytest.mark.parametrize("kind", ["Primus", "PrimusV2", "PrimusV3"])
def test_architecture_read_off_a_network_builds_it_again(kind):
    more = {"depth_per_level": (1, 2, 1), "ch_per_level": (4, 8, 8, 16)} if kind == "PrimusV3" else {}
    options = {"num_register_tokens": 2, "init_values": 0.1, "drop_path_rate": 0.2, "scale_attn_inner": False}
    network = getattr(primus, kind)(1, 48, (8, 8, 8), 3, 4, 4, (16, 24, 32), **options, **more)
    entry = planned_architecture(network, (16, 24, 32))
    from nnslim.hosts.nnunet.model.checked_plans import base_class

    again = base_class(entry["network_class_name"])(
        input_channels=1, num_classes=3, deep_supervision=False, **json.loads(json.dumps(entry["arch_kwargs"]))
    )
    again.load_state_dict(network.state_dict())
    image = torch.randn(1, 1, 16, 24, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(image), network.eval()(image))
    assert again.eva.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_architecture_that_cannot_be_read_is_left_alone():
    assert planned_architecture(nn.Conv3d(1, 1, 1), (8, 8, 8)) is None


def test_trainers_are_found_by_name_also_by_nnunet(monkeypatch):

    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    monkeypatch.setenv("nnUNet_extTrainer", trainers.__path__[0])
    assert len(trainer_names()) == 17
    kinds = ("Primus_M", "PrimusV3S", "UNETR")
    for name in (f"nnUNet_{kind}_TokenSparse_Trainer" for kind in kinds):
        assert recursive_find_trainer_class_by_name(name).__name__ == name
    with pytest.raises(ConfigError, match="nnUNet_Primus_M_TokenSparse_Trainer"):
        trainer_named("nnUNet_Primus_M_TokenSparse")


@pytest.mark.parametrize("variable", ["NNSLIM_TRAINING", "NNSLIM_TOKEN_SPARSE"])
@pytest.mark.parametrize(
    ("preset", "ratio"), [("token-sparse", 0.5), ("token-sparse-btcv", 0.9), ("token-sparse-brats", 0.75)]
)
def test_presets_reach_the_trainers_through_the_environment(preset, ratio, variable, monkeypatch):
    monkeypatch.setenv(variable, preset)
    assert settings_in_force("token_sparse").token_sparse.ratio == ratio
    assert load_config(preset).methods[0].method == "token_sparse"


def test_training_without_a_preset_is_taught_by_labels():
    settings = settings_in_force("token_sparse").token_sparse
    assert (settings.supervision, settings.scorer, settings.ratio) == (1, "mlp", 0.5)
    assert settings.stages(12) == ([3], [0.5], ["mlp"])
    assert settings.stages(24) == ([6], [0.5], ["mlp"])


def test_published_preset_gives_the_published_network():
    settings = load_config("token-sparse-btcv").methods[0].settings
    manager = type("Configuration", (), {"patch_size": (96, 96, 96)})
    with torch.device("meta"):
        network = unetr_trainer_class(settings).build_network_architecture(None, manager, 1, 14)
    from nnslim.network.operations import count_operations

    assert count_operations(network, (1, 1, 96, 96, 96)).macs("torchprofile") == 146_626_752_852


def test_layer_decay_and_weight_decay_are_those_of_the_recipe():
    network = primus.Primus(1, 48, (8, 8, 8), 3, 4, 4, (16, 16, 16), init_values=0.1)
    groups = parameter_groups(network, RecipeConfig(layer_decay=0.5))
    of = {id(p): group for group in groups for p in group["params"]}
    assert of[id(network.eva.pos_embed)]["scale"] == 0.5**5 and of[id(network.eva.pos_embed)]["weight_decay"] == 0
    assert of[id(network.eva.blocks[0].mlp.fc2.weight)]["scale"] == 0.5**4
    assert of[id(network.eva.blocks[3].mlp.fc2.weight)]["scale"] == 0.5
    assert of[id(network.eva.blocks[3].mlp.fc2.weight)]["weight_decay"] == 0.05
    assert of[id(network.eva.norm.weight)]["scale"] == 1.0
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_schedule_warms_up_and_ends_at_zero():
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "scale": 0.5}], 1.0)
    schedule = RateSchedule(optimizer, 1.0, epochs=10, warmup=2, kind="cosine")
    assert schedule.get_last_lr() == [0.25]
    assert [schedule.at(epoch) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


def test_warm_start_from_another_architecture_is_refused(dataset, tmp_path):
    from nnslim.hosts.nnunet.train.token_sparse_trainer import warm_start

    other = {"network_weights": {"a": torch.zeros(1)}, "trainer_name": "x", "init_args": {}}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="not of the dense network"):
        warm_start(primus.Primus(1, 48, (8, 8, 8), 3, 4, 4, (16, 16, 16)), tmp_path / "other.pth")


def test_model_that_plans_describe_already_is_left_alone(make_model):
    model = read_trained_model(make_model("plain"))
    assert built_from_plans(model) is model

"""NNSLIM_TRAINING: one place for the settings of all trainers that nnU-Net starts."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nnslim.errors import ConfigError
from nnslim.hosts.nnunet.train.optimizer_steps import OptimizerSteps
from nnslim.hosts.nnunet.train.settings import KINDS, TrainingSettings, read_section, read_settings, settings_in_force
from nnslim.inflation import WindowConfig
from nnslim.methods.sauron import SauronConfig

EVERY_KIND = {
    "epochs": 7,
    "sauron": {"strength": 0.25, "epochs": 9},
    "token_sparse": "token-sparse-btcv",
    "daeformer": {"form": 128},
    "window": {"encoder": "beit", "options": {"embed_dim": 24}},
}


@pytest.mark.parametrize("kind", ["text", "file.yml", "file.json"])
def test_one_variable_holds_the_settings_of_every_kind(kind, tmp_path, monkeypatch):
    text = json.dumps(EVERY_KIND)
    if kind != "text":
        (tmp_path / kind).write_text(text)
        text = str(tmp_path / kind)
    monkeypatch.setenv("NNSLIM_TRAINING", text)
    made = {name: settings_in_force(name) for name in KINDS}
    assert {settings.epochs for settings in made.values()} == {7}
    assert (made["sauron"].sauron.strength, made["sauron"].sauron.epochs) == (0.25, 7)
    assert (made["token_sparse"].token_sparse.ratio, made["token_sparse"].token_sparse.recipe.epochs) == (0.9, 7)
    assert (made["daeformer"].daeformer.form, made["daeformer"].learning_rate) == ("128", 0.05)
    assert (made["window"].window.encoder, made["window"].window.options) == ("beit", {"embed_dim": 24})


def test_shared_keys_and_sections_agree():
    settings = TrainingSettings(sauron=SauronConfig(learning_rate=0.5, seed=3), batch_size=4).for_kind("sauron")
    assert (settings.learning_rate, settings.seed, settings.sauron.batch_size) == (0.5, 3, 4)
    published = read_settings("{token_sparse: token-sparse-brats}").for_kind("token_sparse").token_sparse.recipe
    assert published.rate_per_256 is not None
    own = read_settings("{token_sparse: token-sparse-brats, learning_rate: 1e-3}").for_kind("token_sparse")
    assert (own.learning_rate, own.token_sparse.recipe.rate_per_256) == (1e-3, None)


@pytest.mark.parametrize(
    ("variable", "text", "kind", "expected"),
    [
        ("NNSLIM_SAURON", "sauron", "sauron", {"strength": 0.5}),
        ("NNSLIM_SAURON", '{"strength": 0.125, "min_filters": 2}', "sauron", {"strength": 0.125, "min_filters": 2}),
        ("NNSLIM_TOKEN_SPARSE", "token-sparse-brats", "token_sparse", {"ratio": 0.75}),
        ("NNSLIM_DAEFORMER", "64-dense", "daeformer", {"form": "64-dense"}),
        ("NNSLIM_WINDOW", "{encoder: swin, depth: 7}", "window", {"encoder": "swin", "depth": 7}),
    ],
)
def test_former_variables_are_read_and_give_way_to_the_new_one(variable, text, kind, expected, monkeypatch):
    monkeypatch.setenv(variable, text)
    section = getattr(settings_in_force(kind), kind)
    assert {key: getattr(section, key) for key in expected} == expected
    monkeypatch.setenv("NNSLIM_TRAINING", f"{kind}: {{}}")
    assert getattr(settings_in_force(kind), kind) == KINDS[kind]()


def test_without_a_variable_the_defaults_are_in_force():
    assert settings_in_force("window").window == WindowConfig()
    assert settings_in_force("sauron").sauron == SauronConfig()
    assert settings_in_force("daeformer").epochs == 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{epoch: 3}", "NNSLIM_TRAINING: unknown key 'epoch'; nearest: epochs"),
        ("{sauron: {strenght: 1}}", "NNSLIM_TRAINING: sauron: unknown key 'strenght'; nearest: strength"),
        ("{window: {encoder: resnet}}", "NNSLIM_TRAINING: window: encoder: Input should be"),
        ("{daeformer: 3}", "NNSLIM_TRAINING: daeformer: expected a YAML file, a preset, or keys and values, found 3"),
        ("{epochs: 0}", "NNSLIM_TRAINING: epochs: Input should be greater than or equal to 1, found 0"),
        ("{device: cuda}", "'device' is not read here; it is an option of the command that trains"),
        ("[1, 2]", "expected a YAML file, a preset, or keys and values"),
        ("token-sparse-btvc", "found 'token-sparse-btvc'; nearest: token-sparse-btcv"),
        ("tucker-balanced", "NNSLIM_TRAINING: that configuration has no method of sauron"),
        ("{encoder: ", "not readable YAML"),
        ("none.yml", "not readable YAML"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ConfigError) as error:
        read_settings(text)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["sauron", "token_sparse"])
def test_section_that_names_a_configuration_of_another_method_is_refused(kind):
    with pytest.raises(ConfigError, match=f"that configuration has no method {kind}"):
        read_section(kind, "tucker-balanced", "NNSLIM_X = 'tucker-balanced'")


def test_batches_of_a_group_step_as_one_and_an_overflow_is_left_out():
    layer = nn.Linear(3, 1)
    batches = [torch.randn(4, 3) for _ in range(3)]
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    steps = OptimizerSteps(optimizer, accumulate=2)
    before = layer.weight.detach().clone()

    def show(batch, factor=1.0):
        optimizer.zero_grad()
        (factor * layer(batch).square().mean()).backward()
        optimizer.step()

    layer(torch.cat(batches[:2])).square().mean().backward()
    wanted = before - 0.5 * layer.weight.grad
    show(batches[0])
    show(batches[1], float("inf"))
    assert torch.equal(layer.weight, before) and steps.taken == 0
    show(batches[1])
    assert_close(layer.weight.detach(), wanted)
    show(batches[2])
    steps.finish()
    steps.finish()  # nothing waits
    assert steps.taken == 2 and not torch.equal(layer.weight, wanted)
    assert read_settings("{accumulate: 2, warmup_steps: 20, gradient_clip: 1}").for_kind("window").accumulate == 2

"""The published token-sparse UNETR: its counts to the digit, and its original's defects."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnslim.errors import ConfigError, SpecError
from nnslim.methods.token_sparse.completion import sincos_3d
from nnslim.methods.token_sparse.reduction import TokenReduction, merge_steps, set_ratio
from nnslim.methods.token_sparse.sequence import Sequence3d, TopK, keep_count
from nnslim.methods.token_sparse.unetr import TokenSparseUNETR, published_unetr
from nnslim.network.operations import count_operations

SHAPES = {"btcv": (1, 1, 96, 96, 96), "brats": (1, 4, 128, 128, 128)}


def counted(name, **changes):
    with torch.device("meta"):
        network = published_unetr(name, **changes)
    return count_operations(network, SHAPES[name])


def tiny(**changes):
    torch.manual_seed(0)
    settings = {"dim": 24, "depth": 10, "heads": 2, "features": 4, "locations": (2, 4, 6), "ratios": 0.5, **changes}
    return TokenSparseUNETR(1, 3, (32, 32, 32), **settings).eval()


@pytest.mark.parametrize(
    ("name", "changes", "profile", "true"),
    [
        ("btcv", {}, 146_626_752_852, 131_800_975_296),
        ("btcv", {"locations": ()}, 273_450_922_896, 258_321_696_768),
        ("btcv", {"ratios": 0.0}, 273_450_922_896, 258_321_696_768),
        ("btcv", {"locations": (), "decoder": "x8"}, 268_751_039_376, 250_847_447_040),
        ("btcv", {"locations": (), "decoder": "x16"}, 83_435_377_296, 73_317_206_016),
        ("brats", {}, 439_421_291_298, 403_770_641_920),
        ("brats", {"decoder": "x8"}, 428_280_826_658, 386_053_901_824),
        ("brats", {"locations": ()}, 835_519_550_352, 798_261_004_288),
        ("brats", {"locations": (), "decoder": "x8"}, 824_379_085_712, 780_544_264_192),
        ("brats", {"locations": (), "decoder": "x16"}, 207_752_844_176, 183_747_233_792),
    ],
)
def test_published_macs_are_met_to_the_digit(name, changes, profile, true):
    cost = counted(name, **changes)
    assert (cost.macs("torchprofile"), cost.macs("torch")) == (profile, true)


@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("btcv", {}, 107_578_226),
        ("btcv", {"locations": ()}, 93_313_966),
        ("btcv", {"locations": (), "decoder": "x8"}, 88_300_462),
        ("btcv", {"locations": (), "decoder": "x16"}, 92_819_374),
        ("brats", {}, 112_398_647),
        ("brats", {"locations": ()}, 96_313_395),
    ],
)
def test_published_parameters_are_met_to_the_digit(name, changes, parameters):
    assert counted(name, **changes).parameters == parameters


def test_published_parameters_of_the_parts():
    with torch.device("meta"):
        network = published_unetr("btcv")

    def count(module, trainable=False):
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)

    assert count(network, trainable=True) == 106_248_625
    assert count(network.encoder) == 89_669_572
    assert count(network.encoder.reduction) == 2_884_611 == 3 * 961_537
    assert count(network.completion) == 11_373_312
    assert count(network.decoder) == 6_535_342


def test_published_table_per_module_and_operation():
    """The breakdown of the sheet, in 1e6 MACs of the torchprofile convention, true MACs where they differ."""
    cost = counted("btcv")
    expected = {
        "encoder.patch_embed": 679.5,
        "encoder.blocks.0": 16_867.98,
        "encoder.reduction.scorers.0": 1_657.9,
        "encoder.blocks.3": 1_271.07,
        "encoder.reduction.scorers.1": 165.0,
        "encoder.blocks.6": 127.93,
        "encoder.reduction.scorers.2": 16.3,
        "encoder.blocks.9": 14.165,
        "encoder": 57_363.46,
        "completion": 18_908.92,
        "decoder.encoder1": 6_511.7,
        "decoder.encoder2": 9_739.2,
        "decoder.encoder3": 5_435.8,
        "decoder.encoder4": 5_520.8,
        "decoder.decoder5": 3_708.8,
        "decoder.decoder4": 5_605.7,
        "decoder.decoder3": 11_211.4,
        "decoder.decoder2": 22_422.7,
        "decoder.out": 198.2,
        "decoder": 70_354.37,
    }
    assert {name: cost.macs("torchprofile", name) / 1e6 for name in expected} == {
        name: pytest.approx(value, abs=0.06) for name, value in expected.items()
    }
    true = {"encoder": 57_243.09, "completion": 18_869.06, "decoder": 55_688.82, "decoder.decoder2": 19_251.9}
    assert {name: cost.macs("torch", name) / 1e6 for name in true} == {
        name: pytest.approx(value, abs=0.06) for name, value in true.items()
    }
    assert cost.by_operation("torchprofile") == {
        "conv": 71_033_683_968,
        "linear": 56_926_125_504,
        "matmul": 18_506_549_760,
        "mul": 144_586_260,
        "layer_norm": 15_640_320,
        "avg_pool": 165_888,
        "mean": 1_152,
    }


@pytest.mark.parametrize(
    ("name", "ratio", "giga"),
    [
        ("btcv", 0.25, 222.780),
        ("btcv", 0.5, 180.189),
        ("btcv", 0.75, 155.759),
        ("brats", 0.25, 642.890),
        ("brats", 0.5, 509.107),
        ("brats", 0.9, 415.263),
    ],
)
def test_published_ratio_sweep(name, ratio, giga):
    assert counted(name, ratios=ratio).macs("torchprofile") / 1e9 == pytest.approx(giga, abs=6e-4)


def test_published_completion_of_the_yaml():
    cost = counted("btcv", completion_dim=384, completion_depth=3, completion_heads=8)
    assert cost.macs("torchprofile") / 1e9 == pytest.approx(144.880, abs=6e-4)


def test_counter_agrees_with_torchs_on_a_real_pass():
    network = tiny()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        network(torch.zeros(2, 1, 32, 32, 32))
    assert count_operations(network, (2, 1, 32, 32, 32)).macs() == flops.get_total_flops() // 2


def test_counter_refuses_a_size_that_does_not_divide():
    with pytest.raises((SpecError, ConfigError), match="does not divide into patches of 8"):
        count_operations(tiny(), (1, 1, 30, 32, 32))


@pytest.mark.parametrize(
    ("length", "ratio", "kept"),
    [(1728, 0.9, 172), (172, 0.9, 17), (17, 0.9, 1), (1000, 0.9, 99), (4096, 0.75, 1024), (5, 0.9, 1), (7, 0.0, 7)],
)
def test_keep_count_is_the_originals_but_never_none(length, ratio, kept):
    assert keep_count(length, ratio) == kept


def test_topk_training_gives_exact_ones_and_the_gradient_of_the_soft_choice():
    scores = torch.randn(2, 9, requires_grad=True)
    split = TopK(tau=0.7, noise=False).train()(scores, 4)
    assert torch.equal(split.policy.squeeze(-1).sum(1), torch.full((2,), 4.0))
    assert set(split.policy.flatten().tolist()) == {0.0, 1.0}
    values = torch.randn(2, 9)
    (gradient,) = torch.autograd.grad((split.policy.squeeze(-1) * values).sum(), scores)
    (expected,) = torch.autograd.grad((torch.softmax(scores / 0.7, 1) * values).sum(), scores)
    assert torch.allclose(gradient, expected)


def test_topk_noise_changes_training_only():
    scores = -1e-3 * torch.arange(64.0)[None]  # far less than the noise; no ties, whose order torch leaves open
    topk = TopK().train()
    torch.manual_seed(0)
    assert not torch.equal(topk(scores, 8).kept, topk(scores, 8).kept)
    assert topk.eval()(scores, 8).kept.tolist() == [list(range(8))]


def test_topk_parts_are_a_partition_in_raster_order():
    split = TopK().eval()(torch.randn(3, 20), 6)
    for kept, dropped in zip(split.kept.tolist(), split.dropped.tolist(), strict=True):
        assert kept == sorted(kept)
        assert dropped == sorted(dropped)
        assert sorted(kept + dropped) == list(range(20))


@pytest.mark.parametrize("decoder", ["x8", "x8v2", "x16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"completion": "fusion_v2"},
        {"completion": "mask", "completion_dim": 36, "completion_heads": 3},
        {"completion": None},
        {"completion_dim": 36, "completion_depth": 2, "completion_heads": 3},
        {"scorer": "att"},
        {"shared": True},
        {"mode": "merge"},
        {"patch_embed": "conv2p1d"},
        {"skips": "blocks"},
        {"noise": False, "drop_path": 0.2},
    ],
    ids=lambda changes: "-".join(f"{key}_{value}" for key, value in changes.items()) or "default",
)
def test_every_variant_is_built_runs_and_learns(decoder, changes):
    network = tiny(decoder=decoder, **changes).train()
    network(torch.randn(2, 1, 32, 32, 32)).square().mean().backward()
    without = {name for name, p in network.named_parameters() if p.requires_grad and p.grad is None}
    # the masked baseline does not look at what was dropped; merging and "last" have their norms only
    assert not {name for name in without if "scorers" not in name and "stage_norms" not in name}
    if changes.get("mode") != "merge" and changes.get("completion") != "mask":
        assert not without
        assert all(p.grad.abs().sum() > 0 for name, p in network.named_parameters() if "scorers" in name)


def test_ratio_zero_is_the_dense_network_and_can_be_set_at_any_time():
    sparse, dense = tiny(), tiny(locations=())
    dense.load_state_dict(sparse.state_dict(), strict=False)
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        before = sparse(image)
        assert set_ratio(sparse, 0) == 1
        assert torch.equal(sparse(image), dense(image))
        set_ratio(sparse, (0.5, 0.0, 0.75))  # a stage may rest
        assert sparse(image).shape == before.shape
        set_ratio(sparse, 0.5)
        assert torch.equal(sparse(image), before)


def test_ratio_high_on_a_small_grid_keeps_one_token_and_warns(caplog):
    network = tiny(ratios=0.95)
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32, 32)).isfinite().all()
    with caplog.at_level(logging.WARNING, "nnslim"):
        assert network.encoder.reduction.kept_counts(64) == [3, 1, 1]
    assert "only 1 token(s) reach the last blocks" in caplog.text


@pytest.mark.parametrize("ratios", [1.0, -0.1, (0.5, 0.5)])
def test_ratio_out_of_bounds_is_refused(ratios):
    with pytest.raises(ConfigError, match="ratios are 3 numbers"):
        tiny().encoder.reduction.set_ratio(ratios)


@pytest.mark.parametrize("locations", [(4, 2), (2, 2), (-1, 3)])
def test_locations_out_of_order_are_refused(locations):
    with pytest.raises(ConfigError, match="ascending"):
        TokenReduction(8, locations, (0.5, 0.5))


@pytest.mark.parametrize("size", [(48, 32, 64), (64, 32, 32)])
def test_any_size_divisible_by_the_patch_runs(size):
    network = tiny()
    with torch.no_grad():
        assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)


def test_decoder_x8v2_names_the_size_that_it_cannot_halve():
    with pytest.raises(ConfigError, match="divisible by 16"):
        tiny()(torch.zeros(1, 1, 40, 32, 32))


def test_dropped_tokens_come_back_to_where_they_were():
    """With completion by last values and blocks that do nothing, the sequence is the embedding again."""
    network = tiny(completion="last")
    network.encoder.blocks = nn.ModuleList(nn.Identity() for _ in network.encoder.blocks)
    seen = []
    network.decoder.forward = lambda image, last, hidden: seen.append(last) or last
    image = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        network(image)
        set_ratio(network, 0)
        network(image)
    assert torch.allclose(seen[0], seen[1], atol=1e-5)


def test_merged_tokens_are_means_of_similar_ones_and_come_back():
    torch.manual_seed(0)
    centres = torch.randn(4, 16)
    members = torch.randint(4, (2, 40))
    x = torch.cat((torch.zeros(2, 1, 16), centres[members] + 1e-3 * torch.randn(2, 40, 16)), dim=1)
    now = merge_steps(Sequence3d(x.clone(), 40, prefix=1), 10)
    assert now.length == 10
    assert torch.equal(now.sizes.sum(1), torch.full((2, 1), 40.0))
    assert torch.allclose((now.x[:, 1:] * now.sizes).sum(1), x[:, 1:].sum(1), atol=1e-4)  # nothing is lost
    assert torch.allclose(now.last_values(), x, atol=1e-2)  # four kinds of token in ten places


def test_sincos_is_the_published_formula():
    table = sincos_3d((2, 3, 4), 12, prefix=1)
    assert table.shape == (1, 25, 12)
    assert not table[0, 0].any()
    h, w, d, omega = 1, 2, 3, 10000**-0.5
    row = table[0, 1 + (h * 3 + w) * 4 + d]
    waves = [f(torch.tensor([x, x * omega])) for x in (h, w, d) for f in (torch.sin, torch.cos)]
    assert torch.allclose(row, torch.cat(waves), atol=1e-6)


def test_same_parameters_are_spared_weight_decay_dense_and_sparse():
    assert (
        tiny().encoder.no_weight_decay() == tiny(locations=()).encoder.no_weight_decay() == {"pos_embed", "cls_token"}
    )


@pytest.mark.parametrize("mode", ["drop", "merge"])
def test_export_has_static_shapes_and_openvino_agrees(mode):
    import openvino

    network = tiny(mode=mode)
    image = torch.randn(1, 1, 32, 32, 32)
    program = torch.export.export(network, (image,))
    with torch.no_grad():
        expected = network(image)
    assert torch.allclose(program.module()(image), expected, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer warns of every size that it takes for a constant
        # OpenVINO crashes on merging by way of torch.export, not on torch's tracer, which nnslim uses
        model = (
            openvino.convert_model(program) if mode == "drop" else openvino.convert_model(network, example_input=image)
        )
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(image.numpy())[0])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_onnx_file_agrees(tmp_path):
    import onnxruntime

    network, image = tiny(), torch.randn(1, 1, 32, 32, 32)
    torch.onnx.export(network, (image,), str(tmp_path / "net.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = network(image)
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4 * expected.abs().max()

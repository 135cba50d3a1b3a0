"""The window network: encoders of timm and torchvision from 2D weights, decoders, sizes, published figures."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.swin_transformer import SwinTransformer

from nnslim.errors import ConfigError, InputError
from nnslim.inflation import (
    DECODERS,
    ENCODERS,
    VideoSwin,
    WindowConfig,
    WindowNet,
    load_encoder,
    make_decoder,
    make_encoder,
    read_weights,
    videoswin_names,
)
from nnslim.network.operations import count_operations

VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2}
OPTIONS = {
    **dict.fromkeys(("vit", "dino", "dinov2", "beit"), VIT),
    "swin": {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)},
    "videoswin": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]},
}
FLAT = [name for name in ENCODERS if name != "videoswin"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def window_net(encoder, decoder="setrpup", *, channels=1, size=(32, 32), depth=5, **more):
    kwargs = {"size": size, "encoder": encoder, "decoder": decoder, "options": OPTIONS[encoder], "width": 8}
    return WindowNet(channels, 3, depth=depth, **kwargs, **more).eval()


def trained(module):
    """Give every tensor a value of its own, as training would."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def flat_network(encoder, size=32):
    grid = {"strict_img_size": False, "always_partition": True} if encoder == "swin" else {}
    made = timm.create_model(ENCODERS[encoder], img_size=size, num_classes=0, **OPTIONS[encoder], **grid)
    return trained(made).eval()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_combination_predicts_every_slice_at_any_size_and_learns_everywhere(encoder, decoder):
    network = window_net(encoder, decoder, channels=2, size=(32, 48)).train()
    logits = network(torch.randn(2, 2, 2, 32, 48))
    assert logits.shape == (2, 3, 2, 32, 48)
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert network.eval()(torch.randn(1, 2, 3, 29, 37)).shape == (1, 3, 3, 29, 37)


@pytest.mark.parametrize("encoder", FLAT)
@pytest.mark.parametrize("mode", ["center", "average"])
def test_encoder_from_2d_weights_is_the_2d_network_on_centre_or_mean_slice(encoder, mode):
    size = 28 if encoder == "dinov2" else 32
    flat = flat_network(encoder, size)
    network = window_net(encoder, size=(size, size))
    assert load_encoder(network.encoder, flat.state_dict(), mode) == []
    window = torch.randn(2, 1, 5, size, size)
    image = (window[:, :, 2] if mode == "center" else window.mean(2)).expand(-1, 3, -1, -1)
    with torch.no_grad():
        maps = network.encoder(window)
        expected = flat.forward_intermediates(image, indices=network.encoder.taken, intermediates_only=True)
    assert len(maps) == len(expected)
    for got, wanted in zip(maps, expected, strict=True):
        assert_close(got, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("encoder", ["dinov2", "swin"])
def test_volume_at_once_equals_window_by_window_with_repeated_ends(encoder):
    """The embedding shared by all windows, and slices in parts, change nothing."""
    network = trained(window_net(encoder))
    volume = torch.randn(2, 1, 4, 28, 28)
    with torch.no_grad():
        everything = network(volume)
        network.slices_at_once = 2
        assert_close(network(volume), everything, atol=1e-5, rtol=1e-4)
        for number in range(4):
            rows = [min(max(number + step, 0), 3) for step in range(-2, 3)]
            maps = network.encoder(volume[:, :, rows])
            assert_close(network.decoder(maps, (28, 28)), everything[:, :, number], atol=1e-5, rtol=1e-4)


def test_center_ignores_neighbours_and_depth_one_is_the_2d_baseline():
    flat = flat_network("dinov2")
    deep, one = window_net("dinov2"), window_net("dinov2", depth=1)
    for network in (deep, one):
        load_encoder(network.encoder, flat.state_dict(), "center")
    one.decoder.load_state_dict(deep.decoder.state_dict())
    volume = torch.randn(1, 1, 6, 32, 32)
    with torch.no_grad():
        assert_close(deep(volume), one(volume), atol=1e-5, rtol=1e-4)
        load_encoder(deep.encoder, flat.state_dict(), "average")
        assert not torch.allclose(deep(volume), one(volume), atol=1e-2)


def test_size_no_multiple_of_the_patch_is_filled_with_its_border_and_cut_back():
    network = trained(window_net("vit"))
    volume = torch.randn(1, 1, 2, 30, 25)
    filled = torch.nn.functional.pad(volume, (0, 7, 0, 2, 0, 0), mode="replicate")
    with torch.no_grad():
        assert_close(network(volume), network(filled)[..., :30, :25], atol=1e-5, rtol=1e-4)


def test_upsampled_slices_come_back_at_their_size():
    network = window_net("vit", upsample=2.0, size=(16, 20))
    assert network.encoder.grid == (2, 3)
    assert network(torch.randn(1, 1, 2, 16, 20)).shape == (1, 3, 2, 16, 20)


def test_beit_takes_smaller_slices_and_refuses_larger_ones():
    network = window_net("beit", size=(32, 32))
    assert network(torch.randn(1, 1, 1, 20, 16)).shape[3:] == (20, 16)
    with pytest.raises(InputError, match=r"built for slices of \(32, 32\) pixels got \(48, 32\)"):
        network(torch.randn(1, 1, 1, 40, 32))


def test_other_grids_resize_positions_tables_and_a_shared_table():
    flat = flat_network("dinov2", 70)
    network = window_net("dinov2", size=(28, 42))
    load_encoder(network.encoder, flat.state_dict())
    assert network.encoder.trunk.pos_embed.shape == (1, 1 + 2 * 3, 24)
    weights = flat_network("beit", 64).state_dict()
    table = weights["blocks.0.attn.relative_position_bias_table"]
    for key in [key for key in weights if key.endswith("relative_position_bias_table")]:
        del weights[key]
    network = window_net("beit", size=(32, 32))
    load_encoder(network.encoder, {**weights, "rel_pos_bias.relative_position_bias_table": table})
    tables = [block.attn.relative_position_bias_table for block in network.encoder.trunk.blocks]
    assert all(torch.equal(each, tables[0]) for each in tables)
    assert tables[0].shape == (3 * 3 + 3, 2) and torch.equal(tables[0][-3:], table[-3:])


@pytest.mark.parametrize("encoder", FLAT)
@pytest.mark.parametrize("size", [(16, 16), (16, 40), (32, 24)])
def test_weights_of_a_usual_size_load_for_slices_of_a_token_or_two(encoder, size):
    network = window_net(encoder, size=size)
    load_encoder(network.encoder, flat_network(encoder, 224).state_dict())
    with torch.no_grad():
        logits = network(torch.randn(1, 1, 2, *size))
    assert logits.shape == (1, 3, 2, *size) and bool(logits.isfinite().all())


def test_names_of_the_published_programs_are_known_and_plans_hold_ours():
    ours = {"beit": "beit", "dino": "dino", "vit": "vit", "swint": "swin", "swint3d": "videoswin"}
    ours["videoswint"] = "videoswin"
    for name, wanted in ours.items():
        config = WindowConfig(encoder=name, decoder="upernet-swint", mode="centering")
        assert (config.encoder, config.decoder, config.mode) == (wanted, "upernet", "center")
        made = window_net(wanted)  # its options are kept under our name
        again = WindowNet(1, 3, size=(32, 32), encoder=name, decoder="setrpup", options=OPTIONS[wanted], width=8)
        assert made.state_dict().keys() == again.state_dict().keys()
    assert WindowConfig(mode="inflation").mode == "average"


def test_swin_weights_under_the_names_of_its_repository_are_the_same():
    flat = flat_network("swin").state_dict()
    official = {key.replace("layers.1.downsample", "layers.0.downsample"): value for key, value in flat.items()}
    assert official.keys() != flat.keys()
    first, second = window_net("swin").encoder, window_net("swin").encoder
    load_encoder(first, flat)
    load_encoder(second, official)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


# VideoSwin


def swin_2d(**more):
    settings = {"patch_size": [4, 4], "window_size": [7, 7], "num_classes": 1, "stochastic_depth_prob": 0.0}
    return trained(SwinTransformer(**settings, embed_dim=8, depths=[1, 2], num_heads=[1, 2], **more)).eval()


@pytest.mark.parametrize("size", [56, 32])
def test_videoswin_from_2d_weights_is_the_2d_swin_on_equal_slices(size):
    """Averaged over the patch's depth, bias the same for every offset along depth; also on maps below a window."""
    flat = swin_2d()
    video = VideoSwin(1, 5, options=OPTIONS["videoswin"]).eval()
    assert all(name.startswith("norms.") for name in load_encoder(video, flat.state_dict()))
    # 6 slices, so that no layer of tokens holds padding; the block of a window then sees equal tokens only.
    image = torch.randn(1, 1, size, size)
    with torch.no_grad():
        maps = video.encode(image.unsqueeze(2).expand(-1, -1, 6, -1, -1))
        expected, tokens = [], image.expand(-1, 3, -1, -1)
        for number, stage in enumerate(flat.features):
            tokens = stage(tokens)
            if number % 2:
                expected.append(video.norms[number // 2](tokens).permute(0, 3, 1, 2))
    for got, wanted in zip(maps, expected, strict=True):
        if size == 56 or got.shape[2] >= 7:
            assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert torch.isfinite(got).all()
    table = video.trunk.features[0][0].attn.relative_position_bias_table
    assert table.shape == (15 * 169, 1)
    assert torch.equal(table[:169], table[-169:])


def test_videoswin_bias_of_a_map_below_a_window_is_that_of_its_offsets():
    attention = trained(VideoSwin(1, 5, options=OPTIONS["videoswin"]).trunk.features[0][0].attn)
    small = attention.get_relative_position_bias([1, 2, 2])[0, 0]
    table = attention.relative_position_bias_table.reshape(15, 13, 13)
    for one, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        for two, (row_2, column_2) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            assert small[one, two] == table[7, row - row_2 + 6, column - column_2 + 6]


def published_names(state):
    """Write torchvision's names as the Video Swin repository does."""
    made = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "features":
            stage, merging = divmod(int(parts[1]), 2)
            parts = ["layers", str(stage), "downsample" if merging else "blocks", *parts[2:]]
        name = "backbone." + ".".join(parts).replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        made[name] = value
    return {**made, "cls_head.fc_cls.weight": torch.zeros(4, 16), "backbone.norm.weight": torch.ones(16)}


def test_videoswin_published_file_loads_with_its_names_and_rgb_summed(tmp_path):
    source = trained(VideoSwin(3, 5, options=OPTIONS["videoswin"]))
    names = published_names(source.trunk.state_dict())
    assert "backbone.layers.0.downsample.reduction.weight" in names
    assert "backbone.layers.1.blocks.1.mlp.fc2.bias" in names
    torch.save({"state_dict": names, "meta": {"epoch": 30}}, tmp_path / "videoswin.pth")
    video = VideoSwin(1, 5, options=OPTIONS["videoswin"])
    load_encoder(video, read_weights(tmp_path / "videoswin.pth"))
    grey = torch.randn(1, 1, 5, 32, 32)
    source.norms.load_state_dict(video.norms.state_dict())
    with torch.no_grad():
        for got, wanted in zip(video.eval()(grey), source.eval()(grey.expand(-1, 3, -1, -1, -1)), strict=True):
            assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_videoswin_names_of_timm_and_of_torchvision_agree():
    timm_names = timm.create_model(ENCODERS["swin"], img_size=56, num_classes=0, **OPTIONS["swin"]).state_dict()
    theirs, ours = videoswin_names(timm_names), videoswin_names(swin_2d().state_dict())
    assert set(theirs) == set(ours)
    assert all(theirs[key].shape == ours[key].shape for key in ours)


# Files


def test_read_weights_unwraps_what_training_scripts_wrap(tmp_path):
    weights = flat_network("dino").state_dict()
    for number, wrapped in enumerate(
        (
            weights,
            {"model": weights, "epoch": 1},
            {"teacher": {f"module.backbone.{key}": value for key, value in weights.items()}},
            {"state_dict": {f"encoder.{key}": value for key, value in weights.items()}},
        )
    ):
        torch.save(wrapped, tmp_path / f"{number}.pth")
        assert set(read_weights(tmp_path / f"{number}.pth")) == set(weights)
    pytest.importorskip("safetensors.torch").save_file(weights, tmp_path / "a.safetensors")
    assert torch.equal(read_weights(tmp_path / "a.safetensors")["pos_embed"], weights["pos_embed"])


def test_weight_files_that_cannot_be_used_are_said(tmp_path):
    with pytest.raises(InputError, match=r"no weight file .*missing.pth"):
        read_weights(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match=r"text.pth is not a readable weight file"):
        read_weights(tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(InputError, match="holds no tensors; keys found: epoch"):
        read_weights(tmp_path / "empty.pth")
    with pytest.raises(ConfigError, match=r"not of this VisionTransformer: .* tensors are missing"):
        weights = flat_network("dino").state_dict()
        load_encoder(window_net("dino").encoder, {k: v for k, v in weights.items() if "blocks.3" not in k})
    with pytest.raises(ConfigError, match=r"0 tensors are missing, .* have no place: blocks.3"):
        shallow = WindowNet(1, 3, size=(32, 32), encoder="dino", decoder="setrpup", options={**VIT, "depth": 3})
        load_encoder(shallow.encoder, weights)
    with pytest.raises(InputError, match=r"timm cannot fetch 'no_such_network'"):
        read_weights("timm:no_such_network")
    with pytest.raises(ConfigError, match="no 2D patch embedding"):
        load_encoder(window_net("dino").encoder, {})
    with pytest.raises(ConfigError, match=r"the file has the shape .* the encoder wants"):
        load_encoder(
            window_net("dino").encoder, flat_network("dinov2").state_dict() | {"cls_token": torch.zeros(1, 1, 9)}
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_encoder("resnet", 1, 5, (32, 32)), "no encoder 'resnet'"),
        (lambda: make_encoder("vit", 1, 5, (32, 32), model="vit_base_patch16_nothing"), "has no network"),
        (lambda: make_encoder("vit", 1, 5, (32, 32), options={"flavour": 1}), "timm cannot make"),
        (
            lambda: make_encoder("vit", 1, 5, (32, 32), model="convnext_tiny", options={"patch_size": 4}),
            "timm cannot make",
        ),
        (lambda: make_encoder("videoswin", 1, 5, (32, 32), model="swin3d_x"), "known: swin3d_t, swin3d_s, swin3d_b"),
        (lambda: make_decoder("unetr", [8], [4], 2), "no decoder 'unetr'; nearest: upernet"),
        (lambda: window_net("vit", depth=4), "depth is odd; found 4"),
        (lambda: window_net("vit")(torch.zeros(1, 1, 32, 32)), r"expected volumes \(B, C, D, H, W\)"),
    ],
)
def test_what_cannot_be_built_is_said(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


# Published figures


def published_encoder(depth):
    with torch.device("meta"):
        encoder = make_encoder("beit", 1, depth, (512, 512))
    for block in encoder.trunk.blocks:
        block.attn.fused_attn = False  # the published count is of attention that scales the queries, not the products
    return encoder


def test_encoder_flops_and_parameters_are_the_published_ones():
    flat, deep = published_encoder(1), published_encoder(5)
    counts = [
        count_operations(flat, (1, 1, 1, 512, 512)),
        count_operations(deep, (1, 1, 5, 512, 512)),
    ]
    assert [2 * count.macs("torchprofile") for count in counts] == [213_343_401_984, 214_954_014_720]
    assert [count.parameters for count in counts] == [85_833_792, 86_620_224]
    assert deep.trunk.blocks[0].attn.relative_position_bias_table.shape == (3972, 12)


def test_upernet_has_the_published_parameters_and_the_decoder_dominates():
    with torch.device("meta"):
        decoder = make_decoder("upernet", [768] * 4, [16] * 4, 14)
    assert sum(p.numel() for p in decoder.parameters()) == 74_940_686  # 74.94 M

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = published_encoder(5), decoder

        def forward(self, volume):
            return self.decoder(self.encoder(volume), (512, 512))

    counted = count_operations(Whole(), (1, 1, 5, 512, 512))
    assert counted.macs("torchprofile", "decoder") > 4 * counted.macs("torchprofile", "encoder")
    assert counted.macs("torchprofile") == pytest.approx(647.5e9, rel=5e-3)

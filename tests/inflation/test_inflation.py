"""2D kernels, position tables and U-Nets in 3D: each inflated network against the 2D one that it came from."""

from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import nnslim.inflation as inflation
from nnslim.errors import ConfigError
from nnslim.inflation import (
    adapt_channels,
    inflate_conv,
    inflate_patch_embedding,
    inflate_positions,
    inflate_transposed_conv,
    inflate_unet,
    resize_beit_table,
    resize_positions,
    resize_swin_table,
    tile_table,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_every_public_name_is_there():
    assert all(callable(getattr(inflation, name)) or name.isupper() for name in inflation.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = inflation.nothing


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_center_is_the_2d_net_on_the_centre_slice_average_on_the_mean_slice(depth, stride):
    kernel, volume = torch.randn(6, 4, 3, 3), torch.randn(2, 4, depth, 9, 8)
    options = {"stride": (1, stride, stride), "padding": (0, 1, 1)}
    flat = {"stride": stride, "padding": 1}
    center = functional.conv3d(volume, inflate_conv(kernel, depth, "center"), **options)[:, :, 0]
    assert_close(center, functional.conv2d(volume[:, :, depth // 2], kernel, **flat), **CLOSE)
    average = functional.conv3d(volume, inflate_conv(kernel, depth, "average"), **options)[:, :, 0]
    assert_close(average, functional.conv2d(volume.mean(2), kernel, **flat), **CLOSE)


def test_conv_repeat_scales_equal_slices_by_the_depth_and_depth_one_is_the_kernel_itself():
    kernel = torch.randn(2, 3, 3, 3)
    assert_close(inflate_conv(kernel, 4, "repeat").sum(2), 4 * kernel)
    for mode in ("center", "average", "repeat"):
        assert torch.equal(inflate_conv(kernel, 1, mode)[:, :, 0], kernel)


@pytest.mark.parametrize("depth", [1, 2])
def test_transposed_conv_keeps_equal_slices_equal(depth):
    kernel, flat = torch.randn(4, 3, 2, 2), torch.randn(1, 4, 5, 6)
    made = functional.conv_transpose3d(
        flat.unsqueeze(2).expand(-1, -1, 3, -1, -1), inflate_transposed_conv(kernel, depth), stride=(depth, 2, 2)
    )
    expected = functional.conv_transpose2d(flat, kernel, stride=2)
    assert made.shape[2] == 3 * depth
    for slice_ in made.unbind(2):
        assert_close(slice_, expected, **CLOSE)


def test_patch_embedding_grey_as_rgb_equals_summed_channels_and_equal_channels_equal_one():
    kernel, grey = torch.randn(8, 3, 4, 4), torch.randn(1, 1, 12, 12)
    one = adapt_channels(kernel, 1)
    expected = functional.conv2d(grey.expand(-1, 3, -1, -1), kernel, stride=4)
    assert_close(functional.conv2d(grey, one, stride=4), expected, **CLOSE)
    for mode in ("center", "average"):
        four = inflate_patch_embedding(kernel, 5, 4, mode)
        assert four.shape == (8, 4, 5, 4, 4)
        volume = torch.randn(1, 1, 5, 12, 12)
        single = functional.conv3d(volume, inflate_patch_embedding(kernel, 5, 1, mode), stride=(5, 4, 4))
        assert_close(functional.conv3d(volume.expand(-1, 4, -1, -1, -1), four, stride=(5, 4, 4)), single, **CLOSE)


def test_patch_embedding_resized_keeps_its_answer_to_a_constant_image():
    kernel = torch.randn(8, 3, 16, 16)
    made = inflate_patch_embedding(kernel.mean((2, 3), keepdim=True).expand(-1, -1, 16, 16), 2, 1, "average", (8, 8))
    assert made.shape == (8, 1, 2, 8, 8)
    assert_close(made.sum((1, 2, 3, 4)), kernel.sum((1, 2, 3)), atol=1e-3, rtol=1e-4)


def test_the_published_difference_of_flops_is_that_of_the_patch_embedding():
    def flops(depth):
        return 2 * 768 * depth * 16 * 16 * 1024

    assert flops(5) - flops(1) == 2 * 4 * 16 * 16 * 768 * 1024 == 214_954_014_720 - 213_343_401_984


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inflate_conv(torch.zeros(1, 1, 3, 3, 3), 3), "expected a 2D kernel"),
        (lambda: inflate_conv(torch.zeros(1, 1, 3, 3), 0), "depth must be at least 1"),
        (lambda: inflate_conv(torch.zeros(1, 1, 3, 3), 3, "middle"), "mode 'middle' is not one of center"),
        (lambda: adapt_channels(torch.zeros(1, 1, 3, 3), 0), "at least one input channel"),
        (lambda: inflate_patch_embedding(torch.zeros(1, 3, 4, 4), 5, 1, "repeat"), "not by repeat"),
        (lambda: resize_positions(torch.zeros(1, 8, 2), (3, 3)), "7 rows is not of a square grid"),
        (lambda: resize_beit_table(torch.zeros(28, 2), (3, 3), depth=2), "says nothing about offsets along depth"),
        (lambda: resize_beit_table(torch.zeros(19, 2), (3, 3)), "of 16 rows has no offset 0 in its middle"),
    ],
)
def test_what_cannot_be_inflated_is_said(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_positions_same_grid_is_untouched_another_is_bicubic_and_the_class_row_stays():
    positions = torch.randn(1, 1 + 16, 6)
    assert resize_positions(positions, (4, 4)) is positions
    made = resize_positions(positions, (3, 5))
    assert made.shape == (1, 16, 6) and torch.equal(made[:, 0], positions[:, 0])
    image = positions[:, 1:].reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    expected = functional.interpolate(image, size=(3, 5), mode="bicubic").flatten(2).transpose(1, 2)
    assert_close(made[:, 1:], expected)
    deep = inflate_positions(positions, (2, 4, 4))
    assert torch.equal(deep[:, 1:17], positions[:, 1:]) and torch.equal(deep[:, 17:], positions[:, 1:])


def test_beit_table_is_identity_on_its_grid_and_3972_x_12_at_512_pixels():
    table = torch.randn(27 * 27 + 3, 12)
    assert resize_beit_table(table, (14, 14)) is table
    made = resize_beit_table(table, (32, 32))
    assert made.shape == (3972, 12)
    assert torch.equal(made[-3:], table[-3:])
    middle = made[:-3].reshape(63, 63, 12)[31, 31]
    assert_close(middle, table[:-3].reshape(27, 27, 12)[13, 13], atol=1e-6, rtol=1e-6)


def test_beit_table_keeps_offset_one_and_follows_a_smooth_function_of_the_grown_coordinates():
    from nnslim.inflation.kernels import geometric_offsets

    at = torch.from_numpy(geometric_offsets(13, 31))
    assert_close(at[[0, 13, 14, 26]], torch.tensor([-31.0, 0.0, 1.0, 31.0], dtype=torch.float64), atol=1e-6, rtol=0)
    assert bool((at[14:].diff() > at[13:-1].diff()).all())
    wave = torch.exp(-((at / 20) ** 2))
    table = torch.cat(((wave[:, None] * wave).reshape(-1, 1), torch.zeros(3, 1, dtype=torch.float64)))
    made = resize_beit_table(table, (32, 32))[:-3].reshape(63, 63)
    target = torch.exp(-((torch.arange(-31, 32, dtype=torch.float64) / 20) ** 2))
    assert_close(made, target[:, None] * target, atol=2e-3, rtol=0)


@pytest.mark.parametrize("source", [1, 2, 3, 14, 64])
def test_beit_table_of_a_few_tokens_along_an_axis_has_the_source_s_nearest_offsets(source):
    """Offsets 0 and 1 are among the source's coordinates, whatever the factor by which these grow."""
    edge = 2 * source - 1
    table = torch.randn(edge * edge + 3, 2)
    for grid in ((1, 1), (1, 5), (2, 2), (2, 7), (3, 3)):
        made = resize_beit_table(table, grid)
        assert made.shape == ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, 2)
        assert bool(made.isfinite().all()) and torch.equal(made[-3:], table[-3:])
    near = table[:-3].reshape(edge, edge, 2)
    if source > 1:
        near = near[source - 2 : source + 1, source - 2 : source + 1]
    assert_close(resize_beit_table(table, (2, 2))[:-3].reshape(3, 3, 2), near.expand(3, 3, 2), **CLOSE)


def test_swin_table_resize_and_tiling():
    table = torch.randn(13 * 13, 4)
    assert resize_swin_table(table, (7, 7)) is table
    assert resize_swin_table(table, (12, 12)).shape == (23 * 23, 4)
    tiled = tile_table(table, 3)
    assert tiled.shape == (5 * 169, 4)
    assert all(torch.equal(part, table) for part in tiled.chunk(5))


def unet(dims, *, kind=PlainConvUNet, features=(4, 6, 8), kernels=None, strides=None, norm=False, channels=1, heads=3):
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    depth = "n_blocks_per_stage" if kind is ResidualEncoderUNet else "n_conv_per_stage"
    norms = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(dims)
        network = kind(
            channels,
            len(features),
            list(features),
            conv,
            kernels or [3] * len(features),
            strides or [1] + [2] * (len(features) - 1),
            **{depth: [1, 2, 1][: len(features)]},
            num_classes=heads,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=norms[dims] if norm else None,
            norm_op_kwargs={"affine": True} if norm else None,
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={},
        )
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


PLANE = [(1, 1, 1), (1, 2, 2), (1, 2, 2)]


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_unet_center_without_norms_is_the_2d_net_on_every_slice(kind):
    flat, deep = unet(2, kind=kind), unet(3, kind=kind, strides=PLANE)
    deep.load_state_dict(inflate_unet(flat, deep, "center").weights)
    volume = torch.randn(1, 1, 5, 16, 16)
    with torch.no_grad():
        for got, image in zip(deep(volume).unbind(2), volume.unbind(2), strict=True):
            assert_close(got, flat(image), **CLOSE)


def test_unet_average_is_the_2d_net_on_equal_slices_away_from_the_depth_border():
    flat, deep = unet(2), unet(3, strides=PLANE)
    deep.load_state_dict(inflate_unet(flat, deep, "average").weights)
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        got = deep(image.unsqueeze(2).expand(-1, -1, 21, -1, -1))
    assert_close(got[:, :, 10], flat(image), **CLOSE)
    assert not torch.allclose(got[:, :, 0], flat(image), atol=1e-3)  # zero padding along depth


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_unet_center_with_norms_and_strides_along_depth_keeps_equal_slices(kind):
    """Transposed kernels are repeated and norms copied; there is no border effect."""
    flat, deep = unet(2, kind=kind, norm=True), unet(3, kind=kind, norm=True)
    deep.load_state_dict(inflate_unet(flat, deep).weights)
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        got, expected = deep(image.unsqueeze(2).expand(-1, -1, 8, -1, -1)), flat(image)
    for slice_ in got.unbind(2):
        assert_close(slice_, expected, atol=1e-4, rtol=1e-4)


def test_unet_aliases_share_one_tensor_and_no_key_is_left_out():
    flat, deep = unet(2, norm=True), unet(3, norm=True)
    weights = inflate_unet(flat, deep, "average").weights
    assert set(weights) == set(deep.state_dict())
    for key, value in weights.items():
        twin = key.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        assert weights[twin] is value
        if key.startswith("encoder."):
            assert weights[f"decoder.{key}"] is value
    for key, value in flat.state_dict().items():
        if value.ndim == 1:
            assert torch.equal(weights[key], value)


def test_unet_kernels_of_depth_one_are_the_2d_kernels():
    flat = unet(2)
    deep = unet(3, kernels=[(1, 3, 3), (1, 3, 3), (3, 3, 3)], strides=PLANE)
    for mode in ("center", "average"):
        weights = inflate_unet(flat, deep, mode).weights
        key = "encoder.stages.0.0.convs.0.conv.weight"
        assert weights[key].shape[2] == 1 and torch.equal(weights[key][:, :, 0], flat.state_dict()[key])


def test_unet_depth_axis_follows_the_order_of_axes():
    """A 3D plan whose last axis is the 2D plan's slice axis: its network sees the same volume transposed."""
    flat = unet(2)
    deep = unet(3, strides=[(1, 1, 1), (2, 2, 1), (2, 2, 1)])
    deep.load_state_dict(inflate_unet(flat, deep, axes=(2, 1, 0)).weights)
    volume = torch.randn(1, 1, 16, 12, 5)  # axes of the source: columns, rows, slices
    with torch.no_grad():
        got = deep(volume)
        for number in range(5):
            image = volume[..., number].transpose(2, 3)
            assert_close(got[..., number].transpose(2, 3), flat(image), **CLOSE)


def test_unet_other_image_channels_are_shared():
    flat, deep = unet(2), unet(3, channels=2, strides=PLANE)
    made = inflate_unet(flat, deep)
    deep.load_state_dict(made.weights)
    volume = torch.randn(1, 1, 3, 16, 16)
    with torch.no_grad():
        assert_close(deep(volume.expand(-1, 2, -1, -1, -1))[:, :, 1], flat(volume[:, :, 1]), **CLOSE)
    assert "2 wanted: summed and shared" in made.notes[0]


def test_unet_other_heads_keep_the_start_values_and_say_so():
    flat, deep = unet(2), unet(3, heads=5)
    made = inflate_unet(flat, deep)
    key = "decoder.seg_layers.1.weight"
    assert torch.equal(made.weights[key], deep.state_dict()[key])
    assert made.notes == ("segmentation heads differ in number: they keep the start values of the 3D network",)


def test_unet_wider_target_gives_the_2d_net_once_padded():
    flat, deep = unet(2), unet(3, features=(6, 6, 11), strides=PLANE)
    with pytest.raises(ConfigError, match=r"the 2D network has the shape \(4, 1, 3, 3, 3\), the 3D plan wants"):
        inflate_unet(flat, deep)
    made = inflate_unet(flat, deep, fit="cut-or-pad")
    deep.load_state_dict(made.weights)
    volume = torch.randn(1, 1, 2, 16, 16)
    with torch.no_grad():
        head = deep(volume)[:, :, 0]
    # Heads have 6 inputs in place of 4: known channels give what they gave, new ones are not read.
    assert_close(head, flat(volume[:, :, 0]), **CLOSE)
    assert any("added with start values that nothing reads yet" in note for note in made.notes)


def test_unet_narrower_target_holds_the_first_channels():
    flat, deep = unet(2, features=(4, 6, 12)), unet(3)
    weights = inflate_unet(flat, deep, fit="cut-or-pad").weights
    key = "encoder.stages.2.0.convs.0.conv.weight"
    assert_close(weights[key][:, :, 1], flat.state_dict()[key][:8])
    key = "decoder.transpconvs.0.weight"  # (I, O, ...)
    assert_close(weights[key][:, :, 0], flat.state_dict()[key][:8])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"features": (4, 6)}, "differ in structure .stages, blocks or kind.: 0 tensors"),
        ({"kernels": [5, 3, 3]}, r"the 2D kernel is \(3, 3\), in the 3D plan it is \(5, 5\)"),
        ({"strides": [(1, 1, 1), (1, 2, 1), (2, 2, 2)]}, r"stride \(2, 2\) in 2D, \(2, 1\) in plane"),
    ],
)
def test_unet_of_another_structure_is_refused_by_name(target, message):
    with pytest.raises(ConfigError, match=message):
        inflate_unet(unet(2), unet(3, **target))

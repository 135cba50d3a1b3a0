"""OpenVINO: the same answers as torch, models that are kept, outputs that stay, clear faults; int8."""

from __future__ import annotations

import gc
import logging
import shutil
import sys

import pytest
import torch
from helpers import damages
from torch import nn

from nnslim.compression.compress_network import compress
from nnslim.compression.config import tucker
from nnslim.errors import BackendError
from nnslim.running import engine as engine_module
from nnslim.running import kept_models
from nnslim.running import openvino as side
from nnslim.running.engine import Settings, make_engine
from nnslim.running.int8 import offer, quantize
from nnslim.running.kept_models import keep, network_fingerprint, recall_model, replace_model, write_openvino_model
from nnslim.running.openvino import OpenVINOEngine, convert

pytest.importorskip("openvino")
KINDS = ("plain3d", "plain2d", "residual3d", "anisotropic")


@pytest.fixture
def slim_net(tiny_net, tiny_shape):
    """Factory: the Tucker form of a tiny network."""

    def make(kind: str) -> nn.Module:
        network = tiny_net(kind, features=(8, 16, 24))
        return compress(network, [network.state_dict()], tucker(rank_factor=0.5, rank_min=2), tiny_shape(kind)).network

    return make


def tile(shape, batch=1, seed=0):
    return torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(seed))


def close(found, wanted, limit=1e-4):
    """Whether the largest error is below a share of the spread; OpenVINO sums norms in single precision."""
    return float((found - wanted).abs().max() / wanted.std()) < limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["dense", "tucker"])
def test_engine_any_batch_agrees_with_torch(tiny_net, tiny_shape, slim_net, tmp_path, kind, form):
    network, shape = tiny_net(kind) if form == "dense" else slim_net(kind), tiny_shape(kind)
    engine = OpenVINOEngine(network, shape, threads=1, cache=tmp_path)
    for batch in (1, 3):
        x = tile(shape, batch)
        with torch.inference_mode():
            wanted, found = network(x), engine(x)
        assert found.shape == wanted.shape and found.stride(1) == 1
        assert close(found, wanted)


def test_engine_throughput_and_several_channels(tiny_net, tiny_shape, tmp_path):
    network, shape = tiny_net("plain3d", channels=2), tiny_shape("plain3d", channels=2)
    engine = OpenVINOEngine(network, shape, throughput=True, cache=tmp_path)
    x = tile(shape, 5)
    with torch.inference_mode():
        assert close(engine(x), network(x))


@pytest.mark.parametrize("last", [False, True])
def test_convert_larger_patch_is_traced_small_and_has_the_layout(tiny_net, tmp_path, last, monkeypatch):
    network, shape, sizes = tiny_net("plain3d"), (1, 1, 64, 32, 96), []
    inner = side.convert_at
    monkeypatch.setattr(side, "convert_at", lambda net, size, full: sizes.append(size) or inner(net, size, full))
    model = convert(network, shape, channels_last=last)
    assert sizes == [(1, 1, 32, 16, 48)]
    assert tuple(model.outputs[0].shape) == ((1, 64, 32, 96, 3) if last else (1, 3, 64, 32, 96))
    assert model.inputs[0].any_name == "image" and model.outputs[0].any_name == "logits"
    x = tile(shape)
    with torch.inference_mode():
        assert close(OpenVINOEngine(model, shape, threads=1)(x), network(x), 1e-3)
    write_openvino_model(model, tmp_path / "m.xml")
    with torch.inference_mode():
        assert close(OpenVINOEngine(tmp_path / "m.xml", shape, threads=1)(x), network(x), 1e-3)


def test_convert_network_without_a_fixed_path_is_traced_at_full_size(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            for _ in range(int(x.shape[2] // 16)):
                y = y * 1.5 if bool(x.shape[3] > 3) else y
            return y

    network, shape = Odd().eval(), (1, 1, 32, 64)
    x = tile(shape)
    with torch.no_grad():
        assert close(OpenVINOEngine(network, shape, threads=1, cache=tmp_path)(x), network(x))


def test_engine_outputs_stay_as_long_as_somebody_holds_them(tiny_net, tiny_shape, tmp_path):
    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    engine = OpenVINOEngine(network, shape, threads=1, cache=tmp_path)
    held = [engine(tile(shape, seed=seed)) for seed in range(3)]
    view = engine(tile(shape, seed=3))[0, 1]  # a view alone holds the memory
    copies = [one.clone() for one in (*held, view)]
    pointers = {one.data_ptr() for one in held}
    assert len(pointers) == 3
    for seed in range(4, 7):
        engine(tile(shape, seed=seed))
    assert all(torch.equal(one, copy) for one, copy in zip((*held, view), copies, strict=True))
    del held, view
    addresses = [engine(tile(shape, seed=seed)).data_ptr() for seed in range(3)]
    assert len(set(addresses)) == 1
    assert len(engine.outputs) == 1


def test_engine_keeps_its_weights_and_new_ones_make_another(tiny_net, tiny_shape, tmp_path):
    network, other, shape = tiny_net("plain2d"), tiny_net("plain2d", seed=1), tiny_shape("plain2d")
    x = tile(shape)
    with torch.no_grad():
        first, second = network(x), other(x)
    engines = [OpenVINOEngine(network, shape, threads=1, cache=tmp_path / name) for name in ("a", "a")]
    assert engines[0].compiled is engines[1].compiled  # shared
    model = convert(network, shape, channels_last=True)
    network.load_state_dict(other.state_dict())
    assert close(engines[0](x), first) and close(OpenVINOEngine(model, shape, threads=1)(x), first)
    assert close(OpenVINOEngine(network, shape, threads=1, cache=tmp_path / "a")(x), second)
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_cache_is_used_and_a_damaged_one_is_made_again(tiny_net, tiny_shape, tmp_path, monkeypatch, caplog):
    network, shape = tiny_net("plain2d"), tiny_shape("plain2d")
    x, made = tile(shape), []
    inner = side.convert
    monkeypatch.setattr(side, "convert", lambda *args, **kwargs: made.append(1) or inner(*args, **kwargs))
    with torch.no_grad():
        wanted = network(x)

    def agrees() -> bool:
        gc.collect()  # engines of this process share what is compiled as long as one lives
        return close(OpenVINOEngine(network, shape, threads=1, cache=tmp_path)(x), wanted)

    for _ in range(2):
        assert agrees()
    OpenVINOEngine(network, shape, threads=1, precision="f32", throughput=True, cache=tmp_path)
    assert len(made) == 1
    (folder,) = tmp_path.iterdir()
    for damage in (b"", b"x" * 100, folder.joinpath("model.bin").read_bytes()[:-1] + b"?"):
        (folder / "model.bin").write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            assert agrees()
        assert "the kept model cannot be used" in caplog.text
        caplog.clear()
    assert len(made) == 4
    OpenVINOEngine(network, (1, 1, 32, 32), threads=1, cache=tmp_path)
    assert len(made) == 5


def test_model_with_any_bit_or_length_changed_is_refused(tiny_net, tiny_shape, tmp_path, caplog):
    network, shape, key = tiny_net("plain2d"), tiny_shape("plain2d"), "1" * 40
    model = convert(network, shape, channels_last=True)
    for part in ("model.xml", "model.bin"):
        keep(model, key, tmp_path)
        for name in damages(tmp_path / key / part, kinds=False):
            caplog.clear()
            assert recall_model(key, tmp_path) is None, name
            assert len(caplog.records) == 1 and not (tmp_path / key).exists(), name
            keep(model, key, tmp_path)
        assert recall_model(key, tmp_path) is not None
    for name in damages(tmp_path / key / "model.xml"):
        if name in ("folder", "pipe"):
            caplog.clear()
            assert recall_model(key, tmp_path) is None and len(caplog.records) == 1, name
            keep(model, key, tmp_path)
    shutil.rmtree(tmp_path / key)
    (tmp_path / key).write_text("a file in the place of the folder")
    assert recall_model(key, tmp_path) is None
    keep(model, key, tmp_path)
    assert recall_model(key, tmp_path) is not None


def test_written_model_that_has_changed_is_refused_and_one_without_a_checksum_is_read(tiny_net, tiny_shape, tmp_path):
    network, shape = tiny_net("plain2d"), tiny_shape("plain2d")
    path = tmp_path / "model.xml"
    replace_model(convert(network, shape, channels_last=True), path)
    x, whole = tile(shape), path.read_bytes()
    answer = OpenVINOEngine(path, shape, threads=1)(x)
    refused = 0
    for part in (path, path.with_suffix(".bin")):
        for name in damages(part, kinds=False):
            try:
                assert torch.equal(OpenVINOEngine(path, shape, threads=1)(x), answer), name
            except BackendError as error:
                refused += 1
                assert str(path) in str(error)
    assert refused > 95, "but for some that only change the words around the checksum"
    path.write_bytes(whole[: whole.rindex(b"<!--")])  # as another tool writes it
    assert torch.equal(OpenVINOEngine(path, shape, threads=1)(x), answer)


def test_cache_that_cannot_be_written_does_not_stop(tiny_net, tiny_shape, tmp_path, caplog):
    network, shape = tiny_net("plain2d"), tiny_shape("plain2d")
    (tmp_path / "file").write_text("x")
    with caplog.at_level(logging.WARNING):
        OpenVINOEngine(network, shape, threads=1, cache=tmp_path / "file" / "cache")(tile(shape))
    assert "is not kept" in caplog.text


def test_fingerprint_follows_weights_settings_and_switches(tiny_net):
    first = network_fingerprint(tiny_net("plain2d"))
    assert first == network_fingerprint(tiny_net("plain2d").train()) != network_fingerprint(tiny_net("plain2d", seed=1))
    assert first != network_fingerprint(tiny_net("plain2d", deep_supervision=True))
    changed = tiny_net("plain2d")
    next(m for m in changed.modules() if isinstance(m, nn.InstanceNorm2d)).eps = 1e-3
    assert network_fingerprint(changed) != first


def test_precisions(tiny_net, tiny_shape, tmp_path, monkeypatch):
    import openvino

    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    x = tile(shape)
    for precision, name in (("bf16", "BF16"), ("f16", "FP16")):
        if name in able:
            with torch.no_grad():
                assert close(OpenVINOEngine(network, shape, precision=precision, cache=tmp_path)(x), network(x), 0.2)
        else:
            with pytest.raises(BackendError, match=f"precision {precision} is not available"):
                OpenVINOEngine(network, shape, precision=precision, cache=tmp_path)
    engine = OpenVINOEngine(network, shape, cache=tmp_path)
    assert "float32" in str(engine.compiled.model.get_property("INFERENCE_PRECISION_HINT"))
    with pytest.raises(BackendError, match="precision 'f8' is not known"):
        OpenVINOEngine(network, shape, precision="f8")
    with pytest.raises(BackendError, match="no int8 model of these weights"):
        OpenVINOEngine(network, shape, precision="int8", cache=tmp_path)


def test_faults_are_named(tiny_net, tiny_shape, tmp_path, monkeypatch):
    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    engine = OpenVINOEngine(network, shape, threads=1, cache=tmp_path)
    with pytest.raises(BackendError, match=r"tiles of \(1, 16, 16, 16\), found \(1, 16, 16, 8\)"):
        engine(torch.zeros(1, 1, 16, 16, 8))
    with pytest.raises(BackendError, match=r"does not run on \(1, 1, 15, 16, 16\)"):
        convert(network, (1, 1, 15, 16, 16), channels_last=True)
    model = convert(network, shape, channels_last=True)
    with pytest.raises(BackendError, match="the model takes tiles of"):
        OpenVINOEngine(model, (1, 1, 32, 32, 32))
    (tmp_path / "bad.xml").write_text("<no")
    with pytest.raises(BackendError, match=r"bad\.xml is not a readable OpenVINO model"):
        OpenVINOEngine(tmp_path / "bad.xml", shape)
    monkeypatch.setitem(sys.modules, "openvino", None)
    for call in (lambda: OpenVINOEngine(network, shape), lambda: convert(network, shape, channels_last=True)):
        with pytest.raises(BackendError, match=r"openvino is not installed; pip install nnslim\[openvino\]"):
            call()


def test_make_engine_takes_it(tiny_net, tiny_shape):
    network, shape = tiny_net("plain2d"), tiny_shape("plain2d")
    engine = make_engine(network, (4, *shape[1:]), Settings("openvino", "f32", 1))
    x = tile(shape, 4)
    with torch.no_grad():
        assert close(engine(x), network(x))


def test_make_engine_keeps_openvino_to_the_threads_that_the_machine_allows(tiny_net, tiny_shape, monkeypatch):
    """A quota of CPU time is not seen by OpenVINO, which starts a thread for each CPU."""
    network, shape = tiny_net("plain3d"), tiny_shape("plain3d")
    monkeypatch.setattr(engine_module, "cpus", lambda: 64)
    monkeypatch.setattr(engine_module, "machine_threads", lambda: 1)
    made = make_engine(network, shape, Settings("openvino"))
    assert made.compiled.model.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize("form", ["dense", "tucker"])
def test_int8_agrees_and_is_found_by_its_weights(tiny_net, tiny_shape, slim_net, tmp_path, form):
    pytest.importorskip("nncf")
    network, shape = tiny_net("plain3d") if form == "dense" else slim_net("plain3d"), tiny_shape("plain3d")
    tiles = [tile(shape, seed=seed) for seed in range(4)]
    made = quantize(network, shape, tiles)
    assert made.in_int8 >= made.layers - 3 and made.bytes_after < made.bytes_before and "int8:" in made.line()
    x = tile(shape, seed=9)
    with torch.no_grad():
        wanted = network(x).argmax(1)
    assert (OpenVINOEngine(made.model, shape, precision="int8")(x).argmax(1) == wanted).double().mean() > 0.9
    file = tmp_path / "fold_0" / "nnslim_int8.xml"
    for _ in range(2):  # the second replaces the first
        replace_model(made.model, file)
    assert sorted(p.name for p in file.parent.iterdir()) == ["nnslim_int8.bin", "nnslim_int8.xml"]
    assert offer(network, shape, file, tmp_path / "cache")
    engine = OpenVINOEngine(network, (2, *shape[1:]), precision="int8", cache=tmp_path / "cache")
    assert (engine(torch.cat([x, x])).argmax(1) == wanted).double().mean() > 0.9
    next(network.parameters()).data += 1
    assert not offer(network, shape, file, tmp_path / "cache")


def test_int8_faults(tiny_net, tiny_shape, monkeypatch):
    network, shape = tiny_net("plain2d"), tiny_shape("plain2d")
    pytest.importorskip("nncf")
    with pytest.raises(BackendError, match="needs calibration tiles"):
        quantize(network, shape, [])
    with pytest.raises(BackendError, match="calibration tile has shape"):
        quantize(network, shape, [torch.zeros(1, 1, 8, 8)])
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(BackendError, match="nncf is not installed"):
        quantize(network, shape, [tile(shape)])


def test_model_that_another_worker_keeps_meanwhile_is_no_fault(tiny_net, tiny_shape, tmp_path, monkeypatch):
    """Workers of a folder run convert the same network at the same time."""
    model, key = convert(tiny_net("plain3d"), tiny_shape("plain3d"), channels_last=True), "0" * 40

    def write_while_another_does(given, path):
        monkeypatch.undo()
        keep(given, key, tmp_path)
        write_openvino_model(given, path)

    monkeypatch.setattr(kept_models, "write_openvino_model", write_while_another_does)
    keep(model, key, tmp_path)
    assert recall_model(key, tmp_path) is not None and [path.name for path in tmp_path.iterdir()] == [key]

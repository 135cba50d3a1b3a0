"""`nnslim.compress`, `save`, `load` and `fast` on networks of MONAI, which know nothing of nnU-Net."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks import nets

import nnslim
from nnslim.errors import InputError, SpecError
from nnslim.network.spec import spec_of

HALF = {"methods": [{"method": "tucker", "rank_factor": 0.5, "rank_min": 4}]}
CUBE = (1, 1, 32, 32, 32)
NETWORKS = {
    "UNet": lambda: nets.UNet(3, 1, 3, (16, 32, 64), (2, 2), num_res_units=2),
    "UNet with batch norm": lambda: nets.UNet(3, 1, 3, (16, 32), (2,), norm="batch", act="relu"),
    "DynUNet": lambda: nets.DynUNet(3, 1, 3, (3, 3, 3), (1, 2, 2), (2, 2), filters=(16, 32, 64)),
    "SegResNet": lambda: nets.SegResNet(init_filters=16, blocks_down=(1, 1), blocks_up=(1,), out_channels=3),
    "HighResNet": lambda: nets.HighResNet(in_channels=1, out_channels=3),
    "UNETR": lambda: nets.UNETR(1, 3, CUBE[2:], 16, 48, 96, 4),
    "SwinUNETR": lambda: nets.SwinUNETR(in_channels=1, out_channels=3, feature_size=12),
}


def made(name: str) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name]().eval()


def tiles(count: int, edge: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    smooth, shape = torch.nn.functional.avg_pool3d, (1, 1, *(edge,) * 3)
    return [3 * smooth(torch.randn(shape, generator=generator), 3, 1, 1) for _ in range(count)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "SwinUNETR" else []) for name in NETWORKS]
)
def test_networks_are_compressed_saved_loaded_and_run(name, tmp_path):
    network, (x, *fitted) = made(name), tiles(3, {"HighResNet": 16, "SwinUNETR": 64}.get(name, 32))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    slim = nnslim.compress(network, HALF, tiles=fitted)
    assert slim.slim.macs < 0.9 * slim.dense.macs and slim.slim.parameters < slim.dense.parameters
    assert {decision.action for decision in slim.decisions} == {"tucker", "dense"}
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items()), "it is not touched"
    nnslim.save(slim.network, tmp_path / "models" / "slim.pt")
    loaded = nnslim.load(tmp_path / "models" / "slim.pt", made(name))
    with torch.inference_mode():
        expected = slim.network(x)
        assert torch.equal(loaded(x), expected)
        for one, wanted in ((network, network(x)), (loaded, expected)):
            torch.testing.assert_close(nnslim.fast(one, x, backend="eager")(x), wanted, rtol=1e-3, atol=1e-3)


def test_fit_to_tiles_loses_less_than_the_weights_alone_and_recovery_less_still():
    network, (x, *fitted) = made("UNet"), tiles(9)
    learned = HALF | {"store": "half", "recovery": {"steps": 30, "learning_rate": 1e-3, "every": 15}}
    errors = []
    for settings, given in ((HALF, None), (HALF, fitted), (learned, fitted)):
        slim = nnslim.compress(network, settings, x, tiles=given)
        with torch.inference_mode():
            errors.append(float((slim.network(x) - network(x)).norm()))
    assert errors[2] < errors[1] < errors[0]
    assert slim.recovery[0]["steps"] == 30 and set(slim.half_agreement["classes"]) == {"1", "2"}


def test_sliding_window_of_monai_takes_what_fast_gives():
    network = made("UNet")
    volume = torch.randn(1, 1, 40, 48, 36, generator=torch.Generator().manual_seed(0))
    window = SlidingWindowInferer(CUBE[2:], sw_batch_size=2, overlap=0.5)
    with torch.inference_mode():
        wanted, found = (window(volume, one) for one in (network, nnslim.fast(network, torch.zeros(CUBE))))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_faults_are_named(tmp_path):
    network = made("UNet")
    with pytest.raises(InputError, match="give an example input, or tiles"):
        nnslim.compress(network, HALF)
    with pytest.raises(InputError, match=r"of one shape, found \(1, 1, 32, 32, 32\) and \(1, 1, 16, 16, 16\)"):
        nnslim.compress(network, HALF, tiles=[torch.zeros(CUBE), torch.zeros(1, 1, 16, 16, 16)])
    with pytest.raises(InputError, match="carries no SlimSpec"):
        nnslim.save(network, tmp_path / "dense.pt")
    (tmp_path / "text.pt").write_text("no network")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    for name in ("none.pt", "text.pt", "other.pt"):
        with pytest.raises(InputError, match=name):
            nnslim.load(tmp_path / name, network)
    slim = nnslim.compress(network, HALF, torch.zeros(CUBE))
    assert spec_of(slim.network) is not None and spec_of(network) is None
    nnslim.save(slim.network, tmp_path / "slim.pt")
    for other in (nets.UNet(3, 1, 4, (16, 32, 64), (2, 2), num_res_units=2), made("DynUNet")):
        with pytest.raises(SpecError):
            nnslim.load(tmp_path / "slim.pt", other)

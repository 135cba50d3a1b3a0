"""The error grid: values by direct computation, one decomposition per layer, pictures that can be read."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from helpers import ROOT
from torch import nn

from nnslim.errors import ConfigError, SpecError
from nnslim.maths.lowrank import Spectrum, leading_eigenvectors
from nnslim.methods.tucker.edit import TuckerConv, kernel_of
from nnslim.methods.tucker.error_grid import equal_factor_lines, error_grid, heat_maps, rank_steps, write_grid
from nnslim.network.cost import measure_cost
from nnslim.network.walk import LayerIndex


@pytest.fixture
def tiles(tiny_shape) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tiny_shape("plain3d"), generator=generator) for _ in range(3)]


@pytest.fixture
def network(tiny_net) -> nn.Module:
    return tiny_net("plain3d")


@pytest.fixture
def cost(network, tiny_shape):
    return measure_cost(network, tiny_shape("plain3d"))


def projected(weight: torch.Tensor, rank_out: int, rank_in: int) -> torch.Tensor:
    """Return the truncated HOSVD of a kernel (O, I, taps), computed from its unfoldings."""
    out = leading_eigenvectors(torch.einsum("oik,pik->op", weight, weight), rank_out)
    in_ = leading_eigenvectors(torch.einsum("oik,ojk->ij", weight, weight), rank_in)
    return torch.einsum("oik,op,ij->pjk", weight, out @ out.T, in_ @ in_.T)


def read(path: Path) -> dict[tuple[str, int, int], dict[str, str]]:
    lines = list(csv.DictReader(path.open(encoding="utf-8")))
    return {(line["layer"], int(line["rank_out"]), int(line["rank_in"])): line for line in lines}


def test_rank_steps_end_with_the_full_rank():
    assert rank_steps(320) == tuple(range(20, 321, 20))
    assert rank_steps(24) == tuple(range(2, 25, 2))
    assert rank_steps(3) == (1, 2, 3)
    assert rank_steps(1) == (1,)
    assert rank_steps(30, 8) == (8, 16, 24, 30)
    assert rank_steps(30, 64) == (30,)
    with pytest.raises(ConfigError, match="from 1 on, found 0"):
        rank_steps(30, 0)


def test_table_equals_direct_computation(network, cost, tmp_path):
    write_grid(error_grid(network, cost), tmp_path / "errors.csv")
    table, layers = read(tmp_path / "errors.csv"), LayerIndex(network)
    assert list(next(iter(table.values()))) == [
        *("layer", "rank_out", "rank_in", "outputs", "inputs", "weights_error", "outputs_error", "energy_error"),
        *("macs", "parameters", "macs_share"),
    ]
    for name, rank_out, rank_in in (("encoder.stages.1.0.convs.1.conv", 3, 5), ("decoder.transpconvs.0", 2, 7)):
        conv, line = layers[name].module, table[name, rank_out, rank_in]
        weight = kernel_of(conv).detach().double().flatten(2)
        error = (weight - projected(weight, rank_out, rank_in)).norm() / weight.norm()
        assert float(line["weights_error"]) == pytest.approx(float(error), rel=1e-5)
        assert float(line["energy_error"]) == pytest.approx(float(error) ** 2, rel=1e-5)
        assert line["outputs_error"] == ""
        assert (int(line["outputs"]), int(line["inputs"])) == weight.shape[:2]
        chain = TuckerConv(conv, rank_out, rank_in)
        ran = measure_cost(chain, (1, *cost.layers[name].input_shape))
        assert (int(line["macs"]), int(line["parameters"])) == (ran.macs(), ran.parameters)
        assert float(line["macs_share"]) == pytest.approx(ran.macs() / cost.layers[name].macs, abs=1e-4)


def test_full_rank_is_there_and_free_of_error(network, cost, tiles, tmp_path):
    write_grid(error_grid(network, cost, tiles, step=4), tmp_path / "errors.csv")
    table = read(tmp_path / "errors.csv")
    convs = LayerIndex(network).of_type(nn.Conv3d, nn.ConvTranspose3d)
    ran = [layer for layer in convs if layer.name in cost.layers]
    assert {key[0] for key in table} == {layer.name for layer in ran}
    for layer in ran:
        line = table[(layer.name, *kernel_of(layer.module).shape[:2])]
        assert [line[key] for key in ("weights_error", "outputs_error", "energy_error")] == ["0", "0", "0"]
        assert line["macs_share"] == "1.0000" and int(line["macs"]) == cost.layers[layer.name].macs
        assert int(line["parameters"]) == sum(p.numel() for p in layer.module.parameters())


def test_errors_fall_with_each_rank(network, cost, tiles):
    for grid in error_grid(network, cost, tiles):
        for error in (grid.weights_error, grid.outputs_error):
            assert (error[1:] <= error[:-1] + 1e-9).all() and (error[:, 1:] <= error[:, :-1] + 1e-9).all()
        assert grid.equal_factor([1.0]) == grid.equal_factor([1.0], outputs=True) == [0.0]
        assert grid.equal_factor([0.5])[0] >= grid.equal_factor([0.9])[0]


def test_outputs_error_is_that_of_the_outputs(network, cost, tiles):
    """A 1x1 layer has no taps to average over, so the error can be had from its outputs themselves."""
    grid = next(g for g in error_grid(network, cost, tiles) if g.name.startswith("decoder.seg_layers"))
    seen: list[torch.Tensor] = []
    handle = grid.conv.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].transpose(0, 1).flatten(1))
    )
    with torch.no_grad():
        for tile in tiles:
            network(tile)
    handle.remove()
    x = torch.cat(seen, 1).double()  # with its mean: no norm follows this layer, and the bias is left alone
    weight = kernel_of(grid.conv).detach().double().flatten(1)
    # Whitened by the data, so its best rank-1 form is that of the outputs: Eckart and Young.
    values = torch.linalg.svdvals(weight @ x)
    expected = float((values[1:].square().sum() / values.square().sum()).sqrt())
    assert grid.outputs_error[0, -1] == pytest.approx(expected, rel=0.05)  # the survey samples positions


@pytest.mark.parametrize("with_images", [False, True])
def test_one_decomposition_per_layer_and_metric(network, cost, tiles, with_images, monkeypatch):
    calls = []
    real = Spectrum.of.__func__
    monkeypatch.setattr(Spectrum, "of", classmethod(lambda cls, kernel: calls.append(1) or real(cls, kernel)))
    steps = []
    grids = error_grid(network, cost, tiles if with_images else None, step=1, progress=lambda *done: steps.append(done))
    assert len(calls) == len(grids) * (2 if with_images else 1)
    assert steps[-1] == (len(grids), len(grids))


def test_grouped_layers_are_left_out_and_nothing_left_is_an_error():
    mixed = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 6, 3)).eval()
    grids = error_grid(mixed, measure_cost(mixed, (1, 4, 8, 8)))
    assert [grid.shape for grid in grids] == [(6, 4, 3, 3)]
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)).eval()
    with pytest.raises(SpecError, match="no 2D or 3D convolution without groups"):
        error_grid(grouped, measure_cost(grouped, (1, 4, 8, 8)))


def panels(path: Path, columns: int, rows: int) -> int:
    """Return how many cells of a page show a panel: its frame or colours are not white."""
    image = matplotlib.image.imread(path)[..., :3]
    height, width = image.shape[:2]
    top, right = int(height * 0.06), int(width * 0.9)
    cells = [
        image[top + row * (height - top) // rows : top + (row + 1) * (height - top) // rows,
              column * right // columns : (column + 1) * right // columns]
        for row in range(rows) for column in range(columns)
    ]  # fmt: skip
    return sum(bool((cell.min(2) < 0.9).mean() > 0.2) for cell in cells)


def test_heat_maps_have_a_panel_per_layer(network, cost, tiles, tmp_path):
    grids = error_grid(network, cost, tiles)
    for outputs, name in ((False, "weights"), (True, "outputs")):
        files = heat_maps(grids, tmp_path, outputs=outputs, title="tiny")
        assert [file.name for file in files] == [f"{name}.png", f"{name}.pdf"]
        height, width = matplotlib.image.imread(files[0]).shape[:2]
        rows = -(-len(grids) // 4)
        assert 1000 < width < 2000 and 250 * rows < height < 420 * rows
        assert panels(files[0], 4, rows) == len(grids)
        assert files[1].read_bytes().startswith(b"%PDF")


def test_heat_maps_of_many_layers_are_paged(network, cost, tmp_path):
    grids = error_grid(network, cost, step=8) * 3  # 24 and more
    files = heat_maps(grids, tmp_path)
    assert [file.name for file in files] == ["weights_1.png", "weights_2.png", "weights.pdf"]
    rows = -(-len(grids) // 8)
    assert panels(files[0], 4, rows) == 4 * rows
    assert files[-1].read_bytes().count(b"/Type /Page\n") + files[-1].read_bytes().count(b"/Type /Page ") == 2
    assert heat_maps(grids, tmp_path, outputs=True) == []  # there were no images


@pytest.mark.parametrize("with_images", [False, True])
def test_equal_factor_lines_decode(network, cost, tiles, with_images, tmp_path):
    grids = error_grid(network, cost, tiles if with_images else None)
    files = equal_factor_lines(grids, tmp_path, title="tiny")
    height, width = matplotlib.image.imread(files[0]).shape[:2]
    assert 500 < height < 900 and (width > 1400) == with_images
    assert [file.suffix for file in files] == [".png", ".pdf"]


def test_script_writes_all_or_nothing(tmp_path, monkeypatch, capsys):
    """On the shipped model; a second call does not overwrite."""
    from nnslim.hosts.nnunet.model.shipped import shipped_model

    script = ROOT / "scripts" / "06_tucker_rec_error.py"
    main = runpy.run_path(str(script), run_name="script")["main"]
    command = [script, "-m", shipped_model(), "-o", tmp_path / "out", "--step", "128", "--fold", "0", "-q"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    assert main() == 0
    assert "18 layers, " in capsys.readouterr().out
    names = [f"{name}.{kind}" for name in ("equal_factor", "weights") for kind in ("pdf", "png")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "errors.csv"])
    assert main() == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

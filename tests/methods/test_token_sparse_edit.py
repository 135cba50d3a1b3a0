"""Token sparsity as an edit of trained networks: nnU-Net's Primus, MONAI's UNETR, ours."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2
from helpers import ROOT, tiny_primus
from monai.networks.nets import UNETR

from nnslim.compression.compress_network import compress
from nnslim.compression.config import SlimConfig, load_config
from nnslim.errors import BackendError, ConfigError, SpecError
from nnslim.methods.token_sparse import TokenSparseConfig, plan_token_sparse, set_ratio, token_sparse_edits
from nnslim.methods.token_sparse.scorers import image_content
from nnslim.methods.token_sparse.sparse_encoders import eva_attention, vit_attention
from nnslim.methods.token_sparse.unetr import TokenSparseUNETR
from nnslim.network.cost import measure_cost
from nnslim.network.operations import count_operations
from nnslim.network.spec import SlimSpec, apply_spec, extend_spec, spec_of
from nnslim.running.engine import Settings, make_engine

SIZE = (32, 32, 24)  # 48 tokens


def unetr():
    torch.manual_seed(1)
    return UNETR(1, 3, (32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2).eval()


def own_unetr(**options):
    """Ours, trained dense: without stages, or with stages that take nothing away."""
    torch.manual_seed(1)
    sizes = {"decoder": "x8", "features": 4, "dim": 24, "depth": 10, "heads": 2}
    return TokenSparseUNETR(1, 3, (32, 32, 24), **sizes, **options).eval()


NETWORKS = {
    "primus": (lambda: tiny_primus(SIZE), SIZE),
    "primus-v2": (lambda: tiny_primus(SIZE, PrimusV2), SIZE),
    "primus-registers": (lambda: tiny_primus(SIZE, registers=2, scale_attn_inner=True), SIZE),
    "primus-no-rope": (lambda: tiny_primus(SIZE, use_rot_pos_emb=False), SIZE),
    "unetr": (unetr, (32, 32, 32)),
    "own-unetr": (lambda: own_unetr(locations=()), SIZE),
}
CONFIGS = {
    "default": {},
    "energy": {"scorer": "energy", "locations": (0, 2)},
    "air-then-mlp": {"scorer": ("air", "mlp"), "locations": (0, 2), "ratio": (0.25, 0.5)},
    "mlp-fusion": {"scorer": "mlp", "completion": "fusion", "shared": True},
    "att-fusion_v2": {"scorer": "att", "completion": "fusion_v2"},
    "distance-mask": {"scorer": "distance", "completion": "mask", "skips": "completed"},
    "merge": {"mode": "merge", "ratio": 0.7},
    "random": {"scorer": "random"},
}


def sparse_of(network, **settings):
    edits = token_sparse_edits(network, TokenSparseConfig(**settings))
    return apply_spec(SlimSpec(edits), copy.deepcopy(network), fill=True)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_sparse_network_with_ratio_zero_is_the_dense_one_and_rebuilds_from_its_spec(name, config):
    make, size = NETWORKS[name]
    dense = make()
    sparse = sparse_of(dense, **CONFIGS[config])
    assert type(sparse) is type(dense)  # its forward is untouched
    assert set(dense.state_dict()) <= set(sparse.state_dict())  # a dense checkpoint is a warm start
    image = torch.randn(2, 1, *size)
    with torch.no_grad():
        expected, found = dense(image), sparse(image)
        assert found.shape == expected.shape
        assert not torch.allclose(found, expected)
        rebuilt = apply_spec(SlimSpec.from_dict(spec_of(sparse).to_dict()), make())
        rebuilt.load_state_dict(sparse.state_dict())
        assert torch.equal(rebuilt(image), found)
        assert torch.equal(copy.deepcopy(sparse)(image), found)
        set_ratio(sparse, 0)
        assert torch.equal(sparse(image), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_learned_completion_starts_as_the_last_values(name):
    make, size = NETWORKS[name]
    dense, image = make(), torch.randn(1, 1, *size)
    with torch.no_grad():
        last = sparse_of(dense, scorer="energy")(image)
        for completion in ("fusion", "fusion_v2"):
            assert torch.allclose(sparse_of(dense, scorer="energy", completion=completion)(image), last, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_new_weight(name):
    make, size = NETWORKS[name]
    dense = make().train()
    dense(torch.randn(1, 1, *size)).square().mean().backward()
    idle = {n.split(".")[-2] for n, p in dense.named_parameters() if p.grad is None}  # MONAI's cross attention
    sparse = sparse_of(dense, scorer="mlp", completion="fusion").train()
    torch.manual_seed(0)
    for _ in range(2):  # the branches that start at 0 pass gradients on after the first step
        sparse.zero_grad()
        sparse(torch.randn(1, 1, *size)).square().mean().backward()
        with torch.no_grad():
            for parameter in sparse.parameters():
                parameter -= 1e-2 * (0 if parameter.grad is None else parameter.grad)
    new = {n: p for n, p in sparse.named_parameters() if "reduction" in n or "completion" in n}
    assert new
    assert [n for n, p in new.items() if p.grad is None and n.split(".")[-2] not in idle] == []
    scorers = [p for n, p in new.items() if "scorers" in n]
    assert all(p.grad.abs().sum() > 0 for p in scorers)


def test_rotary_embedding_follows_the_tokens():
    """Without learned positions a kept token must be as it is in a network that never had the others."""
    dense = tiny_primus(SIZE, use_abs_pos_embed=False).eva
    from nnslim.methods.token_sparse.reduction import take_rope

    rope, kept = dense.rope.get_embed(), torch.tensor([[3, 7, 20, 41]])
    x = torch.randn(1, 4, 48)
    assert torch.allclose(dense.blocks[0](x, rope=take_rope(rope, kept)), dense.blocks[0](x, rope=rope[kept[0]]))


def test_attention_scorer_is_the_attention_of_the_block(monkeypatch):
    block, rope = tiny_primus(SIZE).eva.blocks[1], tiny_primus(SIZE).eva.rope.get_embed()
    x = torch.randn(2, 48, 48)
    seen = []
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        block(x, rope=rope)
        found = eva_attention(block, x, rope, 0)
    assert torch.allclose(found, seen[0].mean(dim=(1, 2)), atol=1e-6)


@pytest.mark.parametrize("name", ["unetr", "own-unetr"])
def test_attention_scorer_of_plain_blocks_is_their_attention(name):
    network = NETWORKS[name][0]()
    block = (network.vit if name == "unetr" else network.encoder).blocks[1]
    x, heads, seen = torch.randn(2, 49, 24), 2, []
    block.attn.qkv.register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        block(x)
        query, key, _ = seen[0].chunk(3, dim=-1)
        split = [part.reshape(2, 49, heads, 12).transpose(1, 2) for part in (query, key)]
        expected = torch.softmax(split[0] @ split[1].transpose(2, 3) * 12**-0.5, dim=-1).mean(dim=(1, 2))
        assert torch.allclose(vit_attention(block, x, None, 1), expected[:, 1:], atol=1e-6)


@pytest.mark.parametrize("skips", ["completed", "blocks"])
def test_own_unetr_with_idle_stages_is_sparse_by_the_edit_at_any_size(skips):
    """What the untrained stages had is gone; a size other than that of the plans runs, as in the dense one."""
    dense = own_unetr(ratios=0.0)
    sparse = sparse_of(dense, skips=skips, scorer="air", ratio=0.6)
    assert not [key for key in sparse.state_dict() if "stage_norms" in key or "policy" in key or "scorers" in key]
    image = torch.randn(1, 1, 16, 32, 40)
    seen = []
    sparse.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        assert not torch.allclose(sparse(image), dense(image))
        _, last, hidden = seen[0]
        assert all(torch.equal(each, last) == (skips == "completed") for each in hidden)
        set_ratio(sparse, 0)
        assert torch.equal(sparse(image), dense(image))
    with pytest.raises(ConfigError, match=r"drops tokens already, by ratios of \(0.5, 0.5, 0.5\)"):
        sparse_of(own_unetr(ratios=0.5))


def test_air_scorer_sees_the_image_and_keeps_the_body():
    image = torch.full((1, 1, *SIZE), -1.0)
    image[..., 8:24, 8:24, :16] = torch.randn(16, 16, 16)  # 2 x 2 x 2 tokens of body in 4 x 4 x 3
    content = image_content(image, 48)
    assert (content > 0.1).sum() == 8
    sparse = sparse_of(tiny_primus(SIZE), scorer="air", locations=(0,), ratio=0.8)
    kept = []
    sparse.eva.reduction.register_forward_hook(lambda _, __, now: kept.append(now.positions))
    with torch.no_grad():
        sparse(image)
    assert set(content[0].nonzero().flatten().tolist()) <= set(kept[0][0].tolist())


def test_macs_of_primus_m_are_those_of_the_sheet():
    giga = {}
    with torch.device("meta"):
        dense = Primus(1, 864, (8, 8, 8), 14, 16, 12, (96, 96, 96), init_values=0.1, scale_attn_inner=True)
    giga["dense"] = count_operations(dense, (1, 1, 96, 96, 96)).macs() / 1e9
    assert giga["dense"] == pytest.approx(338.0, abs=0.1)
    assert measure_cost(dense, (1, 1, 96, 96, 96)).macs() / 1e9 == pytest.approx(338.0, abs=0.1)
    for ratio, expected in ((0.5, 178.1), (0.75, 138.0), (0.9, 122.9)):
        settings = {"ratio": ratio, "scorer": "mlp", "completion": "fusion"}
        sparse = extend_spec(token_sparse_edits(dense, TokenSparseConfig(**settings)), copy.deepcopy(dense))
        # the sheet's completion has another inner design, so within 2 %
        assert count_operations(sparse, (1, 1, 96, 96, 96)).macs() / 1e9 == pytest.approx(expected, rel=0.02)


def test_plan_tells_what_the_encoder_costs_before_and_after():
    dense = tiny_primus(SIZE)
    cost = measure_cost(dense, (1, 1, *SIZE))
    plan = plan_token_sparse(dense, TokenSparseConfig(ratio=0.5, scorer="energy"), cost)
    (decision,) = plan.decisions
    assert (decision.layer, decision.action, decision.shape) == ("eva", "token_sparse", (48, 48))
    assert decision.macs_before == count_operations(dense, (1, 1, *SIZE)).macs("torch", "eva")
    assert decision.macs_after < 0.7 * decision.macs_before
    assert decision.parameters_after == decision.parameters_before


def test_compress_with_images_fits_the_completion_and_errs_less():
    from nnslim.methods.token_sparse.plan import fit_completion

    torch.manual_seed(0)
    dense = tiny_primus(SIZE)
    tiles = [torch.randn(1, 1, *SIZE) for _ in range(12)]
    config = TokenSparseConfig(ratio=0.5, scorer="energy", completion="fusion")
    slim = sparse_of(dense, **config.model_dump(include={"ratio", "scorer", "completion"}))
    cost = measure_cost(dense, (1, 1, *SIZE))
    before = fit_completion(dense, slim, config, cost, tiles, compensate=False)
    after = fit_completion(dense, slim, config, cost, tiles)
    assert after["eva"] < 0.9 * before["eva"]


def test_compress_gives_the_same_weights_twice_and_counts_the_saving():
    dense = tiny_primus(SIZE)
    settings = load_config({"methods": [{"method": "token_sparse", "ratio": 0.5}], "run": {"guard": False}})
    assert isinstance(settings, SlimConfig)
    first, second = (compress(dense, [dense.state_dict()], settings, (1, 1, *SIZE)) for _ in range(2))
    assert all(torch.equal(first.weights[0][key], second.weights[0][key]) for key in first.weights[0])
    assert first.slim.macs < 0.75 * first.dense.macs


def test_network_without_transformer_is_refused(tiny_net, tiny_shape):
    with pytest.raises(ConfigError, match="no transformer encoder"):
        plan_token_sparse(
            tiny_net("plain3d"), TokenSparseConfig(), measure_cost(tiny_net("plain3d"), tiny_shape("plain3d"))
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, "0 <= ratio < 1"),
        ({"locations": (3, 1)}, "ascending"),
        ({"locations": (1, 3), "ratio": (0.5,)}, "ratio lists 1 values for 2 locations"),
        ({"scorer": "best"}, "scorer"),
        ({"colour": 1}, "unknown key 'colour'"),
    ],
)
def test_config_faults_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"methods": [{"method": "token_sparse", **settings}]})


def test_location_beyond_the_depth_is_refused_and_changes_nothing():
    network = tiny_primus(SIZE)
    before = list(dict(network.named_modules()))
    with pytest.raises(SpecError, match="location 9 is beyond its 4 blocks"):
        apply_spec(SlimSpec(token_sparse_edits(network, TokenSparseConfig(locations=(9,)))), network)
    assert list(dict(network.named_modules())) == before


@pytest.mark.parametrize("config", ["mlp-fusion", "merge"])
def test_sparse_primus_compiles_whole_in_training_and_evaluation(config):
    sparse = sparse_of(tiny_primus(SIZE), **CONFIGS[config])
    image = torch.randn(1, 1, *SIZE)
    explained = torch.compile(sparse, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(explained(image), sparse(image), atol=1e-5)
    torch.compile(sparse.train(), fullgraph=True, backend="aot_eager")(image).square().mean().backward()


@pytest.mark.parametrize("config", ["default", "mlp-fusion", "merge", "air-then-mlp"])
def test_sparse_primus_runs_in_openvino(config):
    import openvino

    sparse = sparse_of(tiny_primus(SIZE), **CONFIGS[config])
    image = torch.randn(1, 1, *SIZE)
    with torch.no_grad():
        expected = sparse(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer warns of every size that it takes for a constant
        model = openvino.convert_model(sparse, example_input=image)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(image.numpy())[0])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()

    # the backend's own conversion, which once ended the process: in one of its own
    program = (
        "import torch\nfrom helpers import tiny_primus\nfrom test_token_sparse_edit import CONFIGS, SIZE, sparse_of\n"
        "from nnslim.running.engine import Settings, make_engine\n"
        f"network, image = sparse_of(tiny_primus(SIZE), **CONFIGS[{config!r}]), torch.randn(1, 1, *SIZE)\n"
        "with torch.inference_mode():\n"
        "    found, expected = make_engine(network, image.shape, Settings('openvino'))(image), network(image)\n"
        "print(float((found - expected).abs().max() / expected.abs().max()))\n"
    )
    if config == "merge":  # its static form would end the process, so it is refused
        with pytest.raises(BackendError, match="adds up by index"):
            make_engine(sparse, image.shape, Settings("openvino"))
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) <= 1e-4


def test_locations_are_blocks_or_shares_of_them():
    assert (
        TokenSparseConfig().stages(12)[0] == TokenSparseConfig(locations=(0.25, 0.5, 0.75)).stages(12)[0] == [3, 6, 9]
    )
    assert TokenSparseConfig(locations=(0, 0.5)).stages(9)[0] == [0, 4]
    for wrong in ((1.5,), (3.0,), (-0.5,), (0.75, 0.25)):
        with pytest.raises(ValueError, match=r"locations? (is|are)"):
            TokenSparseConfig(locations=wrong)

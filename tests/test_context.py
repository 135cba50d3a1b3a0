"""NNSlimContext on the real predictor: what it changes, what it puts back, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import load_stock, make_predictor, random_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

import nnslim.maths.lowrank
from nnslim import NNSlimContext
from nnslim.compression.config import from_dict, load_config, tucker
from nnslim.errors import ConfigError, HostError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.compatibility import check_version
from nnslim.hosts.nnunet.model.trained_model import build_untrained, read_trained_model
from nnslim.hosts.nnunet.predict.sliding_window import window_logits
from nnslim.methods.tucker.edit import TuckerConv
from nnslim.network.spec import spec_of

# Stock torch, so that logits can be compared bit by bit; backends and the guard have tests of their own.
STOCK = {"backend": "stock", "guard": False}
HALF = {"methods": [{"method": "tucker", "rank_factor": 0.5, "rank_min": 2}], "run": STOCK}
QUARTER = {"methods": [{"method": "tucker", "rank_factor": 0.25, "rank_min": 2}], "run": STOCK}


def _parameters(predictor):
    return sum(p.numel() for p in predictor.network.parameters())


def _logits(predictor):
    return predictor.predict_logits_from_preprocessed_data(random_data(predictor)).float()


def test_context_all_folds_give_logits_of_the_compressed_folder(make_model, tmp_path):
    source = make_model("residual", folds=(0, 1))
    compress_model(read_trained_model(source), tmp_path / "slim", from_dict(HALF))
    with NNSlimContext(HALF) as slim:
        inside = load_stock(source, (0, 1))
    assert torch.equal(_logits(inside), _logits(load_stock(tmp_path / "slim", (0, 1))))
    assert len(inside.list_of_parameters) == 2
    report = slim.report.models[0]
    assert report.folds == 2 and report.slimmed.slim.macs < report.slimmed.dense.macs
    assert str(source) in str(slim.report) and "fewer" in str(slim.report)


def test_context_case_after_case_reloads_slim_weights(make_model):
    with NNSlimContext(HALF):
        predictor = load_stock(make_model(folds=(0, 1)), (0, 1))
    first = _logits(predictor)
    assert spec_of(predictor.network) is not None
    assert torch.equal(first, _logits(predictor))  # nnU-Net loads both folds again for each case


def test_context_normal_exit_puts_the_very_same_objects_back(make_model):
    before = dict(vars(nnUNetPredictor))
    with NNSlimContext(HALF):
        assert nnUNetPredictor.manual_initialization is not before["manual_initialization"]
        load_stock(make_model())
    assert dict(vars(nnUNetPredictor)) == before
    assert all(vars(nnUNetPredictor)[name] is value for name, value in before.items())


def test_context_exception_in_body_puts_everything_back_and_is_not_hidden():
    before = dict(vars(nnUNetPredictor))
    with pytest.raises(ZeroDivisionError), NNSlimContext(HALF):
        _ = 1 / 0
    assert dict(vars(nnUNetPredictor)) == before


def test_context_outside_models_are_dense(make_model):
    source = make_model()
    with NNSlimContext(HALF):
        slim = load_stock(source)
    dense = load_stock(source)
    assert spec_of(dense.network) is None
    assert _parameters(slim) < _parameters(dense)


def test_context_nested_inner_configuration_counts(make_model):
    source = make_model()
    before = dict(vars(nnUNetPredictor))
    with NNSlimContext(HALF) as outer:
        with NNSlimContext(QUARTER) as inner:
            quarter = load_stock(source)
        half = load_stock(source)
        with NNSlimContext({"apply": False, **HALF}) as off:
            dense = load_stock(source)
    assert _parameters(quarter) < _parameters(half) < _parameters(dense)
    assert [len(context.report.models) for context in (outer, inner, off)] == [1, 1, 1]
    assert "switched off" in str(off.report)
    assert dict(vars(nnUNetPredictor)) == before


def test_context_contexts_closed_out_of_order_leave_nothing_behind(make_model):
    before = dict(vars(nnUNetPredictor))
    first, second = NNSlimContext(HALF), NNSlimContext(QUARTER)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _parameters(load_stock(make_model())) > 0 and len(second.report.models) == 1
    second.__exit__(None, None, None)
    assert dict(vars(nnUNetPredictor)) == before


def test_context_entered_twice_is_refused():
    context = NNSlimContext(HALF)
    with context, pytest.raises(HostError, match="active already"):
        context.__enter__()


def test_context_threads_each_use_their_own_and_cannot_corrupt_each_other(make_model):
    source = make_model()
    before = dict(vars(nnUNetPredictor))
    sizes: dict[str, list[int]] = {"half": [], "quarter": []}
    expected = {}
    for name, config in (("half", HALF), ("quarter", QUARTER)):
        with NNSlimContext(config):
            expected[name] = _parameters(load_stock(source))
    gate = threading.Barrier(2)

    def work(name, config):
        gate.wait()
        for _ in range(6):
            with NNSlimContext(config):
                sizes[name].append(_parameters(load_stock(source)))

    threads = [threading.Thread(target=work, args=item) for item in (("half", HALF), ("quarter", QUARTER))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: set(values) for name, values in sizes.items()} == {n: {v} for n, v in expected.items()}
    assert dict(vars(nnUNetPredictor)) == before


def test_context_worker_thread_without_its_own_uses_the_active_one(make_model):
    source, found = make_model(), []
    with NNSlimContext(HALF) as slim:
        thread = threading.Thread(target=lambda: found.append(spec_of(load_stock(source).network)))
        thread.start()
        thread.join()
    assert found[0] is not None and len(slim.report.models) == 1


def test_context_tasks_of_one_thread_each_use_their_own(make_model):
    source, found = make_model(), {}

    async def own(number: int) -> None:
        config = {"methods": [{"method": "tucker", "rank_factor": 0.5, "rank_min": 2 + number}], "run": STOCK}
        with NNSlimContext(config) as slim:
            for _ in range(3):
                await asyncio.sleep(0)  # the others enter and leave theirs
            inside = await asyncio.to_thread(load_stock, source) if number % 2 else load_stock(source)
            found[number] = [edit.layer for edit in spec_of(inside.network).edits], len(slim.report.models)

    async def none() -> None:
        for _ in range(2):
            await asyncio.sleep(0)
            found.setdefault("none", []).append(spec_of(load_stock(source).network))

    async def started_inside() -> None:
        with NNSlimContext(HALF):
            child = asyncio.create_task(asyncio.to_thread(load_stock, source))
            await asyncio.sleep(0)
            found["child"] = spec_of((await child).network)

    async def outliving() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        found["late"] = spec_of(load_stock(source).network)

    async def everything() -> None:
        await asyncio.gather(none(), *(own(number) for number in range(4)), started_inside())
        with NNSlimContext(HALF):
            late = asyncio.create_task(outliving())
        await late

    asyncio.run(everything())
    assert found["none"] == [None, None], "another task's context is not its own"
    assert [found[number][1] for number in range(4)] == [1, 1, 1, 1]
    assert found["child"] is not None and found["late"] is None, "a context ends with its block"


def test_context_loading_leaves_the_random_states_where_stock_leaves_them(make_model):
    source, states = make_model(), []
    for config in (None, HALF):
        torch.manual_seed(3)
        np.random.seed(3)
        with NNSlimContext(config) if config else nullcontext():
            load_stock(source)
        states.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()))
    assert states[0] == states[1]


def test_context_unknown_signature_is_refused_and_nothing_changed(monkeypatch):
    def initialize_from_trained_model_folder(self, folder, folds, name="x"):
        raise AssertionError("must not run")

    name = "initialize_from_trained_model_folder"
    monkeypatch.setattr(nnUNetPredictor, name, initialize_from_trained_model_folder)
    before = dict(vars(nnUNetPredictor))
    with pytest.raises(HostError, match=r"takes \(self, folder, folds, name\), but \(self, model_training_output_dir"):
        NNSlimContext(HALF).__enter__()
    assert dict(vars(nnUNetPredictor)) == before


@pytest.fixture
def installed(monkeypatch):
    """Pretend that another nnU-Net is installed."""

    def pretend(version):
        for place in ("model.compatibility", "cases.export_patches", "model.trained_model"):
            monkeypatch.setattr(f"nnslim.hosts.nnunet.{place}.nnunet_version", lambda: version)
        check_version.cache_clear()

    yield pretend
    check_version.cache_clear()


@pytest.mark.parametrize("version", ["2.1", "2.2.1", "2.3.0"])
def test_context_old_version_is_refused(installed, version):
    installed(version)
    with pytest.raises(HostError, match=rf"nnU-Net {version} is installed; nnslim needs 2\.3\.1 or newer"):
        NNSlimContext(HALF).__enter__()


@pytest.mark.parametrize("version", ["2.9.0", "3.0"])
def test_context_newer_version_is_used_with_one_warning_as_far_as_it_fits(
    installed, make_model, case_folder, tmp_path, monkeypatch, caplog, version
):
    installed(version)
    source = make_model()
    before = vars(nnUNetPredictor)["predict_from_files"]
    with caplog.at_level(logging.WARNING, "nnslim"):
        for _ in range(2):
            with NNSlimContext(HALF) as slim:
                assert spec_of(load_stock(source).network) is not None
                # how images are read and written is not touched: only what it compresses has been checked
                assert vars(nnUNetPredictor)["predict_from_files"] is before
    assert slim.report.models[0].slimmed is not None
    assert caplog.text.count(f"nnU-Net {version} is newer than 2.8.x") == 1
    compress_model(read_trained_model(source), tmp_path / "slim", from_dict(HALF))
    monkeypatch.setattr(nnUNetPredictor, "manual_initialization", lambda self, network, plans: None)
    with pytest.raises(HostError, match=r"nnUNetPredictor\.manual_initialization takes \(self, network, plans\), but"):
        NNSlimContext(HALF).__enter__()


def test_context_failing_patch_takes_earlier_ones_back(monkeypatch):
    from nnslim.patching import AttributePatch

    before = dict(vars(nnUNetPredictor))
    calls = []
    real = AttributePatch.apply

    def apply(self):
        calls.append(self.name)
        if len(calls) == 3:
            raise RuntimeError("third patch fails")
        real(self)

    monkeypatch.setattr(AttributePatch, "apply", apply)
    with pytest.raises(RuntimeError, match="third patch"):
        NNSlimContext(HALF).__enter__()
    assert len(calls) == 3 and dict(vars(nnUNetPredictor)) == before


def test_context_second_load_reads_the_cache_and_decomposes_nothing(make_model, monkeypatch, tmp_path):
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path / "cache"))
    source = make_model(folds=(0, 1))
    calls = []
    real = nnslim.maths.lowrank.partial_tucker

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr("nnslim.methods.tucker.edit.partial_tucker", counted)
    with NNSlimContext(HALF) as slim:
        first = load_stock(source, (0, 1))
        decompositions = len(calls)
        second = load_stock(source, (0, 1))
    layers = sum(decision.action == "tucker" for decision in slim.report.models[0].slimmed.decisions)
    assert decompositions == 2 * layers and len(calls) == decompositions
    assert [model.from_cache for model in slim.report.models] == [False, True]
    assert torch.equal(_logits(first), _logits(second))


def test_context_cache_that_cannot_be_written_is_a_warning(make_model, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    config = {**HALF, "cache": {"folder": str(tmp_path / "file" / "cache")}}
    with NNSlimContext(config) as slim, caplog.at_level(logging.WARNING, "nnslim"):
        assert spec_of(load_stock(make_model()).network) is not None
    assert "compressed weights are not kept" in caplog.text and slim.report.models[0].from_cache is False


def test_context_tucker_cnn_dictionary_works_and_apply_tucker_false_leaves_dense(make_model, tmp_path):
    source = make_model()
    legacy = {
        "tucker_args": {"rank_mode": "relative", "rank_factor": 0.5, "rank_min": 2, "decompose": True, "verbose": True},
        "apply_tucker": True,
        "inference_bs": 3,
        "ckpt_path": str(tmp_path / "kept" / "net.pt"),
        "save_model": True,
        "load_model": True,
    }
    with NNSlimContext(legacy) as slim:
        predictor = load_stock(source)
        logits = _logits(predictor)
    assert slim.report.models[0].slimmed is not None and torch.isfinite(logits).all()
    assert len(list((tmp_path / "kept" / "nnslim").glob("*.pt"))) == 1
    with NNSlimContext({**legacy, "apply_tucker": False}) as off:
        assert spec_of(load_stock(source).network) is None
    assert off.report.models[0].slimmed is None


def test_context_slim_folder_inside_context_is_left_as_it_is(make_model, tmp_path):
    compress_model(read_trained_model(make_model()), tmp_path / "slim", from_dict(HALF))
    with NNSlimContext(QUARTER) as slim:
        predictor = load_stock(tmp_path / "slim")
    assert "slim model already" in str(slim.report)
    assert torch.equal(_logits(predictor), _logits(load_stock(tmp_path / "slim")))


def test_context_trainer_with_own_network_is_compressed_in_memory(make_model, tmp_path):
    source = make_model()
    model = read_trained_model(source)
    model.trainer_name = "nnUNetTrainerBN"
    network = build_untrained(model)
    assert any(isinstance(module, torch.nn.BatchNorm3d) for module in network.modules())
    content = torch.load(source / "fold_0" / "checkpoint_final.pth", weights_only=False)
    content |= {"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainerBN"}
    torch.save(content, source / "fold_0" / "checkpoint_final.pth")
    with NNSlimContext(HALF) as slim:
        assert torch.isfinite(_logits(load_stock(source))).all()
    assert slim.report.models[0].slimmed.slim.macs < slim.report.models[0].slimmed.dense.macs


@pytest.mark.parametrize("with_parameters", [True, False])
def test_context_manual_initialization_slims_a_copy(make_model, with_parameters):
    dense = load_stock(make_model(folds=(0, 1)), (0, 1))
    network = dense.network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    predictor = make_predictor()
    with NNSlimContext(HALF) as slim:
        predictor.manual_initialization(
            network,
            dense.plans_manager,
            dense.configuration_manager,
            dense.list_of_parameters if with_parameters else None,
            dense.dataset_json,
            "nnUNetTrainer",
            None,
        )
    assert spec_of(predictor.network) is not None and spec_of(network) is None
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert (len(predictor.list_of_parameters) == 2) if with_parameters else (predictor.list_of_parameters is None)
    assert slim.report.models[0].folds == (2 if with_parameters else 1)
    assert torch.isfinite(predictor.predict_sliding_window_return_logits(random_data(predictor))).all()


def test_context_compiled_network_is_unwrapped_slimmed_and_compiled_again(make_model, monkeypatch):
    monkeypatch.setenv("nnUNet_compile", "true")
    with NNSlimContext(HALF):
        predictor = load_stock(make_model())
    assert hasattr(predictor.network, "_orig_mod")
    assert spec_of(predictor.network._orig_mod) is not None


@pytest.mark.parametrize("kind", ["plain", "2d", "regions"])
@pytest.mark.parametrize("batch", [2, 3, 64])
def test_tile_batch_not_dividing_the_tiles_drops_none(make_model, kind, batch):
    """tucker-cnn dropped the last incomplete group of tiles, which left 0/0 = NaN."""
    source = make_model(kind)
    one = {"methods": HALF["methods"], "run": {"tile_batch": 1}}
    with NNSlimContext(one):
        # Even weights: in the corners of a tile the half-precision Gaussian underflows in nnU-Net's own sums.
        predictor = load_stock(source, use_gaussian=False)
        stock = _logits(predictor)
    with NNSlimContext({**one, "run": {"tile_batch": batch}}):
        batched = _logits(predictor)
    slicers = predictor._internal_get_sliding_window_slicers((20, 20, 20))
    assert len(slicers) % 3 != 0 and len(slicers) > 2
    assert torch.isfinite(batched).all()
    # nnU-Net sums in half precision, so the difference is one of its rounding steps.
    torch.testing.assert_close(batched, stock, rtol=0, atol=4e-3 * float(stock.abs().max()))


def test_context_shows_the_progress_that_nnunet_shows(make_model, capsys):
    with NNSlimContext({"methods": HALF["methods"], "run": {"tile_batch": 2}}):
        predictor = load_stock(make_model())
        for shown in (False, True):
            predictor.allow_tqdm = shown
            _logits(predictor)
            assert ("100%" in capsys.readouterr().err) is shown


def test_tile_batch_with_mirroring_equals_one_by_one(make_model):
    source = make_model()
    with NNSlimContext({"apply": False, "run": {"tile_batch": 3}}):
        predictor = load_stock(source, use_mirroring=True, use_gaussian=False)
        batched = _logits(predictor)
    stock = _logits(predictor)
    torch.testing.assert_close(batched, stock, rtol=0, atol=4e-3 * float(stock.abs().max()))


def test_tile_batch_gaussian_weights_do_not_depend_on_the_batch(make_model):
    predictor = load_stock(make_model())
    data = random_data(predictor)
    slicers = predictor._internal_get_sliding_window_slicers(tuple(data.shape[1:]))
    one, three = (window_logits(predictor, data, slicers, False, batch) for batch in (1, 3))
    torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-4)
    stock = predictor._internal_predict_sliding_window_return_logits(data, slicers, False).float()
    inner = (slice(None), *[slice(6, 14)] * 3)  # away from the corners, see above
    torch.testing.assert_close(one[inner], stock[inner], rtol=0, atol=2e-2 * float(stock[inner].abs().max()))


def test_context_nothing_loaded_says_so(caplog):
    with caplog.at_level(logging.WARNING, "nnslim"), NNSlimContext(HALF) as slim:
        pass
    assert "nothing was compressed" in caplog.text and "no model was loaded" in str(slim.report)


def test_context_bad_config_fails_before_anything_is_patched():
    before = dict(vars(nnUNetPredictor))
    with pytest.raises(ConfigError, match="nearest: tucker-balanced"):
        NNSlimContext("tucker-balancd")
    assert dict(vars(nnUNetPredictor)) == before


def test_no_config_means_the_search_with_images_and_the_gentle_preset_without(case_folder, caplog):
    caplog.set_level("INFO", "nnslim")
    assert NNSlimContext(images=case_folder).config == load_config("tucker-auto").with_images(case_folder)
    assert "no config is named: tucker-auto" in caplog.text
    caplog.clear()
    assert NNSlimContext().config == load_config("tucker-balanced")
    assert "no config is named: tucker-balanced" in caplog.text
    caplog.clear()
    assert NNSlimContext("tucker-small").config == load_config("tucker-small") and not caplog.text


def test_context_class_itself_and_no_argument_use_the_default_configuration(make_model):
    """tucker-cnn's README hands the class itself to `with`, which raised there."""
    before = dict(vars(nnUNetPredictor))
    with NNSlimContext as outer:
        assert outer.config == NNSlimContext().config == load_config("tucker-balanced")
        with NNSlimContext(HALF) as inner:
            load_stock(make_model())
        with pytest.raises(KeyError), NNSlimContext:
            raise KeyError
        load_stock(make_model(parent="others"))
    assert "others" not in inner.report.models[0].source and "others" in outer.report.models[0].source
    assert dict(vars(nnUNetPredictor)) == before


@pytest.mark.parametrize("first", ["nnslim.context", "totalsegmentator.nnunet"])
def test_context_import_order_with_totalsegmentator_both_patches_act(first):
    reason = "TotalSegmentator is not installed, or not made for this nnU-Net"
    pytest.importorskip("totalsegmentator.custom_trainers", reason=reason, exc_type=ImportError)
    code = f"""
import importlib, sys
order = ["nnslim.context", "totalsegmentator.nnunet"]
order.remove({first!r})
for name in [{first!r}, *order]:
    importlib.import_module(name)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as P
from nnslim import NNSlimContext
import inspect
before = dict(vars(P))
assert P._totalseg_cropped_logits_resampling_patch
with NNSlimContext({HALF!r}):
    assert hasattr(P.initialize_from_trained_model_folder, "__nnslim_original__")
    assert "use_cropped_logits_resampling" in inspect.signature(P.predict_from_files).parameters
    assert P.predict_from_files.__nnslim_original__ is before["predict_from_files"]
assert dict(vars(P)) == before
print("both")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("both"), done.stderr[-800:]


def test_context_predict_from_files_through_worker_processes(make_model, case_folder, tmp_path):
    """nnU-Net's own file pipeline, spawned export workers included, runs on the slim network."""
    import nibabel as nib

    source = make_model()
    with NNSlimContext(HALF) as slim:
        predictor = load_stock(source)
        predictor.predict_from_files(
            str(case_folder), str(tmp_path / "out"), num_processes_preprocessing=1, num_processes_segmentation_export=1
        )
    labels = nib.load(tmp_path / "out" / "a.nii.gz")
    image = nib.load(case_folder / "a_0000.nii.gz")
    assert labels.shape == image.shape and np.allclose(labels.affine, image.affine)
    assert set(np.unique(np.asarray(labels.dataobj))) <= {0, 1, 2} and len(slim.report.models) == 1


def test_tucker_helper_and_dictionary_give_the_same_configuration():
    assert tucker(rank_factor=0.5, rank_min=2) == from_dict({"methods": HALF["methods"]})


@pytest.mark.parametrize("backend", ["eager", "auto", "openvino"])
@pytest.mark.parametrize("kind", ["plain", "2d", "anisotropic"])
def test_context_backends_give_the_labels_of_stock_torch_for_every_fold(backend, kind, make_model, monkeypatch):
    monkeypatch.setattr("nnslim.running.runner.Runner.worth_measuring", float("inf"))
    if backend == "openvino":
        pytest.importorskip("openvino")
    source = make_model(kind, folds=(0, 1))
    logits = {}
    for name in ("stock", backend):
        with NNSlimContext({**HALF, "run": {"backend": name, "guard": False, "export": "stock"}}) as slim:
            predictor = load_stock(source, (0, 1))
            data = random_data(predictor)
            logits[name] = predictor.predict_logits_from_preprocessed_data(data).float()
        assert slim.report.models[0].slimmed is not None
    assert predictor.network.backend == {"auto": "eager"}.get(backend, backend)
    assert len(predictor.network.engines) == 2
    assert logits[backend].shape == logits["stock"].shape and logits[backend].is_contiguous()
    # The stock window sums in half precision, and its Gaussian underflows in the corners: compare labels.
    same = (logits[backend].argmax(0) == logits["stock"].argmax(0)).float().mean()
    assert same > 0.98
    inner = tuple(slice(size // 4, -(size // 4)) if size > 3 else slice(None) for size in logits["stock"].shape[1:])
    difference = (logits[backend] - logits["stock"])[(slice(None), *inner)]
    assert difference.abs().max() < 0.02 * logits["stock"].std()


@pytest.fixture
def factored_takes(monkeypatch):
    """Make up the seconds of a pass: 10 s for a dense network, and so many for each factored layer more or less."""

    def set_times(seconds: float, first: float) -> None:
        def measure(engines, shape):
            chains = [[m for m in engine.modules() if isinstance(m, TuckerConv)] for engine in engines]
            return [10 + sum(first if chain.in_channels == 8 else seconds for chain in found) for found in chains]

        monkeypatch.setattr("nnslim.running.speed.pass_seconds", measure)

    return set_times


GUARDED = {**HALF, "run": {"backend": "stock"}, "cache": {"read": False}}


def test_slim_model_that_is_slower_stays_dense_and_the_report_says_by_how_much(make_model, factored_takes, tmp_path):
    from nnslim.errors import SlowerError

    source = make_model()
    factored_takes(1.0, first=1.0)
    with NNSlimContext(GUARDED) as slim:
        predictor = load_stock(source)
    assert spec_of(predictor.network) is None
    assert "left as it is (the slim model would be slower here: 19 s per patch, dense 10 s" in str(slim.report)
    assert "no factored layer saves time, of 9 measured: encoder.stages.0" in str(slim.report)
    with pytest.raises(SlowerError, match=r"slower here: .*dense 10 s .*saves time, of 9 .*nothing is written"):
        compress_model(read_trained_model(source), tmp_path / "slim", from_dict(GUARDED))
    assert [path.name for path in tmp_path.iterdir()] == ["models"], "nothing beside what was there"
    forced = compress_model(read_trained_model(source), tmp_path / "slim", from_dict(GUARDED), allow_slower=True)
    assert not forced.speed.gains and not forced.speed.put_back and len(forced.spec.edits) == 9
    with NNSlimContext(HALF):
        assert spec_of(load_stock(source).network) == forced.spec


def test_layers_go_back_to_dense_until_the_model_is_faster(make_model, factored_takes, tmp_path):
    source = make_model()
    with NNSlimContext(HALF):
        whole = spec_of(load_stock(source).network)
    factored_takes(-0.5, first=8.0)
    with NNSlimContext(GUARDED) as slim:
        predictor = load_stock(source)
    (report,) = slim.report.models
    spec, back = spec_of(predictor.network), report.speed.put_back
    assert back and set(spec.edits) == {edit for edit in whole.edits if edit.layer not in back}
    assert f"{len(back)} layer(s) went back to dense: {back[0]}" in str(slim.report)
    dense = torch.load(source / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    for name in back:
        assert torch.equal(predictor.list_of_parameters[0][f"{name}.weight"], dense[f"{name}.weight"])
    written = compress_model(read_trained_model(source), tmp_path / "slim", from_dict(GUARDED))
    assert written.spec == spec
    record = json.loads((tmp_path / "slim" / "nnslim.json").read_text())
    assert record["speed"]["put_back"] == list(back) and record["speed"]["planned_ms"] > record["speed"]["slim_ms"]
    stock = make_predictor()
    stock.initialize_from_trained_model_folder(str(tmp_path / "slim"), (0,))
    data = random_data(stock)
    logits = [one.predict_logits_from_preprocessed_data(data) for one in (stock, predictor)]
    torch.testing.assert_close(*logits)

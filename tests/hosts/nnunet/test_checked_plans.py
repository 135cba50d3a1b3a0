"""Plans that name programs, garbage or absurd sizes: nothing runs, nothing is built, and one line says why."""

from __future__ import annotations

import copy
import json
import sys
from functools import partial

import pytest
import torch
from helpers import load_stock, make_plans, slim_model

from nnslim.compression.config import tucker
from nnslim.context import NNSlimContext
from nnslim.errors import ConfigError, ModelError, NNSlimError
from nnslim.hosts.nnunet.compress.compress_model import compress_model
from nnslim.hosts.nnunet.model.checked_plans import LimitedBuild, base_class, check_directory, locate_trusted
from nnslim.hosts.nnunet.model.trained_model import build_network, input_shape, managers_of, read_trained_model
from nnslim.hosts.nnunet.predict import PredictSettings, load_predictor
from nnslim.inflation.window_net import WindowNet

DATASET = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "one": 1}, "file_ending": ".nii.gz"}
PROGRAM = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
# Functions, classes and modules that do something when they are called or imported, under every disguise.
PAYLOADS = (
    PROGRAM,
    "os.system",
    "subprocess.Popen",
    "builtins.exec",
    "planted.Planted",
    "planted",
    "torch.os.system",
    "torch.load",
    "torch.hub.load",
    "torch.nn.Sequential",
    "torch.nn.functional.relu",
    "torch.nn.modules.planted.Planted",
    "torch.nn.parallel.DistributedDataParallel",
    "torch.utils.cpp_extension.load_inline",
    "dynamic_network_architectures.architectures.unet.np.load",
    "dynamic_network_architectures.architectures.primus.RotaryEmbeddingCat",
    "dynamic_network_architectures.architectures.planted.nn",
    "nnslim.files.write_bytes",
    "nnslim.architectures.import_module",
    "nnunetv2.run.run_training.run_training",
    "monai.networks.nets.UNETR",
    "timm.create_model",
    " torch.nn.Conv3d",
    "torch.nn..Conv3d",
    "",
    ["os.system"],
    {"os": "system"},
    7,
    True,
)
KEYS = ("network_class_name", "conv_op", "norm_op", "dropout_op", "nonlin", "extra", "unlisted", "nnslim_base")
FORMATS = ("own", "inherited", "former name")
_watched: list[str] | None = None


def _hook(event, arguments):
    if _watched is None:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "exec", "import"):
        _watched.append(f"{event} {arguments[0]!r}"[:100])


sys.addaudithook(_hook)


@pytest.fixture(scope="module", autouse=True)
def planted(tmp_path_factory):
    """A module that can be imported and leaves a file when it is; what nnslim itself imports is there already."""
    folder = tmp_path_factory.mktemp("planted")
    mark = folder / "RAN"
    (folder / "planted.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom torch import nn\nclass Planted(nn.Module): pass\n"
    )
    plans, name = make_plans("plain")
    managers_of(folder, plans, DATASET, name)
    base_class("nnslim.architectures.slim_network")
    with pytest.raises(ModelError):
        base_class("dynamic_network_architectures.architectures.gone.Gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield mark
        sys.modules.pop("planted", None)


def hostile(key, payload, written="own"):
    """Return plans in which one key names the payload, and the name of the configuration that has it."""
    plans, name = make_plans("plain")
    architecture = plans["configurations"][name]["architecture"]
    kwargs = architecture["arch_kwargs"]
    if key == "nnslim_base" or written == "former name":
        kwargs["nnslim_base"] = architecture["network_class_name"]
        kwargs["nnslim_spec"] = {"version": 1, "edits": []}
        architecture["network_class_name"] = (
            "nnslim.hosts.nnunet.network.slim_network"
            if written == "former name"
            else "nnslim.architectures.slim_network"
        )
    if key == "network_class_name":
        architecture[key] = payload
    elif key == "unlisted":  # some trainers import conv_op whether it is listed or not
        architecture["_kw_requires_import"], kwargs["conv_op"] = [], payload
    else:
        kwargs[key] = payload
    if key == "extra":
        architecture["_kw_requires_import"].append(key)
    program = {"entrypoint": "true", "args": [], "env": {}, "stdout": None, "stderr": None, "numa_options": None}
    kwargs["nonlin_kwargs"] = {**program, "local_rank_id": 0}
    if written == "inherited":
        plans["configurations"]["child"] = {"inherits_from": name}
        name = "child"
    return plans, name


@pytest.mark.parametrize("written", FORMATS)
@pytest.mark.parametrize("key", KEYS)
def test_nothing_runs_whatever_a_key_names(key, written, tmp_path, planted):
    """8 keys, 29 payloads, 3 formats, each read as the commands do and as the context does."""
    global _watched
    for payload in PAYLOADS:
        if key == "unlisted" and not isinstance(payload, str):
            continue  # imported by nobody
        plans, name = hostile(key, payload, written)
        (tmp_path / "plans.json").write_text(json.dumps(plans))
        loaded, refused, _watched = set(sys.modules), [], []
        for read in (partial(managers_of, tmp_path, plans, DATASET, name), partial(check_directory, tmp_path)):
            try:
                read()
            except ModelError as error:
                refused.append(str(error))
        ran, _watched = [each for each in _watched if "planted" in each or not each.startswith("import")], None
        assert not ran and set(sys.modules) == loaded and not planted.exists(), (payload, ran)
        assert len(refused) == 2, (payload, refused)
        assert all("\n" not in line and len(line) < 800 and str(tmp_path) in line for line in refused), refused


def test_old_format_names_none_of_its_own(tmp_path):
    for payload in PAYLOADS:
        plans, name = make_plans("old plans")
        plans["configurations"][name]["UNet_class_name"] = payload
        with pytest.raises(ModelError, match="cannot be understood"):
            managers_of(tmp_path, plans, DATASET, name)


@pytest.mark.parametrize(
    "name", ["isfile", "os", "time", "recursive_find_nothing", "", None, 3, [], "BaseReaderWriter\n"]
)
@pytest.mark.parametrize(
    "key", ["image_reader_writer", "label_manager", "preprocessor_name", "resampling_fn_data", "resampling_fn_seg"]
)
def test_what_nnunet_finds_by_name_is_its_own(key, name, tmp_path):
    plans, configuration = make_plans("plain")
    (plans if key in plans else plans["configurations"][configuration])[key] = name
    with pytest.raises(ModelError, match=r"plans\.json"):
        managers_of(tmp_path, plans, DATASET, configuration)


def test_what_plans_may_name_is_found():
    assert locate_trusted("torch.nn.modules.conv.Conv3d", "plans") is torch.nn.Conv3d
    assert locate_trusted("torch.nn.LeakyReLU", "plans") is torch.nn.LeakyReLU
    assert locate_trusted("torch.nn.Identity", "plans") is torch.nn.Identity
    block = "dynamic_network_architectures.building_blocks.residual.BottleneckD"
    assert locate_trusted(block, "plans").__name__ == "BottleneckD"
    moved = "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet"
    assert base_class(moved).__module__ == "dynamic_network_architectures.architectures.unet"


def test_own_networks_are_named_in_the_environment(monkeypatch, planted):
    with pytest.raises(ModelError, match="NNSLIM_NETWORKS"):
        base_class("planted.Planted")
    monkeypatch.setenv("NNSLIM_NETWORKS", "another.module, planted")
    assert base_class("planted.Planted").__module__ == "planted"
    with pytest.raises(ModelError, match=r"names 'planted\.nn'"):
        base_class("planted.nn")
    sys.modules.pop("planted")
    planted.unlink()


def plant(model, key="nonlin", payload="planted.Planted"):
    """Let a model name the planted module."""
    plans = json.loads((model / "plans.json").read_text())
    for settings in plans["configurations"].values():
        architecture = settings["architecture"]
        (architecture if key in architecture else architecture["arch_kwargs"])[key] = payload
    (model / "plans.json").write_text(json.dumps(plans))
    return model


@pytest.mark.parametrize("key", ["nonlin", "network_class_name"])
def test_context_refuses_what_stock_nnunet_runs(key, make_model, planted):
    model = plant(make_model(), key)
    with NNSlimContext("tucker-small"), pytest.raises(ModelError, match=r"plans\.json, configuration 3d_fullres, "):
        load_stock(model)
    assert not planted.exists()
    with pytest.raises((TypeError, RuntimeError)):
        load_stock(model)  # it is no network, but it was imported
    assert planted.exists()
    sys.modules.pop("planted")
    planted.unlink()


COMMANDS = {
    "compress": "-m MODEL -o OUT -c tucker-small",
    "plan": "-m MODEL -o OUT.csv -c tucker-small",
    "predict": "-m MODEL -i IMAGES -o OUT",
    "agree": "-m MODEL --dense GOOD -i IMAGES",
    "benchmark": "-m MODEL -o OUT",
    "export": "-m MODEL -o OUT.onnx",
    "report": "-m MODEL --dense GOOD -i IMAGES -o OUT.html",
    "finetune": "-m MODEL -d 998 -o OUT",
    "distill": "-m MODEL --teacher GOOD -i IMAGES -o OUT",
    "train": "-d 998 --start MODEL",
    "inflate": "-m MODEL -o OUT.pth",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_in_one_line(name, make_model, case_folder, command, tmp_path, monkeypatch, planted):
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
        (tmp_path / kind / "Dataset998_Ball").mkdir(parents=True)
    good = make_model(parent="good")
    slim = name in ("agree", "report", "distill")
    model = plant(slim_model(good, tmp_path / "slim") if slim else make_model())
    places = {"MODEL": model, "GOOD": good, "IMAGES": case_folder, "OUT": tmp_path / "out"}
    words = COMMANDS[name].split()
    for word, place in places.items():
        words = [each.replace(word, str(place)) if each.startswith(word) else each for each in words]
    code, _, err = command(name, *words, "-q")
    assert code == 2 and "names 'planted.Planted'" in err and err.count("\n") == 1, err
    assert not planted.exists()


GARBAGE = (None, [], {}, "x", -1, 1e308, [None], [1] * 1_000)


def mutants(content):
    """Yield copies with one value replaced by three kinds of garbage in turn, and where it is; of lists the first."""

    def places(value, path=()):
        if isinstance(value, (dict, list)):
            for key in value if isinstance(value, dict) else range(min(1, len(value))):
                yield (*path, key)
                yield from places(value[key], (*path, key))

    for number, (*path, last) in enumerate(places(content)):
        for garbage in (GARBAGE * 2)[number % len(GARBAGE) :][:3]:
            made = copy.deepcopy(content)
            inside = made
            for key in path:
                inside = inside[key]
            inside[last] = garbage
            yield (*path, last), made


@pytest.mark.parametrize("file", ["plans.json", "dataset.json"])
@pytest.mark.parametrize("kind", ["plain", "old plans"])
def test_garbage_under_any_key_is_a_line_or_does_not_matter(kind, file, make_model):
    model = make_model(kind)
    refused = 0
    for place, content in mutants(json.loads((model / file).read_text())):
        (model / file).write_text(json.dumps(content))
        try:
            read = read_trained_model(model)
            build_network(read)
            input_shape(read)
            load_predictor(model, None, PredictSettings(backend="stock")) if kind == "plain" else None
        except NNSlimError as error:
            refused += 1
            assert "\n" not in str(error), place
    assert refused > 10


def test_garbage_in_place_of_the_parts_of_a_checkpoint_is_a_line(make_model):
    model = make_model()
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    changes = [{key: garbage} for key in ("network_weights", "trainer_name", "init_args") for garbage in GARBAGE]
    changes += [{"network_weights": {1: torch.zeros(1)}}, {"init_args": {"configuration": [1]}}]
    changes += [{"trainer_name": name} for name in ("os", "nnUNetPredictor", "__doc__", "Union", "../x", "a\nb")]
    for change in changes:
        torch.save({**content, **change}, path)
        with pytest.raises(ModelError) as caught:
            build_network(read_trained_model(model))
        assert "\n" not in str(caught.value)


def edits_of(count):
    return {"version": 1, "edits": [{"kind": "narrow", "layer": "a", "outputs": 1, "inputs": 1}] * count}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nnslim_spec": edits_of(6_000)}, "a spec of 6,000 edits"),
        ({"nnslim_spec": edits_of(30_000)}, "holds more than 100,000 values"),
        ({"features_per_stage": [8, 16, 10**9]}, "features_per_stage, has 1000000000; numbers up to 1,000,000"),
        ({"features_per_stage": [8, 16, float("nan")]}, "features_per_stage, has nan"),
        ({"features_per_stage": [10**6, 10**6, 10**6]}, "more than 2,000,000,000 weights"),
        ({"n_conv_per_stage": [10**6, 2, 2]}, "or 5,000 tensors"),
        ({"n_stages": 10**7}, "n_stages, has 10000000"),
        ({"kernel_sizes": [[10**4] * 3] * 3}, "weights"),
        ({"nonlin_kwargs": [[]] * 120_000}, "holds more than 100,000 values"),
    ],
)
def test_absurd_networks_are_refused_before_they_are_built(changes, message, make_model):
    model = make_model()
    plans = json.loads((model / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    if "nnslim_spec" in changes:
        architecture["arch_kwargs"]["nnslim_base"] = architecture["network_class_name"]
        architecture["network_class_name"] = "nnslim.architectures.slim_network"
    architecture["arch_kwargs"] |= changes
    (model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match=message):
        build_network(read_trained_model(model))
    with NNSlimContext("tucker-small"), pytest.raises(ModelError, match=message):
        load_stock(model)


def test_absurd_patch_is_refused(tmp_path):
    for patch in ([2048] * 3, [10**9, 1, 1], [0, 16, 16], [16.0] * 3, [16] * 4, [True, 16], "16"):
        plans, name = make_plans("plain")
        plans["configurations"][name]["patch_size"] = patch
        with pytest.raises(ModelError, match="patch_size"):
            managers_of(tmp_path, plans, DATASET, name)


def test_limited_build_counts_what_torch_would_make():
    with LimitedBuild("here") as limit:
        torch.nn.Conv3d(2, 3, 3, device="meta")
        torch.nn.BatchNorm3d(3)
    assert (limit.tensors, limit.weights) == (6, 2 * 3 * 27 + 3 + 4 * 3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_prefixes_of_wrappers_are_left_off(prefix, make_model, tmp_path):
    model = make_model()
    path = model / "fold_0" / "checkpoint_final.pth"
    expected = build_network(read_trained_model(model)).state_dict()
    content = torch.load(path, weights_only=False)
    weights = {f"{prefix}{key}": value for key, value in content["network_weights"].items()}
    weights = {key.replace("encoder.stages.0.", "encoder.stages.0._orig_mod."): value for key, value in weights.items()}
    torch.save({**content, "network_weights": weights}, path)
    found = read_trained_model(model)
    assert all(torch.equal(build_network(found).state_dict()[key], value) for key, value in expected.items())
    load_predictor(model, None, PredictSettings(backend="stock"))
    if prefix != "module.":
        return
    compress_model(found, tmp_path / "slim", tucker(rank_factor=0.5, rank_min=2))
    assert not [key for key in read_trained_model(tmp_path / "slim").weights[0] if "_orig_mod" in key]


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg", "cache_dir"])
def test_options_of_a_window_network_reach_no_file(option):
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=f"'{option}' is no argument"):
        WindowNet(1, 2, size=(16, 16), encoder="vit", options={option: "/x.pth", "patch_size": 16})
    with pytest.raises(ConfigError, match="has no network"):
        WindowNet(1, 2, size=(16, 16), encoder="vit", model="local-dir:/x", options={"patch_size": 16})

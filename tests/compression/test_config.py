"""Configurations from everything a user may hand over, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pydantic
import pytest

from nnslim.compression.cache import cache_folder
from nnslim.compression.config import SlimConfig, from_dict, load_config, presets, tucker
from nnslim.errors import ConfigError
from nnslim.methods.base import Method, MethodConfig, method_named, methods, register_method
from nnslim.methods.tucker import TuckerConfig

TUCKER_CNN = {
    "tucker_args": {
        "rank_mode": "relative",
        "rank_factor": 0.3,
        "rank_min": 8,
        "decompose": True,
        "verbose": True,
    },
    "apply_tucker": True,
    "inference_bs": 4,
    "ckpt_path": "models/total.pt",
    "save_model": True,
    "load_model": False,
}


def test_presets_each_loads_with_an_active_method():
    assert {"tucker-balanced", "tucker-small"} <= set(presets())
    for name in presets():
        config = load_config(name)
        assert config.active or name in ("dense-fast-cpu", "embedded-half", "embedded-int8"), name
        assert all(entry.method in methods() for entry in config.methods)


def test_load_config_preset_gives_its_values():
    settings = load_config("tucker-balanced").methods[0].settings
    assert (settings.rank_factor, settings.rank_min, settings.rank_multiple) == (0.5, 16, 8)


@pytest.mark.parametrize("as_type", [str, Path])
def test_load_config_yaml_path_gives_its_values(tmp_path, as_type):
    file = tmp_path / "mine.yml"
    file.write_text(
        "version: 1\nmethods:\n  - {method: tucker, rank_factor: 0.25, overrides: {'a.*': [4, 5], 'b.*': 0.5}}\n"
        "run: {tile_batch: 2}\ncache: {folder: somewhere, read: false}\n"
    )
    config = load_config(as_type(file))
    assert config.methods[0].settings.rank_factor == 0.25
    assert config.methods[0].settings.overrides == {"a.*": (4, 5), "b.*": 0.5}
    assert config.run.tile_batch == 2
    assert (config.cache.folder, config.cache.read, config.cache.write) == (Path("somewhere"), False, True)


def test_load_config_empty_yaml_is_an_inactive_config(tmp_path):
    file = tmp_path / "empty.yml"
    file.write_text("# nothing\n")
    assert load_config(file) == SlimConfig()
    assert not load_config(file).active


def test_load_config_dictionary_equals_the_short_form():
    config = load_config({"version": 1, "methods": [{"method": "tucker", "rank_factor": 0.5}]})
    assert config == tucker(rank_factor=0.5)
    assert config.methods[0].settings == TuckerConfig(rank_factor=0.5)
    assert config.active


def test_load_config_method_config_is_wrapped():
    settings = TuckerConfig.published(0.3)
    config = load_config(settings)
    assert config.methods[0].method == "tucker"
    assert config.methods[0].settings is settings


def test_load_config_slim_config_passes_through():
    config = tucker()
    assert load_config(config) is config


def test_load_config_dump_survives_a_round_trip():
    config = load_config({"methods": [TuckerConfig(rank_factor=0.4, include=("a.*",), overrides={"b": (2, 3)})]})
    entry = config.model_dump(mode="json")["methods"][0]
    again = load_config({"methods": [{"method": entry["method"], **entry["settings"]}]})
    assert again == config
    assert again.identity() == config.identity()


def test_config_apply_false_is_inactive_and_keeps_the_methods():
    config = from_dict({"apply": False, "methods": [{"method": "tucker"}]})
    assert not config.active
    assert len(config.methods) == 1
    assert config.identity() == {"methods": []}


def test_config_is_immutable():
    config = tucker()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.apply = False
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.methods[0].settings.rank_factor = 0.1


def test_tucker_cnn_dictionary_all_keys_are_translated():
    given = copy.deepcopy(TUCKER_CNN)
    config = load_config(given)
    assert given == TUCKER_CNN
    settings = config.methods[0].settings
    assert (settings.rank_mode, settings.rank_factor, settings.rank_min) == ("relative", 0.3, 8)
    assert settings.decompose
    assert settings.verbose
    assert config.active
    assert config.run.tile_batch == 4
    assert config.cache.folder == Path("models/nnslim")
    assert (config.cache.read, config.cache.write) == (False, True)
    assert cache_folder(config) == Path("models/nnslim")


def test_tucker_cnn_dictionary_defaults_equal_its_own():
    config = load_config({"tucker_args": {}})
    settings = config.methods[0].settings
    assert (settings.rank_mode, settings.rank_factor, settings.rank_min) == ("relative", 1 / 3, 16)
    assert config.run.tile_batch == 1
    assert (config.cache.folder, config.cache.read, config.cache.write) == (None, True, True)


def test_tucker_cnn_dictionary_apply_tucker_false_is_inactive():
    assert not load_config({**TUCKER_CNN, "apply_tucker": False}).active
    assert load_config({"apply_tucker": True}).active


def test_tucker_cnn_dictionary_decompose_false_reaches_the_settings():
    assert not load_config({"tucker_args": {"decompose": False}}).methods[0].settings.decompose


@pytest.mark.parametrize(("load", "save"), [(True, False), (False, True), (True, True), (False, False)])
def test_tucker_cnn_dictionary_save_and_load_become_the_cache(load, save):
    config = load_config({"ckpt_path": "a/b.pt", "load_model": load, "save_model": save})
    assert config.cache.folder == Path("a/nnslim")
    assert (config.cache.read, config.cache.write) == (load, save)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"tucker_args": {"rank_facto": 0.5}}, r"method tucker: unknown key 'rank_facto'; nearest: rank_factor"),
        ({"apply_tucker": True, "inference_batch": 2}, r"unknown key 'inference_batch' .*inference_bs"),
        ({"tucker_args": {"rank_factor": 2}}, r"method tucker: rank_factor: .*less than or equal to 1, found 2"),
        ({"inference_bs": 0}, r"run\.tile_batch: .*greater than or equal to 1, found 0"),
        ({"tucker_args": "rank_factor=0.5"}, r"tucker_args"),
    ],
)
def test_tucker_cnn_dictionary_unusable_raises(raw, message):
    with pytest.raises(ConfigError, match=message):
        load_config(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("tucker-balance", r"no config preset or file 'tucker-balance'; nearest: tucker-balanced"),
        ("", r"no config preset or file ''"),
        ("absent/tucker.yml", r"no config file 'absent/tucker\.yml'"),
        ({"method": []}, r"config: unknown key 'method'; nearest: methods"),
        ({"run": {"tile_bach": 2}}, r"config: unknown key 'run\.tile_bach'; nearest: tile_batch"),
        ({"cache": {"foldr": "x"}}, r"config: unknown key 'cache\.foldr'; nearest: folder"),
        ({"methods": [{"method": "tuker"}]}, r"unknown method 'tuker'; nearest: tucker"),
        (
            {"methods": [{"method": "tucker", "rank_facto": 0.5}]},
            r"method tucker: unknown key 'rank_facto'; nearest: rank_factor",
        ),
        ({"methods": [{"method": "tucker", "rank_factor": 0}]}, r"rank_factor: .*greater than 0, found 0"),
        ({"methods": [{"method": "tucker", "rank_mode": "best"}]}, r"rank_mode: .*'fixed', .*, found 'best'"),
        (
            {"methods": [{"method": "tucker", "rank_mode": "fixed", "rank_min": None}]},
            r"rank_mode 'fixed' needs rank_min",
        ),
        ({"methods": {"method": "tucker"}}, r"'methods' is a list of objects"),
        ({"methods": ["tucker"]}, r"each of 'methods' is an object with a 'method', found 'tucker'"),
        ({"methods": [{"rank_factor": 0.5}]}, r"each of 'methods' is an object with a 'method'"),
        ({"run": {"tile_batch": 0}}, r"run\.tile_batch: .*greater than or equal to 1, found 0"),
        ({"run": 3}, r"config: run: .*found 3"),
        ({1: 2}, r"config: 1: "),
        ({"version": 2}, r"config: version 2 found, this nnslim reads version 1"),
        ({"version": "1"}, r"config: version '1' found"),
        (7, r"a config is a preset name, YAML path, dictionary or SlimConfig, found 7"),
        (None, r"a config is a preset name, YAML path, dictionary or SlimConfig, found None"),
    ],
)
def test_load_config_unusable_raises(raw, message):
    with pytest.raises(ConfigError, match=message):
        load_config(raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"methods: [", r"mine\.yml is neither YAML nor JSON"),
        (b"\xff\xfe\x00\x01", r"mine\.yml is neither YAML nor JSON"),
        (b"- tucker\n", r"mine\.yml: expected keys and values, found \['tucker'\]"),
        (b"tucker\n", r"mine\.yml: expected keys and values, found 'tucker'"),
        (b"version: 3\n", r"mine\.yml: version 3 found, this nnslim reads version 1"),
        (b"method: x\n", r"mine\.yml: unknown key 'method'; nearest: methods"),
    ],
)
def test_load_config_unusable_yaml_raises_with_its_path(tmp_path, content, message):
    file = tmp_path / "mine.yml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:pathlib.Path", "!!python/name:os.system"]
)
def test_load_config_yaml_that_would_run_code_is_refused(tmp_path, tag):
    mark = tmp_path / "ran"
    file = tmp_path / "mine.yml"
    argument = f" ['{mark}']" if "object" in tag else ""
    file.write_text(f"methods: {tag}{argument}\n")
    with pytest.raises(ConfigError, match=r"neither YAML nor JSON.*could not determine a constructor"):
        load_config(file)
    assert not mark.exists()


def test_load_config_unregistered_method_config_raises():
    class Other(MethodConfig):
        pass

    with pytest.raises(ConfigError, match="each of 'methods' is an object with a 'method'"):
        load_config(Other())


def test_method_registry_refuses_taken_and_capital_names():
    with pytest.raises(ConfigError, match="method name 'tucker' is taken or not lower case"):
        register_method(Method("tucker", TuckerConfig, lambda *_: None))
    with pytest.raises(ConfigError, match="method name 'Tucker' is taken or not lower case"):
        register_method(Method("Tucker", TuckerConfig, lambda *_: None))
    assert method_named("tucker").config_class is TuckerConfig
    methods().clear()
    assert "tucker" in methods()


def test_cache_folder_prefers_config_then_variable_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("NNSLIM_CACHE", str(tmp_path / "variable"))
    assert cache_folder(from_dict({"cache": {"folder": str(tmp_path / "own")}})) == tmp_path / "own"
    assert cache_folder(SlimConfig()) == tmp_path / "variable"
    monkeypatch.delenv("NNSLIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(SlimConfig()) == tmp_path / "xdg" / "nnslim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(SlimConfig()) == tmp_path / "home" / ".cache" / "nnslim"

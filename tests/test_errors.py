"""Texts that come from files are one line of a sane length, wherever they end up."""

from __future__ import annotations

import json
import logging

import pytest

from nnslim.compression.config import load_config
from nnslim.errors import ConfigError, InputError, NNSlimError, first_line, kind_and_line, one_line, shown
from nnslim.evaluation.classes import read_dataset_json, read_groups
from nnslim.tables import read_table

HOSTILE = "\x1b[31mred\r\nnext\u202e" + "x" * 400_000 + "; do this"


def harmless(text: str) -> bool:
    return len(text) <= 1000 and text.isprintable()


def test_messages_are_cut_in_the_middle_and_control_characters_are_named():
    text = str(InputError(HOSTILE))
    assert harmless(text) and text.startswith("\\x1b[31mred  next\\u202exxx") and text.endswith("xxx; do this")
    assert " … " in text and str(InputError("Fäll  1 has 3 axes")) == "Fäll  1 has 3 axes"
    assert harmless(shown("\x1b" * 400_000)) and shown("x" * 1000) == "x" * 1000
    for made in (first_line, one_line, kind_and_line):
        assert harmless(made(ValueError(HOSTILE))) and len(made(ValueError(HOSTILE))) <= 312


def test_log_lines_are_harmless(caplog):
    with caplog.at_level(logging.INFO, "nnslim"):
        logging.getLogger("nnslim").warning("%s has %d", HOSTILE, 3)
    assert harmless(caplog.messages[0]) and caplog.messages[0].endswith("; do this has 3")


def test_files_with_huge_keys_and_values_give_short_messages(tmp_path):
    path = tmp_path / "hostile.yml"
    for content in ({HOSTILE: 1}, {"methods": [{"method": HOSTILE}]}, {"run": {"threads": HOSTILE}}, HOSTILE):
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert harmless(str(caught.value))
    path.write_text(json.dumps({"labels": {"background": 0, "ignore": [HOSTILE]}}))
    with pytest.raises(InputError) as caught:
        read_dataset_json(path)
    assert harmless(str(caught.value))
    path.write_text(json.dumps({HOSTILE: [HOSTILE]}))
    with pytest.raises(InputError) as caught:
        read_groups(path, ["liver"], ["liver"])
    assert harmless(str(caught.value))
    path.write_text(f"{HOSTILE.replace(chr(13), '')}\n1\n")
    with pytest.raises(NNSlimError) as caught:
        read_table(path, ("case",))
    assert harmless(str(caught.value))

"""Each study is a command whose help names its page of docs; tables grow row by row."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from nnslim.errors import ConfigError, InputError
from nnslim.tables import markdown
from studies.command import run_command
from studies.table import GrowingTable, over_seeds

STUDIES = sorted(path.stem for path in (ROOT / "studies").glob("*.py") if "run_command(main)" in path.read_text())


@pytest.mark.parametrize("study", STUDIES)
def test_help_names_the_command_and_a_page_that_has_it(study, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"studies.{study}").main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and f"./run.sh -m studies.{study} " in shown
    page = ROOT / re.search(r"docs/\w+\.md", shown).group()
    assert f"studies.{study} " in page.read_text() or f"studies/{study}.py" in page.read_text()


def test_readme_has_a_line_for_every_study():
    text = (ROOT / "studies" / "README.md").read_text()
    for study in STUDIES:
        assert f"`{study}`" in text, study


def test_study_runs_as_a_module_and_ends_with_2_for_input_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "studies.map_study", "-m", tmp_path / "no", "-i", tmp_path, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("nnslim: "), done.stderr


@pytest.mark.parametrize(("result", "code"), [(None, None), (1, 1)])
def test_exit_code_is_what_main_returns(result, code):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: result)
    assert ended.value.code == code


def test_table_goes_on_where_it_was_cut_off(tmp_path):
    made = []

    def row(name):
        made.append(name)
        if name == "bad":
            raise InputError("nothing there")
        return {"row": name, "dice": 0.5, "by_class": "0.4 0.6", "note": None}

    path = tmp_path / "new" / "table.csv"
    makers = {name: (lambda name=name: row(name)) for name in ("one", "bad", "two")}
    with pytest.raises(InputError, match="nothing there"):
        GrowingTable(path, "row").fill(makers)
    assert path.read_text() == "row,dice,by_class,note\none,0.5,0.4 0.6,\n"
    table = GrowingTable(path, "row")
    assert ("one",) in table and ("two",) not in table
    table.fill({name: makers[name] for name in ("one", "two")})
    assert made == ["one", "bad", "two"]
    assert path.read_text() == "row,dice,by_class,note\none,0.5,0.4 0.6,\ntwo,0.5,0.4 0.6,\n"
    with pytest.raises(ConfigError, match="has the columns"):
        table.add({"row": "three", "other": 1})
    assert len(GrowingTable(path, "row").rows) == 2
    with pytest.raises(InputError, match="no column run"):
        GrowingTable(path, "run")


def test_markdown_has_a_line_for_every_row():
    assert markdown([{"a": 1, "b": None}, {"a": "x|y"}]) == "| a | b |\n| --- | --- |\n| 1 |  |\n| x&#124;y |  |\n"
    assert markdown([{"a": 1}], ["c", "a"]) == "| c | a |\n| --- | --- |\n|  | 1 |\n"


def test_seeds_become_means_with_spread_and_distance_to_the_first_row():
    dice = {("dense", 0): 0.8, ("dense", 1): 0.9, ("slim", 0): 0.7, ("slim", 1): 0.6, ("slim", 2): 0.1}
    rows = [{"row": row, "seed": seed, "dice": str(value), "gmacs": 2.0} for (row, seed), value in dice.items()]
    dense, slim = over_seeds(rows, "row", ("dice", "gmacs"))
    assert dense == {"row": "dense", "seeds": 2, "dice": "0.8500", "gmacs": "2.0000", "spread": "0.0707"} | {
        "behind": "+0.0000 +- 0.0000"
    }
    assert slim["dice"] == "0.4667" and slim["seeds"] == 3
    assert slim["behind"] == "+0.2000 +- 0.1000"  # of the two seeds that both have
    both = over_seeds([{**row, "part": part} for part in "ab" for row in rows[2:]], "row", part="part")
    assert [(one["seeds"], one["behind"]) for one in both] == [(3, "+0.0000 +- 0.0000")] * 2

"""CSV files: what is written is read back, and faults are named."""

import csv

import pandas
import pytest

from nnslim.errors import InputError
from nnslim.tables import markdown, read_table, write_table


def test_rows_of_both_kinds_are_read_back_as_text(tmp_path):
    rows = [
        {"layer": "a, b", "rank": 8, "error": 0.25},
        {"layer": 'with "quotes"', "rank": None, "error": float("nan")},
    ]
    write_table(rows, tmp_path / "maps.csv", ("layer", "rank", "error"))
    write_table([tuple(row.values()) for row in rows], tmp_path / "tuples.csv", ("layer", "rank", "error"))
    assert (tmp_path / "maps.csv").read_text() == 'layer,rank,error\n"a, b",8,0.25\n"with ""quotes""",,\n'
    assert (tmp_path / "maps.csv").read_bytes() == (tmp_path / "tuples.csv").read_bytes()
    found = read_table(tmp_path / "maps.csv", ("layer", "rank"))
    assert found.to_dict("records")[1] == {"layer": 'with "quotes"', "rank": "", "error": ""}


def test_frame_and_empty_table_are_written(tmp_path):
    write_table(pandas.DataFrame({"case": ["a"], "dice": [0.5]}), tmp_path / "frame.csv")
    assert (tmp_path / "frame.csv").read_text() == "case,dice\na,0.5\n"
    write_table([], tmp_path / "none.csv", ("case", "dice"))
    assert list(read_table(tmp_path / "none.csv").columns) == ["case", "dice"]


def test_text_that_a_spreadsheet_would_run_is_marked_as_text_and_read_back(tmp_path):
    formulas = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\n=1", "＝1", "'=1", "''@x", "-"]
    others = ["-0.5", "-1e-05", "+5", "-inf", "nan", "'plain", "a=b", ""]
    rows = [{"=name": text, "loss": -number} for number, text in enumerate(formulas + others)]
    write_table(rows, tmp_path / "maps.csv")
    with (tmp_path / "maps.csv").open(encoding="utf-8", newline="") as stream:
        header, *cells = csv.reader(stream)
    assert header == ["'=name", "loss"]
    assert [row[0] for row in cells] == [f"'{text}" for text in formulas] + others
    assert [row[1] for row in cells] == [str(-number) for number in range(len(rows))]
    found = read_table(tmp_path / "maps.csv", ("=name",))
    assert found["=name"].tolist() == formulas + others
    write_table(pandas.DataFrame({"case": pandas.Categorical(["=x", "y"]), "dice": [-0.5, None]}), tmp_path / "f.csv")
    assert (tmp_path / "f.csv").read_text() == "case,dice\n'=x,-0.5\ny,\n"


def test_markdown_cells_end_neither_their_row_nor_as_html():
    rows = [{"a|b": "x|y\nz", "case": "<img src=x onerror=alert(1)>"}]
    assert markdown(rows) == ("| a&#124;b | case |\n| --- | --- |\n| x&#124;y z | &lt;img src=x onerror=alert(1)> |\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "absent.csv cannot be read"),
        (b"\xff\xfe\x00", "absent.csv cannot be read"),
        (b"", "absent.csv cannot be read"),
        (b"case\nx\n", "no column dice; found case"),
    ],
)
def test_faults_name_the_file(tmp_path, content, message):
    path = tmp_path / "absent.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(path, ("case", "dice"))

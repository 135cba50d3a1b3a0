"""CSV files: what is written is read back, and faults are named."""

import pandas
import pytest

from nnslim.errors import InputError
from nnslim.tables import read_table, write_table


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

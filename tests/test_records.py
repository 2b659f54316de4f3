import json

import numpy as np
import pytest
import torch

from msif_lib.evaluation import Estimate
from msif_lib.study.records import MAX_LIST, MAX_TEXT, read_record, write_record


def write(path, **changes):
    arguments = {
        "section": "4.1",
        "dataset": "digits",
        "values": {"r": 0.99},
        "parameters": {"alpha": 0.01},
        "seeds": [0, 1],
        "wall_time": 1.5,
    }
    return write_record(path, **(arguments | changes))


def test_record_comes_back_with_its_provenance(tmp_path):
    path = tmp_path / "new" / "4.1.json"
    values = {
        "r": Estimate(0.9, 0.8, 0.95),
        "slopes": np.array([1.0, 2.0]),
        "losses": torch.tensor([0.5]),
        "count": np.int64(3),
        "converged": True,
    }
    written = write(path, values=values, dtype=torch.float32)
    record = read_record(path)
    assert record == written
    assert record["values"] == {
        "r": {"value": 0.9, "low": 0.8, "high": 0.95},
        "slopes": [1.0, 2.0],
        "losses": [0.5],
        "count": 3,
        "converged": True,
    }
    assert record["seeds"] == [0, 1]
    made = record["provenance"]
    assert made["dtype"] == "float32"
    assert made["device"].startswith("cpu")
    assert made["packages"]["torch"]
    assert made["date"].endswith("+00:00")
    assert [file.name for file in path.parent.iterdir()] == ["4.1.json"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": float("nan")}, r"values\.r is nan"),
        ({"r": {"low": float("inf")}}, r"values\.r\.low is inf"),
        ({"all": [0.0] * (MAX_LIST + 1)}, r"values\.all has 2001 entries"),
        ({"text": "x" * (MAX_TEXT + 1)}, r"values\.text is a text of 501 characters"),
    ],
)
def test_what_a_record_must_not_hold_is_named(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "r.json", values=values)
    assert not list(tmp_path.iterdir())


def test_objects_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"values\.model is a object"):
        write(tmp_path / "r.json", values={"model": object()})


def test_failed_write_leaves_the_old_record(tmp_path):
    path = tmp_path / "r.json"
    old = write(path)
    with pytest.raises(ValueError, match="nan"):
        write(path, values={"r": float("nan")})
    assert read_record(path) == old


def test_file_that_is_no_record_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{half")
    with pytest.raises(ValueError, match="is not JSON"):
        read_record(path)
    path.write_text(json.dumps({"section": "4.1"}))
    with pytest.raises(ValueError, match="lacks dataset, values"):
        read_record(path)
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "none.json")

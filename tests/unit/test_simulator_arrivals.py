"""Recorded arrivals: the published formats, and what is refused with line, column and remedy."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest

from expertmesh.balancer.simulator.arrivals import read_arrivals
from expertmesh.mesh.errors import UserError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}

{"timestamp": 4500, "input_length": 7322, "output_length": 490, "hash_ids": []}
"""


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    found = read_arrivals(path)
    assert found.arrival_s == pytest.approx([0, 4.314579, 4.541877])
    assert found.prompt_tokens.tolist() == [374, 396, 879]
    assert found.output_tokens.tolist() == [44, 109, 55]


def test_mooncake_both_ways(tmp_path: Path) -> None:
    lines, table = tmp_path / "m.jsonl", tmp_path / "m.csv"
    lines.write_text(MOONCAKE)
    table.write_text("timestamp_ms,input_length,output_length,n_hash_blocks\n1000,6758,500,14\n4500,7322,490,15\n")
    for path in (lines, table):
        found = read_arrivals(path)
        assert found.arrival_s.tolist() == [0, 3.5]
        assert found.prompt_tokens.tolist() == [6758, 7322]
        assert found.output_tokens.tolist() == [500, 490]


def test_compressed_and_out_of_order(tmp_path: Path) -> None:
    text = b"arrival_s,prompt_tokens,output_tokens\n7.5,1,2\n7,3,4\n"
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress(text))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text))
    for name in ("a.csv.xz", "a.csv.gz"):
        found = read_arrivals(tmp_path / name)
        assert found.arrival_s.tolist() == [0, 0.5]
        assert found.prompt_tokens.tolist() == [3, 1]


def test_a_higher_rate_leaves_the_requests_alone(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    found = read_arrivals(path)
    assert found.faster(2).arrival_s == pytest.approx(found.arrival_s / 2)
    assert np.array_equal(found.faster(2).prompt_tokens, found.prompt_tokens)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--rate-scale"):
            found.faster(factor)


HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("", "", "holds no request"),
        (HEADER, "", "holds no request"),
        ("a,b\n1,2\n", "", "columns a, b say no time"),
        (HEADER + "1,2,3\nsoon,2,3\n", ": line 3: arrival_s", "'soon' is no time"),
        (HEADER + "nan,2,3\n", ": line 2: arrival_s", "'nan' is no time"),
        (HEADER + "1,0,3\n", ": line 2: prompt_tokens", "'0' is no number of tokens"),
        (HEADER + "1,2,-3\n", ": line 2: output_tokens", "'-3' is no number of tokens"),
        (HEADER + "1,2\n", ": line 2: output_tokens", "None is no number of tokens"),
        (HEADER + "1,2,99999999999\n", ": line 2: output_tokens", "is no number of tokens from 1 to 16777216"),
        (AZURE + "yesterday,1,1\n", ": line 5: TIMESTAMP", "'yesterday' is no time"),
        (MOONCAKE + "{oops\n", ": line 4", "is not JSON"),
        (MOONCAKE + "[1]\n", ": line 4", "is no JSON object"),
        ('{"timestamp": 0, "input_length": 2.5, "output_length": 1}\n', ": line 1: input_length", "2.5 is no number"),
    ],
)
def test_refused(tmp_path: Path, text: str, key: str, problem: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_arrivals(path)
    assert caught.value.key == f"{path}{key}"
    assert problem in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize(("name", "content"), [("a.csv.xz", b"plain"), ("a.csv.gz", b"plain"), ("a.csv", b"\xff\xfe")])
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_arrivals(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_arrivals(tmp_path / "none.csv")

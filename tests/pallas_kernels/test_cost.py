"""The cost model against the measurements it was fitted to."""

import json
import pathlib

import pytest

from pallas_kernels.lowrank_attention.cost import decode_seconds
from pallas_kernels.shapes import LOWRANK

RESULTS = pathlib.Path(__file__).parents[2] / "experiments/results/h200_lowrank_attention.jsonl"
ROWS = [json.loads(line) for line in RESULTS.read_text().splitlines()]
ROWS = [r for r in ROWS if r.get("way") in ("latents-16", "latents-4")]


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r['shape']}-{r['batch']}x{r['slots']}-{r['way']}"
)
def test_every_measured_row_is_predicted(row):
    s, bits = LOWRANK[row["shape"]], int(row["way"].split("-")[1])
    found = decode_seconds(
        s.heads, s.kv_heads, s.head_dim, s.groups, s.k_rank, s.v_rank, (bits, bits), row["slots"],
        row["batch"],
    )  # fmt: skip
    assert abs(found * 1e6 / row["microseconds"] - 1) < 0.2

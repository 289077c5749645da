"""The table of tile sizes: what is looked up, and that every named matrix has some."""

import json

import pytest

from pallas_kernels.quantized_matmul import tiling
from pallas_kernels.quantized_matmul.shapes import MATMUL
from pallas_kernels.quantized_matmul.tiling import Tiling, choose, guess, why_not_tiling


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", MATMUL)
def test_the_guess_fits_every_named_matrix(name, bits):
    w = MATMUL[name].packed(bits, 64)
    for rows in (1, 6, 16, 17, 64, 289, 512):
        columns, groups = w.words_DS.shape[1], w.shape[0] // w.group
        cfg = choose(rows, w, "no such device")
        assert cfg == guess(rows, columns, groups)
        assert why_not_tiling(cfg, rows, columns, groups, bits) is None


def test_every_entry_of_the_table_fits():
    for (_, inputs, outputs, bits, group, rows), cfg in tiling._table().items():
        w = next(s for s in MATMUL.values() if (s.inputs, s.outputs) == (inputs, outputs))
        columns = w.packed(bits, group).words_DS.shape[1]
        assert why_not_tiling(cfg, rows, columns, inputs // group, bits) is None


def test_lookup_by_the_nearest_bucket(tmp_path, monkeypatch):
    shape = MATMUL["qwen2.5-7b/gate"]
    at = dict(device="d", inputs=shape.inputs, outputs=shape.outputs, bits=4, group=64)
    entry = lambda count, new: {**at, "rows": count, "tiling": new}
    few, vector, many = (dict(tile=16, splits=7), dict(way="vector", together=4), dict(rows=64))
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps([entry(8, few), entry(1, vector), entry(512, many)]))
    monkeypatch.setattr(tiling, "TABLE", path)
    tiling._table.cache_clear()
    w = shape.packed(4, 64)
    expected = {1: vector, 6: few, 8: few, 16: few, 65: many, 289: many}
    assert {n: choose(n, w, "d") for n in expected} == {n: Tiling(**t) for n, t in expected.items()}
    assert choose(17, w, "d") == choose(64, w, "other") == tiling.guess(17, w.words_DS.shape[1], 56)
    assert choose(6, shape.packed(8, 64), "d") == choose(6, shape.packed(8, 64), "other")
    tiling._table.cache_clear()


def test_splits_are_never_empty():
    for turns in range(1, 60):
        for wanted in range(0, 70):
            n = tiling.whole_splits(turns, wanted)
            each = -(-turns // n)
            assert 1 <= n <= max(1, wanted) and (n - 1) * each < turns <= n * each

"""The table of tile sizes: what is looked up, and that every named matrix has some."""

import json

import pytest

from pallas_kernels.quantized_matmul import tiling
from pallas_kernels.quantized_matmul.shapes import MATMUL
from pallas_kernels.quantized_matmul.tiling import Tiling, choose_tiling, guess, why_not_tiling


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", MATMUL)
def test_the_guess_fits_every_named_matrix(name, bits):
    w = MATMUL[name].packed(bits, 64)
    for rows in (1, 6, 16, 17, 64, 96, 128):
        cfg = choose_tiling(rows, w, "no such device")
        assert cfg == guess(rows, w.words // 32, w.shape[0] // 64)
        assert why_not_tiling(cfg, w.shape[0] // 64) is None


def test_every_entry_of_the_table_fits():
    for (_, inputs, outputs, bits, group, rows), cfg in tiling._table().items():
        shape = next(s for s in MATMUL.values() if (s.inputs, s.outputs) == (inputs, outputs))
        chunks = shape.packed(bits, group).words_BNSc.shape[1]
        assert rows in tiling.ROW_BUCKETS and why_not_tiling(cfg, chunks) is None


def test_lookup_by_the_bucket(tmp_path, monkeypatch):
    shape = MATMUL["qwen2.5-7b/gate"]
    at = dict(device="d", inputs=shape.inputs, outputs=shape.outputs, bits=4, group=64)
    entry = lambda count, new: {**at, "rows": count, "tiling": new}
    few, many, wrong = dict(splits=7), dict(rows=16, splits=3), dict(splits=57)
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps([entry(8, few), entry(16, many), entry(64, wrong)]))
    monkeypatch.setattr(tiling, "TABLE", path)
    tiling._table.cache_clear()
    w = shape.packed(4, 64)
    expected = {1: few, 6: few, 8: few, 9: many, 16: many}
    assert {n: choose_tiling(n, w, "d") for n in expected} == {
        n: Tiling(**t) for n, t in expected.items()
    }
    assert choose_tiling(48, w, "d") == choose_tiling(48, w, "other") == guess(48, 74, 56)
    assert choose_tiling(6, shape.packed(8, 64), "d") == choose_tiling(
        6, shape.packed(8, 64), "other"
    )
    tiling._table.cache_clear()


def test_the_guess_is_four_programs_a_multiprocessor():
    assert guess(6, 74, 56) == Tiling(8, 7)
    assert guess(22, 74, 56) == Tiling(16, 4) and guess(48, 74, 56) == Tiling(16, 2)
    assert guess(96, 74, 56) == Tiling(32, 2) and guess(128, 594, 56) == Tiling(32, 1)
    assert guess(6, 14, 56) == Tiling(8, 14)  # of four chunks each
    assert guess(6, 594, 56) == Tiling(8, 1) and guess(6, 1, 2) == Tiling(8, 1)

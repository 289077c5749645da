"""The tuning program on a small matrix, with XLA in place of the GPU."""

import dataclasses
import json

import pytest
from rich.console import Console

from experiments.common.cli import UserError
from experiments.measure import matmul as bench
from pallas_kernels.quantized_matmul.shapes import MatmulShape
from pallas_kernels.quantized_matmul.tiling import Tiling, why_not_tiling


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "MATMUL", {"small": MatmulShape(128, 512)})
    monkeypatch.setattr(bench.jax, "default_backend", lambda: "gpu")
    few = [Tiling(8, 1), Tiling(8, 2), Tiling(16, 1)]
    monkeypatch.setattr(bench, "tiling_candidates", lambda *a: iter(few))
    monkeypatch.setattr(bench, "tiling_variants", lambda *a: iter(()))
    monkeypatch.setattr(bench, "bandwidth", lambda clock: {"read": 1.0, "copy": 1.0})

    def product(cfg):
        if cfg and cfg.splits == 2:
            raise_it = lambda x, w: (_ for _ in ()).throw(RuntimeError("no such layout"))
            return raise_it
        return lambda x, w: bench.quantized_matmul(x, w, implementation="xla")

    monkeypatch.setattr(bench, "tiled_product", product)
    return bench.MatmulTuning(
        shapes=("small",), rows=(2,), large=(17,), large_shapes=("small",), calls=4, repeats=3,
        rotate_mb=0, threads=2, out=tmp_path / "log.jsonl", table=tmp_path / "tuned.json",
    )  # fmt: skip


@pytest.mark.slow
def test_failures_are_recorded_and_runs_go_on(small):
    log = bench.main(small, Console(quiet=True))
    failed = [r for r in log.select(kind="tiling") if "failed" in r]
    assert len(failed) == 2 and all("no such layout" in r["failed"] for r in failed)
    fine = bench.good(log.select(kind="tiling", rows=2))
    assert len(fine) == 2 and all(r["error"] < 0.01 for r in fine)
    compared = log.select(kind="compare")
    assert [r["rows"] for r in compared] == [2, 17]
    assert all(r["kernel_us"] > 0 and r["bf16_us"] > 0 and r["xla_us"] > 0 for r in compared)
    table = json.loads(small.table.read_text())
    assert {e["rows"] for e in table} == {8, 64}
    lines = len(small.out.read_text().splitlines())
    again = bench.main(small, Console(quiet=True))  # nothing is measured twice
    assert len(again.all) == lines + 1


def test_budget_and_merging_without_a_gpu(small, monkeypatch):
    short = dataclasses.replace(small, seconds=0.0)
    assert [r["kind"] for r in bench.main(short, Console(quiet=True)).all] == ["bandwidth"]
    monkeypatch.setattr(bench.jax, "default_backend", lambda: "cpu")
    bench.main(short, Console(quiet=True))
    with pytest.raises(UserError, match="no GPU"):
        bench.main(dataclasses.replace(short, table=None), Console(quiet=True))


@pytest.mark.slow
def test_entries_that_were_tried_in_a_step_stay(small):
    """And records of tilings with other fields, or of too many rows, are left out."""
    log = bench.main(small, Console(quiet=True))
    chosen = json.loads(small.table.read_text())
    chosen[0] |= {"tiling": dataclasses.asdict(Tiling(8, 1, 4)), "us_in_a_step": 1.0}
    small.table.write_text(json.dumps(chosen))
    good = log.select(kind="tiling", rows=2)[0]
    for odd in ({"tiling": {"way": "group"}}, {"rows": 289}):
        log.all.append(good | {"us": 0.001} | odd)
    bench.merge_tuned(log, small.table)
    assert json.loads(small.table.read_text()) == chosen


@pytest.mark.slow
def test_more_rows_than_the_kernel_takes_are_only_compared(small):
    log = bench.main(dataclasses.replace(small, rows=(2,), large=(65,)), Console(quiet=True))
    assert {r["rows"] for r in log.select(kind="tiling")} == {2}
    assert [r["rows"] for r in log.select(kind="compare")] == [2, 65]


@pytest.mark.parametrize("rows", [1, 6, 22])
def test_candidates_and_variants_fit(rows):
    some = list(bench.tiling_candidates(rows, 74, 56))
    some += [c for cfg in some for c in bench.tiling_variants(cfg, 56)]
    assert all(why_not_tiling(cfg, 56) is None for cfg in some) and len(set(some)) > 30

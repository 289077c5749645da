"""The folder of layers on disk: whole or not, resumed, and not taken for another model's."""

import json
import threading
import time

import jax
import numpy as np
import pytest

from llm_jax.disk import DiskArray, loaded
from llm_jax.files import locked
from llm_jax.params import abstract
from llm_jax.safetensors_file import parts_of
from llm_jax.testing import tiny_config, tiny_params
from subspec_jax import stored
from subspec_jax.offload import moving
from subspec_jax.residual.tensor_file import ResidualError
from subspec_jax.stored import store

CFG = tiny_config("qwen2", layers=3)
PARAMS = jax.tree.map(np.asarray, tiny_params(CFG))
TABLES = dict(embed_VD=PARAMS.embed_VD, norm=PARAMS.norm)


def written(path, identity="a", layer=lambda i: PARAMS.layers[i]):
    return store(path, identity, abstract(CFG), lambda: TABLES, layer)


def test_what_moves_stays_in_the_file_and_all_is_what_was_given(tmp_path):
    found = written(tmp_path)
    for i, want in enumerate(PARAMS.layers):
        layer = found.layer(i)
        kinds = [isinstance(a, DiskArray) for a in jax.tree.leaves(layer)]
        assert kinds == jax.tree.leaves(moving(want))
        jax.tree.map(np.testing.assert_array_equal, loaded(layer), want)
    jax.tree.map(np.testing.assert_array_equal, loaded(found.tables()), TABLES)


def test_matrices_lie_at_whole_blocks_that_a_cpu_uses_in_place(tmp_path):
    for layer in map(written(tmp_path).layer, range(CFG.layers)):
        places = [a.offset for a in jax.tree.leaves(layer) if isinstance(a, DiskArray)]
        assert min(places) % 4096 == 0 and not any(at % 64 for at in places)


def test_other_programs_read_the_files(tmp_path):
    written(tmp_path)
    parts = parts_of(tmp_path / "layer-00001.safetensors")  # checked by the library
    np.testing.assert_array_equal(parts[".mlp.down"].array(), PARAMS.layers[1].mlp.down)


def test_a_folder_that_was_left_half_way_is_finished(tmp_path):
    class Killed(Exception):
        pass

    def dies(i):
        if i == 2:
            raise Killed
        return PARAMS.layers[i]

    with pytest.raises(Killed):
        written(tmp_path, layer=dies)
    first = (tmp_path / "layer-00000.safetensors").stat().st_mtime_ns
    asked = []
    written(tmp_path, layer=lambda i: asked.append(i) or PARAMS.layers[i])
    assert asked == [2] and (tmp_path / "layer-00000.safetensors").stat().st_mtime_ns == first
    written(tmp_path, layer=dies)  # complete: nobody asks


def test_another_models_folder_is_refused(tmp_path):
    written(tmp_path)
    with pytest.raises(ResidualError, match="source is 'a', asked for is 'b'"):
        written(tmp_path, "b")


@pytest.mark.parametrize("name", ["manifest.json", "layer-00001.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_damaged_header_is_named(tmp_path, name, harm):
    written(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[40] ^= 1
    (tmp_path / name).write_bytes(data if harm == "flip" else data[:60])
    with pytest.raises(ResidualError, match=name):
        written(tmp_path).layer(1)


def test_one_process_writes_and_the_other_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "PATIENCE_S", 0.01)
    with locked(tmp_path):
        other = threading.Thread(target=written, args=(tmp_path,))
        other.start()
        time.sleep(0.1)
        assert other.is_alive() and not list(tmp_path.glob("*.safetensors"))
    other.join(20)
    assert not other.is_alive() and len(list(tmp_path.glob("layer-*"))) == 3
    assert json.loads((tmp_path / "manifest.json").read_text())["source"] == "a"

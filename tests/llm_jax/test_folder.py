"""Folders in which two files claim to be the model, and folders whose parts do not fit together."""

import json
import shutil
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import CheckpointError, LLMError
from llm_jax import tokenizer as tokenizer_module
from llm_jax.folder import INDEX, WHOLE
from llm_jax.formats import open_checkpoint
from llm_jax.testing import tiny_config, tiny_params, tiny_tokenizer, write_safetensors

CFG = tiny_config("qwen2", layers=1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three folders: one file, two shards, one file with a tokenizer. Nobody changes them."""
    where = tmp_path_factory.mktemp("written")
    write_safetensors(where / "whole", tiny_params(CFG), CFG, tokenizer=False)
    write_safetensors(where / "sharded", tiny_params(CFG, seed=1), CFG, shards=2, tokenizer=False)
    write_safetensors(where / "complete", tiny_params(CFG), CFG)
    return where


@pytest.fixture
def copy(written, tmp_path):
    return lambda name: shutil.copytree(written / name, tmp_path / name)


def problems(folder) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).check(CFG)
    return [line.strip() for line in str(caught.value).splitlines()]


def refusal(folder, what="config") -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint = open_checkpoint(folder)
        checkpoint.tokenizer() if what == "tokenizer" else checkpoint.check(checkpoint.config())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_file_is_the_model_though_an_index_is_left_over(copy, written):
    folder = copy("whole")
    shutil.copy(written / "sharded" / INDEX, folder)
    loaded = open_checkpoint(folder).load(CFG)
    jax.tree.map(np.testing.assert_array_equal, loaded, tiny_params(CFG))


def test_a_whole_file_and_shards_could_be_two_models(copy, written):
    folder = copy("sharded")
    shutil.copy(written / "whole" / WHOLE, folder)
    _, one, two = problems(folder)
    assert one.startswith("model-00001-of-00002.safetensors is here too and may be another model")
    assert "because model.safetensors is used without it; move" in one
    assert two.startswith("model-00002-of-00002.safetensors is here too")


def test_an_index_may_name_the_whole_file(copy):
    folder = copy("whole")
    names = load_file(folder / WHOLE)
    (folder / INDEX).write_text(json.dumps(dict(weight_map=dict.fromkeys(names, WHOLE))))
    open_checkpoint(folder).check(CFG)


def test_shards_that_the_index_does_not_name(copy):
    folder = copy("sharded")
    save_file({}, folder / "model-00003-of-00003.safetensors")
    (line,) = problems(folder)[1:]
    assert line.startswith("model-00003-of-00003.safetensors is here too and may be another")
    assert f"because {INDEX} is used without it" in line


def test_a_tensor_that_a_header_describes_twice(copy):
    """The library keeps the last one: here the same bytes as another type."""
    folder = copy("whole")
    data = (folder / WHOLE).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    known = json.loads(data[8 : 8 + length])["model.norm.weight"]
    again = json.dumps({"model.norm.weight": known | dict(dtype="I32")})[1:]
    header = data[8 : 8 + length].decode().strip()[:-1] + ", " + again
    text = header.encode()
    (folder / WHOLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert "the key 'model.norm.weight' is there twice" in problems(folder)[1]


@pytest.mark.parametrize("name", ("whole", "sharded"))
def test_an_adapter_beside_its_base(copy, name):
    folder = copy(name)
    lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({lora: np.ones((4, 64), np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    one, two = problems(folder)[1:]
    assert one == (
        "adapter_config.json is an adapter and would not be used; move it to a folder of its "
        "own, and pass that as the adapter (--adapter) if it is meant"
    )
    assert two.startswith("adapter_model.safetensors is an adapter")


def test_an_adapter_without_its_base(tmp_path):
    save_file({"x": np.ones(3, np.float32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert f"{tmp_path} is an adapter, not a model: pass" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("index", "expected"),
    (
        ({}, "weight_map is None; expected an object"),
        (dict(weight_map=[1]), r"weight_map is [1]; expected an object"),
        (dict(weight_map={}), "weight_map is {}; expected"),
        (dict(weight_map="x"), "weight_map is 'x'; expected"),
        (dict(weight_map={"a": 5}), "the file of 'a' is 5; expected a name"),
        (dict(weight_map={"a": ["x"]}), "the file of 'a' is ['x']; expected a name"),
        (dict(weight_map={"a": "x", "\x1b[1m": None}), r"'\x1b[1m' is None; expected a name"),
        (dict(weight_map={"a": ""}), "the file of 'a' is ''; expected a name"),
    ),
)
@pytest.mark.parametrize("name", ("whole", "sharded"))
def test_an_index_of_wrong_types(copy, name, index, expected):
    folder = copy(name)
    (folder / INDEX).write_text(json.dumps(index))
    said = refusal(folder)
    assert said.startswith(f"{folder / INDEX}: ") and expected in said


@pytest.mark.parametrize("name", ("config.json", INDEX))
@pytest.mark.parametrize(
    ("text", "expected"),
    (
        (b'{"a":' + b"[" * 100_000, "is not valid JSON: maximum recursion depth"),
        (b"\xff\xfe", "is not UTF-8 text (invalid start byte at byte 0)"),
        (b'{"a": 1, "a": 2}', "is not valid JSON: the key 'a' is there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b"", "is not valid JSON"),
        (b"3", "holds int, not an object"),
    ),
)
def test_json_that_cannot_be_read(copy, name, text, expected):
    folder = copy("sharded")
    (folder / name).write_bytes(text)
    assert f"{folder / name} {expected}" in refusal(folder)


def test_json_that_is_a_folder_or_too_large(copy):
    folder = copy("whole")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert f"{folder / 'config.json'} is a folder; expected an ordinary file" in refusal(folder)
    with (folder / INDEX).open("wb") as file:
        file.truncate(2**40)  # a file with a hole, no bytes on the disk
    assert "has 1,099,511,627,776 bytes; expected at most" in problems(folder)[0]


def rewritten(folder, name, **changes):
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | changes))
    return folder


def test_the_end_of_a_turn_is_in_config_json_where_nothing_else_names_it(copy):
    folder = rewritten(copy("complete"), "config.json", eos_token_id=[258, 77])
    assert 77 not in open_checkpoint(folder).tokenizer().eos  # generation_config.json counts
    rewritten(folder, "generation_config.json", eos_token_id=None)
    assert set(open_checkpoint(folder).tokenizer().eos) == {256, 258, 77}
    (folder / "generation_config.json").unlink()
    assert set(open_checkpoint(folder).tokenizer().eos) == {256, 258, 77}
    rewritten(folder, "config.json", eos_token_id=78)
    assert set(open_checkpoint(folder).tokenizer().eos) == {256, 258, 78}


@pytest.mark.parametrize("value", (True, 2.0, [None], [[1]], {"a": 1}))
def test_the_end_of_a_turn_is_a_whole_number(copy, value):
    folder = rewritten(copy("complete"), "config.json", eos_token_id=value)
    (folder / "generation_config.json").unlink()
    assert "config.json: eos_token_id is" in refusal(folder, "tokenizer")


@pytest.mark.parametrize("value", (288, -1, 10**9))
def test_the_end_of_a_turn_is_in_the_vocabulary(copy, value):
    folder = rewritten(copy("complete"), "config.json", eos_token_id=value)
    (folder / "generation_config.json").unlink()
    assert f"ends a turn with id {value}, and the embedding table has 288 rows" in refusal(
        folder, "tokenizer"
    )


def test_a_tokenizer_with_ids_beyond_the_table(copy):
    """They are refused when a text has them, as a model that never sees them is a whole one."""
    folder = copy("complete")
    known = json.loads((folder / "tokenizer.json").read_text())
    known["model"]["vocab"]["e"] = 10**6
    rewritten(folder, "tokenizer.json", **known)
    tokenizer = open_checkpoint(folder).tokenizer()
    assert tokenizer.decode(tokenizer.encode("a thimbl")) == "a thimbl"
    words = f"token 'e', whose id is 1000000, and the embedding table of {folder} has 288 rows;"
    with pytest.raises(LLMError, match=words):
        tokenizer.encode("a thimble")


def test_added_tokens_that_the_table_has_no_rows_for(copy):
    folder = copy("complete")
    hf = tiny_tokenizer(CFG.vocab)
    fits = CFG.vocab - len(hf)
    hf.add_tokens([f"<unused {i}>" for i in range(fits)])
    hf.save_pretrained(folder)
    whole = open_checkpoint(folder).tokenizer()
    assert whole.vocab == CFG.vocab and whole.encode(f"<unused {fits - 1}>") == [CFG.vocab - 1]
    hf.add_tokens(["<|user|>", "<|eot_id|>"], special_tokens=True)
    hf.save_pretrained(folder)
    tokenizer = open_checkpoint(folder).tokenizer()
    assert tokenizer.eos == whole.eos  # the model cannot say <|eot_id|>
    assert tokenizer.encode("Hi!") == whole.encode("Hi!")
    with pytest.raises(LLMError, match=r"the token '<\|user\|>', whose id is 288"):
        tokenizer.encode("Hi! <|user|>")
    hf.chat_template = "<|user|>{{ messages[0].content }}"
    hf.save_pretrained(folder)
    with pytest.raises(LLMError, match=r"the token '<\|user\|>', whose id is 288"):
        open_checkpoint(folder).tokenizer().chat([dict(role="user", content="Hi!")])


def test_a_turn_must_end_with_a_token_that_the_table_has(copy, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TURN_ENDS", ())  # of which it has others
    folder = copy("complete")
    hf = tiny_tokenizer(CFG.vocab)
    hf.add_tokens([f"<unused {i}>" for i in range(CFG.vocab - len(hf))])
    hf.add_special_tokens(dict(eos_token="<|beyond|>"))
    hf.save_pretrained(folder)
    for name in ("generation_config.json", "config.json"):
        rewritten(folder, name, eos_token_id=288)
    assert "ends a turn with id 288, and the embedding table has 288" in refusal(
        folder, "tokenizer"
    )

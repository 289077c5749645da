"""Missing packages are named together with what installs them."""

import sys

import pytest

from llm_jax.extras import MissingPackage, need


def test_a_module_that_is_there_is_returned():
    import json.decoder

    assert need("json", "eval", "this test") is json
    assert need("json.decoder", "eval", "this test") is json.decoder


@pytest.mark.parametrize(
    "module", ["no_such_package", "no_such_package.inner", "json.no_such_part"]
)
def test_a_missing_one_is_named_with_its_extra(module):
    with pytest.raises(MissingPackage) as caught:
        need(module, "vision", "reading a video")
    assert str(caught.value) == (
        f"reading a video needs {module}, which is not installed: pip install 'thimble-jax[vision]'"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_blocked_module_counts_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingPackage, match="needs cv2"):
        need("cv2", "vision", "reading a video")


def test_code_that_expects_an_import_error_sees_one():
    with pytest.raises(ImportError, match="no_such_package"):
        need("no_such_package", "eval", "this test")


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("import no_such_need", ModuleNotFoundError, "No module named 'no_such_need'"),
        ("from json import no_such_name", ImportError, "cannot import name"),
        ("raise ModuleNotFoundError('without a name')", ModuleNotFoundError, "without a name"),
        ("raise RuntimeError('built for another version')", RuntimeError, "another version"),
    ],
)
def test_a_module_whose_own_import_is_broken_raises_that_error(
    tmp_path, monkeypatch, source, error, message
):
    (tmp_path / "a_broken_package.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=message) as caught:
        need("a_broken_package", "eval", "this test")
    assert not isinstance(caught.value, MissingPackage)

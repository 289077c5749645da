"""Downloaded files hashed again, and the commit that they are from."""

import hashlib
import os

import pytest

from llm_jax import CheckpointError, digest, downloads
from llm_jax.registry import MODELS, RegisteredModel, find_checkpoint
from llm_jax.testing import tiny_config, tiny_params, write_safetensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def published(data, large):
    """The digest by which the Hub names a file."""
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A folder of the Hub's cache with a whole model: links to files named by their content."""
    import huggingface_hub

    cfg = tiny_config("llama", layers=1)
    source = write_safetensors(tmp_path / "source", tiny_params(cfg), cfg)
    repo = tmp_path / "models--nobody--tiny"
    (repo / "blobs").mkdir(parents=True)
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for file in source.iterdir():
        data = file.read_bytes()
        name = published(data, file.suffix == ".safetensors")
        (repo / "blobs" / name).write_bytes(data)
        (folder / file.name).symlink_to(f"../../blobs/{name}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    monkeypatch.setitem(MODELS, "tiny", RegisteredModel("tiny", "nobody/tiny", cfg))
    return folder


def find(tmp_path, **how):
    said = []
    path = find_checkpoint("tiny", cache_dir=tmp_path / "cache", progress=said.append, **how)
    return path, said


def flip(path):
    """Changes the last bit, as a disk may; time and size of the file stay."""
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_the_commit_is_reported(snapshot, tmp_path, monkeypatch):
    path, said = find(tmp_path)
    assert path == snapshot and downloads.commit(path) == COMMIT
    assert said == [f"nobody/tiny is at commit {COMMIT}, the newest when it was fetched"]
    pinned = RegisteredModel("tiny", "nobody/tiny", MODELS["tiny"].config, revision=COMMIT)
    monkeypatch.setitem(MODELS, "tiny", pinned)
    assert find(tmp_path)[1] == [f"nobody/tiny is at commit {COMMIT}"]
    assert downloads.commit(tmp_path) is None
    assert downloads.commit(snapshot.parent / "main") is None


def test_a_pinned_revision_is_asked_for(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo, revision, local_files_only, **options):
        asked.append(revision)
        raise FileNotFoundError("not here")

    def model_info(repo, revision, timeout):
        asked.append(revision)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    pinned = RegisteredModel("tiny", "nobody/tiny", tiny_config(), revision=COMMIT)
    monkeypatch.setitem(MODELS, "tiny", pinned)
    with pytest.raises(CheckpointError, match="no network"):
        find(tmp_path)
    assert asked == [COMMIT, COMMIT]


def test_revisions_are_commits():
    """A branch or a tag would be no promise: both can be moved."""
    for model in MODELS.values():
        assert model.revision is None or len(bytes.fromhex(model.revision)) == 20


@pytest.mark.parametrize("name", ("model.safetensors", "config.json", "tokenizer.json"))
@pytest.mark.parametrize("explicit", (False, True))
def test_a_changed_file_in_the_cache_is_named(snapshot, tmp_path, name, explicit):
    blob = (snapshot / name).resolve()
    if name == "model.safetensors":
        flip(blob)
    else:
        blob.write_text(blob.read_text() + " ")  # still the same JSON
    kind = "sha256" if name == "model.safetensors" else "sha1"
    with pytest.raises(CheckpointError, match=rf"{name} has {kind} \w+; expected \w+: .*delete it"):
        find(tmp_path, checkpoint=snapshot if explicit else None)


def test_a_file_is_hashed_once(snapshot, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(digest, "SETTLED_NS", -1)
    monkeypatch.setattr(downloads, "hashed", hash_and_log(hashed))
    find(tmp_path)
    assert sorted(hashed) == sorted(file.name for file in snapshot.iterdir())
    hashed.clear()
    find(tmp_path)
    assert hashed == []
    blob = (snapshot / "config.json").resolve()
    os.utime(blob, ns=(1, 1))
    find(tmp_path)
    assert hashed == ["config.json"]
    blob.rename(blob.with_name("old"))
    blob.write_bytes(blob.with_name("old").read_bytes())
    os.utime(blob, ns=(1, 1))  # the same bytes, size and time in another file
    find(tmp_path)
    assert hashed == ["config.json"] * 2
    for kept in (tmp_path / "cache/digests").iterdir():
        kept.write_text("damaged")
    hashed.clear()
    find(tmp_path)
    assert len(hashed) == len(list(snapshot.iterdir()))


def test_a_file_that_changes_while_its_time_stands_still_is_hashed_again(snapshot, tmp_path):
    find(tmp_path)
    flip((snapshot / "model.safetensors").resolve())
    with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256"):
        find(tmp_path)


def hash_and_log(log):
    real = downloads.hashed

    def hashed(path, algorithm):
        log.append(path.name)
        return real(path, algorithm)

    return hashed


def test_large_files_are_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "ANNOUNCED", 20_000_000)
    monkeypatch.setattr(digest, "SETTLED_NS", -1)
    (tmp_path / "x").write_bytes(bytes(25_000_000))
    said = []
    for _ in range(2):
        sha256 = hashlib.sha256(bytes(25_000_000)).hexdigest()
        downloads.check([(tmp_path / "x", sha256)], tmp_path / "cache", said.append)
    assert said == [f"checking 0.0 GB of {tmp_path} once"]


def test_a_cache_folder_that_cannot_be_written(snapshot, tmp_path):
    (tmp_path / "cache").write_text("a file, so nothing can lie in it")
    assert find(tmp_path)[0] == snapshot
    flip((snapshot / "config.json").resolve())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find(tmp_path, checkpoint=snapshot)


def test_a_file_that_repositories_share(snapshot, tmp_path):
    """Its own name is a hash of another kind (Xet's); the link to it has the published one."""
    link = snapshot / "model.safetensors"
    blob = snapshot.parent.parent / "blobs" / link.readlink().name
    shared = tmp_path / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/ab/{shared.name}")
    assert find(tmp_path)[0] == snapshot
    flip(shared)
    os.utime(shared, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256"):
        find(tmp_path)


def test_files_without_a_published_digest(tmp_path):
    (tmp_path / ("a" * 64)).write_bytes(b"x")
    (tmp_path / "x.json").symlink_to("a" * 64)  # not in a folder called blobs
    (tmp_path / "y.json").write_bytes(b"{}")
    assert not downloads.published(tmp_path / "x.json")
    assert not downloads.published(tmp_path / "y.json")
    downloads.check_snapshot(tmp_path, ["*.json"], tmp_path / "cache", print)

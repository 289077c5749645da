"""Images of every kind are upright RGB in eight bits, or named."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from qyolop_jax import formats
from qyolop_jax.config import DETECTION
from qyolop_jax.formats import ReadError, is_turned, read_image, read_mask
from qyolop_jax.readers import ImageFolder

ROUGH = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)
SCENE = cv2.resize(ROUGH, (80, 40), interpolation=cv2.INTER_LINEAR)


def oriented(way):
    exif = Image.Exif()
    exif[0x0112] = way
    return exif


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("way", range(10))
def test_exif_turns_images(tmp_path, way, suffix):
    """As Pillow's own way does it; 0 and 9 are no orientation."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(SCENE).save(path, exif=oriented(way), quality=95)
    found = read_image(path)
    want = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    np.testing.assert_array_equal(found, want)
    assert found.shape == ((80, 40, 3) if way in (5, 6, 7, 8) else (40, 80, 3))
    assert is_turned(path) == (way in range(2, 9))
    plain = np.asarray(Image.open(path).convert("RGB"))
    by_hand = {6: np.rot90(plain, -1), 8: np.rot90(plain), 3: plain[::-1, ::-1]}.get(way)
    if by_hand is not None:
        np.testing.assert_array_equal(found, by_hand)


def test_labels_belong_to_the_upright_image(tmp_path):
    class Folder(ImageFolder):
        def labels(self, path, size):
            return dict(lane=read_mask(tmp_path / "mask.png", size))

    Image.fromarray(SCENE).save(tmp_path / "a.jpg", exif=oriented(6))
    lane = np.zeros((80, 40), np.uint8)
    lane[:7] = 1
    Image.fromarray(lane).save(tmp_path / "mask.png")
    sample = Folder([tmp_path / "a.jpg"], "train", DETECTION, None)[0]
    assert sample.image.shape == (80, 40, 3)
    np.testing.assert_array_equal(sample.lane, lane)
    Image.fromarray(np.rot90(lane).copy()).save(tmp_path / "mask.png", exif=oriented(6))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (80, 40)), lane)
    Image.fromarray(lane.T.copy()).save(tmp_path / "mask.png")
    with pytest.raises(ReadError, match=r"mask\.png is 40x80, its image 80x40"):
        Folder([tmp_path / "a.jpg"], "train", DETECTION, None)[0]


def test_exif_that_is_broken_turns_nothing(tmp_path):
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01", b"Exif\0\0no tiff", b"Exif\0\0"):
        Image.fromarray(SCENE).save(tmp_path / "a.jpg", exif=exif)
        assert read_image(tmp_path / "a.jpg").shape == (40, 80, 3)


GREY = SCENE[..., 0]
THREE = np.repeat(GREY[..., None], 3, -1)
PALETTE = Image.fromarray(SCENE).quantize(255)
KINDS = {  # what is written, and what is to be read
    "grey": (Image.fromarray(GREY), THREE),
    "one bit": (Image.fromarray(GREY > 99), np.where(THREE > 99, 255, 0)),
    "alpha": (Image.fromarray(np.dstack([SCENE, GREY])), SCENE),
    "grey and alpha": (Image.fromarray(np.dstack([GREY, GREY])), THREE),
    "palette": (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) * 256 + 77), THREE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixel_is_read_rightly(tmp_path, kind):
    image, want = KINDS[kind]
    image.save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, want)
    other = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(found, other)


def test_other_kinds(tmp_path):
    deep = SCENE.astype(np.uint16) * 256 + 77
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), SCENE)
    clear = Image.fromarray(SCENE).quantize(16)
    clear.save(tmp_path / "clear.png", transparency=bytes(16))  # colours stay what they are
    want = np.asarray(clear.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), want)
    Image.fromarray(SCENE).convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    off = read_image(tmp_path / "print.jpg").astype(int) - SCENE
    assert np.abs(off).mean() < 6
    Image.fromarray(SCENE).save(tmp_path / "web.jpg", format="WEBP", lossless=True)  # by content
    np.testing.assert_array_equal(read_image(tmp_path / "web.jpg"), SCENE)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.png", format="TIFF")
    with pytest.raises(ReadError, match="pixels of mode F; expected 8 or 16 bits"):
        read_image(tmp_path / "float.png")


@pytest.mark.parametrize("quality", [50, 95])
def test_pixels_are_those_of_opencv(tmp_path, quality):
    """Which read them until Pillow did: so no network sees other numbers."""
    for i, size in enumerate([(40, 80), (33, 57), (8, 8), (1, 1), (7, 100)]):
        picture = Image.fromarray(cv2.resize(SCENE, size[::-1]))
        picture.save(tmp_path / "a.jpg", quality=quality, subsampling=i % 3, progressive=i > 2)
        want = cv2.imread(str(tmp_path / "a.jpg"))[..., ::-1]
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), want)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data=b"", bits=8, color=2):
    """A PNG of this size with these pixels, or far fewer."""
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(10_000, 9_000), "10000x9000 pixels; expected at most 89478485"),
        (png(14_000, 10_000), "pixels"),
        (png(100_000, 100_000), "too large"),
        (png(2**31 - 1, 2**31 - 1), "too large"),
        (png(0, 5), "corrupt, or no image"),
        (png(5, 0), "corrupt, or no image"),
        (png(5, 5), "corrupt, or no image"),
        (png(5, 5, bytes(80), bits=3), "corrupt, or no image"),
        (png(5, 5, bytes(80), color=9), "corrupt, or no image"),
        (b"", "is empty"),
        (b"no image", "corrupt, or no image"),
        (b"\xff\xd8\xff", "corrupt, or no image"),
    ],
    ids=range(12),
)
def test_absurd_images_are_named(tmp_path, data, words):
    (tmp_path / "a.png").write_bytes(data)
    for read in (read_image, lambda path: read_mask(path, (5, 5))):
        with pytest.raises(ReadError, match=rf"a\.png .*{words}") as told:
            read(tmp_path / "a.png")
        assert "\n" not in str(told.value)


def encoded(form, **rest):
    out = io.BytesIO()
    Image.fromarray(SCENE).save(out, form, **rest)
    return out.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_every_cut_is_named(tmp_path, form):
    """Also one of a JPEG with a thumbnail, whose end looks like that of the image."""
    data = encoded(form)
    for length in range(0, len(data) - 20, max(len(data) // 40, 1)):
        (tmp_path / "a").write_bytes(data[:length])
        with pytest.raises(ReadError):
            read_image(tmp_path / "a")
    exif = Image.Exif()
    exif[0x9286] = encoded("JPEG", quality=30)
    data = encoded("JPEG", exif=exif)
    (tmp_path / "a").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ReadError):
        read_image(tmp_path / "a")


def test_flipped_bits_are_read_or_named(tmp_path):
    """A PNG has checksums: every flip in its pixels is named. No flip of either is a crash."""
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG"):
        data = encoded(form)
        for _ in range(60):
            at = int(rng.integers(0, 8 * len(data)))
            flipped = bytearray(data)
            flipped[at // 8] ^= 1 << at % 8
            (tmp_path / "a").write_bytes(flipped)
            try:
                found = read_image(tmp_path / "a")
            except ReadError:
                continue
            assert found.dtype == np.uint8
            if form == "PNG":
                np.testing.assert_array_equal(found, SCENE)


def test_animations_are_named_and_pairs_of_pictures_are_read(tmp_path):
    frames = [Image.fromarray(np.roll(SCENE, 9 * i, 1)) for i in range(3)]
    for form in ("PNG", "GIF", "WEBP"):
        frames[0].save(tmp_path / "a.png", form, save_all=True, append_images=frames[1:])
        with pytest.raises(ReadError, match=r"a\.png is an animation; expected one image"):
            read_image(tmp_path / "a.png")
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:], quality=95)
    off = np.abs(read_image(tmp_path / "a.jpg").astype(int) - SCENE)  # as some phones write them
    assert off.mean() < 6


def test_a_bomb_of_text_is_named(tmp_path):
    """Text that unpacks to more than Pillow allows, a megabyte."""
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 2_000_000, zip=True)
    Image.fromarray(SCENE).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(ReadError, match=r"a\.png is corrupt, or no image"):
        read_image(tmp_path / "a.png")


def test_paths_that_are_no_files(tmp_path):
    for path, words in ((tmp_path, "cannot be read"), (tmp_path / "none", "does not exist")):
        with pytest.raises(ReadError, match=words):
            formats.read_image(path)

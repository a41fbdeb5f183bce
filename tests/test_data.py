"""What pictures may be kept in: each kind gives the pixels of the same files in a folder, and their labels."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm.data
import torch
from PIL import Image

import ptq4vit_fx as ptq
from ptq4vit_fx.data.pictures import evenly_spread, short_name
from ptq4vit_fx.data.reading import load_named, read_images
from ptq4vit_fx.data.sources import open_images

CONFIG = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
TRANSFORM = timm.data.create_transform(**CONFIG)
LABELS = (0, 0, 0, 1, 1, 1)
FEATURES = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures of two classes, of different sizes."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for number, name in enumerate(["cat", "cat", "cat", "dog", "dog", "dog"]):
        (root / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 24, 3), np.uint8)
        Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def pixels_of(data: Path, *, labelled: bool = False):
    images, skipped = open_images(data, labelled=labelled), list[str]()
    pixels = load_named(images.items, TRANSFORM, skipped)[1]
    assert skipped == []
    return pixels, tuple(images.labels), images.classes


def files_of(folder):
    return sorted(folder.rglob("*.png"))


def as_list(folder, to):
    lines = [f"{path.relative_to(folder.parent)} {label}" for path, label in zip(files_of(folder), LABELS, strict=True)]
    path = folder.parent / "list.txt"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8-sig")
    return path, ()


def as_zip(folder, to):
    with zipfile.ZipFile(to / "a.zip", "w") as archive:
        for path in [*files_of(folder)[::-1], folder]:
            archive.write(path, Path("top", path.relative_to(folder)))
        archive.writestr("top/cat/.hidden.png", b"no")
        archive.writestr("__MACOSX/cat/0.png", b"no")
    return to / "a.zip", ("cat", "dog")


def as_tar(folder, to, *, mode="w", name="a.tar"):
    with tarfile.open(to / name, mode, format=tarfile.USTAR_FORMAT) as archive:
        archive.add(folder, "photos")
        link = tarfile.TarInfo("photos/cat/9.png")
        link.type, link.linkname = tarfile.LNKTYPE, "/etc/passwd"
        archive.addfile(link)
    return to / name, ("cat", "dog")


def as_tar_gz(folder, to):
    return as_tar(folder, to, mode="w:gz", name="a.tar.gz")


def as_shards(folder, to):
    for shard, paths in enumerate((files_of(folder)[:2], files_of(folder)[2:])):
        with tarfile.open(to / f"set-{shard:06}.tar", "w") as archive:
            for path in paths:
                label = LABELS[int(path.stem)]
                for kind, content in (("png", path.read_bytes()), ("cls", str(label).encode()), ("seg.png", b"no")):
                    member = tarfile.TarInfo(f"{path.stem}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return to, ()


def rows_of(folder):
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files_of(folder)]
    table = pa.table({"image": images, "label": list(LABELS), "id": list(range(6))})
    return table.replace_schema_metadata({"huggingface": json.dumps(FEATURES)})


def as_parquet(folder, to):
    pq.write_table(rows_of(folder), to / "train-00000-of-00001.parquet", row_group_size=4)
    return to / "train-00000-of-00001.parquet", ("cat", "dog")


def as_hub_folder(folder, to):
    as_parquet(folder, to)
    shutil.copy(to / "train-00000-of-00001.parquet", to / "test-00000-of-00001.parquet")
    return Path(f"{to}:train"), ("cat", "dog")


def as_saved(folder, to):
    table = rows_of(folder)
    for number, part in enumerate((table.slice(0, 4), table.slice(4))):
        with pa.ipc.new_stream(to / f"data-{number}.arrow", table.schema) as stream:
            stream.write_table(part)
    files = [{"filename": f"data-{number}.arrow"} for number in range(2)]
    (to / "state.json").write_text(json.dumps({"_data_files": files}))
    return to, ("cat", "dog")


KINDS = [as_list, as_zip, as_tar, as_tar_gz, as_shards, as_parquet, as_hub_folder, as_saved]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_pictures_of_the_folder(folder, tmp_path, kind):
    data, classes = kind(folder, tmp_path)
    expected = pixels_of(folder, labelled=True)
    found = pixels_of(data, labelled=True)
    assert torch.equal(found[0], expected[0])
    assert found[1:] == (LABELS, classes)
    assert torch.equal(pixels_of(data)[0], expected[0])
    images = open_images(data)
    again = [pixels for _, pixels in read_images([images.items[n] for n in (5, 0, 3)], TRANSFORM, [])]
    assert torch.equal(torch.stack(again), expected[0][[5, 0, 3]])  # in any order
    assert len({short_name(picture, data) for picture in images.items}) == 6


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("channels_first", [False, True])
def test_arrays_of_bytes_are_pictures(tmp_path, compressed, channels_first):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 18, 3), np.uint8)
    stored = pixels.transpose(0, 3, 1, 2) if channels_first else pixels
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "a.npz", x=np.ascontiguousarray(stored), y=np.array([[4], [0], [1], [2], [3]]), mask=np.zeros(2))
    np.save(tmp_path / "a.npy", np.ascontiguousarray(stored))
    expected = torch.stack([TRANSFORM(Image.fromarray(image)) for image in pixels])
    found, labels, _ = pixels_of(tmp_path / "a.npz", labelled=True)
    assert torch.equal(found, expected)
    assert labels == (4, 0, 1, 2, 3)
    assert torch.equal(pixels_of(tmp_path / "a.npy")[0], expected)
    assert torch.equal(pixels_of(Path(f"{tmp_path / 'a.npz'}:x"))[0], expected)
    with pytest.raises(ptq.PTQError, match="expected a class number for each image, got none"):
        open_images(tmp_path / "a.npy", labelled=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f8"])
def test_float_arrays_are_pixels_already(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=(4, 3, 16, 20)).astype(dtype)
    np.save(tmp_path / "first.npy", values)
    np.save(tmp_path / "last.npy", np.ascontiguousarray(values.transpose(0, 2, 3, 1)))
    for name in ("first.npy", "last.npy"):
        images = open_images(tmp_path / name)
        assert images.float_shape == (3, 16, 20)
        assert torch.equal(pixels_of(tmp_path / name)[0], torch.from_numpy(values.astype(np.float32)))


def test_sixteen_bits_gray_and_transparency_in_arrays(tmp_path):
    np.save(tmp_path / "gray.npy", np.full((1, 16, 16), 255, np.uint8))
    np.save(tmp_path / "wide.npy", np.full((1, 16, 16, 1), 65535, np.uint16))
    np.save(tmp_path / "clear.npy", np.zeros((1, 16, 16, 4), np.uint8))
    for name in ("gray", "wide", "clear"):
        assert bool((pixels_of(tmp_path / f"{name}.npy")[0] == 1).all()), name


def test_files_that_end_early_are_refused(folder, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 16, 16, 3), np.uint8))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-10])
    with pytest.raises(ptq.PTQError, match=r"a.npy: expected a whole array, got the first of \(4, 16, 16, 3\)"):
        open_images(tmp_path / "a.npy")
    path, _ = as_tar(folder, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"PNG") + 100])
    with pytest.raises(
        ptq.PTQError, match=r"a.tar: expected a whole tar archive, got ReadError: unexpected end of data"
    ):
        open_images(path)
    path.write_bytes(whole[: whole.index(b"photos/dog") + 100])
    with pytest.raises(ptq.PTQError, match=r"a.tar: expected a whole tar archive, got ValueError: no header at byte"):
        open_images(path)


def test_headers_that_lie_take_no_memory(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 9, 9, 3)})
    (tmp_path / "many.npy").write_bytes(header.getvalue())
    with zipfile.ZipFile(tmp_path / "many.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(10**6))
    with pytest.raises(ptq.PTQError, match=r"images.npy: expected a whole array"):
        open_images(tmp_path / "many.npz")
    with pytest.raises(ptq.PTQError, match=r"many.npy: expected a whole array"):
        open_images(tmp_path / "many.npy")
    with gzip.open(tmp_path / "a.tgz", "wb") as archive:  # a name of 20 MiB
        member = tarfile.TarInfo("x")
        member.type, member.size = tarfile.GNUTYPE_LONGNAME, 20 * 2**20
        archive.write(member.tobuf())
        archive.write(bytes(20 * 2**20))
    with pytest.raises(ptq.PTQError, match="a header of 20971520 bytes"):
        open_images(tmp_path / "a.tgz")


def test_a_row_may_name_a_file_beside_it_and_a_row_without_image_is_skipped(folder, tmp_path):
    shutil.copy(files_of(folder)[0], tmp_path / "0.png")
    rows = [{"bytes": None, "path": "0.png"}, {"bytes": None, "path": None}, {"bytes": b"no", "path": None}]
    pq.write_table(pa.table({"picture": rows, "score": [0.5] * 3}), tmp_path / "a.parquet")
    skipped: list[str] = []
    assert len(load_named(open_images(tmp_path / "a.parquet").items, TRANSFORM, skipped)[1]) == 1
    assert "row 1: no image in it" in skipped[0]
    with pytest.raises(ptq.PTQError, match="expected a class number for each image, got none"):
        open_images(tmp_path / "a.parquet", labelled=True)


def test_splits_and_columns_are_named(folder, tmp_path):
    as_hub_folder(folder, tmp_path)
    with pytest.raises(ptq.PTQError, match=r"expected files of one split, got test, train; name it: .*:test"):
        open_images(tmp_path)
    with pytest.raises(ptq.PTQError, match=r"expected one of test, train, got 'trian'; did you mean train\?"):
        open_images(Path(f"{tmp_path}:trian"))
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    with pytest.raises(ptq.PTQError, match=r"expected one column of images, got a, b; name it: .*two.parquet:a"):
        open_images(tmp_path / "two.parquet")
    assert len(open_images(Path(f"{tmp_path / 'two.parquet'}:b")).items) == 1
    for split in ("train", "test"):
        (tmp_path / "saved" / split).mkdir(parents=True)
        as_saved(folder, tmp_path / "saved" / split)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ptq.PTQError, match="expected one split, got test, train; pass"):
        open_images(tmp_path / "saved")
    assert len(open_images(Path(f"{tmp_path / 'saved'}:test")).items) == 6


def test_a_folder_of_many_files_starts_in_seconds(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}").mkdir()
        for name in range(100):
            (tmp_path / f"{number}" / f"{name}.jpg").touch()
    started = time.process_time()
    images = open_images(tmp_path)
    assert len(images.items) == 2000
    assert evenly_spread(2000, 4) == [0, 500, 1000, 1500]
    assert time.process_time() - started < 0.5  # 100,000 are fifty times as many


def seen(image: Image.Image, suffix: str = "png", mode: str = "RGB", **options):
    """Return the color that is read of a picture of one color, saved and opened again."""
    from ptq4vit_fx.data.image_files import opened

    stream = io.BytesIO()
    image.save(stream, suffix, **options)
    return opened(stream.getvalue(), 3).getpixel((0, 0))


def test_transparency_is_seen_on_white():
    clear, half = Image.new("RGBA", (8, 8), (200, 0, 0, 0)), Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert seen(clear) == seen(clear, "webp", lossless=True, exact=True) == (255, 255, 255)
    assert seen(half) == (127, 127, 127)
    assert seen(palette) == (255, 0, 0)
    assert seen(palette, transparency=1) == seen(palette, "gif", transparency=1) == (255, 255, 255)
    assert seen(Image.new("LA", (8, 8), (0, 0))) == (255, 255, 255)
    assert seen(Image.new("RGB", (8, 8), (9, 8, 7)), transparency=(9, 8, 7)) == (255, 255, 255)
    assert seen(Image.new("RGBA", (8, 8), (9, 8, 7, 255))) == (9, 8, 7)


def tiff(bits: int, content: bytes, meaning: int = 1) -> bytes:
    """Return a TIFF file of 4 x 4 gray pixels."""
    tags = {256: 4, 257: 4, 258: bits, 259: 1, 262: meaning, 273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: 4, 279: len(content)}
    entries = b"".join(
        np.array([key, 4, 1, 0, value & 0xFFFF, value >> 16], "<u2").tobytes() for key, value in tags.items()
    )
    return b"II*\0" + np.array([8], "<u4").tobytes() + np.array([9], "<u2").tobytes() + entries + bytes(4) + content


def test_gray_of_more_bits_is_as_bright_as_it_is():
    from ptq4vit_fx.data.image_files import opened

    def shades(content):
        return np.asarray(opened(content, 1))[0].tolist()

    wide = np.tile(np.array([0, 256, 30_000, 65_535], "<u2"), 4).tobytes()
    assert shades(tiff(16, wide)) == [0, 1, 117, 255]
    assert shades(tiff(16, wide, meaning=0)) == [255, 254, 138, 0]
    assert shades(tiff(12, bytes([0xFF, 0xF0, 0x00] * 8))) == [255, 0, 255, 0]
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    assert seen(dark) == (0, 0, 0)
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert seen(cyan, "tiff") == (0, 255, 255)
    assert max(np.abs(np.subtract(seen(cyan, "jpeg", quality=100), (0, 255, 255)))) <= 3
    with pytest.raises(ValueError, match="colors of mode LAB: save it as RGB"):
        seen(Image.new("LAB", (8, 8)), "tiff")


def test_what_pillow_cannot_read_is_skipped_by_name(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    skipped: list[str] = []
    assert len(load_named(open_images(tmp_path).items, TRANSFORM, skipped)[1]) == 1
    assert skipped[0].startswith(f"{tmp_path / 'a.heic'}: cannot identify")


def test_without_pyarrow_there_is_a_sentence(folder, tmp_path, monkeypatch):
    data, _ = as_parquet(folder, tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ptq.PTQError, match=r"expected pyarrow, which reads it, got none; pip install ptq4vit-fx\[data\]$"
    ):
        open_images(data)
    assert len(open_images(folder).items) == 6

"""Folders and image files as they are: bits, modes, orientation, broken files, links, hidden folders, numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ptq4vit_fx as ptq
from brought import brought
from brought.command import VIT, command, vit_checkpoint
from brought.pipeline import QUICK, pictures, vit
from ptq4vit_fx.data.folders import list_images
from ptq4vit_fx.data.pictures import evenly_spread
from ptq4vit_fx.data.preprocessing import data_config, transform_of
from ptq4vit_fx.data.reading import load_named
from ptq4vit_fx.data.sources import open_images

SHADES = np.kron(np.random.default_rng(0).integers(0, 65536, (4, 4)), np.ones((8, 8))).astype(np.uint16)
TRANSFORMS = {
    channels: timm.data.create_transform((channels, 32, 32), mean=(0,) * channels, std=(1,) * channels, crop_pct=1.0)
    for channels in (1, 3)
}
TRANSFORM = TRANSFORMS[3]


@contextmanager
def folder(**files: Any) -> Iterator[Path]:
    """Give a folder of such files: images, arrays of them, or text; `__` in a name stands for a folder, the end for the
    suffix: a__b_png is a/b.png.
    """
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        for name, content in files.items():
            path = root / ".".join(name.replace("__", "/").rsplit("_", 1))
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path)
        yield root


def loaded(root: Path, channels: int = 3) -> Tensor:
    """Return the images of a folder, none of which may be skipped."""
    skipped: list[str] = []
    images = load_named(list_images(root).items, TRANSFORMS[channels], skipped, channels)[1]
    assert not skipped
    return images


def picture(shade: int = 128) -> Image.Image:
    return Image.new("RGB", (32, 32), (shade, 255 - shade, 0))


@brought("data", "images of 16 bits, and of 32-bit integers or floats", quick=True)
def sixteen_bits() -> None:
    right = (SHADES >> 8).astype(np.uint8)
    with folder(a_png=right) as root:
        expected = loaded(root)
    wide, unit = SHADES.astype(np.int32), (right / np.float32(255)).astype(np.float32)
    for images in ({"a_png": SHADES}, {"a_tif": SHADES}, {"a_tif": wide}, {"a_tif": unit}, {"a_tif": unit * 255}):
        with folder(**images) as root:
            torch.testing.assert_close(loaded(root), expected, rtol=0, atol=1e-6)
    with folder(a_tif=unit - 7, b_png=right) as root:
        skipped: list[str] = []
        assert len(load_named(list_images(root).items, TRANSFORM, skipped)[1]) == 1
        assert "what is black and white is not known" in skipped[0]


@brought("data", "photos lying on their side (EXIF orientation)", quick=True)
def orientation() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:10] = 255
    upright, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    with folder() as root:
        upright.rotate(90).save(root / "a.jpg", exif=exif, quality=100)
        assert float(loaded(root)[0, :, :8].mean()) > 0.95
        upright.save(root / "a.jpg", exif=b"Exif\0\0 no exif at all", quality=100)
        assert float(loaded(root)[0, :, :8].mean()) > 0.95


@brought("data", "palettes, transparency, CMYK, one bit, animations, upper-case suffixes")
def other_modes() -> None:
    image = picture()
    frames = [picture(shade).convert("P", palette=Image.Palette.ADAPTIVE) for shade in (128, 0)]
    with folder(a_PNG=frames[0], b_png=image.convert("RGBA"), c_JPEG=image.convert("CMYK")) as root:
        frames[0].save(root / "d.gif", save_all=True, append_images=frames[1:])
        images = loaded(root)
        assert (images - images[:1]).abs().max() < 0.05
    with folder(a_png=Image.new("1", (32, 32), 1), b_png=Image.new("LA", (32, 32), (255, 255))) as root:
        assert (loaded(root) == 1).all()
        assert loaded(root, 1).shape == (2, 1, 32, 32)


@brought("data", "broken, empty and enormous files among others", quick=True)
def broken_files() -> None:
    with folder(a_png=picture(), b_png="not an image", c_jpg="", d_png=Image.new("1", (20000, 20000))) as root:
        whole = (root / "a.png").read_bytes()
        (root / "e.png").write_bytes(whole[: len(whole) // 2])
        (root / "f.png").symlink_to(root / "nowhere.png")
        skipped: list[str] = []
        assert len(load_named(list_images(root).items, TRANSFORM, skipped)[1]) == 1
        assert [Path(line.split(":")[0]).name for line in skipped] == ["b.png", "c.jpg", "d.png", "e.png", "f.png"]
        assert "exceeds limit" in skipped[2]


@brought("data", "nothing but broken files", refused="expected one readable image or more, got none of 2, the first: ")
def all_broken() -> None:
    with folder(a_png="not an image", b_png="nor this") as root:
        load_named(list_images(root).items, TRANSFORM, [])[1]


@brought("data", "hidden files and folders, and what programs leave behind", quick=True)
def hidden_folders() -> None:
    hidden = {".ipynb_checkpoints__a_png": picture(), "__MACOSX__a_png": picture(), "0__._a_png": picture()}
    with folder(**{f"{n}__a_png": picture() for n in range(7) if n != 5}, **{"0__Thumbs_db": "x"}) as root:
        for name, image in hidden.items():
            path = root / ".".join(name.removeprefix("__MACOSX__").replace("__", "/").rsplit("_", 1))
            path = root / "__MACOSX" / "a.png" if "MACOSX" in name else path
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        listed = list_images(root, labelled=True)
        assert listed.labels == (0, 1, 2, 3, 4, 6)
        assert len(list_images(root).items) == 6


@brought("data", "class folders that are links, linked images, links in a circle", quick=True)
def links() -> None:
    with folder(full__a__1_png=picture(), full__b__1_png=picture(), sub__c__1_png=picture()) as root:
        (root / "sub" / "a").symlink_to(root / "full" / "a")
        (root / "sub" / "b").mkdir()
        (root / "sub" / "b" / "2.png").symlink_to(root / "full" / "b" / "1.png")
        (root / "sub" / "b" / "up").symlink_to(root / "sub")
        listed = list_images(root / "sub", labelled=True)
        assert listed.classes == ("a", "b", "c")
        assert {path.name: label for path, label in zip(listed.items, listed.labels, strict=True)}["2.png"] == 1
        assert len(list_images(root / "sub").items) == 3


@brought("data", "a class folder without images")
def empty_class() -> None:
    with folder(a__1_png=picture(), c__1_png=picture()) as root:
        (root / "b").mkdir()
        assert list_images(root, labelled=True).labels == (0, 2)


@brought("data", "an archive of images that is none", refused="images.zip: expected a zip archive, got BadZipFile")
def archive() -> None:
    with folder(images_zip="PK") as root:
        open_images(root / "images.zip")


@brought("data", "an archive that nothing here unpacks", refused="got an archive; unpack it and pass the folder")
def other_archive() -> None:
    with folder(images_7z="7z") as root:
        open_images(root / "images.7z")


@brought(
    "data", "an array file of images that is none", refused="images.npy: expected an array of NumPy, got ValueError"
)
def array_file() -> None:
    with folder(images_npy="x") as root:
        open_images(root / "images.npy")


@brought("data", "a folder, by its path, and the pictures themselves, in Python", quick=True)
def pictures_in_python() -> None:
    shades = [picture(10 * number) for number in range(40)]
    with folder(**{f"{number:02}_png": shade for number, shade in enumerate(shades)}) as root:
        transform = transform_of(data_config(vit()))
        pixels = torch.stack([transform(shades[number]) for number in evenly_spread(40, 32)])
        expected = ptq.quantize(vit(), pixels, qconfig_mapping=QUICK, progress=False).calibration.fingerprint()
        prepared = ptq.prepare_fx(vit(), QUICK, pixels[:1])
        items = [{"image": shade, "label": 3} for shade in shades]
        array = np.stack([np.asarray(shade) for shade in shades])
        for data in (root, str(root), shades, [str(path) for path in list_images(root).items], items, array):
            assert ptq.calibrate(prepared, data, progress=False, memory_limit="2GiB").fingerprint() == expected
        converted = ptq.quantize(vit(), shades, qconfig_mapping=QUICK, progress=False, transform=transform)
        assert converted.calibration.fingerprint() == expected
        named = [{"pixel_values": batch} for batch in pixels.split(8)]
        assert ptq.calibrate(prepared, named, progress=False).fingerprint() == expected
        plain = DataLoader(TensorDataset(pixels), batch_size=8)
        doubled = ptq.calibrate(prepared, plain, progress=False, transform=lambda x: x * 2)
        assert doubled.fingerprint() == calibrated(pixels * 2)


def calibrated(pixels: Tensor) -> str:
    prepared = ptq.prepare_fx(vit(), QUICK, pixels[:1])
    return ptq.calibrate(prepared, pixels, progress=False).fingerprint()


@brought(
    "data", "pictures for a model that says nothing of them", refused="expected transform= beside pictures, got a m"
)
def pictures_without_transform() -> None:
    ptq.quantize(nn.Sequential(vit()).eval(), [picture(), picture(7)], qconfig_mapping=QUICK, progress=False)


@brought("data", "a folder without images", refused="got 1 other files, such as table.csv")
def no_images() -> None:
    with folder(table_csv="x") as root:
        list_images(root)


@brought("data", "gray images for a model of one channel, quantize and eval", quick=True)
def gray_model() -> None:
    with folder(**{f"{n}__a_png": picture(30 * n).convert("L") for n in range(7)}) as root:
        vit_checkpoint(root / "c.pth", in_chans=1)
        arguments = [*VIT, "--model-arg", "in_chans=1", "--weights", root / "c.pth", "--data", root, "--images", 4]
        text = command("quantize", *arguments, "--out", root / "m.onnx")
        assert "images are read as gray, mean 0.5" in text
        assert "of 7 images" in command("eval", root / "m.onnx", "--data", root)


@brought(
    "data", "color images for a model of four channels", refused="got a model of 4 channels; preprocess the images i"
)
def four_channels() -> None:
    with folder(a_png=picture()) as root:
        vit_checkpoint(root / "c.pth", in_chans=4)
        arguments = [*VIT, "--model-arg", "in_chans=4", "--weights", root / "c.pth", "--data", root, "--images", 4]
        command("quantize", *arguments, "--out", root / "m.onnx")


def scored(root: Path) -> str:
    """Return what `eval` says of a ViT of seven classes on a folder."""
    converted = ptq.quantize(vit(), pictures(), qconfig_mapping=QUICK, progress=False)
    ptq.export_onnx(converted, root / "m.onnx", pictures(1))
    return command("eval", root / "m.onnx", "--data", root / "data", "--model", "vit_tiny_patch16_224")


@brought("data", "class folders 0 to 6 without 5, and an empty one")
def a_number_missing() -> None:
    with folder(**{f"data__{n}__a_png": picture() for n in range(5)}) as root:
        (root / "data" / "6").mkdir()
        text = scored(root)
        assert "of 5 images" in text
        assert "warning: eval: " in text
        assert "1 of 6 sub-folders hold no image, and count as classes: 6" in text


@brought(
    "data",
    "one other folder among numbered ones",
    refused="got other beside 0, 1, 2 and 3 more; move what is",
    quick=True,
)
def a_name_among_numbers() -> None:
    with folder(**{f"data__{n}__a_png": picture() for n in (0, 1, 2, 3, 4, 6, "other")}) as root:
        scored(root)


@brought("data", "many unreadable files are one line")
def many_unreadable() -> None:
    with folder(data__0__a_png=picture(), **{f"data__0__b{n}_png": "no" for n in range(30)}) as root:
        text = scored(root)
        assert "skipped 30 files: " in text
        assert text.count("cannot identify") == 3
        assert " and 27 more" in text

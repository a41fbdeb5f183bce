"""Classify a folder of images with a file that `ptq4vit quantize` wrote: ONNX Runtime, numpy and pillow, nothing else.

    python classify_onnxruntime.py model.onnx photos/ --labels labels.txt

Copy this one file to where the model is deployed; it imports neither PyTorch nor timm nor ptq4vit_fx. The input size is
the model's; preprocessing and labels are those that the file records, unless labels.txt has others: one name per line,
line 1 for class 0. A file that takes uint8 images (`--uint8-input`) gets them as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

PROVENANCE, TARGET = "ptq4vit_fx.provenance", "ptq4vit_fx.target"
LABELS, UINT8 = "ptq4vit_fx.labels", "ptq4vit_fx.uint8_input"
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
SUFFIXES |= {".pbm", ".pnm", ".avif", ".jp2", ".heic", ".heif", ".jxl"}
HIDDEN = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}
MODES = {1: "L", 3: "RGB"}
Array = np.ndarray[Any, np.dtype[Any]]


def stop(sentence: str) -> SystemExit:
    """Return what ends the program with one sentence and exit code 1."""
    return SystemExit(f"error: {sentence}")


def open_model(path: Path, threads: int) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """Return a session and the preprocessing: timm's data config, input_size (channels, height, width) the model's.

    Beside it the labels, and in "uint8" the layout of a file that takes images as they are, "" of any other.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if not path.is_file():
        raise stop(f"{path}: expected an ONNX file, got no such file")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes share no base but Exception
        raise stop(f"{path}: expected a model that ONNX Runtime can open: {str(error).splitlines()[0]}") from error
    metadata = session.get_modelmeta().custom_metadata_map
    preprocessing = json.loads(metadata.get(PROVENANCE, "{}")).get("preprocessing")
    if preprocessing is None:
        raise stop(f"{path}: expected a file that records its preprocessing: write it with `ptq4vit quantize`")
    shape, layout = session.get_inputs()[0].shape, metadata.get(UINT8, "")
    if layout == "nhwc" and len(shape) == 4:
        shape = [shape[0], shape[3], *shape[1:3]]
    if len(session.get_inputs()) != 1 or len(shape) != 4 or shape[1] not in MODES:
        raise stop(f"{path}: expected one input of shape (batch, 1 or 3, height, width), got {shape}")
    if metadata.get(TARGET) == "onnxruntime" and lacks_vnni():
        print(
            "warning: this CPU has no VNNI, ONNX Runtime's u8 x s8 products saturate on it and classes may differ: "
            "export the model with --target onnxruntime-avx2, or quantize it with --w-bits 7",
            file=sys.stderr,
        )
    labels = json.loads(metadata.get(LABELS, "[]"))
    return session, preprocessing | {"input_size": tuple(shape[1:]), "uint8": layout, "labels": labels}


def lacks_vnni() -> bool:
    """Return whether this is an x86 CPU that lists AVX2 and no VNNI or AMX; False where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "avx2" in text and not any(name in text for name in ("avx_vnni", "avx512_vnni", "amx_int8"))


def find_images(folder: Path) -> list[Path]:
    """Return the images of a folder in order, links followed, without what is hidden."""
    seen, found = set[str](), list[Path]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        visited = os.path.realpath(parent) in seen
        seen.add(os.path.realpath(parent))
        folders[:] = [] if visited else sorted(n for n in folders if not n.startswith(".") and n not in HIDDEN)
        found += [] if visited else [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def decode(path: Path, channels: int) -> Image.Image:
    """Return an image upright, on white, with 8 bits in 1 or 3 channels; raises what Pillow raises on a broken file."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):  # more bits, which convert() would clip at 255
            values, tags = np.asarray(image), getattr(opened, "tag_v2", {})
            low, high = float(values.min()), float(values.max())
            if not (low >= 0 and high <= (255 if image.mode == "F" else 65535)):
                raise ValueError(f"values from {low:g} to {high:g}: what is black and white is not known")
            if image.mode == "F":
                values = np.round(values * 255) if high <= 1 else np.round(values)
            elif image.mode != "I" or high > 255 or opened.format != "TIFF":
                values = values // (16 if tags.get(258) == (12,) else 256)
            values = values.astype(np.uint8)
            image = Image.fromarray(255 - values if tags.get(262) == 0 else values)  # TIFF: white is zero
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            clear = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        return image.convert(MODES[channels])


def preprocess(image: Image.Image, config: dict[str, Any]) -> Array:
    """Resize, crop and normalize as timm evaluates; return (channels, height, width) float32, or the file's uint8."""
    _, height, width = config["input_size"]
    scaled = [math.floor(side / (config["crop_pct"] or 0.875)) for side in (height, width)]
    mode = config.get("crop_mode") or "center"
    fill = tuple(round(255 * value) for value in config["mean"]) if mode == "border" else (0, 0, 0)
    size = resized_size(image.size, (scaled[0], scaled[1]), mode)
    if size != image.size:
        image = image.resize(size, Image.Resampling[config["interpolation"].upper()])
    image = crop(image, (width, height), fill)
    if config.get("uint8"):
        codes = np.asarray(image).reshape(height, width, -1)
        return codes if config["uint8"] == "nhwc" else codes.transpose(2, 0, 1)
    values = np.asarray(image, np.float32).reshape(height, width, -1) / np.float32(255)
    mean, std = (np.array(config[key], np.float32) for key in ("mean", "std"))
    pixels: Array = ((values - mean) / std).transpose(2, 0, 1)
    return pixels


def resized_size(size: tuple[int, int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    """Return the (width, height) to resize to. size: (width, height). target: (height, width) of the whole picture.

    squash: the target. border: the whole image inside of it. center: the image covers it.
    """
    (width, height), (target_height, target_width) = size, target
    if mode == "squash":
        return target_width, target_height
    if mode == "center" and target_height == target_width:  # the longer side is cut down to whole pixels
        short, side = min(size), target_height
        return int(side * width / short), int(side * height / short)
    if mode not in ("center", "border"):
        raise stop(f"the file's crop_mode: expected center, squash or border, got {mode!r}")
    ratios = height / target_height, width / target_width
    ratio = max(ratios) if mode == "border" else min(ratios)
    return round(width / ratio), round(height / ratio)


def crop(image: Image.Image, size: tuple[int, int], fill: tuple[int, ...]) -> Image.Image:
    """Return the middle of the image, (width, height) large; what lies outside of the image is filled."""
    starts = [
        round((have - want) / 2) if have >= want else -((want - have) // 2)
        for have, want in zip(image.size, size, strict=True)
    ]
    canvas = Image.new(image.mode, size, fill if image.mode == "RGB" else fill[0])
    canvas.paste(image, (-starts[0], -starts[1]))
    return canvas


def read_batches(paths: list[Path], config: dict[str, Any], size: int) -> Iterator[tuple[list[Path], Array]]:
    """Yield paths and pixels, (images, channels, height, width); unreadable images are left out and listed."""
    read: list[Path] = []
    skipped: list[str] = []
    pixels: list[Array] = []
    for path in paths:
        try:
            pixels.append(preprocess(decode(path, config["input_size"][0]), config))
            read.append(path)
        except Exception as error:  # noqa: BLE001 - a broken file raises anything
            skipped.append(f"{path}: {error}")
        if len(read) == size:
            yield read, np.stack(pixels)
            read, pixels = [], []
    if read:
        yield read, np.stack(pixels)
    if skipped:
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        print(f"skipped {len(skipped)}: {'; '.join(skipped[:3])}{more}", file=sys.stderr)


def run(session: onnxruntime.InferenceSession, pixels: Array) -> Array:
    """Return the logits of up to a batch of images; a file of a fixed batch gets the last one until it is full."""
    entry = session.get_inputs()[0]
    missing = entry.shape[0] - len(pixels) if isinstance(entry.shape[0], int) else 0
    filled = np.concatenate([pixels, pixels[-1:].repeat(missing, 0)])
    logits: Array = session.run(None, {entry.name: filled})[0][: len(pixels)]
    return logits


def probabilities(logits: Array) -> Array:
    """Return the softmax of logits, (images, classes)."""
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    shares: Array = exponentials / exponentials.sum(1, keepdims=True)
    return shares


def read_labels(path: Path | None, recorded: list[str], classes: int) -> list[str]:
    """Return one name per class: those of a text file, else those that the model records, which may be none."""
    if path is None:
        return recorded if len(recorded) == classes else []
    if not path.is_file():
        raise stop(f"--labels {path}: expected a text file, got no such file")
    names = path.read_text(encoding="utf-8").splitlines()
    if len(names) != classes:
        raise stop(f"--labels {path}: expected {classes} lines, one per class of the model, got {len(names)}")
    return names


def classify(arguments: argparse.Namespace) -> None:
    """Print one line per image: path, class, probability, and the label if there are labels."""
    session, config = open_model(arguments.model, arguments.threads)
    if not arguments.images.is_dir():
        raise stop(f"{arguments.images}: expected a folder of images, got no such folder")
    paths = find_images(arguments.images)
    if not paths:
        raise stop(f"{arguments.images}: expected one image or more, got none")
    width = max(len(str(path.relative_to(arguments.images))) for path in paths)
    start = shown = time.monotonic()
    labels: list[str] | None = None
    done = 0
    fixed = session.get_inputs()[0].shape[0]
    size = fixed if isinstance(fixed, int) else arguments.batch_size
    for batch, pixels in read_batches(paths, config, size):
        scores = probabilities(run(session, pixels))
        if labels is None:
            labels = read_labels(arguments.labels, config["labels"], scores.shape[1])
            print(f"{'path':{width}}  class  probability" + ("  label" if labels else ""))
        for path, row in zip(batch, scores, strict=True):
            best = int(row.argmax())
            label = f"  {labels[best]}" if labels else ""
            print(f"{path.relative_to(arguments.images)!s:{width}}  {best:5}  {row[best]:11.4f}{label}")
        done += len(batch)
        if time.monotonic() - max(shown, start) > 2:
            shown = time.monotonic()
            print(f"{done} of {len(paths)} images, {done / (shown - start):.1f} per second", file=sys.stderr)
    if not done:
        raise stop(f"{arguments.images}: expected one readable image or more, got none of {len(paths)}")


def main() -> None:
    """Read the arguments and classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="ONNX file written by `ptq4vit quantize`")
    parser.add_argument("images", type=Path, help="folder of images, nested or flat")
    parser.add_argument("--labels", type=Path, help="text file, one class name per line (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="0 lets ONNX Runtime choose")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch-size: expected 1 or more, got {arguments.batch_size}")
    classify(arguments)


if __name__ == "__main__":
    main()

"""Wrong inputs through the command line: the exit code, one sentence on standard error, and nothing left behind."""

from __future__ import annotations

import tarfile
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner
from wrong_options import CONFIGS, OPTIONS

import ptq4vit_fx as ptq
from ptq4vit_fx.tools.cli import app

MODEL, TYPO = "deit_tiny_patch16_224", "deit_tinny_patch16_224"
SIZES = [part for size in ("img_size=32", "depth=1", "num_classes=3") for part in ("--model-arg", size)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that is right and much that is wrong, as the working directory."""
    folder = tmp_path_factory.mktemp("wrong")
    for label in "abc":
        (folder / "images" / label).mkdir(parents=True)
        pixels = np.random.default_rng(ord(label)).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / label / "0.png")
    (folder / "flat").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "flat" / "0.png")
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "notes.txt").write_text("no image")
    (folder / "broken").mkdir()
    (folder / "broken" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (folder / "two" / "a").mkdir(parents=True)
    (folder / "two" / "b").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "two" / "a" / "0.png")
    write_data(folder)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, img_size=32, depth=1, num_classes=3)
    save_file(model.state_dict(), folder / "good.safetensors")
    state = load_file(folder / "good.safetensors")
    save_file(state | {"norm.weight": state["norm.weight"] * float("inf")}, folder / "inf.safetensors")
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")
    torch.save(nn.Linear(2, 2), folder / "module.pth")
    (folder / "garbage.pth").write_bytes(b"PK\x03\x04 no")
    (folder / "garbage.onnx").write_bytes(b"\x08\x07 no model")
    (folder / "none.onnx").write_bytes(b"")
    for name, text in CONFIGS.items():
        (folder / f"{name}.toml").write_text(text)
    write_files(folder)
    write_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield folder


def write_data(folder) -> None:
    """Write data that are no folders of images, and wrong ones of each kind."""
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.write(folder / "flat" / "0.png", "0.png")
    with zipfile.ZipFile(folder / "notes.zip", "w") as archive:
        archive.write(folder / "text" / "notes.txt", "notes.txt")
    with tarfile.open(folder / "links.tar", "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    np.save(folder / "images.npy", np.zeros((2, 3, 32, 32), np.float32))
    np.save(folder / "large.npy", np.zeros((2, 3, 64, 64), np.float32))
    np.save(folder / "lines.npy", np.zeros(7))
    np.save(folder / "objects.npy", np.array([{}, None], object), allow_pickle=True)
    np.savez(folder / "two.npz", train=np.zeros((2, 8, 8, 3), np.uint8), test=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(folder / "nine.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 9]))
    (folder / "list.txt").write_text("flat/0.png\n")
    (folder / "gone.txt").write_text("nowhere.png\n")
    (folder / "half.txt").write_text("flat/0.png 1\nflat/0.png\n")
    for name in ("garbage.npz", "garbage.npy", "garbage.zip", "garbage.tar", "garbage.parquet", "images.7z"):
        (folder / name).write_bytes(b"PK\x03\x04 no")
    for name in ("empty.txt", "empty.npy", "empty.tar"):
        (folder / name).write_bytes(b"")
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../other.arrow"}]}')


def write_files(folder) -> None:
    """Write ONNX files of small models: of three classes, of two, and one that gives pictures."""
    torch.manual_seed(0)
    models = {
        "three.onnx": nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(16, 3)),
        "two.onnx": nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(16, 2)),
        "picture.onnx": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)),
    }
    for name, model in models.items():
        mapping = ptq.recipes.base_ptq().with_search(n=2, rounds=1)
        images = torch.randn(2, 3, 32, 32)
        converted = ptq.quantize(model.eval(), images, qconfig_mapping=mapping, progress=False)
        ptq.export_onnx(converted, folder / name, images[:1])
        if name == "two.onnx":
            converted.calibration.save(folder / "two.scales.safetensors")


@dataclass(frozen=True)
class Case:
    """A command line, its exit code, and what its sentence says."""

    line: str
    says: str
    code: int = 1


def write_models(folder) -> None:
    """Write what MODEL may name and should not: folders, and Python that fails."""
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text('{"model_type": "vitt", "architectures": ["Evil"]}')
    (folder / "timmlike").mkdir()
    (folder / "timmlike" / "config.json").write_text('{"architecture": "vit_tinny_patch16_224", "pretrained_cfg": {}}')
    (folder / "json").mkdir()
    (folder / "json" / "config.json").write_text("{no")
    (folder / "net.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(1, 2, 3, 4, 5, 6, 7)\n")
    (folder / "text.py").write_text("def make(:\n")
    (folder / "shards").mkdir()
    (folder / "shards" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "/etc/passwd"}}')


def model(name: str, says: str, code: int = 1) -> Case:
    return Case(f"quantize {name} --data images --out m.onnx", says, code)


def quantize(
    options: str, says: str, code: int = 1, *, data: str = "images", weights: str = "good.safetensors"
) -> Case:
    given = f"--weights {weights} " if weights else ""
    return Case(f"quantize {MODEL} --data {data} --out m.onnx {given}{' '.join(SIZES)} {options}", says, code)


CASES = {
    # What is read
    "no such folder": quantize("", "got no such folder", data="nowhere"),
    "an empty folder": quantize("", "got an empty folder", data="empty"),
    "a folder of text": quantize("", "got 1 other files, such as notes.txt", data="text"),
    "a broken image": quantize("", "expected one readable image or more, got none of 1", data="broken"),
    "an archive": quantize("", "unpack it and pass the folder", data="images.7z"),
    "an archive without images": quantize("", "notes.zip: expected an archive of images", data="notes.zip"),
    "an archive of links": quantize("", "links.tar: expected an archive of images, got none in it", data="links.tar"),
    "no zip": quantize("", "garbage.zip: expected a zip archive", data="garbage.zip"),
    "no tar": quantize("", "garbage.tar: expected a whole tar archive", data="garbage.tar"),
    "an empty tar": quantize("", "empty.tar: expected a whole tar archive", data="empty.tar"),
    "no archive at all": quantize("", "got no such file", data="no.tar"),
    "arrays": quantize(
        "", "weights.safetensors: expected a folder of images, got no such f", data="weights.safetensors"
    ),
    "arrays of weights": quantize("", "save the images with numpy.savez", data="good.safetensors"),
    "arrays of another size": quantize("", "expected float images of the model's size (3, 32, 32)", data="large.npy"),
    "no images in an array": quantize("", "expected uint8 images (images, height, width", data="lines.npy"),
    "objects in an array": quantize("", "got pickled objects, which may hold a program", data="objects.npy"),
    "two arrays": quantize("", "got train, test; name it: two.npz:train", data="two.npz"),
    "an array of another name": quantize("", "did you mean test?", data="two.npz:tests"),
    "no array": quantize("", "garbage.npy: expected an array of NumPy", data="garbage.npy"),
    "an empty array": quantize("", "empty.npy: expected an array of NumPy", data="empty.npy"),
    "no arrays": quantize("", "garbage.npz: expected a .npz file of NumPy", data="garbage.npz"),
    "no table": quantize("", "garbage.parquet: expected a whole table", data="garbage.parquet"),
    "a data set that leads elsewhere": quantize("", "expected files of this folder", data="saved"),
    "an empty list": quantize("", "empty.txt: expected a path in each line", data="empty.txt"),
    "a list of nothing": quantize("", "got none of 1, the first: nowhere.png: no such file", data="gone.txt"),
    "an image": quantize("", "pass the folder that holds it", data="flat/0.png"),
    "no such weights": quantize("", "no.safetensors: expected a state dict", weights="no.safetensors"),
    "weights of another model": quantize("", "expected a state dict of this model", weights="other.safetensors"),
    "infinite weights": quantize("", "norm.weight: expected finite values", weights="inf.safetensors"),
    "a pickled module": quantize("", "module.pth: expected", weights="module.pth"),
    "a damaged archive": quantize("", "garbage.pth: expected", weights="garbage.pth"),
    "a folder as weights": quantize("", "images: expected a state dict", weights="images"),
    "an entry that is not there": quantize("--weights-entry ema", "ema"),
    "an entry of nothing": quantize("--weights-entry ema", "a file that it is an entry of", weights=""),
    "no hub": quantize("", "pass --weights FILE with a local checkpoint", weights=""),
    "an unknown model": Case(f"quantize {TYPO} --data images --out m.onnx", f"did you mean {MODEL}"),
    "a folder by the name of a model": model("hf", "expected a timm model name"),
    "a folder of a model that is not there": model("./hff", "did you mean hf?"),
    "a folder without a configuration": model("./images", "got one without config.json"),
    "a folder of another library": model("./hf", "hf: expected a configuration that transformers knows"),
    "a folder of a timm model that is none": model("local-dir:timmlike", "did you mean vit_tiny_patch16_224"),
    "a folder of Hugging Face for timm": model("local-dir:hf", "got one of Hugging Face; pass it as ./hf"),
    "a configuration that is no JSON": model("./json", "json/config.json: expected JSON"),
    "a name on no hub": model("org/nothing", "download the folder and pass ./FOLDER"),
    "a name of timm on no hub": model("hf-hub:org/nothing", "create model: hf-hub:org/nothing"),
    "a model of torchvision": model("torchvision:vit_b_61", "did you mean torchvision:vit_b_16"),
    "a prefix": model("torch-vision:vit_b_16", "did you mean torchvision:vit_b_16?"),
    "a file of weights as a model": model("good.safetensors", "pass the model's name, and --weights good.safetensors"),
    "an ONNX file as a model": model("three.onnx", "pass the PyTorch model that it was exported from"),
    "Python without a name": model("net.py", "write net.py:make"),
    "Python that is not there": model("nett.py:make", "did you mean net.py?"),
    "Python that fails": model("net.py:make", "in net.py, line 3"),
    "Python that is none": model("text.py:make", "in text.py, line 1"),
    "a module that is not there": model("no_such_package:make", "No module named 'no_such_package'"),
    "an index of files elsewhere": quantize(
        "", "expected names of files beside it, got '/etc/passwd'", weights="shards"
    ),
    "averaged weights that are not there": quantize("--ema", "--ema: expected an entry of averaged weights"),
    "averaged weights and an entry": quantize("--no-ema --weights-entry model", "leave one of them out"),
    "averaged weights of nothing": quantize("--ema", "add --weights FILE", weights=""),
    "another size": quantize("--model-arg img_size=64", "expected a state dict of this model"),
    "no such argument": quantize("--model-arg nonsense=1", "create model"),
    "no value": quantize("--model-arg depth", "expected key=value"),
    "no size": quantize("--model-arg img_size=0", "create model"),
    # How images become pixels
    "a size in words": quantize("--img-size large", "--img-size: expected pixels, got 'large'"),
    "no pixels": quantize("--img-size 0", "--img-size: expected pixels, got '0'"),
    "two sizes": quantize("--img-size 64", "got 64x64 beside --model-arg img_size=32x32"),
    "a mean in words": quantize("--mean dark", "--mean: expected one number, or one per channel"),
    "two means": quantize("--mean 0.5,0.5", "--mean: expected one number, or one per channel"),
    "a mean of bytes": quantize("--mean 123.7,116.3,103.5", "divide by 255: --mean 0.4851,0.4561,0.4059"),
    "no spread": quantize("--std 0", "--std: expected numbers above 0"),
    "an endless mean": quantize("--mean nan", "--mean: expected one number"),
    "a crop of percents": quantize("--crop-pct 90", "--crop-pct: expected 0.05 to 1, got 90"),
    "an interpolation": quantize("--interpolation cubic", "did you mean bicubic?"),
    # What is asked for
    "a recipe": quantize("--recipe fast", "got 'fast'"),
    "a twin": quantize("--twins triplets", "expected exact or wide or uniform or auto"),
    "a twin of base": quantize("--recipe base --twins wide", "expected exact with the recipe base"),
    "a target": quantize("--target onnxruntim", "did you mean onnxruntime"),
    "a recipe of another target": quantize("--target tensorrt", "add --recipe tensorrt"),
    "bits of tensorrt": quantize("--recipe tensorrt --a-bits 4", "a_bits: expected 8"),
    "one bit": quantize("--w-bits 1", "expected an integer from 2 to 8, got 1"),
    "sixteen bits": quantize("--a-bits 16", "expected an integer from 2 to 8, got 16"),
    "an old opset": quantize("--opset 12", "opset: expected 17 to"),
    "an opset to come": quantize("--opset 99", "opset: expected 17 to"),
    "a loss": quantize("--loss cross_entropy", "expected one of pseudo_label, fisher"),
    "a layer to skip": quantize("--skip blocks.7", "blocks.7"),
    "a kind of output": quantize("--output-kind class", "expected one of classes, embeddings, values"),
    "no memory": quantize("--memory-limit 0", "--memory-limit: expected GiB above 0, got 0"),
    "negative memory": quantize("--memory-limit=-1", "--memory-limit: expected GiB above 0, got -1"),
    "memory that is no number": quantize("--memory-limit nan", "--memory-limit: expected GiB above 0, got nan"),
    "endless memory": quantize("--memory-limit inf", "--memory-limit: expected GiB above 0, got inf"),
    "memory of another unit": quantize("--memory-limit 8parsecs", "--memory-limit: expected bytes above 0, or text"),
    "no memory with a unit": quantize("--memory-limit 0MiB", "--memory-limit: expected bytes above 0"),
    "a long seed": quantize(f"--seed {2**70}", "--seed: expected an integer of 64 bits"),
    "a plan of an unknown model": Case(f"quantize {TYPO} --data images --out m.onnx --plan", f"did you mean {MODEL}"),
    "a config without a folder": Case(f"quantize {MODEL} --out m.onnx --config good.toml", "--data", 2),
    "a plan of no images": quantize("--plan", "got no such folder", data="nowhere"),
    "a batch that no memory holds": quantize(f"--batch {10**12}", "images at once; choose a smaller one"),
    "an agreement that float has not": quantize(
        "--agreement 1.5", "--agreement: expected a share above 0 and at most 1"
    ),
    "an agreement of nothing": quantize("--agreement 0", "--agreement: expected a share above 0 and at most 1"),
    "a quantity": quantize("--agreement 0.9 --minimize speed", "expected one of time, size, bits, got 'speed'"),
    "a quantity without a budget": quantize("--minimize size", "--minimize: expected an agreement to keep"),
    "timings without a budget": quantize("--timings t.json", "--timings: expected an agreement to keep"),
    "timings that are not there": quantize("--agreement 0.9 --timings t.json", "t.json: expected a file of `ptq4vit"),
    "timings that are none": quantize("--agreement 0.9 --timings text/notes.txt", "text/notes.txt: expected JSON"),
    "a choice that tuning makes": quantize("--agreement 0.9 --twins auto", "expected --twins exact and another recipe"),
    "distances that compare nothing": quantize("--agreement 0.9 --recipe base", "--agreement: expected --twins exact"),
    "bits that tuning chooses": quantize(
        "--agreement 0.9 --set blocks.*=w8a8", "--set: expected bits that --agreement"
    ),
    "no image left": quantize("--agreement 0.9", "--agreement: expected images that calibration does not take"),
    "a model to time": Case(f"timings {TYPO}", f"did you mean {MODEL}"),
    "a target that is not timed": Case(
        f"timings {MODEL} {' '.join(SIZES)} --target tensorrt", "expected timings of its"
    ),
    "a target to time": Case(f"timings {MODEL} {' '.join(SIZES)} --target onx", "expected one of onnxruntime"),
    "why of nothing": Case("why nowhere.safetensors --data images", "nowhere.safetensors: expected a safetensors file"),
    "why of weights": Case("why good.safetensors --data images", "good.safetensors: expected ptq4vit_fx calibration 2"),
    "why of a damaged file": Case("why garbage.onnx --data images", "garbage.onnx: expected an ONNX"),
    "why of no model": Case("why three.onnx --data images", "three.onnx: expected the name of its model, got none"),
    "why of another model": Case(
        f"why three.onnx --data images --model {MODEL} --weights good.safetensors {' '.join(SIZES)}",
        "model: expected the one that was calibrated",
    ),
    # What is written
    "a folder that is not there": quantize("--out nowhere/m.onnx", "an existing, writable folder"),
    "a folder": quantize("--out images", "an existing, writable folder"),
    "standard output": quantize("--out -", "standard output, which is not supported"),
    "over the weights": quantize("--out good.safetensors", "expected another file than --out, got good.safetensors"),
    "twice the same": quantize("--float-onnx ./m.onnx", "--float-onnx: expected another file than --out"),
    "a report nowhere": quantize("--report nowhere/r.html", "quantize --report"),
    "a report over the file": quantize("--report m.onnx", "--report: expected another file than --out, got m.onnx"),
    "the float file nowhere": quantize("--float-onnx nowhere/f.onnx", "quantize --float-onnx"),
    "the float file over the weights": quantize("--float-onnx good.safetensors", "expected another file than --float"),
    "a checkpoint that is a folder": quantize("--checkpoint images", "quantize --checkpoint"),
    "a checkpoint that is none": quantize("--checkpoint other.safetensors", "other.safetensors"),
    # What cannot be read as options
    "no images": quantize("--images 0", "--images", 2),
    "no batch": quantize("--batch 0", "--batch", 2),
    "words for bits": quantize("--w-bits four", "--w-bits", 2),
    "a share above one": quantize("--fail-under 98", "--fail-under", 2),
    "an unknown option": quantize("--fast", "--fast", 2),
    "no folder": Case(f"quantize {MODEL} --out m.onnx", "--data", 2),
    "no file": Case(f"quantize {MODEL} --data images", "--out", 2),
    "no model": Case("quantize --data images --out m.onnx", "Missing argument", 2),
    "no such command": Case("quantise", "quantise", 2),
    # eval and inspect
    "eval of no file": Case("eval no.onnx --data images", "no.onnx"),
    "eval of garbage": Case("eval garbage.onnx --data images", "expected an ONNX model"),
    "eval of an empty file": Case("eval none.onnx --data images", "none.onnx"),
    "eval of a folder": Case("eval images --data images", "images: expected an ONNX model"),
    "eval without preprocessing": Case("eval three.onnx --data images", "pass --model with the timm model"),
    "eval of a picture": Case(f"eval picture.onnx --data images --model {MODEL}", "expected logits"),
    "eval of other classes": Case(f"eval two.onnx --data images --model {MODEL}", "expected 2 sub-folders"),
    "eval with an unknown model": Case(f"eval three.onnx --data images --model {TYPO}", f"did you mean {MODEL}"),
    "eval on nothing": Case(f"eval three.onnx --data nowhere --model {MODEL}", "got no such folder"),
    "eval without classes": Case(f"eval three.onnx --data flat --model {MODEL}", "in one sub-folder per class"),
    "eval on a list without classes": Case(
        f"eval three.onnx --data list.txt --model {MODEL}", "list.txt: expected a class number for each image, got none"
    ),
    "eval on classes of another model": Case(
        f"eval three.onnx --data nine.npz --model {MODEL}", "expected the 3 classes of the model, got numbers up to 9"
    ),
    "eval on a list with some classes": Case(
        f"eval three.onnx --data half.txt --model {MODEL}", "half.txt: expected a class number behind every path"
    ),
    "eval with half of a preprocessing": Case("eval three.onnx --data images --mean 0.5", "or --mean and --std"),
    "eval with another crop": Case(f"eval three.onnx --data images --model {MODEL} --crop-pct 0", "--crop-pct"),
    "eval against nothing": Case(f"eval three.onnx --data images --model {MODEL} --against no.onnx", "no.onnx"),
    "eval against garbage": Case(
        f"eval three.onnx --data images --model {MODEL} --against garbage.onnx", "garbage.onnx: expected an ONNX model"
    ),
    "eval against an unknown model": Case(
        f"eval three.onnx --data images --model {MODEL} --against {TYPO}",
        f"did you mean {MODEL}",
    ),
    "eval against other classes": Case(
        f"eval three.onnx --data images --model {MODEL} --against two.onnx", "--against: expected logits of the shape"
    ),
    "eval against a file with weights": Case(
        "eval three.onnx --data images --against two.onnx --weights good.safetensors", "leave these out"
    ),
    "eval of another kind": Case(f"eval three.onnx --data images --model {MODEL} --output-kind class", "did you mean"),
    "eval against a folder": Case(f"eval three.onnx --data images --model {MODEL} --against ./images", "config.json"),
    "weights of nothing": Case("eval three.onnx --data images --weights good.safetensors", "add --against"),
    "inspect of no file": Case("inspect no.onnx", "no.onnx"),
    "inspect of garbage": Case("inspect garbage.onnx --json", "expected an ONNX model"),
    "inspect of a folder": Case("inspect images", "images: expected an ONNX model"),
    # report
    "a report of no file": Case("report no.onnx -o r.html", "no.onnx: expected an ONNX file or a calibration"),
    "a report of garbage": Case("report garbage.onnx -o r.html", "garbage.onnx: expected an ONNX model"),
    "a report of nothing": Case("report none.onnx -o r.html", "none.onnx"),
    "a report of a folder": Case("report images -o r.html", "images: expected an ONNX file or a calibration"),
    "a report of weights": Case(
        "report good.safetensors -o r.html", "good.safetensors: expected ptq4vit_fx calibration"
    ),
    "a report of a picture": Case("report flat/0.png -o r.html", "flat/0.png: expected an ONNX model"),
    "a report without a place": Case("report three.onnx", "--out", 2),
    "a report in no folder": Case("report three.onnx -o nowhere/r.html", "report --out"),
    "a report over its file": Case("report three.onnx -o three.onnx", "expected another file than those it is about"),
    "a report over its float": Case(
        "report three.onnx -o two.onnx --against two.onnx", "another file than those it is"
    ),
    "a report on standard output": Case("report three.onnx -o -", "standard output, which is not supported"),
    "a calibration of another file": Case(
        "report three.onnx -o r.html --calibration two.scales.safetensors", "expected the calibration of three.onnx"
    ),
    "a calibration that is none": Case(
        "report three.onnx -o r.html --calibration good.safetensors", "good.safetensors"
    ),
    "a calibration on images": Case(
        "report two.scales.safetensors -o r.html --data images", "data: expected an ONNX file"
    ),
    "a calibration beside float": Case(
        "report two.scales.safetensors -o r.html --against two.onnx", "pass the ONNX file, or leave reference out"
    ),
    "a report on nothing": Case(
        "report three.onnx -o r.html --data nowhere", "got no such record; pass images in Python"
    ),
    "a report beside nothing": Case("report three.onnx -o r.html --against no.onnx", "no.onnx"),
    "a report beside an unknown model": Case(f"report three.onnx -o r.html --against {TYPO}", f"did you mean {MODEL}"),
    "a report with weights of nothing": Case(
        "report three.onnx -o r.html --weights good.safetensors", "expected a model's name in --against, got none"
    ),
    "no images for a report": Case("report three.onnx -o r.html --data images --images 0", "--images", 2),
    # bench
    "bench of no file": Case("bench no.onnx", "no.onnx"),
    "bench of garbage": Case("bench garbage.onnx", "expected an ONNX model"),
    "bench of a folder": Case("bench images", "images: expected an ONNX model"),
    "bench beside itself": Case("bench three.onnx --against three.onnx", "expected another file, got one that is"),
    "bench beside nothing": Case("bench three.onnx --against no.onnx", "no.onnx"),
    "bench beside garbage": Case("bench three.onnx --against garbage.onnx", "garbage.onnx: expected an ONNX model"),
    "bench beside an unknown model": Case(f"bench three.onnx --against {TYPO}", f"did you mean {MODEL}"),
    "bench beside a folder of no model": Case(
        "bench three.onnx --against ./images", "expected a folder of a model, got one without config.json"
    ),
    "bench beside a model of another size": Case(
        f"bench three.onnx --against {MODEL}", "expected a size that the model accepts"
    ),
    "bench in an unknown runtime": Case("bench three.onnx --runtime tflite", "expected one of onnxruntime, openvino"),
    "bench of no float file": Case("bench three.onnx --against two.onnx --static", "expected a float file to quantize"),
    "bench of one round": Case("bench three.onnx --rounds 1", "--rounds", 2),
    "bench of threads below none": Case("bench three.onnx --threads=-1", "--threads", 2),
    "bench of no images": Case("bench three.onnx --batch 0", "--batch", 2),
    "a batch of a bench that no memory holds": Case(f"bench three.onnx --batch {10**12}", "choose a smaller one"),
    "coverage of nothing": Case("coverage --family vitt --out empty", "did you mean"),
    "a demo in a file": Case("demo --out three.onnx", "demo --out"),
    **{name: quantize(*given) for name, given in OPTIONS.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_one_sentence(place, name):
    case = CASES[name]
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    result = CliRunner().invoke(app, case.line.split())
    assert result.exit_code == case.code, result.output
    assert case.says in " ".join(result.stderr.replace("│", " ").split()), result.stderr
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    if case.code == 1:
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        others = [line for line in result.stderr.splitlines() if not line.startswith("warning: ") and line != error]
        assert not others
        assert len(error) < 1000
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_there_are_many():
    assert len(CASES) >= 60

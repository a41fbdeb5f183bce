"""Options of `quantize` that are refused, by what is wrong: the options, and what the sentence says."""

from __future__ import annotations

#: Files for --config, by their names.
CONFIGS = {
    "deep": "a = " + "[" * 100_000,
    "cut": "w_bits = 4\na_bits = \n",
    "unknown": "# bits\n\nwbits = 4\n",
    "config": "config = 'good.toml'\n",
    "string": "images = 2\nw_bits = '4'\n",
    "true": "w-bits = true\n",
    "number": "labels = 1\n",
    "table": "\n[out]\na = 1\n",
    "list": "skip = [1]\n",
    "share": "fail-under = 98\n",
    "none": "images = 0\n",
    "twice": "w-bits = 4\nw_bits = 4\n",
    "good": "w-bits = 4\n",
    "recipe": "recipe = 'fast'\n",
}

OPTIONS = {
    "a recipe without other weights": (
        "--recipe base --weights-granularity channel",
        "--weights-granularity: expected tensor with the recipe base",
    ),
    "a granularity": ("--weights-granularity row", "expected channel or tensor or group with the recipe best"),
    "a device": ("--device gpu", "--device: expected cpu, cuda, cuda:0 or auto, got 'gpu'"),
    "a device of another kind": ("--device meta", "--device: expected one of cpu"),
    "a device that is not there": ("--device cuda:99", "--device: expected one of cpu"),
    "twins that wait": ("--sequential --twins auto", "expected exact, wide or uniform with --sequential"),
    "bits of nothing": ("--set head", "--set: expected NAME=w8a8, NAME=w4, NAME=a8 or NAME=float, got 'head'"),
    "bits without a name": ("--set =w8a8", "--set: expected NAME=w8a8"),
    "bits that are none": ("--set head=int8", "--set: expected NAME=w8a8"),
    "nothing for bits": ("--set head=", "--set: expected NAME=w8a8"),
    "sixteen bits of a product": ("--set head=w16", "expected an integer from 2 to 8, got 16"),
    "endless bits": (f"--set head=w{'9' * 5000}", "expected an integer from 2 to 8"),
    "bits of an unknown product": ("--set blocks.*.mlp.fc3=w8", "set bits: 'blocks.*.mlp.fc3': expected a rule"),
    "bits of what stays float": ("--skip head --set head=w8", "head, which stays float"),
    "weights alone for ONNX Runtime": (
        "--a-bits 32",
        "target onnxruntime: expected quantized activations beside quantized weights, got --a-bits 32",
    ),
    "one weight alone for ONNX Runtime": ("--set head=a32", "beside quantized weights, got --set head=a32"),
    "weights alone by a recipe of both": (
        "--recipe base --a-bits 32 --target generic",
        "an integer from 2 to 8, got 32",
    ),
    "narrow activations for TensorRT": (
        "--target tensorrt --recipe tensorrt --set head=w4a4",
        "expected 8 bits of activations with the target tensorrt",
    ),
    "a pattern to skip": ("--skip blocks.*.atn", "skip: 'blocks.*.atn': expected a rule"),
    "two names of one input": ("--input-name a --input-name b", "input_names: expected one name, as image"),
    "no name of an input": ("--input-name=", "input_names: expected one name, as image"),
    "one name for both": ("--input-name a --output-name a", "expected names that differ, got a, a"),
    "names in a folder's layout": (
        "--layout huggingface --out hf --output-name a",
        "--output-name: expected a layout without names",
    ),
    "a plan in no folder": ("--plan --out nowhere/m.onnx", "an existing, writable folder"),
    "a scheduler for products that wait": ("--scheduler tcp://127.0.0.1:1 --sequential", "--scheduler: expected"),
    "a plan without memory": ("--plan --memory-limit 0.01", "memory_limit: expected"),
    # What stands in a file
    "no such config": ("--config no.toml", "no.toml: expected a TOML file, got no such file"),
    "a folder as config": ("--config images", "images: expected a TOML file, got a folder"),
    "a config of bytes": ("--config good.safetensors", "good.safetensors: expected a TOML file"),
    "a config of brackets": ("--config deep.toml", "deep.toml: expected a TOML file"),
    "a config that is cut": ("--config cut.toml", "Invalid value (at line 2, column 10)"),
    "an unknown key": ("--config unknown.toml", "line 3: expected an option of quantize, got 'wbits'; did you mean"),
    "a config in a config": ("--config config.toml", "line 1: expected an option of quantize, got 'config'"),
    "a string for bits": ("--config string.toml", "line 2: w_bits: expected an integer, got '4'"),
    "true for bits": ("--config true.toml", "line 1: w-bits: expected an integer, got True"),
    "a number for a path": ("--config number.toml", "line 1: labels: expected a string, got 1"),
    "a table for a path": ("--config table.toml", "line 2: out: expected a string, got {'a': 1}"),
    "numbers in a list": ("--config list.toml", "line 1: skip: expected a string, or a list of such, got [1]"),
    "a share above one in a file": ("--config share.toml", "line 1: fail-under: expected 0 to 1, got 98"),
    "no images in a file": ("--config none.toml", "line 1: images: expected 1 or more, got 0"),
    "a key in both spellings": ("--config twice.toml", "line 2: expected w-bits once, got it twice"),
    "a recipe in a file": ("--config recipe.toml", "--recipe: expected best, ptq4vit, tensorrt or base"),
}

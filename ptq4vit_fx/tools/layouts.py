"""What `ptq4vit quantize` writes: one ONNX file, or a folder for Hugging Face's readers; labels, uint8 images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from ptq4vit_fx.errors import failure, foreign, quoted
from ptq4vit_fx.export.huggingface import FILE as FILE_IN_FOLDER
from ptq4vit_fx.export.huggingface import FLOAT_FILE, PIXELS, export_huggingface, write_card
from ptq4vit_fx.export.interface import interface_of
from ptq4vit_fx.export.onnx_export import ExportReport, export_onnx
from ptq4vit_fx.export.pixels import LAYOUTS
from ptq4vit_fx.export.proof.verify import VerifyReport
from ptq4vit_fx.files import check_readable, check_writable

FILE, FOLDER = "file", "huggingface"


@dataclass(frozen=True)
class Destination:
    """out: a file, or with the layout `huggingface` a folder. uint8_input: nhwc or nchw. labels: a text file.

    input_names, output_names: those of the file, none for the usual ones.
    """

    out: str
    layout: str = FILE
    uint8_input: str | None = None
    labels: Path | None = None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, Any]:
        """The names as arguments of `export_onnx` and `export_float`."""
        return {"input_names": self.input_names or None, "output_names": self.output_names or None}

    def check(self) -> None:
        """Raise PTQError on what would be refused after minutes: forms that do not exist, and no room to write."""
        if self.layout not in (FILE, FOLDER):
            got, do = quoted(self.layout), "choose one"
            raise failure("quantize", "--layout", expected=f"{FILE} or {FOLDER}", got=got, do=do)
        if self.uint8_input not in (None, *LAYOUTS):
            got, do = quoted(self.uint8_input), "choose one"
            raise failure("quantize", "--uint8-input", expected=" or ".join(LAYOUTS), got=got, do=do)
        if self.layout == FILE:
            check_writable(self.out, "quantize --out")
            return
        if self.input_names or self.output_names:
            option, do = "--input-name" if self.input_names else "--output-name", "leave one of them out"
            raise failure("quantize", option, expected="a layout without names", got=f"--layout {FOLDER}", do=do)
        if self.uint8_input is not None:
            got, do = f"--layout {FOLDER}", "leave one of them out"
            raise failure("quantize", "--uint8-input", expected="images that no processor scales", got=got, do=do)
        if os.path.isdir(self.out):
            check_writable(Path(self.out, "config.json"), "quantize --out")
        else:
            check_writable(self.out.rstrip("/" + os.sep) or self.out, "quantize --out")
            if os.path.lexists(self.out):
                do = "name a folder, which may not exist yet"
                raise failure("quantize", f"--out {self.out}", expected="a folder", got="a file", do=do)

    def check_names(self, prepared: GraphModule) -> None:
        """Raise PTQError, before the minutes, on names that the model has not as many inputs or outputs for."""
        if self.input_names or self.output_names:
            interface_of(prepared, self.input_names or None, self.output_names or None)

    def class_names(self, model: nn.Module) -> list[str] | None:
        """Return the lines of the labels, None without. Raises PTQError unless there is one for each class."""
        if self.labels is None:
            return None
        subject, do = f"--labels {self.labels}", "write one name per line, line 1 for class 0"
        path = check_readable(self.labels, "quantize --labels", "a text file")
        with foreign("quantize", subject, expected="text in UTF-8", do=do):
            names = path.read_text(encoding="utf-8").splitlines()
        classes = getattr(model, "num_classes", getattr(model, "num_labels", None))
        if isinstance(classes, int) and classes != len(names):
            expected = f"{classes} lines, one per class of the model"
            raise failure("quantize", subject, expected=expected, got=str(len(names)), do=do)
        return names

    def write(
        self, converted: GraphModule, example: Tensor, labels: list[str] | None, preprocessing: Any, **options: Any
    ) -> ExportReport:
        """Write a converted model. options: target, opset and batch of `export_onnx`."""
        said: dict[str, Any] = {"labels": labels, "preprocessing": preprocessing, **options}
        if self.layout == FOLDER:
            return export_huggingface(converted, self.out, example, **said)
        return export_onnx(converted, self.out, example, uint8_input=self.uint8_input, **self.names, **said)

    @property
    def file(self) -> str:
        """Where the quantized file is written."""
        return os.path.join(self.out, FILE_IN_FOLDER) if self.layout == FOLDER else self.out

    def interface(self, report: ExportReport) -> dict[str, Any]:
        """Return the names of the float file, arguments of `export_float`: in a folder those of the file in it."""
        return {"input_names": [PIXELS], "output_names": report.outputs} if self.layout == FOLDER else self.names

    def holds(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a path is the place of the float file in the folder, where readers look for it."""
        return self.layout == FOLDER and os.path.realpath(path) == os.path.realpath(os.path.join(self.out, FLOAT_FILE))

    def note(self, report: ExportReport, verified: VerifyReport, figures: dict[str, str]) -> None:
        """Write what is known of the file into its model card, if it has one."""
        if self.layout == FOLDER:
            share, images = verified.same_functions.bit_equal, verified.images
            proof = {"computes what was simulated": f"to the last bit on {share:.1%} of {images} images"}
            write_card(Path(self.out), report, figures | proof)

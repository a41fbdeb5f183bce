"""Deployment targets: what each runtime wants a QDQ file to look like, checked before the file is written.

The rules, and where each comes from, are in the file of each target; docs/targets.md has the table.
"""

from __future__ import annotations

from ptq4vit_fx.export.contract import Target
from ptq4vit_fx.export.targets import generic, onnxruntime, openvino, tensorrt

__all__ = ["TARGETS", "Target"]

#: Name -> target. One more is a file with a `Target`, and its line here.
TARGETS = {
    target.name: target
    for target in (
        onnxruntime.X86,
        onnxruntime.AVX2,
        onnxruntime.ARM,
        openvino.TARGET,
        tensorrt.TARGET,
        generic.TARGET,
    )
}

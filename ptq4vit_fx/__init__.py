"""ptq4vit_fx: post-training quantization of vision transformers, from a trained model to a verified int8 ONNX file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq4vit_fx import recipes
    from ptq4vit_fx.api import calibrate, convert_fx, load_calibration, prepare_fx, quantize
    from ptq4vit_fx.calibration import Calibration
    from ptq4vit_fx.errors import PTQError, PTQWarning
    from ptq4vit_fx.export.huggingface import export_huggingface
    from ptq4vit_fx.export.onnx_export import ExportReport, export_onnx
    from ptq4vit_fx.export.proof.against_float import AgainstFloat
    from ptq4vit_fx.export.proof.compare_float import compare_float
    from ptq4vit_fx.export.proof.verify import VerifyReport, verify_onnx
    from ptq4vit_fx.export.report.collect import report
    from ptq4vit_fx.export.report.content import Report
    from ptq4vit_fx.inputs.settings import SearchSettings, Transforms
    from ptq4vit_fx.passes.graph.traced_module import TracedModule
    from ptq4vit_fx.plan import QuantPlan
    from ptq4vit_fx.qconfig import QConfig, QConfigMapping
    from ptq4vit_fx.quantizers import TwinUniform, Uniform, Unquantized
    from ptq4vit_fx.tuning.sensitivity import Sensitivity
    from ptq4vit_fx.tuning.study import sensitivity
    from ptq4vit_fx.tuning.tune import Tuned, tune
    from ptq4vit_fx.tuning.why import Why, why
    from ptq4vit_fx.twins import TwinReport, choose_twins

__version__ = "0.1.0"

__all__ = [
    "AgainstFloat",
    "Calibration",
    "ExportReport",
    "PTQError",
    "PTQWarning",
    "QConfig",
    "QConfigMapping",
    "QuantPlan",
    "Report",
    "SearchSettings",
    "Sensitivity",
    "TracedModule",
    "Transforms",
    "Tuned",
    "TwinReport",
    "TwinUniform",
    "Uniform",
    "Unquantized",
    "VerifyReport",
    "Why",
    "calibrate",
    "choose_twins",
    "compare_float",
    "convert_fx",
    "export_huggingface",
    "export_onnx",
    "load_calibration",
    "prepare_fx",
    "quantize",
    "recipes",
    "report",
    "sensitivity",
    "tune",
    "verify_onnx",
    "why",
]

#: Module -> the public names that it defines. They are imported when they are used: the command line answers --help
#: without torch, and a reader of files without the exporter.
_MODULES = {
    "api": ("calibrate", "convert_fx", "load_calibration", "prepare_fx", "quantize"),
    "calibration": ("Calibration",),
    "errors": ("PTQError", "PTQWarning"),
    "export.huggingface": ("export_huggingface",),
    "export.onnx_export": ("ExportReport", "export_onnx"),
    "export.proof.against_float": ("AgainstFloat",),
    "export.proof.compare_float": ("compare_float",),
    "export.proof.verify": ("VerifyReport", "verify_onnx"),
    "export.report.collect": ("report",),
    "export.report.content": ("Report",),
    "inputs.settings": ("SearchSettings", "Transforms"),
    "passes.graph.traced_module": ("TracedModule",),
    "plan": ("QuantPlan",),
    "qconfig": ("QConfig", "QConfigMapping"),
    "quantizers": ("TwinUniform", "Uniform", "Unquantized"),
    "tuning.sensitivity": ("Sensitivity",),
    "tuning.study": ("sensitivity",),
    "tuning.tune": ("Tuned", "tune"),
    "tuning.why": ("Why", "why"),
    "twins": ("TwinReport", "choose_twins"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return importlib.import_module("ptq4vit_fx.recipes")
    if name not in _HOMES:
        raise AttributeError(f"module 'ptq4vit_fx' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptq4vit_fx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""ptq4vit_fx: post-training quantization of vision transformers, from a trained model to a verified int8 ONNX file."""

from ptq4vit_fx import recipes
from ptq4vit_fx.api import calibrate, convert_fx, load_calibration, prepare_fx, quantize
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import PTQError, PTQWarning
from ptq4vit_fx.export.onnx_export import ExportReport, export_onnx
from ptq4vit_fx.export.verify import VerifyReport, verify_onnx
from ptq4vit_fx.plan import QuantPlan
from ptq4vit_fx.qconfig import QConfig, QConfigMapping, SearchSettings
from ptq4vit_fx.quantizers import TwinUniform, Uniform
from ptq4vit_fx.twins import TwinReport, choose_twins

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "ExportReport",
    "PTQError",
    "PTQWarning",
    "QConfig",
    "QConfigMapping",
    "QuantPlan",
    "SearchSettings",
    "TwinReport",
    "TwinUniform",
    "Uniform",
    "VerifyReport",
    "calibrate",
    "choose_twins",
    "convert_fx",
    "export_onnx",
    "load_calibration",
    "prepare_fx",
    "quantize",
    "recipes",
    "verify_onnx",
]

"""Ready-made QConfigMappings."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ptq4vit_fx.errors import failure
from ptq4vit_fx.inputs.settings import SearchSettings
from ptq4vit_fx.qconfig import QConfig, QConfigMapping
from ptq4vit_fx.quantizers import FLOAT_BITS, TwinUniform, Uniform, check_activation_bits, check_bits


def best(
    w_bits: int = 8,
    a_bits: int = 8,
    weights: Literal["channel", "tensor", "group"] = "channel",
    twins: Literal["exact", "wide", "uniform"] = "exact",
) -> QConfigMapping:
    """`ptq4vit` with what keeps more of the float model at no cost in the runtime (docs/transforms.md).

    The residual stream is rotated, queries, keys, values and convolutions are balanced, weights are rounded by the
    Gram matrix of their inputs, and the search is weighted by how far the direction of the output moves. Where a step
    is not exact on a model it is left out, and the plan says why. Convolutions read one uniform grid behind GELU and
    SiLU, whatever `twins` is: they gain nothing from two. Bits from 2 to 8, or 32 of activations, which leaves these
    float, else PTQError; weights and twins as in `ptq4vit`.
    """
    mapping = ptq4vit(w_bits, a_bits, weights, twins)
    qconfig = mapping.global_qconfig
    assert qconfig is not None
    if a_bits != FLOAT_BITS:
        mapping.set_global(replace(qconfig, convolved=Uniform(a_bits, signed=False)))
    mapping = mapping.with_transforms(rotation=0, attention=0.5, convolutions=0.5, depthwise=1.0)
    mapping.recipe = f"best({w_bits}, {a_bits}, weights={weights!r}, twins={twins!r})"
    return mapping.with_search(rounding="gram").with_loss("projection")


def base_ptq(w_bits: int = 8, a_bits: int = 8) -> QConfigMapping:
    """Plain post-training quantization, the paper's baseline ("Base PTQ", section 4.1).

    Symmetric uniform quantizers everywhere, one scale per tensor, cosine distance, candidates from 0.5 to 1.2
    times the range, one round. Bits from 2 to 8, else PTQError.
    """
    check_bits("recipes.base_ptq", w_bits)
    check_bits("recipes.base_ptq", a_bits)
    qconfig = QConfig(
        activation=Uniform(a_bits),
        weight=Uniform(w_bits),
        matmul=Uniform(a_bits),
        search=SearchSettings(metric="cosine", alpha=0.5, rounds=1),
    )
    return QConfigMapping(f"base_ptq({w_bits}, {a_bits})").set_global(qconfig)


def tensorrt(w_bits: int = 8, a_bits: int = 8) -> QConfigMapping:
    """PTQ4ViT as far as TensorRT holds it: int8 without zero points, one scale per activation, fused attention.

    As `ptq4vit`, but softmax gets a uniform quantizer and attention one scale per operand: two branches behind softmax,
    or scales per head behind a product, would break the fusion. The twin after GELU stays. Raises PTQError unless
    w_bits is 2 to 8 and a_bits is 8: fewer need a clip in front of their quantizer, which breaks it too.
    """
    if a_bits != 8:
        do = "quantize weights alone to fewer bits, or choose another target"
        raise failure("recipes.tensorrt", "a_bits", expected="8", got=repr(a_bits), do=do)
    qconfig = ptq4vit(w_bits, a_bits).global_qconfig
    assert qconfig is not None
    changed = replace(qconfig, softmax=Uniform(8), matmul=Uniform(8))
    return QConfigMapping(f"tensorrt({w_bits}, {a_bits})").set_global(changed)


def ptq4vit(
    w_bits: int = 8,
    a_bits: int = 8,
    weights: Literal["channel", "tensor", "group"] = "channel",
    twins: Literal["exact", "wide", "uniform"] = "exact",
) -> QConfigMapping:
    """Twin uniform quantization and the Hessian-guided metric (PTQ4ViT, sections 3.2 and 3.3).

    Twin quantizers after softmax and GELU; separate scales for each head's attention operands; candidates from 0 to
    1.2 times the range, three alternating rounds. Bits from 2 to 8, or 32 of activations,
    else PTQError.

    With a_bits=32 weights alone are quantized: files are small, and run in float.

    weights: "channel" gives every output channel of a weight its scale, which every integer runtime computes at no
    cost; "tensor" gives each weight one; "group" is the paper's, one scale per layer and separate ones for the q, k and
    v rows of a fused projection. Whichever, the patch convolution is quantized per channel and the image, which is
    8-bit data, to 8 bits.

    twins: "exact" is the paper's, both ranges in one k-bit code; "wide" has 2^k codes in each range, half the steps at
    the same cost in ONNX, where the two ranges are two products anyway; "uniform" searches one uniform scale in the
    place of every twin, unsigned behind softmax and from the activation's minimum behind GELU: half the products there.
    At 8 bits the latter is as good as the twin, the former costs accuracy (docs/speed.md); below 8 bits both do.
    """
    check_bits("recipes.ptq4vit", w_bits)
    check_activation_bits("recipes.ptq4vit", a_bits)
    recipe = f"ptq4vit({w_bits}, {a_bits}, weights={weights!r}, twins={twins!r})"
    if a_bits == FLOAT_BITS:
        quantized = ptq4vit(w_bits, 8, weights, twins).global_qconfig
        assert quantized is not None
        return QConfigMapping(recipe).set_global(quantized.with_bits(None, FLOAT_BITS))
    uniform, wide = twins == "uniform", twins == "wide"
    qconfig = QConfig(
        activation=Uniform(a_bits),
        weight=Uniform(w_bits, granularity=weights),
        matmul=Uniform(a_bits, granularity="head"),
        softmax=Uniform(a_bits, signed=False, granularity="head")
        if uniform
        else TwinUniform(a_bits, "softmax", wide=wide),
        gelu=Uniform(a_bits, signed=False) if uniform else TwinUniform(a_bits, "gelu", wide=wide),
        kernel=Uniform(w_bits, granularity="channel"),
        image=Uniform(8),
    )
    return QConfigMapping(recipe).set_global(qconfig)

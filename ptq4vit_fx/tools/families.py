"""One record per family of vision transformers: what `ptq4vit coverage` builds, traces, quantizes and verifies."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ptq4vit_fx.errors import failure, near_names
from ptq4vit_fx.tools.family_arguments import caformer, mobilevitv2, mvitv2, torchvision_swin

Source = Literal["timm", "torchvision", "huggingface"]


@dataclass(frozen=True)
class Family:
    """A model with random weights, made small where its constructor allows.

    model: the name that `timm.create_model` knows, `module.Class` in `timm.models` or `torchvision.models`, or the
    class in `transformers`. image: side of the square input, in pixels. arguments: of the constructor (Hugging Face: of
    the configuration).
    """

    name: str
    source: Source
    model: str
    image: int
    arguments: dict[str, Any] = field(default_factory=dict)

    def create(self) -> nn.Module:
        """Return the model in evaluation mode, its weights drawn with seed 0.

        What constructors leave constant (heads and gates of zeros, layer scales of 1e-5) is drawn too: otherwise whole
        branches would compute nothing. Batch norms get the statistics of random images, as training would give them.
        """
        torch.manual_seed(0)
        model = self._construct().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() > 1 and parameter.min() == parameter.max():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            for norm in norms:
                norm.train().momentum = 1.0
            model(torch.randn(8, 3, self.image, self.image))
            for norm in norms:
                norm.eval().momentum = 0.1
        return model

    def _construct(self) -> nn.Module:
        model: nn.Module
        if self.source == "timm":
            import timm

            module, dot, name = self.model.rpartition(".")
            if dot:
                constructor = getattr(importlib.import_module(f"timm.models.{module}"), name)
                model = constructor(num_classes=CLASSES, **self.arguments)
            else:
                model = timm.create_model(self.model, num_classes=CLASSES, **self.arguments)
        elif self.source == "torchvision":
            module, _, name = self.model.rpartition(".")
            constructor = getattr(importlib.import_module(f"torchvision.models.{module}".rstrip(".")), name)
            model = constructor(num_classes=CLASSES, **self.arguments)
        else:
            import transformers

            configuration = getattr(transformers, self.model.replace("ForImageClassification", "Config"))
            model = getattr(transformers, self.model)(configuration(num_labels=CLASSES, **self.arguments))
        return model


#: Classes of every model.
CLASSES = 10


def _timm(name: str, model: str, image: int, **arguments: Any) -> Family:
    return Family(name, "timm", model, image, arguments)


def _plain(name: str, model: str, image: int = 64, **arguments: Any) -> Family:
    """Return a family of columns: one block width throughout."""
    return _timm(name, model, image, **{"img_size": image, "embed_dim": 64, "depth": 2, "num_heads": 2} | arguments)


def _hugging_face(name: str, model: str, **arguments: Any) -> Family:
    return Family(name, "huggingface", model, 64, {"image_size": 64} | arguments)


_MAXVIT: dict[str, Any] = {"embed_dim": (32, 64, 96, 128), "stem_width": (16, 32)}
_METAFORMER: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (32, 64, 96, 128)}
_HF_COLUMNS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}

FAMILIES = (
    _plain("vit", "vit_tiny_patch16_224"),
    _plain("vit_relpos", "vit_relpos_small_patch16_224"),
    _plain("deit", "deit_tiny_patch16_224"),
    _plain("deit_distilled", "deit_tiny_distilled_patch16_224"),
    _plain("deit3", "deit3_small_patch16_224"),
    _plain("flexivit", "flexivit_small"),
    _plain("dinov2", "vit_small_patch14_reg4_dinov2", 56),
    _plain("dinov3", "vit_small_patch16_dinov3"),
    _plain("vit_clip", "vit_base_patch32_clip_224"),
    _plain("vit_clip_quickgelu", "vit_base_patch32_clip_quickgelu_224"),
    _plain("siglip", "vit_base_patch16_siglip_224"),
    _plain("vit_hybrid", "vit_base_r26_s32_224", 64),
    _plain("eva", "eva_giant_patch14_224", 56),
    _plain("eva02", "eva02_tiny_patch14_224", 56),
    _plain("beit", "beit_base_patch16_224"),
    _plain("beitv2", "beitv2_base_patch16_224"),
    _plain("samvit", "samvit_base_patch16_224", 64),
    _timm(
        "swin",
        "swin_tiny_patch4_window7_224",
        56,
        img_size=56,
        window_size=7,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    _timm(
        "swinv2",
        "swinv2_tiny_window8_256",
        64,
        img_size=64,
        window_size=8,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    _timm("swinv2_cr", "swinv2_cr_tiny_224", 64, img_size=64, embed_dim=32, depths=(2, 2), num_heads=(2, 4)),
    _plain("cait", "cait_xxs24_224", depth_token_only=1),
    _plain("xcit", "xcit_nano_12_p16_224"),
    _timm("pvt_v2", "pvt_v2_b0", 64, depths=(1, 1, 1, 1)),
    _timm("pvt_v2_linear", "pvt_v2_b2_li", 64, depths=(1, 1, 1, 1)),
    _timm("twins_pcpvt", "twins_pcpvt_small", 64, img_size=64, depths=(1, 1, 1, 1)),
    _timm("twins_svt", "twins_svt_small", 224, depths=(1, 2, 1, 1)),
    _timm("tnt", "tnt_s_patch16_224", 64, img_size=64, embed_dim=64, depth=2, inner_dim=16, num_heads_outer=2),
    _timm("pit", "pit_ti_224", 64, img_size=64, depth=(1, 1, 1)),
    _timm("crossvit", "crossvit_9_240", 240, depth=((1, 1, 0), (1, 1, 0))),
    _timm(
        "coat",
        "coat.CoaT",
        64,
        img_size=64,
        patch_size=4,
        embed_dims=(32, 64, 64, 64),
        serial_depths=(1, 1, 1, 1),
        parallel_depth=1,
        num_heads=8,
    ),
    _timm("coat_lite", "coat_lite_tiny", 64, img_size=64, serial_depths=(1, 1, 1, 1)),
    _plain("convit", "convit_tiny", depth=2, local_up_to_layer=1, embed_dim=24),
    _timm("levit", "levit.Levit", 64, img_size=64, embed_dim=(32, 64), key_dim=16, depth=(1, 1), num_heads=(2, 4)),
    _timm("mvitv2", "mvitv2.MultiScaleVit", 64, img_size=64, cfg=mvitv2()),
    _timm("maxvit", "maxvit_pico_rw_256", 160, img_size=160, depths=(1, 1, 1, 1), **_MAXVIT),
    _timm("coatnet", "coatnet_nano_rw_224", 160, img_size=160, depths=(1, 1, 2, 1), **_MAXVIT),
    _timm("maxxvit", "maxxvitv2_nano_rw_256", 64, img_size=64, depths=(1, 1, 1, 1)),
    _timm(
        "gcvit",
        "gcvit.GlobalContextVit",
        64,
        img_size=64,
        depths=(2, 2),
        num_heads=(1, 2),
        embed_dim=32,
        window_ratio=(16, 8),
    ),
    _timm("davit", "davit_tiny", 64, depths=(1, 1), embed_dims=(32, 64), num_heads=(1, 2)),
    _timm("mobilevit", "mobilevit_xxs", 64),
    _timm("mobilevitv2", "byobnet.ByobNet", 64, cfg=mobilevitv2()),
    _timm(
        "efficientformer",
        "efficientformer.EfficientFormer",
        224,
        depths=(1, 1, 1, 2),
        embed_dims=(16, 32, 48, 64),
        num_vit=1,
    ),
    _timm(
        "efficientformerv2",
        "efficientformer_v2.EfficientFormerV2",
        64,
        img_size=64,
        depths=(1, 1, 1, 2),
        embed_dims=(16, 32, 48, 64),
        num_vit=1,
    ),
    _timm(
        "edgenext",
        "edgenext.EdgeNeXt",
        64,
        depths=(1, 1, 2, 1),
        dims=(16, 32, 48, 64),
        heads=(2, 2, 2, 2),
        global_block_counts=(0, 0, 1, 1),
    ),
    _timm(
        "efficientvit_mit",
        "efficientvit_mit.EfficientVit",
        64,
        widths=(8, 16, 32, 64),
        depths=(1, 1, 1, 1),
        head_widths=(64, 64),
    ),
    _timm(
        "efficientvit_msra",
        "efficientvit_msra.EfficientVitMsra",
        64,
        img_size=64,
        embed_dim=(32, 64),
        key_dim=(16, 16),
        depth=(1, 1),
        num_heads=(2, 2),
        window_size=(2, 2),
    ),
    _timm("nest", "nest.Nest", 64, img_size=64, embed_dims=(32, 64, 96), num_heads=(1, 2, 3), depths=(1, 1, 1)),
    _timm("visformer", "visformer_tiny", 64, img_size=64, depth=(1, 1, 1)),
    _timm(
        "tiny_vit",
        "tiny_vit.TinyVit",
        64,
        embed_dims=(32, 64, 96),
        depths=(1, 1, 1),
        num_heads=(1, 2, 3),
        window_sizes=(4, 4, 4),
    ),
    _timm("fastvit", "fastvit_sa12", 64, layers=(1, 1, 1, 1)),
    _timm("repvit", "repvit.RepVit", 64, embed_dim=(16, 32), depth=(1, 1)),
    _timm("hiera", "hiera_tiny_224", 64, img_size=64, stages=(1, 1, 1, 1), embed_dim=32),
    _timm(
        *("volo", "volo.VOLO", 64),
        img_size=64,
        layers=(1, 1, 1, 1),
        embed_dims=(32, 64, 64, 64),
        num_heads=(1, 2, 2, 2),
    ),
    _timm("focalnet", "focalnet.FocalNet", 64, depths=(1, 1, 1, 1), embed_dim=32),
    _timm("poolformer", "metaformer.MetaFormer", 64, **_METAFORMER, mlp_act=nn.GELU),
    _timm("caformer", "metaformer.MetaFormer", 64, **_METAFORMER, **caformer()),
    _timm("naflexvit", "naflexvit_base_patch16_gap", 64, img_size=64, embed_dim=64, depth=2, num_heads=2),
    Family(
        *("torchvision_vit", "torchvision", "vision_transformer.VisionTransformer", 64),
        {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 128},
    ),
    Family("torchvision_swin", "torchvision", "swin_transformer.SwinTransformer", 56, torchvision_swin(1)),
    Family("torchvision_swin_v2", "torchvision", "swin_transformer.SwinTransformer", 56, torchvision_swin(2)),
    Family(
        *("torchvision_maxvit", "torchvision", "maxvit.MaxVit", 64),
        {
            "input_size": (64, 64),
            "stem_channels": 16,
            "partition_size": 4,
            "block_channels": [16, 32],
            "block_layers": [1, 1],
            "head_dim": 16,
            "stochastic_depth_prob": 0.0,
        },
    ),
    _hugging_face("hf_vit", "ViTForImageClassification", **_HF_COLUMNS),
    _hugging_face("hf_deit", "DeiTForImageClassification", **_HF_COLUMNS),
    _hugging_face(
        "hf_dinov2", "Dinov2ForImageClassification", hidden_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
    _hugging_face(
        "hf_swin", "SwinForImageClassification", embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    _hugging_face("hf_beit", "BeitForImageClassification", **_HF_COLUMNS),
)


def find_family(name: str) -> Family:
    """Return the family called `name`; raises PTQError, with near names, if there is none."""
    for known in FAMILIES:
        if known.name == name:
            return known
    names = [known.name for known in FAMILIES]
    do = f"did you mean {near_names(name, names, 3)}?"
    raise failure("coverage", "--family", expected="a family of ptq4vit_fx/families.py", got=repr(name), do=do)

"""Arguments of small models whose constructors take more than numbers."""

from __future__ import annotations

from typing import Any


def caformer() -> dict[str, Any]:
    """Return what timm's CAFormer adds to its MetaFormer: convolutions, then attention, as token mixers."""
    from timm.models import metaformer

    return {
        "token_mixers": [metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention],
        "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    }


def mvitv2() -> Any:
    from timm.models.mvitv2 import MultiScaleVitCfg

    return MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=32)


def torchvision_swin(version: int) -> dict[str, Any]:
    """Return the arguments of a small `swin_t` or `swin_v2_t`."""
    from torchvision.models import swin_transformer as swin

    blocks = (swin.SwinTransformerBlock, swin.PatchMerging), (swin.SwinTransformerBlockV2, swin.PatchMergingV2)
    block, downsample = blocks[version - 1]
    return {
        "patch_size": [4, 4],
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": [7, 7] if version == 1 else [8, 8],
        "block": block,
        "downsample_layer": downsample,
    }


def mobilevitv2() -> Any:
    """Return the configuration of a MobileViTv2 of two stages."""
    from timm.models import mobilevit
    from timm.models.byobnet import ByoModelCfg

    return ByoModelCfg(
        blocks=(
            mobilevit._inverted_residual_block(d=1, c=16, s=2),
            mobilevit._mobilevitv2_block(d=1, c=32, s=2, transformer_depth=1),
        ),
        stem_chs=16,
        stem_type="3x3",
        stem_pool="",
        downsample="",
        act_layer="silu",
    )

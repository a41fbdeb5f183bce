"""Tasks beyond classification: small models of transformers with random weights, every output of which is compared."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.torch_version import TorchVersion

from brought import brought
from brought.pipeline import pictures, pipeline, sum_of_squares

os.environ.setdefault("HF_HUB_OFFLINE", "1")

#: torch.onnx.export of older releases mixes up two names where type_as gives back a buffer as it is.
OLD_EXPORT = "got ValueError: Key" if torch.__version__ < TorchVersion("2.14") else None

#: Of a transformer of two layers.
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
#: Of its images.
IMAGES = {"image_size": 32, "patch_size": 8}


def made(create: type[nn.Module], config: object) -> nn.Module:
    """Return a model with the same random weights in every run, large enough to matter."""
    torch.manual_seed(0)
    model = create(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.std() < 0.05:
                parameter.mul_(3)
    return model


@brought("task", "classification with transformers: ViT", quick=True)
def classification() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    pipeline(made(ViTForImageClassification, ViTConfig(**SMALL, **IMAGES, num_labels=5)), pictures())


@brought("task", "embeddings: CLIP's vision model with its projection")
def embeddings_of_clip() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**SMALL, **IMAGES, projection_dim=24)
    pipeline(made(CLIPVisionModelWithProjection, config), pictures(), loss=sum_of_squares)


@brought("task", "embeddings: all tokens of DINOv2 with registers", quick=True)
def embeddings_of_dinov2() -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, **IMAGES)
    pipeline(made(Dinov2WithRegistersModel, config), pictures(), loss=sum_of_squares)


@brought("task", "detection: YOLOS, with class scores and boxes")
def detection_by_yolos() -> None:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(**SMALL, image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=6)
    pipeline(made(YolosForObjectDetection, config), pictures())


@brought("task", "detection: DETR on a ResNet", quick=True)
def detection_by_detr() -> None:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    stages = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_queries": 6}
    encoder = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    config = DetrConfig(
        **encoder,
        **decoder,
        d_model=32,
        num_labels=5,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(**stages),
    )
    pipeline(made(DetrForObjectDetection, config), pictures(4, 3, 64, 64))


@brought("task", "segmentation: Segformer", quick=True)
def segmentation_by_segformer() -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 3]}
    config = SegformerConfig(**sizes, decoder_hidden_size=32, num_labels=4)
    pipeline(made(SegformerForSemanticSegmentation, config), pictures(4, 3, 64, 64))


@brought("task", "segmentation: Mask2Former on a Swin, with masks and class scores of queries")
def segmentation_by_mask2former() -> None:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    names = ["stage1", "stage2", "stage3", "stage4"]
    swin = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 4}
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 64}
    config = Mask2FormerConfig(
        **sizes,
        **layers,
        num_queries=6,
        num_labels=4,
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=SwinConfig(image_size=64, patch_size=4, **swin, out_features=names),
    )
    pipeline(made(Mask2FormerForUniversalSegmentation, config), pictures(2, 3, 64, 64), loss=sum_of_squares)


@brought("task", "depth: Depth Anything on DINOv2")
def depth() -> None:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    names = {"out_features": ["stage1", "stage2"], "reshape_hidden_states": False, "apply_layernorm": True}
    backbone = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, **IMAGES, **names)
    sizes = {"neck_hidden_sizes": [16, 24], "reassemble_factors": [2, 1], "fusion_hidden_size": 16, "patch_size": 8}
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=48, **sizes)
    pipeline(made(DepthAnythingForDepthEstimation, config), pictures(), loss=sum_of_squares)


@brought("task", "poses: ViTPose, with heat maps")
def poses() -> None:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    backbone = VitPoseBackboneConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=[32, 32], patch_size=[8, 8], mlp_ratio=2
    )
    config = VitPoseConfig(backbone_config=backbone, use_simple_decoder=True, num_labels=5)
    pipeline(made(VitPoseForPoseEstimation, config), pictures(), loss=sum_of_squares)


@brought("task", "video: VideoMAE, (batch, frames, channels, height, width)", refused=OLD_EXPORT, quick=True)
def videomae() -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(**SMALL, **IMAGES, num_frames=4, tubelet_size=2, num_labels=5)
    pipeline(made(VideoMAEForVideoClassification, config), pictures(4, 4, 3, 32, 32))


@brought("task", "audio: AST on spectrograms (batch, time, bands)", quick=True)
def audio() -> None:
    from transformers import ASTConfig, ASTForAudioClassification

    sizes = {"max_length": 40, "num_mel_bins": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    pipeline(made(ASTForAudioClassification, ASTConfig(**SMALL, **sizes, num_labels=5)), pictures(4, 40, 32))


@brought("task", "segmentation by prompts: the image encoder of SAM")
def image_encoder_of_sam() -> None:
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=48,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_dim=96,
        image_size=64,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[1],
        initializer_range=0.02,
    )
    pipeline(made(SamVisionEncoder, config), pictures(3, 3, 64, 64), loss=sum_of_squares)


@brought("task", "images and text: CLIP, image_embeds and text_embeds, logits per image")
def images_and_text() -> None:
    from transformers import CLIPConfig, CLIPModel

    text = SMALL | {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 49}
    config = CLIPConfig(text_config=text, vision_config=SMALL | IMAGES, projection_dim=24)
    tokens = torch.randint(1, 49, (4, 8), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = 49
    model = made(CLIPModel, config)
    example = {"input_ids": tokens[:1], "pixel_values": pictures(1)}
    batches = [{"input_ids": tokens, "pixel_values": pictures(4)}]
    pipeline(model, (tokens, pictures(4)), example=example, data=batches, loss=sum_of_squares)

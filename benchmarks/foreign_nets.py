"""Networks of other libraries by name: how each is made and called, and at which size; rows of bench_foreign."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

CLASSES = 11
Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True)
class Net:
    """One row: how to make the network, and the sides of the square image that it is tried on."""

    family: str
    make: Callable[[], nn.Module]
    side: int = 64


def logits(net: Any, image: Any) -> object:
    """How networks of transformers that take labels too are called."""
    return net(image).logits


def queries(net: Any, image: Any) -> object:
    """What a mask classifier of transformers answers."""
    found = net(image)
    return found.class_queries_logits, found.masks_queries_logits


def smp_nets() -> Iterator[tuple[str, Net]]:
    """Every decoder with every encoder that it takes."""
    encoders = ("resnet18", "mobilenet_v2", "efficientnet-b0", "mit_b0", "tu-convnext_atto", "densenet121")
    decoders = ("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan", "deeplabv3", "deeplabv3plus",
                "upernet", "segformer")  # fmt: skip
    refused = {("mit_b0", each) for each in ("unetplusplus", "linknet", "pan", "deeplabv3", "deeplabv3plus")}
    refused |= {("tu-convnext_atto", each) for each in ("linknet", "unetplusplus", "pan", "deeplabv3", "deeplabv3plus")}
    refused |= {("densenet121", each) for each in ("pan", "deeplabv3", "deeplabv3plus")}
    for decoder in decoders:
        for encoder in encoders:
            if (encoder, decoder) not in refused:
                side = 96 if decoder in ("deeplabv3", "pan", "pspnet") else 64

                def make(decoder: str = decoder, encoder: str = encoder) -> nn.Module:
                    import segmentation_models_pytorch as smp

                    return smp.create_model(decoder, encoder, encoder_weights=None, classes=CLASSES)

                yield f"smp {decoder} {encoder}", Net("smp", make, side)


def smp_dpt() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.DPT("tu-vit_tiny_patch16_224.augreg_in21k", encoder_weights=None, classes=CLASSES, dynamic_img_size=True)


def torchvision_nets() -> Iterator[tuple[str, Net]]:
    """Segmentation and classification."""
    from torchvision import models

    heads = ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
    for name in heads:
        yield f"torchvision {name}", Net("torchvision", lambda name=name: models.get_model(
            name, weights=None, weights_backbone=None, num_classes=CLASSES))  # fmt: skip
    plain = ("alexnet", "vgg11_bn", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet",
             "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "squeezenet1_1",
             "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny")  # fmt: skip
    for name in plain:
        yield f"torchvision {name}", Net("torchvision", lambda name=name: models.get_model(
            name, weights=None, num_classes=CLASSES))  # fmt: skip
    yield "torchvision inception_v3", Net("torchvision", lambda: models.get_model(
        "inception_v3", weights=None, init_weights=False, num_classes=CLASSES), 299)  # fmt: skip
    for name, side in (("swin_t", 64), ("swin_v2_t", 64), ("maxvit_t", 224), ("vit_b_32", 224)):
        yield f"torchvision {name}", Net("torchvision", lambda name=name: models.get_model(
            name, weights=None, num_classes=CLASSES), side)  # fmt: skip


def timm_nets() -> Iterator[tuple[str, Net]]:
    """Backbones as classifiers."""
    names = ("resnet18", "resnetv2_50", "res2net50_14w_8s", "resnest14d", "seresnext26d_32x4d", "skresnet18",
             "ecaresnet26t", "gernet_s", "repvgg_a0", "mobileone_s0", "mobilenetv4_conv_small", "ghostnet_100",
             "hardcorenas_a", "tinynet_e", "lcnet_050", "fbnetc_100", "rexnet_100", "hrnet_w18_small", "dla34",
             "vovnet39a", "cspresnet50", "darknet53", "efficientvit_b0", "convnextv2_atto", "inception_next_tiny",
             "mambaout_femto", "starnet_s1", "regnetx_002", "nfnet_l0", "xception41")  # fmt: skip
    fixed = ("deit_tiny_patch16_224", "mixer_s32_224", "poolformer_s12", "pvt_v2_b0", "coat_lite_tiny",
             "levit_128s", "mobilevit_xxs", "edgenext_xx_small", "fastvit_t8", "repvit_m0_9",
             "swin_tiny_patch4_window7_224")  # fmt: skip
    for name in (*names, *fixed):

        def make(name: str = name) -> nn.Module:
            import timm

            return timm.create_model(name, pretrained=False, num_classes=CLASSES)

        yield f"timm {name}", Net("timm", make, 224 if name in fixed else 64)


def monai_nets() -> Iterator[tuple[str, Net]]:
    """Two-dimensional networks for medical images, three channels in."""
    ends = {"spatial_dims": 2, "in_channels": 3, "out_channels": CLASSES}
    steps = {"channels": (16, 32, 64), "strides": (2, 2)}
    rows: dict[str, dict[str, Any]] = {
        "UNet": ends | steps | {"num_res_units": 2},
        "BasicUNet": ends | {"features": (16, 16, 32, 64, 128, 16)},
        "BasicUNetPlusPlus": ends | {"features": (16, 16, 32, 64, 128, 16)},
        "AttentionUnet": ends | steps,
        "SegResNet": ends | {"init_filters": 8},
        "DynUNet": ends | {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3},
        "FlexibleUNet": {"in_channels": 3, "out_channels": CLASSES, "backbone": "efficientnet-b0"},
        "HighResNet": ends,
        "UNETR": ends | {"img_size": (64, 64), "feature_size": 8, "hidden_size": 96, "mlp_dim": 192, "num_heads": 4},
        "SwinUNETR": ends | {"feature_size": 12},
    }
    for name, options in rows.items():

        def make(name: str = name, options: dict[str, Any] = options) -> nn.Module:
            from monai.networks import nets

            return getattr(nets, name)(**options)

        yield f"monai {name}", Net("monai", make)


def transformers_nets() -> Iterator[tuple[str, Net]]:
    """Segmentation networks by their configurations, nothing downloaded."""

    def named(model: str, config: Callable[[Any], Any]) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            import transformers

            return getattr(transformers, model)(config(transformers))

        return make

    rows: dict[str, tuple[str, Callable[[Any], Any], int]] = {
        "segformer_b0": ("SegformerForSemanticSegmentation", lambda t: t.SegformerConfig(num_labels=CLASSES), 64),
        "upernet_convnext": ("UperNetForSemanticSegmentation", lambda t: t.UperNetConfig(
            backbone_config=t.ConvNextConfig(depths=[2, 2, 2, 2], hidden_sizes=[24, 48, 96, 192],
                                             out_features=["stage1", "stage2", "stage3", "stage4"]),
            hidden_size=64, auxiliary_in_channels=96, auxiliary_channels=32, num_labels=CLASSES), 64),
        "upernet_swin": ("UperNetForSemanticSegmentation", lambda t: t.UperNetConfig(
            backbone_config=t.SwinConfig(embed_dim=24, depths=[2, 2, 2, 2], num_heads=[2, 4, 8, 16],
                                         out_features=["stage1", "stage2", "stage3", "stage4"]),
            hidden_size=64, auxiliary_in_channels=96, auxiliary_channels=32, num_labels=CLASSES), 64),
        "mask2former_swin": ("Mask2FormerForUniversalSegmentation", lambda t: t.Mask2FormerConfig(
            backbone_config=t.SwinConfig(embed_dim=24, depths=[2, 2, 2, 2], num_heads=[2, 4, 8, 16],
                                         out_features=["stage1", "stage2", "stage3", "stage4"]),
            feature_size=64, mask_feature_size=64, hidden_dim=64, dim_feedforward=128, encoder_feedforward_dim=128,
            encoder_layers=2, decoder_layers=2, num_attention_heads=4, num_queries=20, num_labels=CLASSES), 64),
        "maskformer_swin": ("MaskFormerForInstanceSegmentation", lambda t: t.MaskFormerConfig(
            backbone_config=t.SwinConfig(embed_dim=24, depths=[2, 2, 2, 2], num_heads=[2, 4, 8, 16],
                                         out_features=["stage1", "stage2", "stage3", "stage4"]),
            decoder_config=t.DetrConfig(d_model=64, encoder_layers=1, decoder_layers=2, num_queries=20,
                                        encoder_attention_heads=4, decoder_attention_heads=4),
            num_labels=CLASSES), 64),
        "mobilevit_small": ("MobileViTForSemanticSegmentation", lambda t: t.MobileViTConfig(num_labels=CLASSES), 64),
        "mobilevitv2": ("MobileViTV2ForSemanticSegmentation", lambda t: t.MobileViTV2Config(num_labels=CLASSES), 64),
        "mobilenet_v2": ("MobileNetV2ForSemanticSegmentation", lambda t: t.MobileNetV2Config(num_labels=CLASSES), 64),
        "dpt": ("DPTForSemanticSegmentation", lambda t: t.DPTConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=64,
            backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 32, 64, 64], fusion_hidden_size=32,
            num_labels=CLASSES), 64),
        "beit": ("BeitForSemanticSegmentation", lambda t: t.BeitConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192, image_size=64,
            out_indices=[1, 2, 3, 4], num_labels=CLASSES), 64),
    }  # fmt: skip
    for name, (model, config, side) in rows.items():
        yield f"transformers {name}", Net("transformers", named(model, config), side)


def pytorchcv_nets() -> Iterator[tuple[str, Net]]:
    """Segmentation networks of pytorchcv."""
    names = ("fcn8sd_resnetd50b_voc", "pspnet_resnetd50b_voc", "deeplabv3_resnetd50b_voc",
             "icnet_resnetd50b_cityscapes", "sinet_cityscapes", "bisenet_resnet18_celebamaskhq",
             "danet_resnetd50b_cityscapes", "fastscnn_cityscapes", "cgnet_cityscapes", "dabnet_cityscapes",
             "fpenet_cityscapes",
             "lednet_cityscapes", "esnetv2_cityscapes")  # fmt: skip
    for name in names:

        def make(name: str = name) -> nn.Module:
            from pytorchcv.model_provider import get_model

            return get_model(name, pretrained=False, in_size=(128, 128), num_classes=CLASSES)

        yield f"pytorchcv {name}", Net("pytorchcv", make, 128)


def ultralytics_nets() -> Iterator[tuple[str, Net]]:
    """Instance segmentation, as the trainer builds it."""
    for name in ("yolov8n-seg", "yolo11n-seg"):

        def make(name: str = name) -> nn.Module:
            from ultralytics.nn.tasks import SegmentationModel

            return SegmentationModel(f"{name}.yaml", nc=CLASSES, verbose=False)

        yield f"ultralytics {name}", Net("ultralytics", make)


FORWARDS: dict[str, Forward] = {
    "transformers": logits, "transformers mask2former_swin": queries, "transformers maskformer_swin": queries
}  # fmt: skip
PACKAGES = {"smp": "segmentation_models_pytorch"}


def nets() -> dict[str, Net]:
    """Name -> row, in the order of the result."""
    rows = dict(smp_nets())
    rows["smp dpt vit_tiny"] = Net("smp", smp_dpt)
    for more in (torchvision_nets, timm_nets, monai_nets, transformers_nets, pytorchcv_nets, ultralytics_nets):
        rows |= dict(more())
    return rows


def forward_of(name: str, net: Net) -> Forward | None:
    """How a row's network is called; None: as a network of images."""
    return FORWARDS.get(name) or FORWARDS.get(net.family)


def package_of(family: str) -> str:
    """The package that a family's networks come from."""
    return PACKAGES.get(family, family)

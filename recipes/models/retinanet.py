"""RetinaNet, the detector of Xiao et al. 2018: torchvision's, every convolution of which `convert_` reaches."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


def retinanet(classes: int, size: int = 800, backbone: str = "resnet18", **options: Any) -> RetinaNet:
    """RetinaNet on a torchvision ResNet with a feature pyramid, focal loss and batch norm that trains; no pretraining.

    classes counts the background as torchvision does (91 for COCO). Images are scaled until their shorter side is
    `size`, the longer at most 5/3 of it, as in the paper. `options` are torchvision's RetinaNet's.
    model(images, targets) gives the two losses in training, detections in evaluation.
    """
    features = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return RetinaNet(features, classes, size, size * 5 // 3, **options)


def small_retinanet(classes: int, size: int = 96, **options: Any) -> RetinaNet:
    """RetinaNet for images of about 100 pixels: ResNet-18, strides 8 to 64, 64 channels, anchors of twice the stride.

    Heads have group norm, as in torchvision's retinanet_resnet50_fpn_v2: in so narrow a head without it the first
    weights, of deviation 0.01, let nothing through. Arguments as in :func:`retinanet`; images are scaled to `size`.
    """
    channels, strides, ratios = 64, (8, 16, 32, 64), (0.5, 1.0, 2.0)
    layers = {"layer2": "2", "layer3": "3", "layer4": "4"}
    features = BackboneWithFPN(resnet18(), layers, [128, 256, 512], channels)
    sizes = tuple(tuple(int(2 * stride * 2 ** (i / 3)) for i in range(3)) for stride in strides)
    anchors = AnchorGenerator(sizes, (ratios,) * len(sizes))
    head = RetinaNetHead(channels, 9, classes, norm_layer=partial(nn.GroupNorm, 16))
    return RetinaNet(features, classes, size, size, anchor_generator=anchors, head=head, **options)

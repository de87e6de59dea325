"""RetinaNet, the detector of Xiao et al. 2018: torchvision's, every convolution of which `convert_` reaches."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


def retinanet(classes: int, backbone: str = "resnet18", **options: Any) -> RetinaNet:
    """RetinaNet on a torchvision ResNet with a feature pyramid, focal loss and batch norm that trains; no pretraining.

    classes counts the background as torchvision does (91 for COCO). `options` are torchvision's RetinaNet's, such as
    min_size. model(images, targets) gives the two losses in training, detections in evaluation.
    """
    features = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return RetinaNet(features, classes, **options)

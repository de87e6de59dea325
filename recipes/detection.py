"""Object detection: sets in COCO's format, what a detector finds in them, and COCO's average precision."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from recipes.data import Data

if TYPE_CHECKING:
    from pycocotools.coco import COCO

Target = dict[str, Any]
Box = tuple[int, int, int, int]  # x, y, width, height
Colour = tuple[int, int, int]

# The size to which images are scaled where nothing else is said.
KINDS = {"shapes": 96, "coco": 800}

SHAPES = ("ellipse", "rectangle", "triangle", "cross", "ring")
SHAPES_IMAGES = {"train": 1000, "val": 200}


def kind(spec: str) -> str:
    """``spec`` without its path: a key of :data:`KINDS`. Raises ValueError for anything else."""
    name, _, path = spec.partition(":")
    if name not in KINDS or (name == "coco") != bool(path):
        raise ValueError(f"got {spec!r}, want shapes or coco:PATH")
    return name


def load(spec: str, root: str | Path, size: int = 0) -> Data:
    """The detection set ``spec``: "coco:PATH", a folder laid out as COCO 2017 is, or "shapes", generated in ``root``.

    PATH has the folders train2017, val2017 and annotations, with instances_train2017.json and instances_val2017.json in
    it. The classes of the result count the background, whose label is 0.
    """
    name = kind(spec)
    size = size or KINDS[name]
    folder = Path(spec.partition(":")[2]) if name == "coco" else Path(root) / f"shapes-{size}"
    if name == "shapes":
        for seed, (split, images) in enumerate(SHAPES_IMAGES.items()):
            if not _annotations(folder, split).exists():
                write_shapes(folder, split, images, size, seed)
    train, test, plain = (
        coco(folder / f"{split}2017", _annotations(folder, split), objects=split == "train", flips=flips)
        for split, flips in (("train", True), ("val", False), ("train", False))
    )
    return Data(train, test, (3, size, size), max(train.coco.getCatIds()) + 1, collate, plain)


def _annotations(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}2017.json"


def coco(
    images: str | Path, annotations: str | Path, *, objects: bool = False, flips: bool = False
) -> datasets.CocoDetection:
    """A set in COCO's format by torchvision's own loader: (image (3, H, W) in 0 … 1, {boxes, labels, image_id}).

    Boxes are x1, y1, x2, y2 in pixels and labels COCO's category ids; crowds are no objects. objects: no images without
    any. flips: random horizontal ones. Resizing is the model's, which maps its detections back.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = datasets.CocoDetection(str(images), str(annotations))
    if objects:
        dataset.ids = [i for i in dataset.ids if dataset.coco.getAnnIds(i, iscrowd=False)]
    dataset.transforms = v2.Compose(
        [
            _objects,
            v2.ToImage(),
            *([v2.RandomHorizontalFlip()] if flips else []),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(),
            v2.ToDtype(torch.float32, scale=True),
            v2.ToPureTensor(),
        ]
    )
    return datasets.wrap_dataset_for_transforms_v2(dataset, ("boxes", "labels", "image_id", "iscrowd"))


def _objects(image: Image.Image, target: Target) -> tuple[Image.Image, Target]:
    """Without the crowds; torchvision leaves out the keys of an image without objects."""
    crowd = torch.tensor(target.pop("iscrowd", []), dtype=torch.bool)
    boxes = target.get("boxes", torch.zeros(0, 4))[~crowd]
    labels = target.get("labels", torch.zeros(0, dtype=torch.long))[~crowd]
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.size[::-1])
    return image, target | {"boxes": boxes, "labels": labels}


def write_shapes(folder: Path, split: str, images: int, size: int = 96, seed: int = 0) -> None:
    """Write a generated set of images of `size` x `size` pixels, in COCO's format and layout, into `folder`.

    Each has one to four of :data:`SHAPES` in colours of their own on noise, their sides a sixth to half of the image's.
    Boxes overlap by at most a tenth of the smaller.
    """
    draw = random.Random(seed)
    pictures, path = folder / f"{split}2017", _annotations(folder, split)
    for parent in (pictures, path.parent):
        parent.mkdir(parents=True, exist_ok=True)
    annotations: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        colour = _colour(draw)
        noise = Image.frombytes("RGB", (size, size), draw.randbytes(3 * size * size))
        image = Image.blend(Image.new("RGB", (size, size), colour), noise, 0.3)
        boxes: list[Box] = []
        for _ in range(draw.randint(1, 4)):
            w, h = (draw.randint(size // 6, size // 2) for _ in range(2))
            box = (draw.randint(0, size - w), draw.randint(0, size - h), w, h)
            if any(_intersection(box, other) > 0.1 * min(w * h, other[2] * other[3]) for other in boxes):
                continue
            boxes.append(box)
            kind = draw.randrange(len(SHAPES))
            _draw(ImageDraw.Draw(image), SHAPES[kind], box, _colour(draw, colour))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": kind + 1,
                    "bbox": box,
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        image.save(pictures / f"{number}.png")
    entries = [{"id": n, "file_name": f"{n}.png", "width": size, "height": size} for n in range(1, images + 1)]
    categories = [{"id": n, "name": name} for n, name in enumerate(SHAPES, 1)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    # Last, and whole or not at all: where it is, the set is complete.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def _colour(draw: random.Random, away: Colour | None = None) -> Colour:
    while True:
        colour = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
        if away is None or sum(abs(a - b) for a, b in zip(colour, away, strict=True)) > 200:
            return colour


def _intersection(a: Box, b: Box) -> int:
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0)


def _draw(canvas: ImageDraw.ImageDraw, shape: str, box: Box, colour: Colour) -> None:
    x, y, w, h = box
    right, bottom = x + w - 1, y + h - 1
    if shape == "ellipse":
        canvas.ellipse((x, y, right, bottom), fill=colour)
    elif shape == "rectangle":
        canvas.rectangle((x, y, right, bottom), fill=colour)
    elif shape == "triangle":
        canvas.polygon([(x, bottom), (right, bottom), (x + w // 2, y)], fill=colour)
    elif shape == "cross":
        canvas.rectangle((x + w // 3, y, right - w // 3, bottom), fill=colour)
        canvas.rectangle((x, y + h // 3, right, bottom - h // 3), fill=colour)
    else:
        canvas.ellipse((x, y, right, bottom), outline=colour, width=max(2, min(w, h) // 5))


def average_precision(
    truth: COCO, detections: list[dict[str, Any]], images: list[int] | None = None
) -> dict[str, float]:
    """COCO's AP (mean over classes and over IoU 0.50, 0.55 … 0.95), AP50 and AP75, of boxes, by pycocotools.

    images: ids of those that count, by default all of `truth`.

    Detections are in COCO's format of results: image_id, category_id, bbox (x, y, width, height), score.
    """
    # Here, so that classifiers train without the package.
    from pycocotools.cocoeval import COCOeval

    if not detections:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        if images is not None:
            evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), evaluation.stats[:3].tolist(), strict=True))


@torch.no_grad()
def detect(model: nn.Module, batches: Iterable[tuple[list[Tensor], list[Target]]]) -> list[dict[str, Any]]:
    """What a torchvision detector finds, in COCO's format of results."""
    found = []
    for images, targets in batches:
        for target, result in zip(targets, model(images), strict=True):
            x1, y1, x2, y2 = result["boxes"].unbind(1)
            boxes = torch.stack([x1, y1, x2 - x1, y2 - y1], 1).tolist()
            for box, score, label in zip(boxes, result["scores"].tolist(), result["labels"].tolist(), strict=True):
                found.append({"image_id": target["image_id"], "category_id": label, "bbox": box, "score": score})
    return found


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Lists, as torchvision's detectors take them: images differ in size and in the number of their objects."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)

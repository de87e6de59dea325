"""Detection recipes: COCO's format by torchvision's loader, average precision in closed form, and runs of RetinaNet."""

import json

import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
from recipes import __main__ as cli
from recipes import checkpoint, data, detection

pytestmark = pytest.mark.usefixtures("one_thread")


def annotation(number, image, category, bbox, iscrowd=0):
    area = bbox[2] * bbox[3]
    found = {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": iscrowd}
    # COCO's crowds are run-length encoded masks.
    return found | ({"segmentation": {"counts": [0, area], "size": bbox[:1:-1]}} if iscrowd else {})


ANNOTATIONS = [
    annotation(1, 7, 1, [2, 3, 10, 20]),
    annotation(2, 7, 90, [20.5, 4.25, 12, 8]),
    annotation(3, 7, 1, [0, 0, 40, 30], iscrowd=1),
    annotation(4, 7, 3, [5, 5, 0, 6]),
    annotation(5, 12, 3, [1, 1, 30, 44]),
    annotation(6, 13, 3, [0, 0, 9, 9], iscrowd=1),
]
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
SIZES = {7: (40, 30), 12: (34, 48), 13: (32, 32), 20: (36, 36)}


@pytest.fixture
def coco(tmp_path):
    """Four images in MS COCO's own layout: crowds, an empty box, images without objects, gaps in the categories."""
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        for number, size in SIZES.items():
            ramp = Image.linear_gradient("L").rotate(90).resize(size)
            # One grey image, of which COCO has some.
            (ramp if number == 12 else ramp.convert("RGB")).save(tmp_path / f"{split}2017" / f"{number:012}.jpg")
        images = [{"id": n, "file_name": f"{n:012}.jpg", "width": w, "height": h} for n, (w, h) in SIZES.items()]
        content = {"images": images, "annotations": ANNOTATIONS, "categories": CATEGORIES}
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return tmp_path


def test_coco(coco):
    data = detection.load(f"coco:{coco}", "")
    assert (len(data.train), len(data.test), data.classes, data.shape) == (2, 4, 91, (3, 800, 800))
    image, target = data.test[0]
    assert type(image) is torch.Tensor and image.shape == (3, 30, 40) and 0 <= image.min() < image.max() <= 1
    assert type(target["boxes"]) is torch.Tensor and target["image_id"] == 7
    assert target["boxes"].tolist() == [[2, 3, 12, 23], [20.5, 4.25, 32.5, 12.25]]
    assert target["labels"].tolist() == [1, 90]
    assert data.test[1][0].shape == (3, 48, 34)
    for empty in (2, 3):
        assert data.test[empty][1]["boxes"].shape == (0, 4) and data.test[empty][1]["labels"].shape == (0,)
    with pytest.raises(FileNotFoundError):
        detection.load("coco:/nowhere", "")
    for spec in ("coco", "shapes:here", "voc"):
        with pytest.raises(ValueError, match=f"got '{spec}', want shapes or coco:PATH"):
            detection.kind(spec)


def test_training_images_are_flipped_with_their_boxes(coco):
    data = detection.load(f"coco:{coco}", "")
    plain, target = data.test[0]
    mirrored = torch.stack([40 - target["boxes"][:, 2], target["boxes"][:, 1]], 1)
    seen = set()
    for _ in range(20):
        image, flipped = data.train[0]
        turned = torch.equal(image, plain.flip(2))
        assert turned or torch.equal(image, plain)
        corner = mirrored if turned else target["boxes"][:, :2]
        assert torch.equal(flipped["boxes"][:, :2], corner)
        seen.add(turned)
    assert seen == {True, False}


@pytest.mark.parametrize("shape", detection.SHAPES)
@pytest.mark.parametrize("box", [(3, 5, 16, 48), (0, 0, 17, 17), (47, 20, 49, 31)])
def test_boxes_are_tight(shape, box):
    image = Image.new("RGB", (96, 96))
    detection._draw(ImageDraw.Draw(image), shape, box, (255, 255, 255))
    x, y, w, h = box
    assert image.getbbox() == (x, y, x + w, y + h)


def test_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "SHAPES_IMAGES", {"train": 6, "val": 40})
    data = detection.load("shapes", tmp_path / "one", 64)
    assert (len(data.train), len(data.test), data.classes, data.shape) == (6, 40, 6, (3, 64, 64))
    again = detection.load("shapes", tmp_path / "two", 64)
    labels = set()
    for number in range(40):
        (image, target), (other, same) = data.test[number], again.test[number]
        assert torch.equal(image, other) and torch.equal(target["boxes"], same["boxes"])
        boxes, ids = target["boxes"], target["labels"]
        assert 1 <= len(boxes) <= 4 and boxes.min() >= 0 and boxes.max() <= 64
        assert image.shape == (3, 64, 64)
        labels.update(ids.tolist())
    assert labels == {1, 2, 3, 4, 5}
    assert not torch.equal(data.test[0][0], data.train[0][0])
    # Where the set is, it is read and not made again.
    before = (tmp_path / "one" / "shapes-64" / "val2017" / "1.png").stat().st_mtime_ns
    detection.load("shapes", tmp_path / "one", 64)
    assert (tmp_path / "one" / "shapes-64" / "val2017" / "1.png").stat().st_mtime_ns == before


@pytest.fixture
def truth(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "SHAPES_IMAGES", {"train": 1, "val": 20})
    return detection.load("shapes", tmp_path, 64).test.coco


def found(truth, keep=lambda a: True, change=lambda box: box):
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": change(a["bbox"]), "score": 0.9}
        for a in truth.dataset["annotations"]
        if keep(a)
    ]


def test_average_precision_in_closed_form(truth):
    assert detection.average_precision(truth, []) == {"AP": 0, "AP50": 0, "AP75": 0}
    assert detection.average_precision(truth, found(truth)) == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1})
    # Boxes of 0.675 of the height have IoU 0.675: right at the thresholds 0.50, 0.55, 0.60 and 0.65 of ten.
    low = found(truth, change=lambda b: [b[0], b[1], b[2], 0.675 * b[3]])
    assert detection.average_precision(truth, low) == pytest.approx({"AP": 0.4, "AP50": 1, "AP75": 0})
    # Two of the five classes only.
    some = found(truth, keep=lambda a: a["category_id"] in (2, 4))
    assert detection.average_precision(truth, some) == pytest.approx({"AP": 0.4, "AP50": 0.4, "AP75": 0.4})
    # All that is in half of the images, which is all that counts there.
    half = truth.getImgIds()[::2]
    there = found(truth, keep=lambda a: a["image_id"] in half)
    assert detection.average_precision(truth, there, half)["AP"] == 1 > detection.average_precision(truth, there)["AP"]
    # Of class 1 a share r of the objects: precision 1 at the recalls 0, 0.01 … up to r, of 101, and 0 beyond.
    first = [a["id"] for a in truth.dataset["annotations"] if a["category_id"] == 1]
    part = found(truth, keep=lambda a: a["category_id"] != 1 or a["id"] in first[: len(first) // 3])
    recalls = 100 * (len(first) // 3) // len(first) + 1
    assert detection.average_precision(truth, part)["AP"] == pytest.approx((4 + recalls / 101) / 5)


def test_validation_images_are_whole_and_those_whose_boxes_count(tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "SHAPES_IMAGES", {"train": 12, "val": 4})
    loaded = detection.load("shapes", tmp_path, 32)
    _, held = loaded.split(0.25)
    batches = [data.Batches(loaded.plain, 2, only=held, collate=loaded.collate) for _ in range(2)]
    targets = [target for _, part in batches[0] for target in part]
    assert [target["image_id"] for target in targets] == [loaded.plain.ids[i] for i in held.tolist()]
    # No flips.
    assert all(map(torch.equal, *([image for images, _ in part for image in images] for part in batches)))


def test_a_perfect_detector_has_average_precision_one(coco):
    """From the loader's boxes back to COCO's, at the images' own sizes."""
    data = detection.load(f"coco:{coco}", "")
    batches = torch.utils.data.DataLoader(data.test, 3, collate_fn=data.collate)
    answers = iter([target | {"scores": torch.full((len(target["labels"]),), 0.5)} for _, target in data.test])

    def perfect(images):
        return [next(answers) for _ in images]

    results = detection.detect(perfect, batches)
    assert [r["bbox"] for r in results] == [a["bbox"] for a in ANNOTATIONS[:2]] + [ANNOTATIONS[4]["bbox"]]
    # The empty box cannot be found: of its class one of two objects is.
    assert detection.average_precision(data.test.coco, results)["AP"] == pytest.approx((1 + 1 + 51 / 101) / 3)


EXPERIMENT = """
row = "small"
[data]
name = "shapes"
size = 64
[model]
name = "retinanet-small"
[algorithm]
name = "{}"
[optimizer]
name = "sgd"
lr = 0.02
momentum = 0.9
[train]
epochs = {}
batch_size = 8
"""


def run(path, out, root, *args):
    cli.main(["run", str(path), "--out", str(out), "--data-root", str(root), "--device", "cpu", *args])
    (log,) = (out / path.parent.name / path.stem).glob("seed-*/log.jsonl")
    _, *rows = map(json.loads, log.read_text().splitlines())
    return rows, checkpoint.load(log.parent / "checkpoint.pt")["model"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["backprop", "brsf"])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, rule):
    monkeypatch.setattr(detection, "SHAPES_IMAGES", {"train": 12, "val": 4})
    path = tmp_path / "small.toml"
    path.write_text(EXPERIMENT.format(rule, 2))
    rows, model = run(path, tmp_path / "whole", tmp_path)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert 0 < rows[2]["train_loss"] < 10 and rows[0]["test_AP"] == 0
    assert all(0 <= row["test_AP"] <= row["test_AP50"] <= 1 and "validation_AP" in row for row in rows)
    angle = rows[2]["angle_grad/backbone.body.layer1.0.conv1"]
    assert angle == 0 if rule == "backprop" else 0 < angle < 180
    run(path, tmp_path / "parts", tmp_path, "--set", "train.epochs=1")
    torch.rand(7)
    again, parts = run(path, tmp_path / "parts", tmp_path)
    for row, other in zip(rows, again, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    assert all(torch.equal(value, parts[key]) for key, value in model.items())


@pytest.mark.slow
def test_the_full_retinanet_in_bfloat16(tmp_path, coco):
    path = tmp_path / "small.toml"
    path.write_text(EXPERIMENT.format("usf", 1))
    settings = ["data.name=coco", f"data.path={coco.name}", "model.name=retinanet", "train.amp=bf16"]
    settings += ["train.batch_size=2", "data.validation=0", "algorithm.last_layer=backprop"]
    rows, _ = run(path, tmp_path / "out", coco.parent, *[part for s in settings for part in ("--set", s)])
    assert 0 < rows[1]["train_loss"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["backprop", "usf"])
def test_the_small_retinanet_learns(tmp_path, monkeypatch, rule):
    """The sixteen images that it is trained on."""
    monkeypatch.setattr(detection, "SHAPES_IMAGES", {"train": 16, "val": 16})
    write = detection.write_shapes
    monkeypatch.setattr(detection, "write_shapes", lambda *args: write(*args[:-1], 0))
    path = tmp_path / "small.toml"
    path.write_text(EXPERIMENT.format(f'{rule}"' + ('\nscale = "initial' if rule == "usf" else "\n#"), 60))
    rows, _ = run(
        path, tmp_path / "out", tmp_path, "--no-measure", "--set", "data.size=96", "--set", "data.validation=0"
    )
    assert rows[0]["test_AP50"] < 0.05
    assert rows[-1]["test_AP50"] > 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.name=lenet"], "model.name: got 'lenet', want one of retinanet, retinanet-small"),
        (["algorithm.name=dfa"], "algorithm.name: got 'dfa', want a rule: backprop, usf"),
        (["data.path=here"], "data.path: got 'here', want none with data.name = 'shapes'"),
        (["data.name=coco"], "data.path: got '', want a folder below --data-root with data.name = 'coco'"),
        (["data.name=coco", "data.path=nowhere"], "instances_train2017.json"),
        (["data.name=digits"], "model.name: got 'retinanet-small', want"),
        (["train.batch_size=5000"], "train.batch_size: got 5000, there are 22 images"),
    ],
)
def test_bad_settings(tmp_path, monkeypatch, capsys, settings, message):
    monkeypatch.setattr(detection, "SHAPES_IMAGES", {"train": 24, "val": 8})
    path = tmp_path / "small.toml"
    path.write_text(EXPERIMENT.format("usf", 1))
    with pytest.raises(SystemExit):
        run(path, tmp_path / "out", tmp_path, *[part for s in settings for part in ("--set", s)])
    assert message in capsys.readouterr().err

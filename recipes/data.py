"""The data sets a recipe trains on: real images, read by torchvision's and scikit-learn's own loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from torchvision import datasets
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2

# Channels and height = width of the images as they are.
NATIVE = {"digits": (1, 8), "mnist": (1, 28), "fashion-mnist": (1, 28), "cifar10": (3, 32), "imagefolder": (3, 224)}

AUGMENT = ("standard", "vertical", "none")

Pixels = tuple[tuple[float, ...], tuple[float, ...]]

# Mean and standard deviation of the training images' channels.
PIXELS: dict[str, Pixels] = {
    "digits": ((0.305,), (0.376,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# Loaders of the grey sets in MNIST's format.
_GREY = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}

# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# Below the data root, and where the files are from that torchvision would download.
_FILES = {
    "mnist": ("MNIST/raw", "the four files of https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "fashion-mnist": (
        "FashionMNIST/raw",
        "the four files of https://github.com/zalandoresearch/fashion-mnist (Debian: dataset-fashion-mnist)",
    ),
    "cifar10": ("", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
}


@dataclass
class Data:
    train: TensorDataset | datasets.VisionDataset
    test: TensorDataset | datasets.VisionDataset
    shape: tuple[int, int, int]
    classes: int
    collate: Callable[[list[Any]], Any] | None = None  # of a DataLoader, where not torch's own
    plain: datasets.VisionDataset | None = None  # the training images as test images are prepared, where that differs

    def split(self, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the training images to learn from, and of those to validate on: always the same `share` of them.

        In proportion to the classes where the images have one each. Raises ValueError where that leaves a class or a
        part without images.
        """
        if not share:
            return torch.arange(len(self.train)), torch.arange(0)
        held = round(share * len(self.train))
        targets = (
            self.train.tensors[1] if isinstance(self.train, TensorDataset) else getattr(self.train, "targets", None)
        )
        try:
            parts = train_test_split(range(len(self.train)), test_size=held, stratify=targets, random_state=0)
        except ValueError as error:
            raise ValueError(
                f"data.validation: got {share}, which is {held} of {len(self.train)} images; "
                "want one of each class at least in either part, or 0, and the test images choose"
            ) from error
        train, validation = (torch.tensor(sorted(part)) for part in parts)
        return train, validation


class Order(Sampler[list[list[int]]]):
    """Batches of [number, seed] of the images `only`: of each its part for `rank` of `ranks`, equally many on all.

    With a generator, which draws both, whole batches of `size` over the ranks, from the batch `first` on; each image's
    seed is for what augments it. Without, all images as they come, in batches of at most `size` a rank.
    """

    def __init__(
        self, only: torch.Tensor, size: int, shuffle: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> None:
        self.only, self.size, self.shuffle, self.rank, self.ranks = only, size, shuffle, rank, ranks
        self.first = 0

    def __len__(self) -> int:
        count = len(self.only)
        return -(-count // (self.size * self.ranks)) if self.shuffle is None else count // self.size - self.first

    def __iter__(self) -> Iterator[list[list[int]]]:
        for batch in self.tensors():
            yield batch.tolist()

    def tensors(self) -> Iterator[torch.Tensor]:
        """The same as tensors of (images, 2)."""
        count = len(self.only)
        if self.shuffle is None:
            numbers = self.only[self.rank :: self.ranks]
            found = torch.stack([numbers, torch.zeros_like(numbers)], 1).tensor_split(len(self))
        else:
            drawn = self.only[torch.randperm(count, generator=self.shuffle)]
            seeds = torch.randint(2**62, (count,), generator=self.shuffle)
            whole = torch.stack([drawn, seeds], 1)[: count // self.size * self.size]
            found = whole.view(-1, self.ranks, self.size // self.ranks, 2)[self.first :, self.rank]
        # Drawn when the first is asked for: a DataLoader with workers makes two iterators and uses one.
        yield from found


class _Drawn(Dataset[Any]):
    """Images by [number, seed]: what is random in one depends on that seed alone, whichever process loads it when."""

    def __init__(self, dataset: datasets.VisionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, at: list[int]) -> Any:
        number, seed = at
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.dataset[number]


class Batches:
    """Batches (images, targets) of a data set on `device`, any number of times over.

    shuffle: a generator, for a new order each time and no last batch of fewer images, which would stop batch norm.
    only: indices of the images to take. Images in memory are indexed there, others come from a DataLoader.
    reconstruct: targets are the images' numbers, (N, channels · height · width).
    rank, ranks: what of each batch is ours, as in `Order`.
    """

    def __init__(
        self,
        dataset: TensorDataset | datasets.VisionDataset,
        size: int,
        shuffle: torch.Generator | None = None,
        *,
        only: torch.Tensor | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
        reconstruct: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.dataset, self.device, self.reconstruct = dataset, torch.device(device), reconstruct
        self.only = torch.arange(len(dataset)) if only is None else only
        self.count = len(self.only)
        self.order = Order(self.only, size, shuffle, rank, ranks)
        self.loader: DataLoader[Any] | None = None
        if not isinstance(dataset, TensorDataset):
            self.loader = DataLoader(
                _Drawn(dataset),
                batch_sampler=self.order,
                collate_fn=collate,
                num_workers=workers,
                # Those that train: others would wait through every epoch.
                persistent_workers=workers > 0 and shuffle is not None,
                pin_memory=self.device.type == "cuda",
            )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self.loader or self._in_memory():
            x, y = tree_map_only(torch.Tensor, lambda t: t.to(self.device, non_blocking=True), batch)
            yield x, x.flatten(1) if self.reconstruct else y

    def _in_memory(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, targets = self.dataset.tensors
        for batch in self.order.tensors():
            yield images[batch[:, 0]], targets[batch[:, 0]]


def kind(spec: str) -> str:
    """``spec`` without its path: a key of :data:`NATIVE`. Raises ValueError for anything else."""
    name, _, path = spec.partition(":")
    if name not in NATIVE or (name == "imagefolder") != bool(path):
        raise ValueError(f"got {spec!r}, want digits, mnist, fashion-mnist, cifar10 or imagefolder:PATH")
    return name


def pixels(name: str, normalise: bool = True) -> Pixels:
    """What is subtracted from the channels of a data set and what they are divided by."""
    mean, std = PIXELS[name]
    return (mean, std) if normalise else ((0.0,) * len(mean), (1.0,) * len(std))


def load(
    spec: str, root: str | Path, size: int, channels: int, augment: str = "standard", normalise: bool = True
) -> Data:
    """The data set ``spec`` with images of ``channels`` x ``size`` x ``size``; downloads go into ``root``.

    normalise: subtract the training images' mean and divide by their standard deviation, by channel; else 0 … 1.

    augment, of training images in colour; grey ones are never changed:

    * "standard": cifar10, random crops of 32 from a margin of 4 and horizontal flips; imagefolder, random resized crops
      and horizontal flips, and the middle of test images (Xiao et al. 2018)
    * "vertical": the same with vertical flips for horizontal ones (Bartunov et al. 2018, CIFAR-10)
    * "none": the whole image, resized (Bartunov et al. 2018, ImageNet)

    Raises ValueError for an unknown ``spec`` or images of too few channels, and RuntimeError or OSError where the files
    cannot be had, with the folder where they are wanted and where they are from.
    """
    name = kind(spec)
    try:
        return _load(name, spec, root, size, channels, augment, normalise)
    except (RuntimeError, OSError) as error:
        if name not in _FILES:
            raise
        folder, source = _FILES[name]
        raise RuntimeError(
            f"data.name: {name} is not in {Path(root) / folder} and cannot be downloaded "
            f"({' '.join(str(error).split())}); put {source} there, or give another --data-root"
        ) from error


def _load(name: str, spec: str, root: str | Path, size: int, channels: int, augment: str, normalise: bool) -> Data:
    shape = (channels, size, size)
    statistics = pixels(name, normalise)
    if name == "digits":
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        targets = torch.from_numpy(digits.target)
        train, test = train_test_split(range(len(images)), test_size=0.2, stratify=targets, random_state=0)
        prepared = [_in_memory(images[part], targets[part], shape, statistics) for part in (train, test)]
        return Data(prepared[0], prepared[1], shape, 10)
    if name in _GREY:
        if name == "fashion-mnist":
            _unpack_debian_fashion_mnist(Path(root))
        raw = [_GREY[name](root, train=train, download=True) for train in (True, False)]
        prepared = [_in_memory(part.data.unsqueeze(1), part.targets, shape, statistics) for part in raw]
        return Data(prepared[0], prepared[1], shape, 10)
    flips = {"standard": [v2.RandomHorizontalFlip()], "vertical": [v2.RandomVerticalFlip()], "none": []}[augment]
    if name == "cifar10":
        crops = [v2.RandomCrop(32, padding=4), *flips] if augment != "none" else []
        prepare = _prepare(size, channels, statistics)
        return Data(
            datasets.CIFAR10(root, train=True, download=True, transform=v2.Compose([*crops, *prepare])),
            datasets.CIFAR10(root, train=False, download=True, transform=v2.Compose(prepare)),
            shape,
            10,
            plain=datasets.CIFAR10(root, train=True, transform=v2.Compose(prepare)),
        )
    folder = Path(spec.partition(":")[2])
    held_out = next((folder / part for part in ("val", "test") if (folder / part).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"data.path: {folder} must hold the folders train and val (or test), each with a folder per class "
            "(ImageNet: ILSVRC 2012 of https://image-net.org); data.path is below --data-root"
        )
    prepare = _prepare(size, channels, statistics)
    crops = [v2.RandomResizedCrop(size), *flips] if augment != "none" else []
    # The usual margin: 256 for 224.
    middle = [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)] if augment != "none" else []
    train_set = datasets.ImageFolder(str(folder / "train"), v2.Compose([*crops, *prepare]))
    test_set = datasets.ImageFolder(str(held_out), v2.Compose([*middle, *prepare]))
    if train_set.classes != test_set.classes:
        raise ValueError(f"{folder}: train and {held_out.name} do not hold the same classes")
    plain = datasets.ImageFolder(str(folder / "train"), test_set.transform)
    return Data(train_set, test_set, shape, len(train_set.classes), plain=plain)


def _prepare(size: int, channels: int, pixels: Pixels) -> list[v2.Transform]:
    if channels < len(pixels[0]):
        raise ValueError(f"colour images cannot be given to a model of {channels} channel(s)")
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Resize((size, size)),
        v2.Normalize(*pixels),
    ]


def _in_memory(
    images: torch.Tensor,
    targets: torch.Tensor,
    shape: tuple[int, int, int],
    pixels: Pixels,
) -> TensorDataset:
    """Small grey images, prepared once; a second and third channel are a view and cost no memory."""
    images = v2.Compose(_prepare(shape[1], shape[0], pixels)[1:])(images)
    return TensorDataset(images.expand(-1, *shape), targets)


def _unpack_debian_fashion_mnist(root: Path) -> None:
    """Put Debian's files where torchvision looks, unpacked as torchvision's own download does it."""
    raw = root / "FashionMNIST" / "raw"
    for archive in sorted(DEBIAN_FASHION_MNIST.glob("*.gz")):
        if not (raw / archive.stem).exists():
            raw.mkdir(parents=True, exist_ok=True)
            extract_archive(str(archive), str(raw))

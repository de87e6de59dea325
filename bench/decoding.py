"""Images a second that one core makes ready for training: `python -m bench.decoding`.

scikit-learn's two photographs as ImageNet has them on average, 500 x 375 pixels in JPEG, through `recipes.data`:
decoded by Pillow, cropped at random, resized to 224 x 224, flipped, normalised.
"""

import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from recipes import data

BATCHES, SIZE = 12, 64


def rate() -> tuple[float, float]:
    """Images a second of processor time, the best of BATCHES batches, and kilobytes of a file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            for name, pixels in zip("ab", load_sample_images().images, strict=True):
                Path(folder, split, name).mkdir(parents=True)
                photograph = Image.fromarray(pixels).resize((500, 375))
                for i in range(SIZE if split == "train" else 1):
                    photograph.save(Path(folder, split, name, f"{i}.jpg"), quality=95)
        files = list(Path(folder).rglob("*.jpg"))
        kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1e3
        batches = data.Batches(data.load(f"imagefolder:{folder}", "", 224, 3).train, SIZE, torch.Generator())
        seconds = []
        while len(seconds) < BATCHES:
            start = time.process_time()
            for _ in batches:
                seconds.append(time.process_time() - start)
                start = time.process_time()
    return SIZE / min(seconds), kilobytes


if __name__ == "__main__":
    print("{:.0f} images/s a core, JPEG files of {:.0f} kB".format(*rate()))

"""Philox4x32-10 against the known answers that Random123 publishes: reference, C++ header, and ops."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from bitwise import KEY, each_device, needs_native

from bioplaus_kernels.backends import reference
from bioplaus_kernels.backends.reference.philox import philox4x32

PI = "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0"
VECTORS = [  # counter and key, words
    ("00000000 " * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

PROGRAM = """
#include <stdio.h>
#include "philox.h"
int main() {
  unsigned c[4], k[2];
  while (scanf("%x %x %x %x %x %x", c, c + 1, c + 2, c + 3, k, k + 1) == 6) {
    const auto x = bioplaus::philox4x32_10(c[0], c[1], c[2], c[3], k[0], k[1]);
    printf("%08x %08x %08x %08x\\n", x.w[0], x.w[1], x.w[2], x.w[3]);
  }
}
"""


@pytest.mark.parametrize(("arguments", "words"), VECTORS)
def test_reference(arguments: str, words: str) -> None:
    c0, c1, c2, c3, k0, k1 = (torch.tensor(int(word, 16)) for word in arguments.split())
    assert " ".join(f"{w:08x}" for w in philox4x32((c0, c1, c2, c3), (k0, k1)).tolist()) == words


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_header(tmp_path: Path) -> None:
    """csrc/common/philox.h, by itself: an op cannot reach counters as high as the published ones."""
    source, program = tmp_path / "philox.cpp", tmp_path / "philox"
    source.write_text(PROGRAM)
    include = Path(__file__).resolve().parent.parent / "csrc" / "common"
    subprocess.run(["c++", "-std=c++17", "-I", include, source, "-o", program], check=True)
    inputs = "\n".join(arguments for arguments, _ in VECTORS)
    output = subprocess.run([program], input=inputs, check=True, capture_output=True, text=True).stdout
    assert output.splitlines() == [words for _, words in VECTORS]


@needs_native
@each_device
def test_layout(device: torch.device) -> None:
    """A row of seeded signs is Philox's words, bit for bit: counter (j // 128, i, stream), key as its two halves."""
    rows, calls = 3, 2
    b = torch.ops.bioplaus.feedback_weight(
        None, None, None, KEY.to(device), "constant", 1.0, [rows, 128 * calls], dtype=torch.float32
    )
    _, key, stream = (value % 2**64 for value in KEY.tolist())
    low, high = torch.tensor(key % 2**32), torch.tensor(key >> 32)
    for i in range(rows):
        for call in range(calls):
            counter = (call, i, stream % 2**32, stream >> 32)
            words = philox4x32(tuple(map(torch.tensor, counter)), (low, high))
            negative = (words[:, None] >> torch.arange(32)) & 1
            assert torch.equal(b[i, 128 * call : 128 * (call + 1)].cpu(), 1.0 - 2 * negative.flatten())


@needs_native
@each_device
def test_zeros_vector_through_the_op(device: torch.device) -> None:
    """Layer key 0, stream 0, first row: the first known answer is the first row's sign words."""
    key = torch.tensor([1, 0, 0], device=device)
    b = torch.ops.bioplaus.feedback_weight(None, None, None, key, "constant", 1.0, [1, 128], dtype=torch.float32)
    signs = torch.ops.bioplaus.pack_signs(b)
    assert " ".join(f"{w % 2**32:08x}" for w in signs[0].tolist()) == VECTORS[0][1]


def test_draws_are_uniform_and_normal() -> None:
    """Moments of 10⁵ draws, within five standard errors."""
    n = 100_000
    arguments = (None, None, None, KEY)
    u = reference.feedback_weight(*arguments, "uniform", 1.0, [100, n // 100], dtype=torch.float64)
    assert u.min() >= -1
    assert u.max() < 1
    assert abs(u.mean()) < 5 / (3 * n) ** 0.5
    assert abs(u.var() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    z = reference.feedback_weight(*arguments, "normal", 1.0, [100, n // 100], dtype=torch.float64)
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5

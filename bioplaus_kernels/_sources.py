"""What the native library is built from, in one word: setup.py gives it to the build, the report compares."""

import hashlib
from pathlib import Path


def digest(root: Path) -> str:
    """Of the names and contents of the native sources in `root`; empty where there are none."""
    files = sorted(root.glob("csrc/**/*.[ch]*"))
    if not files:
        return ""
    found = hashlib.sha256()
    for path in (root / "CMakeLists.txt", *files):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]

"""How is a file written so that a process killed at any moment leaves the old one or the new one?"""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes | memoryview, *, is_shared: bool = False) -> None:
    """Write a file beside its place and move it there; folders that are missing are made.

    Args:
        path: Its place.
        content: Text is written as UTF-8.
        is_shared: Whether several processes may write this file at once. What a killed one leaves beside it is then
            not written over by the next.

    Raises:
        OSError: The folder or the disk does not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part" if is_shared else f".{path.name}.part")
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

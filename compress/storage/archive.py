"""One file for one entry of a store, to send to another host.

    compress-entry 1 KEY DIGEST    one line; DIGEST is the SHA-256 of everything that follows
    tar                            entry.json, then the other files

The digest is checked before anything is unpacked. It reveals damage and exchanged files; it is no signature.
"""

import hashlib
import re
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

from compress.storage.digest import RecordDamaged, check_digest, parse_json
from compress.storage.store import ENTRY_FILE

_MAGIC = "compress-entry 1"
_CHUNK_BYTES = 1 << 20
_MOST_RECORD_BYTES = 1 << 28
_ZEROS = "0" * 64


def pack(folder: Path, key: str, path: Path) -> None:
    """Write the entry in a folder to one file; the same entry always gives the same bytes.

    Raises:
        OSError: The disk is full, or a file has gone.
    """
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    names.sort(key=lambda name: name != ENTRY_FILE)  # its record can be read without the rest
    with path.open("w+b") as stream:
        stream.write(_header(key, _ZEROS))
        body = _Hashed(stream)
        with tarfile.open(fileobj=body, mode="w|", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = (folder / name).stat().st_size
                with (folder / name).open("rb") as source:
                    archive.addfile(info, source)
        stream.seek(0)
        stream.write(_header(key, body.digest.hexdigest()))


def unpack(path: Path, key: str, folder: Path) -> None:
    """Write the files of an entry into an empty folder, after a check of the digest.

    Raises:
        RecordDamaged: The file is damaged, incomplete, of another key, or names files outside of the folder.
        OSError: The disk is full.
    """
    with path.open("rb") as stream:
        expected = _read_header(stream, key)
        start = stream.tell()
        digest = hashlib.sha256()
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
        if digest.hexdigest() != expected:
            raise RecordDamaged(f"its content has SHA-256 {digest.hexdigest()[:12]}, its first line {expected[:12]}")
        stream.seek(start)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    _extract(archive, member, folder)
        except (tarfile.TarError, ValueError) as error:
            raise RecordDamaged(f"it is no readable tar archive ({error})") from error


def read_record(stream: IO[bytes], key: str) -> dict[str, Any]:
    """Return the record of an entry, entry.json, from the beginning of its file.

    Raises:
        RecordDamaged: The beginning is damaged, or of another key.
    """
    _read_header(stream, key)
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            member = archive.next()
            source = archive.extractfile(member) if member is not None and member.isreg() else None
            if member is None or source is None or member.name != ENTRY_FILE or member.size > _MOST_RECORD_BYTES:
                raise RecordDamaged(f"its first file is not {ENTRY_FILE}")
            return check_digest(parse_json(source.read(), ENTRY_FILE, allows_nan=True), ENTRY_FILE)
    except (tarfile.TarError, ValueError) as error:
        raise RecordDamaged(f"it is no readable tar archive ({error})") from error


def is_safe_name(name: str) -> bool:
    """Return whether a name of a file stays inside of any folder, on all systems.

    >>> is_safe_name("slim/weights.safetensors"), is_safe_name("../x"), is_safe_name("/x"), is_safe_name("C:x")
    (True, False, False, False)
    """
    path = PurePosixPath(name)
    is_plain = path.as_posix() == name and not any(character in name for character in "\\:\0")
    return is_plain and not path.is_absolute() and name != "." and ".." not in path.parts


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    if not member.isreg() or not is_safe_name(member.name):
        raise RecordDamaged(f"'{member.name[:200]}' in it must be a plain file inside of the entry")
    source, target = archive.extractfile(member), folder / member.name
    if source is None or target.exists():
        raise RecordDamaged(f"'{member.name[:200]}' stands in it twice")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as stream:
        shutil.copyfileobj(source, stream, _CHUNK_BYTES)


def _header(key: str, digest: str) -> bytes:
    return f"{_MAGIC} {key} {digest}\n".encode("ascii")


def _read_header(stream: IO[bytes], key: str) -> str:
    """Return the digest in the first line."""
    line = stream.read(len(_header(key, _ZEROS)))
    digest = line[-len(_ZEROS) - 1 : -1].decode("ascii", errors="replace")
    if not re.fullmatch("[0-9a-f]{64}", digest) or line != _header(key, digest):
        raise RecordDamaged(f"its first line must be '{_MAGIC} {key[:12]}... DIGEST'")
    return digest


class _Hashed:
    """Binary file that can only be written to, with the digest of what was written."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self._stream = stream

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._stream.write(content)

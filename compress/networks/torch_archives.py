"""Tensors of TorchScript archives and torch.export programs, read from the zip file as data.

    TorchScript    NAME/data.pkl (objects, by class)  NAME/data/0 ... (bytes)  NAME/code/*.py (names of weights)
    torch.export   NAME/data/weights/model_weights_config.json  NAME/data/weights/weight_0 ... (bytes)

torch's own loaders would compile the code in the file, or unpickle any object. Here the objects of a TorchScript
archive become records with attributes, whatever their class. Other names in its pickle are refused, except those of
tensors, storages and lists. From the code, only the two lists that name parameters and buffers are read, as text.
"""

import io
import json
import pickle  # noqa: TID251 - an unpickler that finds no class but the records below
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError, translated

_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_SCALARS = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_EXPORTED, _OLDER = "data/weights/model_weights_config.json", ("data/weights/model.pt", "serialized_state_dict.pt")
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
_LARGEST_TEXT = 16_000_000  # bytes
_HINT = "Load it where it was made and save `model.state_dict()` with safetensors."


def read_archive(path: Path) -> dict[str, Tensor] | None:
    """Return the parameters and buffers of a TorchScript archive or a torch.export program by name.

    Returns:
        None for any other file, such as an ordinary checkpoint.

    Raises:
        ArtifactError: The archive is damaged, names paths outside of itself, or its weights cannot be read as data.
    """
    with translated(
        lambda error: ArtifactError(
            f"'{path}' is no readable archive of a network, got {type(error).__name__}: {str(error)[:200]}"
        )
    ):
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            members = _Members(archive, path)
            if members.find(_EXPORTED) is not None:
                return dict(_exported(members))
            for name in _OLDER:
                if members.find(name) is not None:
                    return _older_export(members, name)
            if members.find("data.pkl") is not None and members.find("constants.pkl") is not None:
                return dict(_scripted(members))
            if any(
                name.endswith((".so", "_metadata.json", "serialized_exported_program.json")) for name in members.names
            ):
                raise ArtifactError(f"'{path}' holds a compiled program and no weights under names.", hint=_HINT)
    return None


class _Members:
    """Files of an archive, by their names within its single top folder."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path = archive, path
        self.names: dict[str, zipfile.ZipInfo] = {}
        for entry in archive.infolist():
            place = PurePosixPath(entry.filename.replace("\\", "/"))
            if place.is_absolute() or ".." in place.parts or ":" in place.parts[0]:
                raise ArtifactError(f"'{path}' must hold files of its own only, it names '{entry.filename}'.")
            self.names["/".join(place.parts[1:]) if len(place.parts) > 1 else place.name] = entry

    def find(self, name: str) -> zipfile.ZipInfo | None:
        return self.names.get(name)

    def read(self, name: str) -> bytes:
        entry = self.find(name)
        if entry is None:
            raise ArtifactError(f"'{self.path}' must hold '{name}', it is missing.")
        if entry.compress_type != zipfile.ZIP_STORED and entry.file_size > _LARGEST_TEXT:
            raise ArtifactError(  # torch compresses code only: a small file could unpack to more than fits in memory
                f"'{self.path}' must be as torch wrote it, '{name}' is compressed and {entry.file_size:,} bytes long."
            )
        return self.archive.read(entry)

    def check_byte_order(self) -> None:
        said = self.read("byteorder").decode() if self.find("byteorder") else "little"
        if said != sys.byteorder:
            raise ArtifactError(f"'{self.path}' must have {sys.byteorder}-endian numbers, it has {said}-endian ones.")


def _exported(members: _Members) -> Iterator[tuple[str, Tensor]]:
    members.check_byte_order()
    folder = _EXPORTED.rpartition("/")[0]
    for name, entry in json.loads(members.read(_EXPORTED))["config"].items():
        place = str(entry["path_name"])
        if PurePosixPath(place).name != place:
            raise ArtifactError(f"'{members.path}' must hold files of its own only, weight '{name}' is in '{place}'.")
        data, meta = members.read(f"{folder}/{place}"), entry["tensor_meta"]
        if entry.get("use_pickle"):
            yield name, torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
            continue
        if meta["dtype"] not in _SCALARS:
            raise ArtifactError(f"Weight '{name}' in '{members.path}' has a dtype that is not supported.", hint=_HINT)
        sizes, strides = ([int(one["as_int"]) for one in meta[key]] for key in ("sizes", "strides"))
        yield name, _tensor(data, _SCALARS[meta["dtype"]], sizes, strides, int(meta["storage_offset"]["as_int"]))


def _older_export(members: _Members, name: str) -> dict[str, Tensor]:
    state = torch.load(io.BytesIO(members.read(name)), weights_only=True, map_location="cpu")
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArtifactError(f"'{members.path}' must hold a state dict in '{name}', it does not.", hint=_HINT)
    return {str(key): value for key, value in state.items()}


def _scripted(members: _Members) -> Iterator[tuple[str, Tensor]]:
    members.check_byte_order()
    root = _Reader(members).load()
    if not isinstance(root, _Record):
        raise ArtifactError(f"'{members.path}' must hold a scripted network, it holds something else.")
    found = dict(_weights(root, "", members, ()))
    if not found:
        raise ArtifactError(
            f"'{members.path}' holds no weights under names: a frozen network keeps them as constants of its code.",
            hint=_HINT,
        )
    yield from found.items()


def _weights(record: "_Record", prefix: str, members: _Members, above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a record and of the records inside it, named as in a state dict."""
    if id(record) in above:
        raise ArtifactError(f"'{members.path}' must hold a tree of modules, '{prefix}' lies within itself.")
    listed = _declared(record.kind, members)
    for name, value in record.attributes.items():
        if isinstance(value, Tensor) and name in listed:
            yield f"{prefix}{name}", value
        elif isinstance(value, _Record):
            yield from _weights(value, f"{prefix}{name}.", members, (*above, id(record)))


def _declared(kind: str, members: _Members) -> set[str]:
    """Return the attributes of a scripted class that its code declares as parameters or buffers."""
    place, _, name = kind.rpartition(".")
    code = members.read(f"code/{place.replace('.', '/')}.py").decode()
    body = re.search(rf"^class {re.escape(name)}\(Module\):\n((?:  .*\n?|\n)*)", code, re.MULTILINE)
    lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", body.group(1), re.MULTILINE) if body else []
    return {found for text in lists for found in re.findall(r'"([^"]*)"', text)}


class _Record:
    """Attributes of an object of a scripted class, without its code."""

    kind = ""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __new__(cls, *_: object) -> "_Record":
        record = super().__new__(cls)
        record.attributes = {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.attributes = dict(state) if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    """Unpickler of `data.pkl` that only creates records, tensors and lists."""

    def __init__(self, members: _Members) -> None:
        super().__init__(io.BytesIO(members.read("data.pkl")))
        self.members = members

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name; raise ArtifactError for a name that would run code."""
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Record,), {"kind": f"{module}.{name}"})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle" and name in _LISTS:
            return _first
        raise ArtifactError(
            f"Weights file '{self.members.path}' was refused: reading it could run code ({module}.{name}).", hint=_HINT
        )

    def persistent_load(self, found: Any) -> tuple[bytes, torch.dtype]:
        """Return the bytes of a storage and their dtype."""
        _, dtype, key, *_ = found
        return self.members.read(f"data/{key}"), dtype


def _rebuild(storage: tuple[bytes, torch.dtype], offset: int, sizes: Any, strides: Any, *_: object) -> Tensor:
    return _tensor(*storage, list(sizes), list(strides), offset)


def _first(value: object, *_: object) -> object:
    return value


def _tensor(data: bytes, dtype: torch.dtype, sizes: list[int], strides: list[int], offset: int) -> Tensor:
    """Return a new tensor; torch raises when there are too few bytes."""
    if not data:
        return torch.empty(sizes, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).as_strided(sizes, strides, offset).clone().contiguous()

"""`SafeReader`, `SafePlanner`: distributed checkpoints that are read without running what they say.

torch.distributed.checkpoint unpickles its `.metadata` and what is no tensor, and a pickle may call any
function. Here it may name the classes that such files are made of, and nothing else.
"""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *(
        (_METADATA, name)
        for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")
    ),
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class SafeReader(FileSystemReader):
    """Reads a checkpoint whose metadata name nothing but what they are made of, and files beside them."""

    def read_metadata(self, *_: Any, **options: Any) -> Metadata:
        """What the checkpoint holds.

        Raises:
            UnpicklingError: the file names something else, such as a function to be called.
        """
        with self.fs.create_stream(self._get_metadata_path(options.get("rank")), "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        for info in metadata.storage_data.values():
            file_name = info.relative_path
            if type(file_name) is not str or PurePath(file_name).name != file_name:
                raise pickle.UnpicklingError(f"it reads {file_name}, elsewhere")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafePlanner(DefaultLoadPlanner):
    """Reads numbers, strings and containers of them, where a checkpoint holds no tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Reads one entry.

        Raises:
            UnpicklingError: it is something else.
        """
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib":  # of the folder it was written to
            return _path
        # Some Pythons write members of an enum as calls of `getattr`.
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _KNOWN and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _path(*parts: str) -> str:
    return "/".join(parts)


def _member(kind: Any, name: str) -> Enum:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"it names {name} of {kind}, which no checkpoint needs")
    return kind[name]

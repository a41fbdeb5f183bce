"""Tensors and texts in one safetensors file, with a digest of both: a bit that changed on the way is noticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, uint8

from ptq4vit_fx.errors import foreign, quoted
from ptq4vit_fx.files import check_readable
from ptq4vit_fx.inputs.records import Place

DIGEST = "digest"


@dataclass(frozen=True)
class TensorFile:
    """What such a file holds. sealed: whether it has a digest, which is the right one; files of before have none."""

    tensors: dict[str, Tensor]
    texts: dict[str, str]
    sealed: bool


def sealed(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """Return the content of a file with these tensors, of any shapes, and these texts, one of them `format`."""
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(owned, {**texts, DIGEST: digest_of(owned, texts)})


def read_sealed(path: str | os.PathLike[str], place: Place) -> TensorFile:
    """Read a file of `sealed`; raises PTQError if it is missing, something else, or not what was written."""
    expected = "a safetensors file written by Calibration.save"
    readable = check_readable(path, place.operation, expected)
    with foreign(place.operation, place.subject, expected=expected, do=place.do), safe_open(readable, "pt") as file:
        texts = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    digest = texts.pop(DIGEST, None)
    if digest is not None and digest != digest_of(tensors, texts):
        raise place.refusal("what was saved", f"other content than that with the digest {quoted(digest)}")
    return TensorFile(tensors, texts, digest is not None)


def digest_of(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """Return a hash of names, dtypes, shapes and bytes of tensors, and of texts by name; their order plays no part."""
    contents = {
        name: (str(x.dtype), tuple(x.shape), hashlib.sha256(bytes_of(x)).hexdigest()) for name, x in tensors.items()
    }
    return hashlib.sha256(json.dumps([contents, dict(texts)], sort_keys=True).encode()).hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor of any dtype, in the order of its elements."""
    return tensor.detach().cpu().resolve_neg().contiguous().reshape(-1).view(uint8).numpy().tobytes()

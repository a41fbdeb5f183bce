"""Checkpoints that were made to harm, or came to harm: weights, or one sentence that names the file."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

import ptq4vit_fx as ptq
from ptq4vit_fx.tools.checkpoints import load_weights
from ptq4vit_fx.tools.named.kinds import load_model
from ptq4vit_fx.tools.named.model import Asked


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


STATE = model().state_dict()
GOOD = save(STATE)
HEADER = json.loads(GOOD[8 : 8 + struct.unpack("<Q", GOOD[:8])[0]])


def safetensors(header: Any, content: bytes = bytes(400), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def entry(**changes: Any) -> bytes:
    return safetensors(HEADER | {"0.weight": HEADER["0.weight"] | changes})


def saved(content: Any, **options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, **options)


def archive(*files: tuple[str, bytes], kind: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", kind) as file:
            for name, content in files:
                file.writestr(name, content)

    return write


def holding_itself() -> dict[str, Any]:
    whole: dict[str, Any] = {}
    whole |= {str(number): whole for number in range(20)}
    return whole


class Runs:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(GOOD)
        file.truncate(2**43)


def cut_archive(path: Path) -> None:
    archive(("a/data.pkl", b"x" * 999))(path)
    os.truncate(path, 500)


GLOBAL = b"\x80\x02cos\nsystem\nX\x0e\0\0\0mkdir executedq\0\x85R."
FILES: dict[str, bytes | Callable[[Path], None]] = {
    "a header of 2^63 bytes": safetensors(b"{}", length=2**63),
    "a header longer than the file": safetensors(b"{}", length=10**6),
    "no JSON": safetensors(b"{no"),
    "a list": safetensors([]),
    "brackets": safetensors(b"{" + b'"a":[' * 50_000),
    "a key twice": safetensors(json.dumps(HEADER)[:-1].encode() + b"," + json.dumps(HEADER)[1:].encode()),
    "another type": entry(dtype="F99"),
    "integers": entry(dtype="I32"),
    "another shape": entry(shape=[2, 8]),
    "a shape of 2^62": entry(shape=[2**62, 2**62]),
    "a negative shape": entry(shape=[-4, -4]),
    "offsets backwards": entry(data_offsets=[64, 0]),
    "offsets outside": entry(data_offsets=[0, 2**40]),
    "8 TB of nothing": sparse,
    **{f"cut at {place}": GOOD[:place] for place in (1, 7, 8, 9, 50, len(GOOD) - 1)},
    "a pickle": pickle.dumps({"0.weight": 1}),
    "a pickle that runs": GLOBAL,
    "a pickle in an archive": archive(("a/data.pkl", GLOBAL), ("a/version", b"3")),
    "an object that runs": saved(Runs()),
    "an object that runs beside weights": saved({"state": STATE, "args": Runs()}),
    "the old format that runs": saved({"args": Runs()}, _use_new_zipfile_serialization=False),
    "brackets in a pickle": b"\x80\x02" + b"]" * 50_000 + b"a" * 50_000 + b".",
    "an archive of nothing": archive(),
    "an archive that is cut": cut_archive,
    "an archive that lies": b"PK\3\4" + bytes(50) + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 2**31, 2**31, 0),
    "a bomb": archive(("a/data.pkl", bytes(10**8)), kind=zipfile.ZIP_DEFLATED),
    "a mapping that holds itself": saved(holding_itself()),
    "sparse weights": saved({key: x.to_sparse() for key, x in STATE.items()}),
    "meta weights": saved({key: x.to("meta") for key, x in STATE.items()}),
    "complex weights": saved({key: x.to(torch.complex64) for key, x in STATE.items()}),
    "weights of 1e12 values": saved({key: torch.zeros(1).expand(10**12) for key in STATE}),
    "text as weights": saved(dict.fromkeys(STATE, "\x1b[31m")),
    "numbers as keys": saved({1: STATE["0.weight"], None: STATE["0.weight"]}),
    "text": b"no\n" * 99,
    "random bytes": np.random.default_rng(0).bytes(999),
    "a pipe": os.mkfifo,
    "a circle": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", FILES)
def test_weights_or_one_sentence_and_nothing_runs(tmp_path, monkeypatch, name, suffix):
    monkeypatch.chdir(tmp_path)
    path, made = tmp_path / f"weights{suffix}", FILES[name]
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        made(path)
    network = model()
    with pytest.raises(ptq.PTQError, match=r"^load weights: .*/weights\.[a-z]+: ") as refused:
        load_weights(network, path)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1500
    assert "weights_only" not in str(refused.value)  # torch's advice to load it all the same
    assert all(torch.equal(x, STATE[key]) for key, x in network.state_dict().items())
    assert not (tmp_path / "executed").exists()


def test_names_are_no_places_to_load_code_from(tmp_path):
    config = {"architecture": "vit_tiny_patch16_224", "auto_map": {"AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit")
    for name in (f"local-dir:{tmp_path}", f"hf-hub:{tmp_path}", str(tmp_path)):
        with pytest.raises(ptq.PTQError, match=r"create model: .*expected a model with its weights"):
            load_model(Asked(name))
    with pytest.raises(ptq.PTQError, match=r"got a folder; pass the \.safetensors or \.pth file in it"):
        load_weights(model(), tmp_path)


@pytest.mark.parametrize("brackets", [10**3, 10**5])
def test_an_argument_of_brackets_is_text(brackets):
    with pytest.raises(ptq.PTQError, match="create model"):
        load_model(Asked("vit_tiny_patch16_224", Path("none"), arguments=(f"img_size={'[' * brackets}",)))

"""The C++ program of docs/deploy.md: compiled, and run on a file."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import ptq4vit_fx as ptq

PAGE = Path(__file__).resolve().parents[1] / "docs" / "deploy.md"


def test_it_gives_what_openvino_gives_in_python(small_converted, small_images, tmp_path):
    openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    from ptq4vit_fx.export.proof.openvino_runtime import compile_openvino

    home = Path(openvino.__file__).parent
    libraries = sorted(home.glob("libs/libopenvino.so.*"))
    if shutil.which("g++") is None or not (home / "include").is_dir() or not libraries:
        pytest.skip("no g++, or a wheel of OpenVINO without headers")
    (source,) = re.findall(r'```cpp title="classify.cpp"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    assert "{1, 3, 224, 224}" in source
    (tmp_path / "classify.cpp").write_text(source.replace("224, 224", "16, 16"))
    command = ["g++", "-std=c++17", "classify.cpp", "-o", "classify", f"-I{home / 'include'}", str(libraries[0])]
    subprocess.run([*command, f"-Wl,-rpath,{home / 'libs'}"], cwd=tmp_path, check=True)
    ptq.export_onnx(small_converted, tmp_path / "m.onnx", small_images[:1], target="openvino")
    image = small_images[:1].numpy()
    run = subprocess.run(["./classify", "m.onnx"], cwd=tmp_path, input=image.tobytes(), capture_output=True, check=True)
    expected = compile_openvino(tmp_path / "m.onnx")(image)[0]
    np.testing.assert_array_equal(np.array(run.stdout.split(), np.float32), expected.ravel())
    cut = subprocess.run(["./classify", "m.onnx"], cwd=tmp_path, input=image.tobytes()[:-4], check=False)
    assert cut.returncode == 1

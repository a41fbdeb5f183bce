"""Models of the user's own Python, `path/to/file.py:Class` and `package.module:function`: that code is run."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ptq4vit_fx.data.preprocessing import data_config
from ptq4vit_fx.errors import PTQError, failure, near_names, reason_of
from ptq4vit_fx.files import not_a_file
from ptq4vit_fx.tools.models import parse_arguments
from ptq4vit_fx.tools.named.model import CREATE, Asked, NamedModel, guessed_preprocessing, with_weights

#: Folders of code that is not the user's: its lines say nothing to him.
OTHERS = tuple(
    os.path.realpath(path)
    for path in (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(Path(__file__).parents[2]))
    if path
)
ADVICE = "give the model a dict `pretrained_cfg` with mean, std and input_size if it was trained otherwise"


def load_python(asked: Asked) -> NamedModel:
    """Return what a class or function of the user's makes of --model-arg, or the nn.Module of that name.

    Its preprocessing is what its `pretrained_cfg` says, in timm's form; else ImageNet's, with a warning. Raises
    PTQError if there is no such file or name (with near ones), and with the line of the user's code where that raises.
    """
    place, name = _parts(asked.name)
    arguments = parse_arguments(asked.arguments)
    with _of_the_user(asked.name, f"fix it, or check {place}"):
        module = _imported(place)
    maker = _named(module, name, asked.name)
    if isinstance(maker, nn.Module):
        if arguments:
            do = "leave it out, or name the class"
            raise failure(CREATE, asked.name, expected="a class or function with --model-arg", got="a model", do=do)
        network: Any = maker
    else:
        with _of_the_user(asked.name, "check --model-arg, or what it does with them"):
            network = maker(**arguments)
    if not isinstance(network, nn.Module):
        do = "return the model from it"
        raise failure(CREATE, asked.name, expected="an nn.Module", got=f"a {type(network).__name__}", do=do)
    said = with_weights(network, asked)
    if asked.weights is None and asked.pretrained:
        said = (*said, f"weights: as {asked.name} makes them")
    config = getattr(network, "pretrained_cfg", None)
    known = isinstance(config, dict) and {"mean", "std"} <= config.keys()
    prepared = data_config(network) if known else guessed_preprocessing(network, asked.name, ADVICE)
    return NamedModel(network.eval(), prepared, None, None, said)


def _parts(name: str) -> tuple[str, str]:
    """Return the file or module, and the name in it; raises PTQError if one is missing."""
    before, _, after = name.rpartition(":")
    if before and after:
        return before, after
    path = before or name
    names = _defined(Path(path)) if not not_a_file(path) else []
    do = f"write {path}:{names[0] if names else 'Class'}"
    raise failure(CREATE, name, expected="file.py:Class", got="no name of a class or function", do=do)


def _defined(path: Path) -> list[str]:
    """Return the classes and functions of a file, which is not run; [] of one that is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return []
    kinds = (ast.ClassDef, ast.FunctionDef)
    return sorted((n.name for n in tree.body if isinstance(n, kinds)), key=lambda name: name[0].islower())


def _imported(place: str) -> ModuleType:
    """Return a file or a module as Python imports it, with its folder, or the working one, in sys.path."""
    if not place.endswith(".py"):
        _search_in(os.getcwd())
        return importlib.import_module(place)
    path = Path(place).expanduser()
    other = not_a_file(path)
    if other:
        beside = sorted(str(path.parent / inner.name) for inner in path.parent.glob("*.py"))
        do = f"did you mean {near_names(str(path), beside, 1)}?" if beside else "check the path"
        raise failure(CREATE, place, expected="a file of Python", got=other, do=do)
    _search_in(str(path.resolve().parent))
    name = f"ptq4vit_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _search_in(folder: str) -> None:
    """Let Python find what stands beside the user's file, behind everything that is installed."""
    if folder not in sys.path:
        sys.path.append(folder)


def _named(module: ModuleType, path: str, name: str) -> Any:
    """Return what a module calls by a name, with dots within; raises PTQError unless that makes or is a model."""
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            made = [one for one, x in vars(found).items() if callable(x) and not one.startswith("_")]
            own = [one for one in made if getattr(vars(found)[one], "__module__", "") == module.__name__]
            do = f"did you mean {near_names(part, own or made, 3)}?"
            raise failure(CREATE, name, expected=f"a class or function {part} in it", got="no such name", do=do)
        found = getattr(found, part)
    if not callable(found):
        do = "name a class, a function or a model"
        raise failure(CREATE, name, expected="what makes a model", got=f"a {type(found).__name__}", do=do)
    return found


@contextlib.contextmanager
def _of_the_user(name: str, do: str) -> Iterator[None]:
    """Turn what the user's code raises into one sentence with its line; what it prints goes to standard error."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except PTQError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_of(error)
        got = f"{reason_of(error)}{f' in {line}' * bool(line)}"
        raise failure(CREATE, name, expected="code that makes a model", got=got, do=do) from error


def _line_of(error: BaseException) -> str:
    """Return `file.py, line 3` of the innermost line that is the user's, "" if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{os.path.basename(error.filename)}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not os.path.realpath(frame.filename).startswith(OTHERS)]
    return f"{os.path.basename(own[-1].filename)}, line {own[-1].lineno}" if own else ""

"""The layers of a command line as plain data: ``--config`` files and ``--key=value`` options, in order."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader


class ConfigError(Exception):
    """A configuration that cannot work; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One configuration source: nested plain data, and what to call it in a message."""

    origin: str
    tree: dict[str, Any]
    is_option: bool = False


def read_layers(args: Sequence[str]) -> list[Layer]:
    """The layers of a command line after its subcommand: ``--config FILE`` and ``--key=value``, in order.

    Raises:
        ConfigError: If a file is missing, is not YAML, or does not hold a mapping.
    """
    layers: list[Layer] = []
    position = 0
    while position < len(args):
        token = args[position]
        position += 1
        if not token.startswith("-"):
            raise ConfigError(f"'{token}' stands alone on the command line; options are written --key=value.")
        key, equals, value = token.partition("=")
        if key in ("-h", "--help", "--print_config") or key.endswith(".help"):
            position += not equals and position < len(args) and not args[position].startswith("-")
            continue
        if not equals:
            if position >= len(args):
                raise ConfigError(f"{key} needs a value.")
            value = args[position]
            position += 1
        layers.append(_file_layer(value) if key in ("-c", "--config") else _option_layer(key, value))
    return layers


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """The layers as one tree, later ones over earlier ones, for those who read settings without building anything.

    Arguments of a class are under ``init_args`` wherever they were given, and the words of options are what YAML takes them for.
    """
    tree: dict[str, Any] = {}
    for layer in layers:
        given = _read_words(layer.tree) if layer.is_option else layer.tree
        _merge(tree, {key: _with_init_args(key, value) for key, value in given.items()})
    return tree


def _read_words(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read_words(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    try:
        read = get_loader("yaml")(value)
    except yaml.YAMLError:  # a text, such as a template
        return value
    return value if isinstance(read, dict | list) else read


def _with_init_args(key: str, value: Any) -> Any:
    if key not in ("model", "data") or not isinstance(value, dict):
        return {"class_path": value} if key in ("model", "data") and isinstance(value, str) else value
    loose = {name: item for name, item in value.items() if name not in ("class_path", "init_args")}
    kept = {"class_path": value["class_path"]} if "class_path" in value else {}
    return kept | {"init_args": {**(value.get("init_args") or {}), **loose}}


def texts(value: Any) -> Iterator[str]:
    """Every text in nested plain data that is not a key."""
    if isinstance(value, str):
        yield value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for item in items:
        yield from texts(item)


def _merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)


def config_files(args: Sequence[str]) -> list[str]:
    """The values of ``--config`` on a command line, in order."""
    files = [token.partition("=")[2] for token in args if token.startswith(("--config=", "-c="))]
    return files or [following for token, following in itertools.pairwise(args) if token in ("--config", "-c")]


def _file_layer(name: str) -> Layer:
    path = Path(name)
    inline = name.lstrip().startswith("{") and not path.is_file()
    if not inline and not path.is_file():
        there = sorted(str(file) for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        everywhere = there or sorted(str(file) for file in Path("configs").rglob("*.y*ml"))
        raise ConfigError(f"There is no config file '{name}'{closest(name, everywhere)}.")
    origin = "--config" if inline else name
    try:
        tree = get_loader("yaml")(name if inline else path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{line} is not YAML: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{origin} is not YAML: {one_line(error)}.") from error
    if not isinstance(tree, dict) and tree:
        raise ConfigError(f"{origin} holds {show(tree)}, but a config is a mapping with keys such as model, data and trainer.")
    return Layer(origin, tree if isinstance(tree, dict) else {})


def _option_layer(key: str, text: str) -> Layer:
    value: Any = text
    if text.lstrip()[:1] in ("{", "["):
        try:
            value = get_loader("yaml")(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: {key.lstrip('-')} is not valid YAML or JSON: {text}.") from error
    if key.lstrip("-") in ("model", "data", "trainer") and Path(text).is_file():
        value = _file_layer(text).tree
    for part in reversed(key.lstrip("-").split(".")):
        value = {part: value}
    return Layer("command line", value, is_option=True)


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: the closest known name, or all of them when they are few; empty otherwise."""
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6) or get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if close:
        return f"; the closest is '{close[0]}'"
    return f"; there are {', '.join(sorted(known))}" if 0 < len(known) <= 30 else ""


def show(value: Any) -> str:
    """A value as JSON writes it, cut to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(error: BaseException) -> str:
    """An exception's type and message without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")

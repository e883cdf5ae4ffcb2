"""Read a command line before the parser does, and say what is wrong with it in one sentence.

jsonargparse decides what a configuration means. But where it finds fault it reports every member of a union that did not match, and
an import error not at all. So the layers (YAML files and ``--key=value`` options, in order) are walked first, with the same signatures,
and the first class, key or value that cannot work is named with where it stands and the closest thing that would work.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.pytorch import LightningModule

from theodolite.config_layers import ConfigError, Layer, closest, one_line, show

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


@dataclass
class Checker:
    """Walks layers in order and remembers which class each key holds.

    Args:
        roots: Base class by key, for keys that hold an instance given by ``class_path`` (``model``, ``data``).
        groups: Class by key, for keys that hold one class's own arguments (``trainer``).
        plain: Type by key, for the other top-level keys.
        bases: Base class of dotted keys whose annotation does not say it (``trainer.callbacks``).
        choices: Names allowed where the annotation says no more than ``str``, by dotted key.
        parts: Class or protocol of arguments that take an instance as plain data, ``{class_path, init_args}``, by the class that takes them
            and their name; classes by full name, since a config of another study need not import them.
        classes: Found so far: the class at each key; list entries are numbered (``trainer.callbacks[0]``).
        given: Found so far: the arguments that some layer sets, by the same keys.
        last: Found so far: the last entry of each list, which options without an index edit.
    """

    roots: Mapping[str, type]
    groups: Mapping[str, type]
    plain: Mapping[str, Any]
    bases: Mapping[str, type] = field(default_factory=dict)
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    parts: Mapping[tuple[str, str], str] = field(default_factory=dict)
    classes: dict[str, type] = field(default_factory=dict)
    given: dict[str, set[str]] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)

    def check(self, layers: Iterable[Layer]) -> None:
        """Raise :class:`ConfigError` at the first thing that cannot work, in the order of the layers."""
        for layer in layers:
            for raw_key, value in layer.tree.items():
                self._top(str(raw_key), value, layer)
        for key in self.classes:
            self._required(key)

    def _top(self, raw_key: str, value: Any, layer: Layer) -> None:
        key = raw_key.removesuffix("+")
        known = [*self.roots, *self.groups, *self.plain]
        if key not in known:
            raise ConfigError(f"{layer.origin}: there is no option '{key}'{closest(key, known)}.")
        if key in self.roots:
            self._instance(key, value, self.roots[key], layer)
        elif key in self.groups:
            if value is not None:
                self._arguments(key, value, self.groups[key], layer)
        else:
            self._value(key, value, self.plain[key], layer)

    def _arguments(self, key: str, values: Any, owner: type, layer: Layer) -> None:
        """The arguments of a class whose name is known."""
        if not isinstance(values, dict):
            raise ConfigError(f"{layer.origin}: {key} is {show(values)}, but {owner.__name__} takes named arguments here.")
        types = accepted(owner)
        for raw_name, value in values.items():
            name = str(raw_name).removesuffix("+")
            if name not in types:
                raise ConfigError(f"{layer.origin}: {owner.__name__} has no argument '{name}' (at {key}){closest(name, types)}.")
            self.given.setdefault(key, set()).add(name)
            if f"{key}.{name}" in self.bases and isinstance(value, list) and not str(raw_name).endswith("+"):
                self._forget(f"{key}.{name}[")
            part = self._part(owner, name)
            if part is not None and isinstance(value, dict):
                self._instance(f"{key}.{name}", value, part, layer)
            else:
                self._any(f"{key}.{name}", value, types[name], layer)

    def _part(self, owner: type, name: str) -> type | None:
        """What an argument's ``class_path`` must name, where its annotation does not say it."""
        takers = [full_name(parent) for parent in owner.__mro__]
        bases = [base for (taker, argument), base in self.parts.items() if argument == name and taker in takers]
        return _import_class(bases[0], object, name) if bases else None

    def _forget(self, prefix: str) -> None:
        """A list that is given anew replaces what earlier layers put there."""
        self.classes = {key: owner for key, owner in self.classes.items() if not key.startswith(prefix)}
        self.given = {key: names for key, names in self.given.items() if not key.startswith(prefix)}

    def _entry(self, key: str, is_new: bool) -> str:
        """The label of a list's new entry, or of its last one: options without an index edit that."""
        if is_new:
            self.last[key] = f"{key}[{sum(label.startswith(f'{key}[') and label.endswith(']') for label in self.classes)}]"
        return self.last.get(key, key)

    def _any(self, key: str, value: Any, annotation: Any, layer: Layer) -> None:
        """A value that may be, or may hold, instances given by class name."""
        base = self.bases.get(key)
        if isinstance(value, list) and any(isinstance(item, dict) or base for item in value):
            for item in value:
                self._item(key, item, base, layer)
        elif isinstance(value, dict) and base:
            self._instance(self._entry(key, "class_path" in value), value, base, layer)
        elif isinstance(value, dict) and (any(name in value for name in CLASS_KEYS) or key in self.classes):
            self._instance(key, value, object, layer)
        elif isinstance(value, str) and base:
            self._instance(self._entry(key, True), value, base, layer)
        else:
            self._value(key, value, annotation, layer)

    def _item(self, key: str, item: Any, base: type | None, layer: Layer) -> None:
        """One entry of a list of instances."""
        label = self._entry(key, True)
        if (isinstance(item, dict) and "class_path" in item) or (isinstance(item, str) and base):
            self._instance(label, item, base or object, layer)
        elif base:
            raise ConfigError(f"{layer.origin}: {label} is {show(item)}, but each entry needs a class_path.")

    def _instance(self, key: str, value: Any, base: type, layer: Layer) -> None:
        """``{class_path, init_args}``, a class name, or only arguments for the class that an earlier layer named."""
        if value is None or isinstance(value, bool):
            return
        if isinstance(value, str):
            value = {"class_path": value}
        if not isinstance(value, dict):
            raise ConfigError(f"{layer.origin}: {key} is {show(value)}, but a class_path with init_args belongs here.")
        if "class_path" in value:
            self.classes[key] = resolve_class(value["class_path"], base, f"{layer.origin}: {key}.class_path")
        arguments = dict(value.get("init_args") or {})
        loose = {name: item for name, item in value.items() if name not in CLASS_KEYS and name != "help"}
        if loose and not layer.is_option:
            name = next(iter(loose))
            remedy = f"'{name}' goes under {key}.init_args" if key in self.classes and name in accepted(self.classes[key]) else None
            raise ConfigError(
                f"{layer.origin}: {key} has no key '{name}'" + (f"; {remedy}." if remedy else f"{closest(name, CLASS_KEYS)}.")
            )
        arguments |= loose
        self.given.setdefault(key, set()).update(value.get("dict_kwargs") or {})
        if arguments and key not in self.classes:
            raise ConfigError(f"{layer.origin}: {key} has arguments, but no layer up to here gives {key}.class_path.")
        if arguments:
            self._arguments(key, arguments, self.classes[key], layer)

    def _value(self, key: str, value: Any, annotation: Any, layer: Layer) -> None:
        choices = self.choices.get(key)
        if choices is not None and isinstance(value, str) and value not in choices and "." not in value and not value[:1].isupper():
            raise ConfigError(f"{layer.origin}: {key} is {show(value)}, which is not known{closest(value, choices)}.")
        if not fits(value, annotation, layer.is_option):
            options = [str(option) for option in literals(annotation)]
            hint = closest(str(value), options) if options else ""
            raise ConfigError(f"{layer.origin}: {key} is {show(value)}, but must be {describe(annotation)}{hint}.")

    def _required(self, key: str) -> None:
        owner = self.classes[key]
        missing = [name for name in _required_names(owner) if name not in self.given.get(key, set())]
        if missing:
            raise ConfigError(f"{key}.init_args.{missing[0]} is not set, and {owner.__name__} has no default for it.")


def check_predicts(subcommand: str, owner: type) -> None:
    """Refuse ``predict`` for a module without anything that it could call (Lightning's own ``predict_step`` calls ``forward``).

    Raises:
        ConfigError: The module has neither ``predict_step`` nor ``forward``.
    """
    methods = ("predict_step", "forward")
    if subcommand == "predict" and all(getattr(owner, name, None) is getattr(LightningModule, name) for name in methods):
        raise ConfigError(f"{owner.__name__} predicts nothing: it has neither predict_step nor forward; theodolite test evaluates it.")


def accepted(owner: type) -> dict[str, Any]:
    """Argument names of a class's constructor, followed through ``**kwargs`` to its parents, with their annotations."""
    return {parameter.name: parameter.annotation for parameter in get_signature_parameters(owner, None, logger=False)}


def _required_names(owner: type) -> list[str]:
    return [item.name for item in get_signature_parameters(owner, None, logger=False) if item.default is inspect.Parameter.empty]


def fits(value: Any, annotation: Any, is_option: bool = False) -> bool:
    """Whether the parser would accept a value (as YAML gives it, or as typed on the command line) for an annotation."""
    if annotation is inspect.Parameter.empty or annotation is Any:
        return True
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=annotation)
        if is_option and isinstance(value, str):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError):
        return False
    return True


def known_classes(base: type) -> dict[str, type]:
    """Every imported public subclass of ``base`` by full name; of a protocol, every class of this package that has its methods."""
    if _protocol(base):
        own = known_classes(object).items()
        return {name: child for name, child in own if name.startswith("theodolite.") and not _protocol(child) and _is_one(child, base)}
    found: dict[str, type] = {}
    queue = [base]
    while queue:
        for child in type.__subclasses__(queue.pop()):  # asked of the metaclass: `type` itself is among the subclasses of object
            if full_name(child) not in found:
                queue.append(child)
                found[full_name(child)] = child
    return {name: child for name, child in found.items() if not any(part.startswith("_") for part in name.split("."))}


def _protocol(base: type) -> bool:
    return bool(getattr(base, "_is_protocol", False))


def _is_one(found: type, base: type) -> bool:
    """Whether a class is a subclass of ``base``, or has the methods of that protocol; its attributes may come with an instance."""
    if not _protocol(base):
        return issubclass(found, base)
    methods = [name for name, value in vars(base).items() if inspect.isfunction(value) and not name.startswith("_")]
    return all(callable(getattr(found, name, None)) for name in methods)


def full_name(owner: type) -> str:
    """Import path of a class."""
    return f"{owner.__module__}.{owner.__qualname__}"


def resolve_class(name: Any, base: type, where: str) -> type:
    """The class of a ``class_path``, full or short.

    Raises:
        ConfigError: If there is no such class; names the closest one, or the error that its import raised.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{where} is {show(name)}, but must be the name of a class.")
    if "." not in name:
        matches = [child for child in known_classes(base).values() if child.__name__ == name]
        if len(matches) > 1:
            raise ConfigError(f"{where}: '{name}' could be {' or '.join(sorted(map(full_name, matches)))}; write the full one.")
        if not matches:
            kind = "class" if base is object else base.__name__
            raise ConfigError(f"{where}: there is no {kind} called '{name}'{_class_hint(name, base)}.")
        return matches[0]
    found = _import_class(name, base, where)
    if not isinstance(found, type):
        # functions that return an instance are allowed by the parser; it checks their return type
        if callable(found):
            return _as_type(found)
        raise ConfigError(f"{where}: '{name}' is {show(found)}, not a class.")
    if base is not object and not _is_one(found, base):
        raise ConfigError(f"{where}: {name} is not a {base.__name__}{_class_hint(name, base)}.")
    return found


def _as_type(function: Any) -> type:
    return type(function.__name__, (), {"__init__": function})


def _import_class(name: str, base: type, where: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"{where}: there is no module '{error.name}'{_class_hint(name, base)}.") from error
        raise ConfigError(f"{where}: importing '{module_name}' failed: {one_line(error)}.") from error
    except Exception as error:
        raise ConfigError(f"{where}: importing '{module_name}' failed: {one_line(error)}.") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{where}: module '{module_name}' has no class '{attribute}'{_class_hint(name, base)}.")
    return getattr(module, attribute)


def _class_hint(name: str, base: type) -> str:
    """The closest known class, by its own name first: people misremember folders more often than they mistype classes."""
    known = known_classes(base)
    if base is object:  # of all that is imported, this package's own
        known = {full: child for full, child in known.items() if full.startswith("theodolite.")}
    short = {child.__name__: full for full, child in reversed(known.items())}
    close = get_close_matches(name.rpartition(".")[2], short, n=1, cutoff=0.6)
    if close:
        return f"; the closest is {close[0]} ({short[close[0]]})"
    closest_full = get_close_matches(name, known, n=1, cutoff=0.6)
    if closest_full:
        return f"; the closest is {closest_full[0]}"
    own = sorted(short_name for short_name, full in short.items() if full.startswith("theodolite."))
    return f"; theodolite has {', '.join(own)}" if own and base is not object else ""


def describe(annotation: Any) -> str:
    """A type as people say it: ``a number``, ``a whole number or null``, ``one of 'a', 'b'``."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null", None: "null"}
    if annotation in names:
        return names[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        options = Literal[tuple(literals(annotation))] if literals(annotation) else None
        others = [part for part in arguments if not literals(part)]
        return " or ".join(dict.fromkeys(describe(part) for part in ([options] if options else []) + others))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if origin in (list, tuple, dict, set):
        return f"a {origin.__name__}" + (f" ({', '.join(describe(part) for part in arguments if part is not ...)})" if arguments else "")
    return getattr(annotation, "__name__", str(annotation).replace("typing.", ""))


def literals(annotation: Any) -> list[Any]:
    """All options of the ``Literal`` types inside an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return [option for part in get_args(annotation) for option in literals(part)]
    return []

"""Answers, plain Python values, to JSON and back, exact types kept.

Both sides of the sandbox use this file: the trusted parent imports it, the zygote loads it by path. It therefore imports the standard
library only. JSON has no tuples, sets or bytes, so everything that it does not carry exactly travels as an object with one key:

====  =============================================  ====  ==================================
key   value                                          key   value
====  =============================================  ====  ==================================
i     integer of 64 bits or more, hexadecimal        s, f  set, frozenset: list of members
t     tuple: list of members                         b     bytes, hexadecimal
d     dict: list of [key, value]                     u     string with lone surrogates: codes
o     anything else: only the name of its type     q     the same, of a class that has its own ``==``
====  =============================================  ====  ==================================
"""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 100
"""Deepest nesting of containers that is carried."""

MAX_HASHED = 4096
"""Most dict and set entries accepted in one value: hashing entries chosen to collide costs quadratic time in the trusted process."""

_SMALL = 1 << 63
_PLAIN = {int, bool, float, type(None)}
READABLE = {int, bool, float, str, type(None)}
"""Types that JSON carries as they are."""


def _all_small(values: list[Any]) -> bool:
    numbers = [value for value in values if type(value) is int]
    return not numbers or (min(numbers) >= -_SMALL and max(numbers) < _SMALL)


class Opaque:
    """A value of a type that is not carried. Equal to nothing but itself.

    Attributes:
        type_name: Name of the type, as the untrusted side gave it.
        own_equality: The untrusted side says that the program wrote the type's ``__eq__`` (not a dataclass's).
    """

    __slots__ = ("own_equality", "type_name")

    def __init__(self, type_name: str, own_equality: bool = False) -> None:
        self.type_name = type_name
        self.own_equality = own_equality

    def __repr__(self) -> str:
        return f"Opaque({self.type_name!r})"


def to_wire(value: Any, depth: int = 0) -> Any:
    """What ``json.dumps`` should get for ``value``; shares no container with it.

    A subclass is not its base: an ``int`` subclass or a ``Counter`` becomes an :class:`Opaque`, whatever it compares equal to.

    Raises:
        ValueError: Containers nested more than :data:`MAX_DEPTH` deep (or cyclic).
    """
    kind = type(value)
    if kind is int:
        return value if -_SMALL <= value < _SMALL else {"i": hex(value)}
    if kind is str:
        return value if value.isascii() or _encodable(value) else {"u": [ord(c) for c in value]}
    if value is None or kind is bool or kind is float:
        return value
    if kind is bytes:
        return {"b": value.hex()}
    if depth >= MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if kind is list:
        if set(map(type, value)) <= _PLAIN and _all_small(value):  # the usual answer, without a Python call per member
            return value.copy()
        return [to_wire(v, depth + 1) for v in value]
    if kind is dict:
        return {"d": [[to_wire(k, depth + 1), to_wire(v, depth + 1)] for k, v in value.items()]}
    tag = {tuple: "t", set: "s", frozenset: "f"}.get(kind)
    if tag is None:
        return {"q" if _has_own_equality(kind) else "o": str(kind.__name__)[:80]}
    return {tag: [to_wire(v, depth + 1) for v in value]}


def _has_own_equality(kind: type) -> bool:
    own = (vars(base) for base in kind.__mro__ if base.__module__ in ("solution", "__main__"))
    return any("__eq__" in members and "__dataclass_fields__" not in members for members in own)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def from_wire(node: Any) -> Any:
    """Inverse of :func:`to_wire`; ``node`` may come from the untrusted side.

    Raises:
        ValueError: ``node`` is not something that :func:`to_wire` makes, is deeper than :data:`MAX_DEPTH`, or has
            more than :data:`MAX_HASHED` dict and set entries.
    """
    return _Reader().read(node, 0)


class _Reader:
    """Counts hashed entries while one value is read."""

    def __init__(self) -> None:
        self.hashed = 0

    def read(self, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind is list:
            self._check_depth(depth)
            if set(map(type, node)) <= READABLE:
                return node
            return [self.read(n, depth + 1) for n in node]
        if kind is not dict:
            return node
        if len(node) != 1:
            raise ValueError("an object must have one key")
        self._check_depth(depth)
        tag, body = next(iter(node.items()))
        if tag in ("i", "b", "o", "q"):
            return _scalar(tag, body)
        if type(body) is not list:
            raise ValueError(f"key {tag!r} needs a list")
        return self._container(tag, body, depth + 1)

    def _container(self, tag: str, body: list[Any], depth: int) -> Any:
        if tag == "t":
            return tuple(self.read(n, depth) for n in body)
        if tag == "u":
            return "".join(map(chr, body))
        self.hashed += len(body)
        if self.hashed > MAX_HASHED:
            raise ValueError(f"more than {MAX_HASHED} dict and set entries")
        try:
            if tag == "d":
                return {self.read(k, depth): self.read(v, depth) for k, v in body}
            if tag in ("s", "f"):
                members = [self.read(n, depth) for n in body]
                return set(members) if tag == "s" else frozenset(members)
        except TypeError as error:
            raise ValueError("an entry that cannot be hashed") from error
        raise ValueError(f"unknown key {tag!r}")

    def _check_depth(self, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _scalar(tag: str, body: Any) -> Any:
    if type(body) is not str:
        raise ValueError(f"key {tag!r} needs a string")
    if tag == "i":
        return int(body, 16)
    return bytes.fromhex(body) if tag == "b" else Opaque(body[:80], tag == "q")

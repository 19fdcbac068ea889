"""Strict reading of YAML into dataclasses: a wrong key, a wrong type or a repeated key is an error.

Every message gives the dotted path, what was given, what was expected and, for a name, the nearest known.
"""

import difflib
import math
import re
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

import yaml


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text; `source` names it in messages.

    Raises:
        ValueError: If the text is no YAML, nested without end, or repeats a key.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no valid YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply to be a recipe; write fewer brackets") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice, which YAML otherwise resolves silently to the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor` is no key of its own
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"key {key!r} is given twice (line {node.start_mark.line + 1} and below); keep one")
        return super().construct_mapping(node, deep=deep)


def apply_override(mapping: dict[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of a raw recipe with one `key=value` applied.

    >>> raw = {"seed": 1, "stages": [{"name": "decoder", "training": {"max_steps": 5}}]}
    >>> apply_override(raw, "stages.decoder.training.max_steps=7")["stages"][0]["training"]
    {'max_steps': 7}
    >>> raw["stages"][0]["training"]
    {'max_steps': 5}
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} is not of the form key=value, e.g. seed=3")
    value = parse_yaml(text, f"the value of override {override!r}")
    return _set(mapping, key.split("."), value, key)


def _set(node: Any, keys: list[str], value: Any, path: str) -> Any:
    """Copy the containers along `keys` and set the last one; list elements are found by their `name`."""
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    if isinstance(node, list):
        names = [str(element.get("name")) for element in node if isinstance(element, dict)]
        if len(names) < len(node):
            raise ValueError(f"override {path}: a list cannot be entered at {head!r}; give it whole, as [a, b]")
        if head not in names:
            raise ValueError(f"override {path}: no stage {head!r}{nearest(head, names)}; stages: {', '.join(names)}")
        index = names.index(head)
        return [*node[:index], _set(node[index], rest, value, path), *node[index + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise ValueError(f"override {path}: {head!r} lies below {node!r}, which is a value, not a mapping")
    base = dict(node or {})
    base[head] = _set(base.get(head), rest, value, path)
    return base


def from_mapping(cls: type, mapping: Any, path: str = "") -> Any:
    """Build a dataclass from plain data, refusing unknown keys, missing keys and wrong types.

    Args:
        cls (`type`): One of the dataclasses above.
        mapping (`dict`): Plain data as YAML gives it; `from` stands for the field `from_`.
        path (`str`): Dotted path of `mapping`, for messages.

    Raises:
        ValueError: With the full dotted path, what was given, what was expected and the nearest known key.
    """
    where = path or "the recipe"
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} is {mapping!r}, expected a mapping")
    known = {item.name.rstrip("_"): item for item in fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in mapping:
        if key not in known:
            full = _join(path, str(key))
            raise ValueError(f"unknown key {full}{nearest(str(key), list(known))}; known here: {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, item in known.items():
        if key in mapping:
            values[item.name] = _convert(hints[item.name], mapping[key], _join(path, key))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{_join(path, key)} is missing; {where} needs it")
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against one type hint and return it; an int becomes a float where one is expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(option for option in arguments if option is not type(None)), value, path)
    if origin is Literal:
        if value not in arguments:
            close = nearest(str(value), [str(option) for option in arguments])
            raise ValueError(f"{path} is {value!r}{close}; expected one of {', '.join(map(str, arguments))}")
        return value
    if origin in (list, dict):
        return _convert_all(origin, arguments[-1], value, path)
    if is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, path)
    if hint is Any:
        return _check_plain(value, path)
    return _convert_scalar(hint, value, path)


def _convert_all(kind: type[list] | type[dict], hint: Any, value: Any, path: str) -> Any:
    """Check a list or a mapping, and each of its elements against a type hint."""
    if not isinstance(value, kind):
        expected = f"a list: write [{value}]" if kind is list else "a mapping"
        raise ValueError(f"{path} is {value!r}, expected {expected}")
    if isinstance(value, list):
        return [_convert(hint, element, _join(path, _label(i, element))) for i, element in enumerate(value)]
    return {str(key): _convert(hint, element, f"{path}.{key}") for key, element in value.items()}


def _label(index: int, element: Any) -> str:
    """What to call a list element in a path: its name if it has one, else its index."""
    name = element.get("name") if isinstance(element, dict) else None
    return name if isinstance(name, str) else str(index)


def _convert_scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is hint:
        return _check_plain(value, path) if hint is float else value
    if isinstance(value, str) and hint in (int, float):
        _check_plain(value, path)
    raise ValueError(f"{path} is {value!r} ({type(value).__name__}), expected {hint.__name__}")


def _check_plain(value: Any, path: str) -> Any:
    """Refuse what is no number, and numbers that YAML read as text, at any depth: `1e-4` is a string, `1.0e-4` not."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}, expected a number that is finite; correct the recipe")
    if isinstance(value, dict):
        return {key: _check_plain(element, _join(path, str(key))) for key, element in value.items()}
    if isinstance(value, list):
        return [_check_plain(element, f"{path}.{i}") for i, element in enumerate(value)]
    if isinstance(value, str) and re.fullmatch(r"[+-]?[\d._]+[eE][+-]?\d+", value):
        try:
            remedy = _yaml_float(float(value))
        except ValueError:
            return value
        raise ValueError(f"{path} is the text {value!r}: YAML reads that as a string; write {remedy}")
    return value


def _yaml_float(value: float) -> str:
    """Write a float so that YAML reads a float.

    >>> _yaml_float(1e-4), _yaml_float(2.5e7), _yaml_float(3.0)
    ('1.0e-4', '2.5e+7', '3.0e+0')
    """
    mantissa, exponent = f"{value:e}".split("e")
    mantissa = mantissa.rstrip("0")
    mantissa = mantissa + "0" if mantissa.endswith(".") else mantissa
    return f"{mantissa}e{int(exponent):+d}"


def nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def yaml_names(value: Any) -> Any:
    """Give fields their YAML names back: `from_` -> `from`."""
    if isinstance(value, dict):
        return {("from" if key == "from_" else key): yaml_names(element) for key, element in value.items()}
    return [yaml_names(element) for element in value] if isinstance(value, list) else value

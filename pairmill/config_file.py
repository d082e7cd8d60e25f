"""Read a config of any pydantic model from YAML, with overrides, and say in one line a key what is wrong."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pairmill.errors import ConfigError
from schemas.config import Condition

Model = TypeVar("Model", bound=BaseModel)


def read_config(model: type[Model], path: str, overrides: Sequence[str] = ()) -> Model:
    """A config from a YAML file, with ``key.sub=value`` overrides applied (values are YAML too).

    Raises:
        ConfigError: no such file, broken YAML (names the line), or wrong keys and values (one line each).
    """
    data = _read_yaml(path)
    for override in overrides:
        _override(data, override)
    return parse_config(model, data, path)


def parse_config(model: type[Model], data: Mapping[str, Any], where: str = "config") -> Model:
    """A config from a dictionary.

    Raises:
        ConfigError: wrong keys or values: which key, what was expected, what was given, one line each.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        items = error.errors(include_url=False)
        causes = {item["loc"][:n] for item in items for n in range(len(item["loc"]))}
        lines = [_explain(model, dict(i)) for i in items if i["type"] != "too_short" or i["loc"] not in causes]
        raise ConfigError("\n".join([f"{where} is wrong:", *(f"  {line}" for line in lines)])) from error


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; give the path of a YAML file") from error
    try:
        data = yaml.load(text, _Loader)  # noqa: S506 (a safe one)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, such as `dataset: out/my-dataset`")
    return data


class _Loader(yaml.SafeLoader):
    """yaml's safe loader, but a key that stands twice in a section is an error: it would take the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Where and what, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: write it as key=value, such as --set keep.min_side=100")
    place: Any = data
    *parents, last = key.strip().split(".")
    for parent in parents:
        place = _step_into(place, parent, override)
    try:
        # In YAML a text of several lines follows a > or |; on one line it is a condition, such as >= 0.3.
        parsed = value.strip() if value.lstrip()[:1] in (">", "|") else yaml.load(value, _Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {_yaml_problem(error)}") from error
    if isinstance(place, list):
        place[_position(place, last, override)] = parsed
    else:
        place[last] = parsed


def _step_into(place: Any, key: str, override: str) -> Any:
    if isinstance(place, list):
        inner = place[_position(place, key, override)]
    else:
        inner = place.get(key)
        if inner is None:
            inner = place[key] = {}
    if not isinstance(inner, (dict, list)):
        raise ConfigError(f"--set {override!r}: {key!r} is not a section of the config, but the value {inner!r}")
    return inner


def _position(place: list[Any], key: str, override: str) -> int:
    if key.isdigit() and int(key) < len(place):
        return int(key)
    raise ConfigError(f"--set {override!r}: {key!r} must be a position in a list of {len(place)}, counted from 0")


def _explain(model: type[BaseModel], item: dict[str, Any]) -> str:
    """One validation error as one line: which key, what was expected, what was given."""
    owners, place = _follow(model, item["loc"])
    key = ".".join(place) or "the config"
    if item["type"] == "extra_forbidden":
        known = [name for owner in owners for name in _keys(owner)]
        near = difflib.get_close_matches(place[-1], known, n=1)
        return f"{key}: unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
    if item["type"] == "missing":
        return f"{key}: missing"
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        context = item["ctx"]
        told = f"(given: {context['tag']!r})" if "tag" in context else "(missing)"
        tags = [repr(tag) for owner in _models_at(owners, place) if (tag := _tag(owner))]
        return f"{key}.{context['discriminator'].strip(chr(39))}: expected one of {', '.join(tags)} {told}"
    given = item.get("input")
    open_owners = [owner for owner in owners if owner.model_config.get("extra") == "allow"]
    known = [name for owner in open_owners for name in _keys(owner)]
    if known and place and place[-1] not in known and (near := difflib.get_close_matches(place[-1], known, n=1)):
        return f"{key}: unknown key; did you mean {near[0]!r}?"
    condition = any(_is_condition(owner, place[-1]) for owner in owners if place)
    expected = _CONDITION if condition and item["type"] == "string_type" else _expected(item)
    shown = "" if isinstance(given, (dict, BaseModel)) or repr(given) in expected else f" (given: {given!r:.80})"
    return f"{key}: {expected}{shown}"


_CONDITION = "expected a condition such as '>= 0.28', '< 3' or 'top 30%'"


def _expected(item: dict[str, Any]) -> str:
    message = str(item["msg"])
    if item["type"] == "string_pattern_mismatch":
        return _CONDITION
    if item["type"] in ("tuple_type", "list_type"):
        return "expected a list"
    if item["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return "expected keys and values"
    if item["type"] == "too_short":
        return f"expected at least {item['ctx']['min_length']} of them"
    for opening in ("Input should be ", "Value error, ", "Assertion failed, "):
        if message.startswith(opening):
            message = message[len(opening) :]
            comparison = message.startswith(("greater than", "less than"))
            return ("expected " if opening.startswith("Input") else "") + ("a value " if comparison else "") + message
    return message


def _follow(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[type[BaseModel]], list[str]]:
    """The models that own the last key of an error's place, and the place as a user writes it.

    pydantic puts the tag of a union (``url_table``) between the keys; a user does not.
    """
    owners: list[type[BaseModel]] = [model]
    place: list[str] = []
    inside: list[type[BaseModel]] = [model]
    for part in map(str, loc):
        tagged = [m for m in inside if len(inside) > 1 and part in (_tag(m), m.__name__)]
        if tagged:
            inside = owners = tagged
            continue
        place.append(part)
        owners = inside
        if not part.isdigit():
            inside = [m for owner in owners for m in _models_of(_annotation(owner, part))]
    return owners, place


def _models_at(owners: list[type[BaseModel]], place: list[str]) -> list[type[BaseModel]]:
    """The models that the value at a place may be of; a position in a list leaves them as they are."""
    if place[-1].isdigit():
        return owners
    return [m for owner in owners for m in _models_of(_annotation(owner, place[-1]))]


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return None if kind is None else str(kind.default)


def _annotation(owner: type[BaseModel], key: str) -> Any:
    for name, info in owner.model_fields.items():
        if key in (name, info.alias):
            return info.annotation
    return None


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models within an annotation such as ``tuple[Annotated[A | B, ...], ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated, tuple, list, dict):
        for argument in get_args(annotation):
            yield from _models_of(argument)


def _is_condition(owner: type[BaseModel], key: str) -> bool:
    """Whether a key takes a condition, as any further key of a section does that allows them."""
    annotation = _annotation(owner, key)
    if annotation is None:
        return owner.model_config.get("extra") == "allow"
    return Condition in (annotation, *get_args(annotation))


def _keys(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]

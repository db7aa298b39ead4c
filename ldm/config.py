"""YAML and `section.key=value` overrides become validated, frozen records; every mistake names its key.

This module is the strict loader only: it knows no schema and no network.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from ldm.cli import nearest
from ldm.errors import SettingError


class Config(pydantic.BaseModel):
    """Base of every record that is read from a file: frozen, and no unknown or ill-typed key gets in."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


ConfigType = TypeVar("ConfigType", bound=Config)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that reads `1e-4` as a number and refuses a key that is given twice."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            continue  # the safe loader says so itself
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node)


def _float_or_text(loader: _Loader, node: yaml.ScalarNode) -> Any:
    try:
        return float(node.value)
    except ValueError:
        return node.value


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
_Loader.add_constructor("!number", _float_or_text)
# YAML 1.1 wants a dot before the exponent; people write 1e-4.
_Loader.add_implicit_resolver("!number", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; SettingError with file and line for what is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise SettingError(f"{where}{line}: not valid YAML: {error.problem}; correct that line") from None
    except yaml.YAMLError as error:
        raise SettingError(f"{where}: not valid YAML: {error}; correct it") from None


Location = tuple[int | str, ...]
"""Keys and indices that lead to a value."""


def validate(
    values: Any, schema: type[ConfigType], where: str, line: Callable[[Location], str] = lambda _: ""
) -> ConfigType:
    """`values` as a record of `schema`; SettingError that names the first bad key and, for a typo, the nearest one.

    `line` gives, for messages, what follows `where` for a value: the line at which a file has it.
    """
    if not isinstance(values, Mapping):
        raise SettingError(f"{where}: expected a mapping of keys to values, got {type(values).__name__}; see configs/")
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, where = ".".join(str(part) for part in first["loc"]), where + line(first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), _fields_at(schema, first["loc"][:-1]))
            raise SettingError(f"{where}: {key}: no such key{hint}; remove or rename it") from None
        # A section or list as a whole says nothing that the message does not, and fills the line: with aliases, ten
        # lines of YAML can stand for a list of a billion words.
        silent = first["type"] == "missing" or isinstance(first["input"], Mapping | list | tuple)
        got = "" if silent else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise SettingError(f"{where}: {key or schema.__name__}: {message}{got}; correct the value") from None


def _fields_at(schema: type[pydantic.BaseModel], location: Sequence[object]) -> list[str]:
    """The field names of the record that `location` points to."""
    for part in location:
        field = schema.model_fields.get(str(part))
        if field is None:
            continue
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        schema = next((c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)), schema)
    return list(schema.model_fields)


def load(path: Path, schema: type[ConfigType], overrides: Sequence[str] = ()) -> ConfigType:
    """The record in the YAML file at `path`, with `section.key=value` overrides applied in order.

    Raises SettingError with the file, the key, what was got and the nearest known key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingError(
            f"{path}: {error.strerror}; give the path of a YAML file, e.g. configs/shapes.yaml"
        ) from None
    except UnicodeDecodeError:
        raise SettingError(f"{path}: not UTF-8 text; give the path of a YAML file") from None
    values = parse_yaml(text, str(path))
    if values is None:
        raise SettingError(f"{path}: the file is empty; see configs/ for complete recipes")
    for override in overrides:
        _apply(values, override)
    given = [override.partition("=")[0] for override in overrides]

    def line(location: Location) -> str:
        key = ".".join(str(part) for part in location)
        return "" if any(f"{key}.".startswith(f"{one}.") for one in given) else line_of(text, location)

    return validate(values, schema, str(path), line)


def line_of(text: str, location: Location) -> str:
    """`:7` where line 7 of a YAML text has the value, or else what encloses it; nothing where it has neither.

    Parts of a location that are no key, which say as what kind of section it was read, are passed over.
    """
    node, found = yaml.compose(text, Loader=_Loader), ""
    for part in location:
        if isinstance(node, yaml.MappingNode):
            entries = [(key, value) for key, value in node.value if key.value == str(part)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            entries = [(node.value[part], node.value[part])]
        else:
            break
        for key, value in entries:
            node, found = value, f":{key.start_mark.line + 1}"
    return found


def _apply(values: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or not text:
        raise SettingError(f"{override}: expected section.key=value; for example unet.training.batch_size=8")
    *sections, last = key.split(".")
    for section in sections:
        if isinstance(values, list) and section.isdigit() and int(section) < len(values):
            values = values[int(section)]
        elif isinstance(values, dict) and section in values:
            values = values[section]
        else:
            known = list(values) if isinstance(values, dict) else []
            raise SettingError(f"{override}: no section {section!r}{nearest(section, known)}; use a key of the file")
    if not isinstance(values, dict):
        raise SettingError(f"{override}: {'.'.join(sections)} has no keys; use a section of the file")
    values[last] = parse_yaml(text, override)


def dump(config: Config) -> str:
    """The record as YAML text that `load` reads back to an equal record."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

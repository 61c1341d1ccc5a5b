"""Converts trees of frozen dataclasses to `ml_collections.ConfigDict` and back. Errors name the path of a wrong value.

A run's config file returns a ConfigDict, which `--config.path.to=value` edits; the code reads dataclasses. A field
annotated `Any` may hold one of several dataclasses: its section has a key `type` with the name of the dataclass, which
is looked up in a registry.
"""

import dataclasses
import importlib.util
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from mllm_jax.common.errors import suggestion
from mllm_jax.common.settings import as_float, checker, type_name

TYPE = "type"  # key with the name of the dataclass, in sections of fields annotated `Any`


class ConfigError(ValueError):
    """A config is invalid. The message begins with the path of the wrong value."""


def to_config_dict(value: Any) -> ConfigDict:
    """Returns a dataclass and those inside as a ConfigDict. All fields can be overridden, even those that are None."""
    return ConfigDict(_section(value, named=False))


class _Operation(NamedTuple):
    """Operation that a FieldReference applies to the value that it refers to."""

    fn: Callable
    args: tuple = ()


def following(field: FieldReference, function: Callable[[Any], Any]) -> FieldReference:
    """Returns a field whose value is `function` of another field's value, until it is set itself."""
    return FieldReference(field, field_type=object, op=_Operation(function))


def from_config_dict(cls: type, config: Mapping | ConfigDict, registry: Mapping[str, type] | None = None, path=""):
    """Builds the dataclass `cls` from a ConfigDict or a plain dict; the inverse of `to_config_dict`.

    Absent fields have their defaults; lists become tuples.

    Args:
      cls: a dataclass; the annotations of its fields define the accepted values.
      registry: dataclasses by name, for `type` keys.
      path: path of `config`, for error messages.

    Raises:
      ConfigError: a name is unknown (with a suggestion) or missing, a type is wrong, a value violates the constraint
        of its annotation (see `mllm_jax.common.settings`), or the dataclass raises a ValueError.
    """
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    return _dataclass(cls, config, registry or {}, path)


def dump(config: ConfigDict) -> str:
    """Returns a ConfigDict as JSON, for a checkpoint."""
    return json.dumps(config.to_dict(), indent=2)


def load(text: str) -> ConfigDict:
    """Inverts `dump`. Lists of JSON become tuples again."""
    return ConfigDict(_tuples(json.loads(text)))


def beside(file: str, name: str) -> types.ModuleType:
    """Returns the module of a config file in the folder of another one, for example `beside(__file__, "sft.py")`."""
    path = Path(file).with_name(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_path(config: ConfigDict, path: str) -> None:
    """Raises ConfigError unless the dotted `path` names a field of `config`."""
    parents, section = [], config
    for name in path.split("."):
        if not isinstance(section, ConfigDict) or name not in section:
            names = section.keys() if isinstance(section, ConfigDict) else ()
            raise ConfigError(f"{_join('config', *parents)} has no {name!r}; {suggestion(name, names)}")
        parents.append(name)
        section = section[name]


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _section(value: Any, named: bool) -> dict:
    hints = typing.get_type_hints(type(value))
    fields = {f.name: _field(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value) if f.init}
    return {TYPE: type(value).__name__, **fields} if named else fields


def _field(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _section(value, named=hint is Any)
    if isinstance(value, Mapping):
        nested = {name: _section(x, named=False) for name, x in value.items() if dataclasses.is_dataclass(x)}
        return {name: FieldReference(x, field_type=object) for name, x in value.items() if name not in nested} | nested
    if hint is Any:
        return FieldReference(value, field_type=object)
    if value is None:  # this type parses a new value of the command line
        kinds = [kind for kind in typing.get_args(hint) if isinstance(kind, type) and kind is not types.NoneType]
        return FieldReference(None, field_type=kinds[0] if len(kinds) == 1 else object)
    return value


def _dataclass(cls: type, config: Any, registry: Mapping[str, type], path: str) -> Any:
    if not isinstance(config, Mapping):
        raise ConfigError(f"{path or cls.__name__}: needs a section with the fields of {cls.__name__}, not {config!r}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for name, value in config.items():
        if name not in fields:
            raise ConfigError(f"{path or cls.__name__}: unknown name {name!r}; {suggestion(name, fields)}")
        values[name] = (_part if hints[name] is Any else _value)(hints[name], value, registry, _join(path, name))
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise ConfigError(f"{path or cls.__name__}: {', '.join(missing)} must be given")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{_join(path)}: {error}" if path else str(error)) from error


def _value(hint: Any, value: Any, registry: Mapping[str, type], path: str) -> Any:
    """Returns `value` converted to the type of the annotation `hint`."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        value = _value(hint.__origin__, value, registry, path)
        try:
            checker(hint)(value, path)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return value
    if hint is Any:
        return _any(value, registry, path)
    if origin in (typing.Union, types.UnionType):
        return _union(hint, options, value, registry, path)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, registry, path)
    if (origin or hint) is tuple and isinstance(value, (list, tuple)):
        kinds = options[:1] * len(value) if len(options) == 2 and options[1] is Ellipsis else options
        if not options:
            return _tuples(value)
        if len(kinds) == len(value):
            items = enumerate(zip(kinds, value))
            return tuple(_value(kind, item, registry, f"{path}[{i}]") for i, (kind, item) in items)
    elif isinstance(origin or hint, type) and issubclass(origin or hint, Mapping) and isinstance(value, Mapping):
        kind = options[1] if options else Any
        return {name: _value(kind, item, registry, _join(path, str(name))) for name, item in value.items()}
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return as_float(value)
    elif hint in (bool, int, float, str) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    elif hint is types.NoneType and value is None:
        return None
    raise ConfigError(f"{path}: needs {type_name(hint)}, not {value!r}")


def _part(hint: Any, value: Any, registry: Mapping[str, type], path: str) -> Any:
    """Returns the value of a field annotated `Any`: one of several dataclasses, or None."""
    part = _any(value, registry, path)
    if part is not None and not dataclasses.is_dataclass(part):
        raise ConfigError(f"{path}={str(value)[:80]}: needs None, or a section whose {TYPE!r} names a part.")
    return part


def _any(value: Any, registry: Mapping[str, type], path: str) -> Any:
    if not isinstance(value, Mapping) or TYPE not in value:
        return _tuples(value)
    name = value[TYPE]
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(f"{_join(path, TYPE)}: no part is called {name!r}; {suggestion(str(name), registry)}")
    return _dataclass(registry[name], {key: item for key, item in value.items() if key != TYPE}, registry, path)


def _union(hint: Any, options: tuple, value: Any, registry: Mapping[str, type], path: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    options = [option for option in options if option is not types.NoneType]
    if len(options) == 1:
        return _value(options[0], value, registry, path)
    for option in options:
        try:
            return _value(option, value, registry, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path}: needs {type_name(hint)}, not {value!r}")


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value

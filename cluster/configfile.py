"""YAML in, frozen dataclasses out: config files, their overrides, and job specs that arrive over the wire.

The schema is `cluster.config` and nothing else: values are converted by its type hints, then checked by
`cluster.configcheck`. Every fault is a `ConfigError` that names the file, the path inside it, the value and a remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from actors.errors import InvalidInput
from cluster.config import ClusterConfig, JobConfig, ModelConfig
from cluster.configcheck import validate_cluster, validate_job, validate_model
from cluster.errors import ConfigError

T = TypeVar("T")

SHIPPED = Path(__file__).resolve().parent.parent / "configs"
"""`configs` lies beside the `cluster` package, in a checkout as in site-packages."""


def load_cluster(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """`path`: a file, or the name of a shipped config such as `local_cpu`.

    `overrides` maps dotted keys (`experts.actors`) to parsed values. The entry `model` is a mapping, or names a YAML
    file, a Hugging Face model directory (both relative to the config file) or a shipped model such as `tiny`.
    Paths in overrides, and `storage.root` everywhere, are relative to the working directory.
    """
    file = find_config(path)
    values, places = _read(file), _Places(str(file))
    prefix = "model."
    model_overrides = {k.removeprefix(prefix): v for k, v in (overrides or {}).items() if k.startswith(prefix)}
    other_overrides = {k: v for k, v in (overrides or {}).items() if not k.startswith(prefix)}
    _override(values, other_overrides, places)
    entry = values.pop("model", None)
    if entry is None:
        raise places.error("model", "missing", remedy="name a model file, a model directory, or give `values`")
    folder = Path() if "model" in other_overrides else file.parent
    model = _load_model_entry(entry, folder, places, model_overrides)
    config = _convert_fields(ClusterConfig, {**values, "model": model}, "", places)
    return validate_cluster(config, str(file))


def load_job(path: str | Path, overrides: Mapping[str, Any] | None = None) -> JobConfig:
    """`path`: a file, or the name of a shipped job such as `demo`. A relative `data.source` starts at the file."""
    file = find_config(path, "jobs")
    values, places = _read(file), _Places(str(file))
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("source"), str):
        data["source"] = _anchor_source(data["source"], file.parent)
    _override(values, overrides or {}, places)
    return validate_job(_convert_fields(JobConfig, values, "", places), str(file))


def load_model(path: str | Path) -> ModelConfig:
    """`path`: a YAML file, or the name of a shipped model such as `tiny`."""
    return _load_model_file(find_config(path, "models"), {})


def job_from_dict(values: Mapping[str, Any], source: str) -> JobConfig:
    """A job spec from elsewhere than a file; `source` names it in errors, e.g. `SubmitJob`."""
    config = _convert_fields(JobConfig, dict(values), "", _Places(source))
    return validate_job(config, source)


def to_dict(config: ClusterConfig | JobConfig | ModelConfig) -> dict[str, Any]:
    """Plain values (dict, list, str, numbers, None), ready for YAML or JSON; the inverse of loading."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def find_config(name: str | Path, kind: str = "") -> Path:
    """The file `name` means: an existing path, or a shipped config (`local_cpu`; kind `jobs` or `models`: `demo`)."""
    given = Path(name)
    if given.is_file():
        return given
    folder = SHIPPED / kind
    for shipped in (folder / given, folder / f"{name}.yaml"):
        if not given.is_absolute() and shipped.is_file():
            return shipped
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    raise ConfigError(
        "no such config file",
        field=str(name),
        remedy=f"give the path of a YAML file or one of the shipped names: {', '.join(known)}",
    )


# --- The model entry ---------------------------------------------------------------------------------------------


def _load_model_entry(entry: Any, folder: Path, places: _Places, overrides: Mapping[str, Any]) -> ModelConfig:
    if isinstance(entry, str):
        found = folder / entry
        if found.is_dir():
            return _build_model({"path": str(found)}, overrides, _Places(places.source, prefix="model"))
        if not found.is_file():
            found = _shipped_model(entry, places)
        return _load_model_file(found, overrides)
    if not isinstance(entry, dict):
        raise places.error("model", "expected a name or a mapping", entry)
    return _build_model(_anchored(entry, folder), overrides, _Places(places.source, prefix="model"))


def _shipped_model(name: str, places: _Places) -> Path:
    try:
        return find_config(name, "models")
    except ConfigError as error:
        remedy = f"give a YAML file or model directory relative to the config file; {error.remedy}"
        raise places.error("model", "no such model file or directory", name, remedy) from None


def _load_model_file(file: Path, overrides: Mapping[str, Any]) -> ModelConfig:
    return _build_model(_anchored(_read(file), file.parent), overrides, _Places(str(file)))


def _build_model(values: dict[str, Any], overrides: Mapping[str, Any], places: _Places) -> ModelConfig:
    _override(values, overrides, places)
    return validate_model(_convert_fields(ModelConfig, values, "", places), places.source, places.prefix)


def _anchored(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = values.get("path")
    return {**values, "path": str(folder / path)} if isinstance(path, str) else values


def _anchor_source(source: str, folder: Path) -> str:
    path = source.removeprefix("path:")
    return source if path == source else f"path:{folder / path}"


# --- Reading YAML ------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error and `3e-3` is a number."""


# YAML 1.1 wants a dot in a number with an exponent; nobody who writes `lr: 3e-3` means a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.value in seen:
            raise yaml.MarkedYAMLError(
                problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
            )
        if isinstance(key_node.value, str):
            seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _read(file: Path) -> dict[str, Any]:
    try:
        # _Loader is a SafeLoader: it builds plain values only.
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", field=str(file)) from None
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_fault(error), field=str(file), remedy="correct the YAML") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("expected a mapping of keys to values", field=str(file), value=values)
    return values


def _yaml_fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else f"not YAML: {problem}"


# --- Overrides ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Places:
    """Where values come from, for error messages: the file, except for the keys that an override has set."""

    source: str
    prefix: str = ""
    """Path of the values inside the source."""
    overridden: set[str] = dataclasses.field(default_factory=set)

    def error(self, path: str, message: str, value: object = None, remedy: str = "") -> ConfigError:
        is_override = any(path == key or path.startswith(f"{key}.") for key in self.overridden)
        shown = ".".join(part for part in (self.prefix, path) if part)
        source = f"{self.source} (override)" if is_override else self.source
        return ConfigError(message, field=f"{source}: {shown}" if shown else source, value=value, remedy=remedy)


def _override(values: dict[str, Any], overrides: Mapping[str, Any], places: _Places) -> None:
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        at = values
        for depth, key in enumerate(parents):
            if at.get(key) is None:
                at[key] = {}
            at = at[key]
            if not isinstance(at, dict):
                path = ".".join(parents[: depth + 1])
                raise places.error(path, f"is not a mapping, so {dotted!r} cannot be set inside it", at)
        at[leaf] = value
        places.overridden.add(dotted)


# --- Conversion by type hint -------------------------------------------------------------------------------------


def _convert_fields(cls: type[T], values: Mapping[Any, Any], path: str, places: _Places) -> T:
    """An instance of the dataclass `cls`; values that are instances of their field's class already are kept."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    converted = {}
    for key, value in values.items():
        if key not in fields:
            where = f" of {path}" if path else ""
            remedy = _did_you_mean(str(key), fields, otherwise=f"known keys{where}: {', '.join(fields)}")
            raise places.error(_join(path, str(key)), "unknown key", value, remedy)
        converted[key] = _convert(value, hints[key], _join(path, key), places)
    try:
        return cls(**converted)
    except InvalidInput as error:  # a value that checks itself, and knows the field but not the file
        name = error.field.rpartition(".")[2]
        raise places.error(_join(path, name), error.message, converted.get(name), error.remedy) from None


def _convert(value: Any, hint: Any, path: str, places: _Places) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_optional(value, args, path, places)
    if origin is typing.Literal:
        return _convert_choice(value, args, path, places)
    if origin is tuple:
        _expect(isinstance(value, list | tuple), "a list", value, path, places)
        return tuple(_convert(item, args[0], f"{path}[{i}]", places) for i, item in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, Mapping), "a mapping", value, path, places)
        return {
            _convert(key, args[0], path, places): _convert(item, args[1], _join(path, key), places)
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        _expect(isinstance(value, Mapping), "a mapping", value, path, places)
        return _convert_fields(typing.cast(type, hint), value, path, places)
    return _convert_scalar(value, hint, path, places)


def _convert_optional(value: Any, args: tuple[Any, ...], path: str, places: _Places) -> Any:
    (inner,) = (arg for arg in args if arg is not types.NoneType)
    return None if value is None else _convert(value, inner, path, places)


def _convert_choice(value: Any, choices: tuple[Any, ...], path: str, places: _Places) -> Any:
    if isinstance(value, bool) and {"on", "off"} <= set(choices):
        return "on" if value else "off"  # YAML 1.1 reads the bare words as true and false
    if value in choices and not isinstance(value, bool):
        return value
    remedy = _did_you_mean(str(value), choices, otherwise=f"choose one of {', '.join(map(str, choices))}")
    raise places.error(path, "not one of the choices", value, remedy)


def _convert_scalar(value: Any, hint: type, path: str, places: _Places) -> Any:
    if hint is float:
        # bool is a subclass of int; `lr: true` is a slip, never a number.
        _expect(isinstance(value, int | float) and not isinstance(value, bool), "a number", value, path, places)
        _expect(math.isfinite(value), "a finite number", value, path, places)
        return float(value)
    wanted = {int: "a whole number", bool: "true or false", str: "a text"}[hint]
    is_right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    _expect(is_right, wanted, value, path, places)
    return value


def _expect(condition: bool, wanted: str, value: Any, path: str, places: _Places) -> None:
    if not condition:
        got = "null" if value is None else type(value).__name__
        raise places.error(path, f"expected {wanted}, not {got}", value, f"write {wanted}")


def _did_you_mean(name: str, known: Iterable[Any], otherwise: str) -> str:
    close = difflib.get_close_matches(name, [str(item) for item in known], n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

"""How settings are read and checked: frozen sections, YAML files, `section.field=value` overrides, one-line errors.

The settings themselves are in `beats_ray.config`, which is what the rest of the package imports.
"""

import copy
import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from beats_ray.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FractionBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A frozen group of settings; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    instead_of: ClassVar[dict[str, str]] = {}
    """Fields that, where they are given, take the place of another one's default."""

    @model_validator(mode="before")
    @classmethod
    def _keep_section_defaults(cls, values: Any) -> Any:
        """`finetune: {train: {steps: 10}}` changes one number: the rest stays what *this* section's default says."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items() if name in values}
        sections = {name: default for name, default in defaults.items() if isinstance(default, Section)}
        unset = [name for name in sections if values[name] is None]  # `train:` with nothing below it is as without it
        return {name: value for name, value in values.items() if name not in unset} | {
            name: _merged(default, values[name]) for name, default in sections.items() if name not in unset
        }


def _merged(default: Section, values: Any) -> Any:
    if values is None:  # `train:` with nothing below it
        return default
    if not isinstance(values, dict):
        return values
    merged = {name: getattr(default, name) for name in type(default).model_fields}
    for name, replaced in default.instead_of.items():
        if values.get(name) is not None:
            del merged[replaced]
    for name, value in values.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, Section) else value
    return merged


SectionT = TypeVar("SectionT", bound=Section)


def load_config(
    kind: type[SectionT], /, path: str | None = None, overrides: list[str] | None = None, **fields: Any
) -> SectionT:
    """The config of one job: defaults, then the YAML file, then `fields`, then `section.field=value` overrides.

    Raises ConfigError, one line, for an unreadable file, an unknown key (the nearest valid one is named), a wrong type
    or a broken rule.
    """
    values, mistakes = read_values(kind, path, overrides, **fields)
    try:
        config = validate(kind, values)
    except ConfigError as error:
        raise ConfigError(*mistakes, *error.mistakes) from None
    if mistakes:
        raise ConfigError(*mistakes)
    return config


def read_values(
    kind: type[BaseModel], /, path: str | None = None, overrides: list[str] | None = None, **fields: Any
) -> tuple[dict[str, Any], list[str]]:
    """What `load_config` checks, as it was given, and a line for each override that could not be read.

    Raises ConfigError for an unreadable file.
    """
    values = _read_yaml(path) if path else {}
    values |= {name: copy.deepcopy(value) for name, value in fields.items() if value is not None}
    mistakes: list[str] = []
    for override in overrides or []:
        try:
            _apply_override(kind, values, override)
        except ConfigError as error:
            mistakes += error.mistakes
    return values, mistakes


def validate(kind: type[SectionT], values: dict[str, Any]) -> SectionT:
    """`values` as a checked config; ConfigError has a line for each mistake."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        mistakes = _all_mistakes(kind, values, error)
    raise ConfigError(*dict.fromkeys(_explain(kind, one) for one in mistakes))


def replace(config: SectionT, changes: dict[str, Any]) -> SectionT:
    """A checked copy of `config` with dotted fields replaced: `replace(c, {"train.steps": 10})`."""
    values = config.model_dump()
    for name, value in changes.items():
        _set_dotted(type(config), values, name, value)
    return validate(type(config), values)


def fingerprint(config: BaseModel | dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that differ when any setting differs."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def field_names(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of every setting below `kind`."""
    names = []
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names += field_names(annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _apply_override(kind: type[BaseModel], values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r}: expected section.field=value")
    if _annotation(kind, name) is str:
        _set_dotted(kind, values, name, text)  # as it stands: a folder may be called 2024, or `on`
        return
    try:
        value = _parse_yaml(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {_yaml_problem(error)}") from error
    _set_dotted(kind, values, name, value)


def _annotation(kind: type[BaseModel], name: str) -> Any:
    """The type of a dotted field; None where there is no such field."""
    annotation: Any = kind
    for part in name.split("."):
        entries = _entries_kind(annotation)
        if entries:
            annotation = entries if _has_sections(entries) else None
            continue
        fields = annotation.model_fields if _is_section(annotation) else {}
        annotation = fields[part].annotation if part in fields else None
    return annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _entries_kind(annotation: Any) -> type[BaseModel] | None:
    """`SearchParameter` for `dict[str, SearchParameter]`: a dict of sections under names of the user's."""
    arguments = get_args(annotation)
    return arguments[1] if get_origin(annotation) is dict and _is_section(arguments[1]) else None


def _has_sections(kind: type[BaseModel]) -> bool:
    return any(_is_section(field.annotation) for field in kind.model_fields.values())


def _set_dotted(kind: type[BaseModel], values: dict[str, Any], name: str, value: Any) -> None:
    """Sets `section.field`.

    Below a dict of plain sections the key takes every part but the last, as in `sweep.space.train.learning_rate.low`,
    and the dict starts from its default; where these have sections of their own it is one part, as in
    `tasks.esc50.finetune.dropout`.
    """
    *sections, field = name.split(".")
    annotation: Any = kind
    for depth, section in enumerate(sections):
        known = annotation.model_fields.get(section) if _is_section(annotation) else None
        entries = _entries_kind(known.annotation) if known else None
        if known and entries and section not in values:
            values[section] = {key: entry.model_dump() for key, entry in known.default.items()}
        if values.get(section) is None:
            values[section] = {}
        elif isinstance(values[section], BaseModel):
            values[section] = values[section].model_dump()
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {'.'.join(sections[: depth + 1])} is a value, not a section")
        annotation = known.annotation if known else None
        if entries and not _has_sections(entries):
            _set_entry(entries, values, sections[depth + 1 :], field, value)
            return
        if entries and depth + 1 < len(sections):
            key, *rest = sections[depth + 1 :]
            if not isinstance(values.setdefault(key, {}), dict):
                raise ConfigError(f"{name}: {'.'.join(sections[: depth + 2])} is a value, not a section")
            _set_dotted(entries, values[key], ".".join([*rest, field]), value)
            return
        if entries and value is None:  # null takes the entry out
            values.pop(field, None)
            return
    values[field] = value


def _set_entry(kind: type[BaseModel], values: dict[str, Any], key: list[str], field: str, value: Any) -> None:
    if key and field in kind.model_fields:
        values.setdefault(".".join(key), {})[field] = value
    else:  # the whole entry: space.train.steps={distribution: choice, values: [1, 2]}; null takes it out
        whole = ".".join([*key, field])
        values.pop(whole, None)
        if value is not None:
            values[whole] = value


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number and a key that stands twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"not valid YAML, line {error.problem_mark.line + 1}: {error.problem}"
    return f"not valid YAML: {' '.join(str(error).split())}"


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        if "://" in path:
            from beats_ray.data.storage import open_place  # which imports this module

            values = _parse_yaml(open_place(path).read_bytes().decode())
        else:
            values = _parse_yaml(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: {_yaml_problem(error)}") from error
    if not isinstance(values or {}, dict):
        raise ConfigError(f"config file {path}: expected `section: ...` at the top, found {type(values).__name__}")
    return _without_sharing(values or {})


def _without_sharing(values: Any) -> Any:
    """The same with a copy wherever YAML's anchors or merges put one section in several places.

    An override of one of them would otherwise change all.
    """
    if isinstance(values, dict):
        return {name: _without_sharing(value) for name, value in values.items()}
    return [_without_sharing(value) for value in values] if isinstance(values, list) else values


def _all_mistakes(kind: type[BaseModel], values: dict[str, Any], error: ValidationError) -> list[ErrorDetails]:
    """Unknown keys first, which are often why another one is missing, then what is wrong without them.

    The rules of a section are looked at only where each of its fields is right; an unknown key must not hide them.
    """
    unknown = [one for one in error.errors() if one["type"] == "extra_forbidden"]
    if not unknown:
        return error.errors()
    rest = copy.deepcopy(values)
    for one in unknown:
        *sections, name = one["loc"]
        section: Any = rest
        for part in sections:
            section = section[part]
        del section[name]
    try:
        kind.model_validate(rest)
    except ValidationError as other:
        return unknown + _all_mistakes(kind, rest, other)
    return unknown


def _explain(kind: type[BaseModel], error: ErrorDetails) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _explain_unknown(kind, name)
    if error["type"] == "missing":
        return f"{name}: missing; set it in the config file or as {name}=VALUE"
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{name}.{reason}" if name else reason
    if error["type"] in ("model_type", "dict_type"):
        reason = f"is a section; set its fields, as in {name}.FIELD=VALUE"
    if error["type"] == "tuple_type":
        reason = f"is a list; write {name}=[{error['input']}]"
    return f"{name}={_shown(error)}: {reason[0].lower()}{reason[1:]}"


def _shown(error: ErrorDetails) -> str:
    text = repr(error["input"])
    return text if len(text) <= 80 else f"{text[:77]}..."


def _explain_unknown(kind: type[BaseModel], name: str) -> str:
    names = field_names(kind)
    section, _, last = name.rpartition(".")
    near = difflib.get_close_matches(name, names, 1, 0.6) or [n for n in names if n.rsplit(".", 1)[-1] == last][:1]
    if near:
        return f"{name}: unknown config key; did you mean {near[0]}?"
    inner = _annotation(kind, section) if section else kind
    valid = ", ".join(inner.model_fields if _is_section(inner) else kind.model_fields)
    return f"{name}: unknown config key; valid keys: {valid}"


def section_fields(settings: Section) -> dict[str, Any]:
    """The fields of a section, to be given to a job that has them at its top."""
    return {name: getattr(settings, name) for name in type(settings).model_fields}

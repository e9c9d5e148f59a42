"""The keys of the schema by dotted name: their types, and the nearest key to a misspelled one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ulysses_infer.config.option import MISSING
from ulysses_infer.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One recipe key."""

    name: str
    """Dotted name, `parallel.sp`."""
    type: Any
    """Type without `None`."""
    optional: bool
    """Whether null is allowed."""
    field: dataclasses.Field[Any]
    """The dataclass field, for its default and metadata."""

    @property
    def meaning(self) -> str:
        """The meaning of the key."""
        return self.field.metadata["help"]

    @property
    def default(self) -> Any:
        """The default value; `MISSING` if a recipe must set it."""
        if self.field.default_factory is not dataclasses.MISSING:
            return self.field.default_factory()
        return self.field.default

    @property
    def is_required(self) -> bool:
        """Whether a recipe must set it."""
        return self.default == MISSING

    @property
    def type_text(self) -> str:
        """The type in words: `int or null`, `fcfs | priority`."""
        limits = self.field.metadata
        text = limits["kind"] or " | ".join(limits["choices"] or [_type_text(self.type)])
        return f"{text} or null" if self.optional else text


@functools.cache
def section_names() -> tuple[str, ...]:
    """The sections of a recipe, in order."""
    return tuple(section.name for section in dataclasses.fields(Config))


@functools.cache
def all_keys() -> dict[str, Key]:
    """Every key by dotted name, in the order of the schema."""
    sections = typing.get_type_hints(Config)
    return {key.name: key for name in section_names() for key in _section_keys(name, sections[name])}


def is_open(name: str) -> bool:
    """Whether `name` is a key that holds a mapping, such as `generate.sampling`."""
    return name in all_keys() and typing.get_origin(all_keys()[name].type) is dict


def is_mapping(name: str) -> bool:
    """Whether `name` stands for a mapping of further keys in a recipe."""
    return name in section_names() or is_open(name)


def is_key(name: str) -> bool:
    """Whether `name` can be set: a key of the schema, an entry of an open one, or something nested there."""
    owner, inside = ".".join(name.split(".")[:2]), name.count(".") - 1
    return name in all_keys() or (is_open(owner) and (inside == 1 or _nests(owner)))


def _nests(name: str) -> bool:
    """Whether entries of the open key `name` may be mappings themselves."""
    return typing.get_args(all_keys()[name].type)[1] is Any


def hint_for(name: str) -> str:
    """Hint for the unknown key `name`: the nearest key, or else the keys of its section."""
    nearest = _nearest_key(name)
    if nearest is not None:
        return f"did you mean '{nearest}'?"
    section = name.partition(".")[0]
    known = [key for key in all_keys() if key.startswith(section + ".")] or section_names()
    return f"known: {', '.join(known)}"


def _nearest_key(name: str) -> str | None:
    """The key most similar to `name`: in its own section if there is one, else anywhere, else by its last part."""
    section, _, last = name.rpartition(".")
    own = [key.rpartition(".")[2] for key in all_keys() if key.startswith(section + ".")]
    if section and (nearest := nearest_name(last, own)):
        return f"{section}.{nearest}"
    by_last_part = {key.rpartition(".")[2]: key for key in all_keys()}
    if section not in section_names() and (nearest := nearest_name(name, [*all_keys(), *section_names()])):
        return nearest
    nearest = nearest_name(last, by_last_part)
    return by_last_part[nearest] if nearest else None


def nearest_name(name: str, choices: Iterable[str]) -> str | None:
    """The choice most similar to `name`, or None."""
    return next(iter(difflib.get_close_matches(name, list(choices), n=1, cutoff=0.7)), None)


def _section_keys(section: str, schema: type) -> list[Key]:
    hints = typing.get_type_hints(schema)
    return [_key(f"{section}.{field.name}", hints[field.name], field) for field in dataclasses.fields(schema)]


def _key(name: str, hint: Any, field: dataclasses.Field[Any]) -> Key:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [member for member in members if member is not type(None)]
    return Key(name, plain[0], len(plain) < len(members) or hint is Any, field)


def _type_text(type_: Any) -> str:
    plain = typing.get_origin(type_) or type_
    return "mapping" if plain is dict else plain.__name__

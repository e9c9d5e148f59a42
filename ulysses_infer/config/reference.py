"""The configuration as text: the resolved recipe, and the reference of all keys."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import yaml

from ulysses_infer.config.keys import Key, all_keys, section_names
from ulysses_infer.config.schema import Config
from ulysses_infer.config.settings import escaped


def resolved_yaml(config: Config) -> str:
    """`config` as a complete recipe; the values of secret keys are hidden."""
    tree = escaped(dataclasses.asdict(config))
    for key in all_keys().values():
        section, _, name = key.name.partition(".")
        if key.field.metadata["secret"] and tree[section][name] is not None:
            tree[section][name] = "(hidden)"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def schema_reference() -> str:
    """Markdown tables, one per section, of every key: type, default and meaning."""
    return "\n".join(_section_table(section) for section in section_names())


def _section_table(section: str) -> str:
    summary = typing.get_type_hints(Config)[section].__doc__
    head = f"## `{section}`\n\n{summary}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    return head + "".join(_row(key) for name, key in all_keys().items() if name.startswith(section + "."))


def _row(key: Key) -> str:
    default = "required" if key.is_required else f"`{_yaml_text(key.default)}`"
    kind = key.type_text.replace("|", "\\|")
    return f"| `{key.name}` | {kind}{_range_text(key)} | {default} | {key.meaning} |\n"


def _range_text(key: Key) -> str:
    signs = {"at_least": "≥", "above": ">", "at_most": "≤"}
    limits = {name: key.field.metadata[name] for name in signs}
    return "".join(f", {signs[name]} {limit}" for name, limit in limits.items() if limit is not None)


def _yaml_text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")

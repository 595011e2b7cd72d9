"""The JSON Schema (draft 2020-12) of a saved run, and a check of the part of the language it uses.

The check is here so that reading a file needs no further package; `SCHEMA` may be given to any
validator.
"""

from __future__ import annotations

import math
from typing import Any

VERSION = 1
UNITS = ["s", "B", "B/s", "FLOP/s", "%", "x", "yes/no", ""]
KINDS = ["measured", "counted", "implied", "given"]

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}

_FIGURE = {
    "type": "object",
    "required": ["value", "unit", "kind"],
    "additionalProperties": False,
    "properties": {
        "value": {"type": "number"},
        "unit": {"enum": UNITS},
        "kind": {"enum": KINDS},
    },
}

_ROW = {
    "type": "object",
    "required": ["group", "name", "labels", "figures", "spread"],
    "additionalProperties": False,
    "properties": {
        "group": {"type": "string"},
        "name": {"type": "string"},
        "labels": _TEXTS,
        "figures": {"type": "object", "additionalProperties": _FIGURE},
        "spread": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
    },
}

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A run of python -m singd_ext.bench",
    "type": "object",
    "required": ["schema", "machine", "command", "rows", "notes"],
    "additionalProperties": False,
    "properties": {
        "schema": {"enum": [VERSION]},
        "machine": _TEXTS,
        "command": {"type": "array", "items": {"type": "string"}},
        "rows": {"type": "array", "items": _ROW},
        "notes": {"type": "array", "items": {"type": "string"}},
    },
}

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
}


def check(data: object, rule: dict[str, Any] = SCHEMA, place: str = "the file") -> None:
    """Check data as read from JSON.

    Raises:
        ValueError: Naming the first place that does not fit.
    """
    if "enum" in rule and data not in rule["enum"]:
        raise ValueError(f"{place} is {data!r}, where {rule['enum']} is allowed")
    kind = rule.get("type")
    if kind and (not isinstance(data, _TYPES[kind]) or isinstance(data, bool)):
        raise ValueError(f"{place} is {data!r}, where JSON's type '{kind}' is expected")
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError(f"{place} is {data}, which JSON does not have")
    if isinstance(data, (int, float)) and data < rule.get("minimum", -math.inf):
        raise ValueError(f"{place} is {data}, less than {rule['minimum']}")
    if isinstance(data, list):
        for index, item in enumerate(data):
            check(item, rule["items"], f"{place}[{index}]")
    if isinstance(data, dict):
        _check_object(data, rule, place)


def _check_object(data: dict[str, Any], rule: dict[str, Any], place: str) -> None:
    for name in rule.get("required", ()):
        if name not in data:
            raise ValueError(f"{place} has no '{name}'")
    for name, value in data.items():
        inner = rule.get("properties", {}).get(name, rule["additionalProperties"])
        if inner is False:
            raise ValueError(f"{place} has an unknown '{name}'")
        check(value, inner, f"{place}.{name}")

"""The JSON Schema of remote access, and a check against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from jsonschema import Draft202012Validator

SCHEMA: Final = json.loads((Path(__file__).parents[2] / "docs" / "remote-access.schema.json").read_text())


def problems_with(name: str, value: object) -> list[str]:
    """What jsonschema finds wrong with `value` as the definition `name`."""
    checker = Draft202012Validator({"$ref": f"#/$defs/{name.replace('/', '~1')}", "$defs": SCHEMA["$defs"]})
    return [error.message for error in checker.iter_errors(value)]

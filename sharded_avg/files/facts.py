"""What a file of weights says about them: JSON in a safetensors header, or beside the tensors of a torch file."""

from __future__ import annotations

import json
from typing import Any

from ..errors import CheckpointError

METADATA_KEY = "sharded_avg"
MAX_JSON_BYTES = 256 << 20


def load_facts(text: str) -> dict[str, Any]:
    """What `consolidate` and `merge` wrote about an average; `{}` if it is nothing. Raises `CheckpointError`."""
    facts = load_json(text, "what a file says about its average")
    aliases = facts.get("aliases", {}) if isinstance(facts, dict) else None
    if not isinstance(aliases, dict) or not isinstance(facts.get("average", ""), str):
        raise CheckpointError("what a file says about its average is damaged: it is not what this package writes")
    return {str(key): value for key, value in facts.items()}


def load_json(text: str, what: str) -> Any:
    """JSON as the standard has it, without NaN; raises `CheckpointError` for anything else."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON value")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is damaged: it is no JSON ({error})") from error

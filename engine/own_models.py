"""Whether `models` is the engine's own: one in the working directory may hide it."""

import sys
from importlib.util import find_spec
from pathlib import Path

from engine.errors import UserError
from engine.logger import complain_once

OWN = Path(__file__).resolve().parents[1] / "models" / "__init__.py"


def check_models() -> None:
    """Raises UserError where Python would import another `models` than the one beside the engine; imports neither."""
    try:
        spec = find_spec("models")
    except ValueError:  # a program has put a module of its own in that place
        spec = None
    found = spec and (spec.origin or next(iter(spec.submodule_search_locations or []), None))
    if found is None or Path(found).resolve() != OWN:
        do = "start from another folder, or with `mocov3 ...` or `python -P -m engine...`, or in a process of its own"
        raise UserError(f"models ({found or 'missing'}) must not hide the engine's own; {do}")


def exit_if_hidden() -> None:
    """End the process in one line, as a door does, where another `models` hides the engine's."""
    try:
        check_models()
    except UserError as error:
        complain_once(f"error: {error}")
        sys.exit(2)

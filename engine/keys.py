"""The keys of a recipe: type and range, default, meaning.

  mocov3 keys                    all of a pre-training recipe
  mocov3 keys train              those of a section
  mocov3 keys epochs             those of that name, as train.epochs
  mocov3 keys --task finetune    of another task's recipe

A resume may change the keys that are marked with *.
"""

import difflib
import textwrap

from engine.cli import Parser, enter
from engine.errors import UserError, one_line
from engine.recipe.describe import KeyDoc, describe_keys
from engine.recipe.sections import RECIPES

WIDTH = 100


def main(arguments: list[str]) -> None:
    parser = Parser("engine.keys", __doc__)
    parser.add_argument("section", nargs="?", default="", help="a section or a key")
    parser.add_argument("--task", choices=tuple(RECIPES), default="pretrain", help="default: pretrain")
    options = parser.parse_args(arguments)
    print("\n".join(line for key in chosen(options.task, options.section) for line in described(key)))


def chosen(task: str, section: str) -> list[KeyDoc]:
    """The keys of a section, or of a name, dotted or not; all for "". Raises UserError where there is none."""
    words = {key: (key.name, *key.name.split(".")) for key in describe_keys(task)}
    found = [key for key, names in words.items() if not section or section in names]
    if not found:
        nearest = difflib.get_close_matches(section, {name for names in words.values() for name in names}, 1)
        do = f"did you mean {nearest[0]}?" if nearest else "leave it out for all keys"
        raise UserError(f"section ({one_line(section)}) must be a section or a key of task {task}; {do}")
    return found


def described(key: KeyDoc) -> list[str]:
    default = "required" if key.default is None else f"default {key.default}"
    facts = f"{key.name}{'*' if key.is_free else ''}: {key.must}; {default}"
    return [
        *textwrap.wrap(facts, WIDTH, subsequent_indent="  ", break_long_words=False),
        *textwrap.wrap(key.meaning, WIDTH, initial_indent="    ", subsequent_indent="    "),
    ]


if __name__ == "__main__":
    enter(main)

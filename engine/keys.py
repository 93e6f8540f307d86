"""The keys of a recipe: type and range, default, meaning.

  mocov3 keys                    all of a pre-training recipe
  mocov3 keys train              those of a section
  mocov3 keys epochs             every key of that name, such as train.epochs
  mocov3 keys --task finetune    of another task's recipe

A resume may change the keys that are marked with *.
"""

import textwrap

from engine.cli import Parser
from engine.door import enter, show
from engine.errors import UserError, did_you_mean, one_line
from engine.recipe.describe import KeyDoc, describe_keys
from engine.recipe.sections import RECIPES

WIDTH = 100


def main(arguments: list[str]) -> None:
    parser = Parser("engine.keys", __doc__)
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="a section or a key")
    parser.add_argument("--task", choices=tuple(RECIPES), default="pretrain", help="default: pretrain")
    options = parser.parse_args(arguments)
    show("\n".join(line for key in chosen(options.task, options.name) for line in described(key)))


def chosen(task: str, name: str) -> list[KeyDoc]:
    """The keys of a section, or of a name, dotted or not; all for "". Raises UserError where there is none."""
    keys = describe_keys(task)
    found = [key for key in keys if not name or name in (key.name, *key.name.split("."))]
    if not found:
        known = {word for key in keys for word in (key.name, *key.name.split("."))}
        do = did_you_mean(name, sorted(known), "leave it out for all keys")
        raise UserError(f"NAME ({one_line(name)}) must be a section or a key of task {task}; {do}")
    return found


def described(key: KeyDoc) -> list[str]:
    """The lines of one key."""
    default = "required" if key.default is None else f"default {key.default}"
    facts = f"{key.name}{'*' if key.is_free else ''}: {key.must}; {default}"
    return [
        *textwrap.wrap(facts, WIDTH, subsequent_indent="  ", break_long_words=False),
        *textwrap.wrap(key.meaning, WIDTH, initial_indent="    ", subsequent_indent="    "),
    ]


if __name__ == "__main__":
    enter(main)

"""The ranges that keys of recipes have: each as it reads after the type's name, and as a test of a value."""

import re

from engine.recipe.keys import Rule
from models.shapes import CONV_VITS, PLAIN_VITS, RESNET_SHAPES, WELL_KNOWN, is_network

POSITIVE = Rule(" > 0", lambda value: value > 0)
NOT_NEGATIVE = Rule(" >= 0", lambda value: value >= 0)
AT_LEAST_1 = Rule(" >= 1", lambda value: value >= 1)
AT_LEAST_2 = Rule(" >= 2", lambda value: value >= 2)
FRACTION = Rule(" from 0 to 1", lambda value: 0 <= value <= 1)
HUE = Rule(" from 0 to 0.5", lambda value: 0 <= value <= 0.5)
CROP = Rule(" > 0 and <= 1", lambda value: 0 < value <= 1)
CENTRE = Rule(" from 0.01 to 1", lambda value: 0.01 <= value <= 1)
BELOW_1 = Rule(" >= 0 and < 1", lambda value: 0 <= value < 1)
REPEATS = Rule(" from 1 to 100", lambda value: 1 <= value <= 100)
PATH = Rule(", in quotes if it looks like a number", lambda value: bool(value) and value.isprintable())
TEXT = Rule(PATH.text, PATH.holds)
NAMES = (*PLAIN_VITS, *CONV_VITS, *RESNET_SHAPES)
NETWORK = Rule(f": {', '.join(NAMES)} or timm/<name>", is_network, (*NAMES, *WELL_KNOWN))
RANDAUGMENT = Rule(
    " in timm's words, such as rand-m9-mstd0.5-inc1",
    lambda value: re.fullmatch(r"rand(-(m|n|mmax)\d+|-(mstd|p)\d+(\.\d+)?|-inc[01]|-tweights)*", value) is not None,
)
WORKERS = Rule(" >= 0", lambda value: value == "auto" or value >= 0)
MINUTES = Rule(" > 0 and <= 1e6", lambda value: 0 < value <= 1e6)
WARN = Rule(": warn", lambda value: value == "warn")
ARGUMENTS = Rule(", each a keyword argument", lambda value: all(name.isidentifier() for name in value))

"""The rules of what is an image of a set have a number, which a run keeps: an older run goes on where its images are
found alike under the new rules.

Raise it with a change of what a source finds in the same files, and have the source name the first file for which the
change matters (`Source.otherwise`).
"""

from engine.data.source import Source

RULES = 2


def by_rules(began: int, source: Source) -> str:
    """How the rules explain that a run, begun under those of number `began`, finds other images; in words."""
    if began == RULES or source.otherwise is None:
        return ""
    return f" under rules {began} of what is an image, where rules {RULES} differ: {source.otherwise}"

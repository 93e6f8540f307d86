"""What a search for images comes across beside them: it is counted, and said in one line."""

from collections import Counter

from engine.errors import listed

NO_FILES = "pipes or devices"  # whatever their suffix
_MOST = 8  # kinds that the line names
_LONGEST = 10  # characters of a suffix
_PHOTOGRAPHS = (".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf")  # cameras' own


class Survey:
    """What was left out, by kind, and the first file that former rules took for something else (engine.data.rules)."""

    def __init__(self, left_out: dict[str, int] | None = None, otherwise: tuple[str, str] | None = None):
        self.left_out, self.otherwise = Counter(left_out), otherwise

    def leave_out(self, kind: str) -> None:
        self.left_out[kind] += 1

    def leave_out_file(self, name: bytes) -> None:
        """A file whose suffix is none of an image."""
        self.leave_out(suffix_of(name))

    def takes_otherwise(self, name: bytes, rule: str) -> None:
        """`name` is what it is by a rule that former runs did not have."""
        text = printable(name)
        if self.otherwise is None or text < self.otherwise[0]:
            self.otherwise = (text, rule)

    def add(self, other: "Survey", within: str) -> None:
        """Another search's, which went before all that follows."""
        self.left_out += other.left_out
        if self.otherwise is None and other.otherwise is not None:
            self.otherwise = (f"{within}:{other.otherwise[0]}", other.otherwise[1])

    def rule_in_words(self) -> str | None:
        return None if self.otherwise is None else "{} ({})".format(*self.otherwise)

    def words(self) -> str | None:
        """`120 .heic, 3 .txt; convert .heic to JPEG ...`; None where nothing was left out."""
        kinds = [f"{count} {kind}" for kind, count in self.left_out.most_common()]
        photographs = [kind for kind, _ in self.left_out.most_common() if kind in _PHOTOGRAPHS]
        do = f"; convert {listed(photographs)} to JPEG where they shall count" if photographs else ""
        return f"{listed(kinds, most=_MOST)}{do}" if kinds else None


def suffix_of(name: bytes) -> str:
    """A file's last suffix in lower case; of one that is no word, only that it is another file."""
    base = name.rpartition(b"/")[2]
    stem, dot, suffix = base.rpartition(b".")
    text = suffix.decode(errors="replace").lower()
    is_word = bool(stem and dot) and len(text) <= _LONGEST and text.isalnum() and not text.isdigit()
    return f".{text}" if is_word else "other files"


def printable(name: bytes) -> str:
    """A path on one line."""
    text = name.decode(errors="backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]

"""What a checkpoint says beside its tensors: the run that it is of, and where that stands.

One writer and one reader, the forms of earlier versions included.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.checkpoint.manifest import Damaged, Manifest


@dataclass(frozen=True)
class RunState:
    """The run that a checkpoint is of, and where that stands.

    step: finished updates.
    recipe: YAML.
    images: {"train": fingerprint} and, where the result depends on them, "val"; of imported weights, which have seen
        none, empty.
    contents: of the same splits, checksums of some images by their number (engine.data.contents); checkpoints of
        former versions have none.
    accepted: how images of a split differ, or once differed, from what the run began with, in words
        (data.accept_changes).
    left_out: images of a split that could not be read when the run began, by their number among all of it, each with
        its name and why; runs that former versions began leave none out.
    image_rules: the number of the rules that said what is an image of the set (engine.data.rules); before they had
        numbers it was 1.
    order: the law by which the run permutes its images (engine.data.order); before there were two it was "sorted".
    decoder: what decodes JPEG files for the run's crops, and its version (engine.data.jpeg); before there were two it
        was "pillow".
    bad_images: unreadable ones that the run met.
    licence: of imported weights, which binds what is made of them.
    continued_from: checksum of the manifest of the checkpoint that the run began with (run.continue_from).
    network: sha256 of the weights that supervised training, or a run with model.weights, began with.
    about: JSON in which a fine-tuned network says what it is (engine.weights).
    classes: their names, of supervised training; checkpoints of former versions have none.
    frozen: of linear classification, what it classifies the features of: {"checkpoint", "encoder", "heads"}.
    made_by: versions, device and number of ranks that wrote the checkpoint; for the reader.
    """

    step: int
    recipe: str
    images: dict[str, str]
    contents: dict[str, dict[str, str]] = field(default_factory=dict)
    bad_images: int = 0
    licence: str | None = None
    continued_from: str | None = None
    network: str | None = None
    about: str | None = None
    made_by: dict[str, str] = field(default_factory=dict)
    image_rules: int = 1
    order: str = "sorted"
    decoder: str = "pillow"
    classes: list[str] = field(default_factory=list)
    frozen: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, checkpoint: Path, manifest: Manifest) -> "RunState":
        """The state of a checkpoint whose manifest was read. Raises Damaged where it is not the state of a run."""
        found = dict(manifest.state)
        if "images" not in found:  # until schema 2: {"data": train} of pre-training, {"train", "val"} of the others
            former = {"train": found.get("data", found.get("train")), "val": found.get("val")}
            found["images"] = {name: value for name, value in former.items() if value is not None}
        known = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        try:
            state = cls(**known)
        except TypeError as error:
            raise Damaged(checkpoint, f"its state is not the state of a run ({error})") from None
        if problem := state._problem():
            raise Damaged(checkpoint, f"its state is not the state of a run: {problem}")
        return state

    def _problem(self) -> str | None:
        for name in ("step", "bad_images", "image_rules"):
            if type(getattr(self, name)) is not int:
                return f"{name} is no integer"
        texts = ("recipe", "order", "decoder")
        for name in (*texts, "licence", "continued_from", "network", "about"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name in texts or value is not None):
                return f"{name} is no text"
        for name in ("images", "accepted", "made_by", "frozen"):
            if not _is_table_of_texts(getattr(self, name)):
                return f"{name} is no table of texts"
        if not isinstance(self.classes, list) or not all(isinstance(name, str) for name in self.classes):
            return "classes is no list of texts"
        for name in ("contents", "left_out"):
            tables = getattr(self, name)
            if not isinstance(tables, dict) or not all(map(_is_table_of_texts, tables.values())):
                return f"{name} is no table of tables of texts"
        if not all(i.isascii() and i.isdecimal() for table in self.left_out.values() for i in table):
            return "left_out has what is no number of an image"
        return None


def _is_table_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(part, str) for part in value.values())

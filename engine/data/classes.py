"""Whether folders of pre-training's images are their classes: data.classes."""

from engine.data.opening import align_or_drop, unknown_classes, without_labels
from engine.data.source import Root, Source
from engine.errors import UserError, listed
from engine.recipe.sections import Classes

_SHOWN = 5  # classes that a line names


def settle_classes(choice: Classes, root: Root, train: Source, val: Source | None) -> tuple[Source, Source | None]:
    """Training images, which lie in `root`, and validation images with the labels that they have by `choice`.

    Under auto a line says what was taken, where validation's classes do not confirm it. Raises UserError where some of
    val's classes are train's and others are not.
    """
    if choice == "none":
        return without_labels(train), None if val is None else without_labels(val)
    if choice == "folders" and train.labels is None and root.kind in ("folder", "shards"):
        train = without_labels(train, f"data.classes (folders): unlabelled, as not all images of {root} lie in folders")
    if choice == "auto" and train.by_folder is not None:
        train = _judged(root, train, val)
    return train, None if val is None else align_or_drop(train, val)


def _judged(root: Root, train: Source, val: Source | None) -> Source:
    """`train` with its folders as classes, or unlabelled, and the line that says so."""
    names = listed(train.classes, most=_SHOWN)
    what = f"the {len(train.classes)} folders of {root} ({names})"
    if (objection := _objection(root, train, val)) is not None:
        line = f"unlabelled: {what} are no classes, {objection}; pass data.classes=folders if they are"
        return without_labels(train, f"data.classes (auto): {line}")
    if val is not None:  # which confirms it
        return train
    labelled = without_labels(train, f"data.classes (auto): {what} are classes; pass data.classes=none if they are not")
    labelled.labels, labelled.classes = train.labels, train.classes
    return labelled


def _objection(root: Root, train: Source, val: Source | None) -> str | None:
    """Why the folders are no classes; None where they are."""
    if len(train.classes) < 2:
        return "as there is one alone"
    if val is None:
        return "as images lie in folders inside them" if train.by_folder == "deeper" else None
    if val.classes is None:
        return "as validation images have none"
    unknown = unknown_classes(train, val)
    if len(unknown) == len(val.classes):
        return f"as validation has others ({listed(unknown, most=_SHOWN)})"
    if unknown:
        raise UserError(
            f"validation classes ({listed(unknown, most=_SHOWN)}) must be among the {len(train.classes)} folders of "
            f"{root}, as others are; name them alike, or pass data.classes=none"
        )
    return None

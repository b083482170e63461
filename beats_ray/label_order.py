"""Which of a classifier's classes is which label of a data set: by name, never by place.

Two data sets with the same labels in another order look alike to a program that compares numbers, and the accuracy is
then that of a lottery.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beats_ray.config import UserError
from beats_ray.data.storage import Place
from beats_ray.inference import is_released_file, load_checked


@dataclass(frozen=True)
class ClassOrder:
    """Where a classifier keeps each label of a data set."""

    class_C: np.ndarray
    """The classifier's class for each label id."""
    note: str
    """What a reader must know about it; empty where classes and labels are the same list."""


def read_class_names(model: Place) -> list[str] | None:
    """The names of a published classifier's classes in their order; None where it does not tell."""
    if is_released_file(model):
        names = getattr(load_checked(model, "model", ("classifier",)), "class_names", None)
        return list(names) if names is not None else None
    try:
        return [str(name) for name in (model / "labels.json").read_json()]
    except FileNotFoundError:
        return None


def translate_ids(class_names: Sequence[str], class_table: Place) -> list[str]:
    """AudioSet's ids (`/m/09x0r`) as the display names of class_labels_indices.csv; other names stay."""
    from beats_ray.data.datasets.audioset import read_labels

    names, label_of = read_labels(class_table)
    return [names[label_of[name]] if name in label_of else name for name in class_names]


def match_classes(
    class_names: Sequence[str] | None, num_classes: int, label_names: Sequence[str], model: str
) -> ClassOrder:
    """The classifier's class of every label of the data set.

    UserError naming `model` where a label has no class of its name, or where neither names nor numbers can tell.
    """
    if class_names is None:
        if num_classes != len(label_names):
            raise UserError(
                f"model={model}: has {num_classes} classes without names, the data set {len(label_names)} labels; give "
                "a classifier of this data set"
            )
        note = f"{model} names no classes: class i is taken for label i of the data set"
        return ClassOrder(np.arange(num_classes), note)
    if list(class_names) == list(label_names):
        return ClassOrder(np.arange(num_classes), "")
    place_of = {name: place for place, name in enumerate(class_names)}
    missing = [name for name in label_names if name not in place_of]
    if missing or len(place_of) < len(class_names):
        ids = any(name.startswith("/m/") for name in class_names)
        remedy = (
            "set class_table to AudioSet's class_labels_indices.csv" if ids else "give a classifier of these labels"
        )
        what = (
            f"has no class for {len(missing)} of the data set's {len(label_names)} labels, {missing[0]!r} among them"
            if missing
            else "has classes of the same name, in another order than the data set's labels"
        )
        raise UserError(f"model={model}: {what} (its own are {class_names[0]!r}, ...); {remedy}")
    surplus = len(class_names) - len(label_names)
    left_out = f"; {surplus} classes that the data set lacks are left out" if surplus else ""
    class_C = np.array([place_of[name] for name in label_names])
    return ClassOrder(class_C, f"classes of {model} are matched with the labels by name{left_out}")

"""What samples are made of: class labels or prompts, and the metadata that goes to rewards with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError


CONDITION_COLUMNS = ("prompt", "label", "class_label")


@dataclass(frozen=True)
class Conditions:
    """Conditions that are taken in turn, and one mapping of metadata for each."""

    values: Sequence[int] | Sequence[str]
    metadata: Sequence[Mapping]

    @classmethod
    def of(cls, pipeline, train_conditions: Sequence | None = None, train_dataset=None) -> "Conditions":
        """From a list, from a `datasets.Dataset` (a column `prompt`, `label` or `class_label`; the other columns are
        metadata), or all classes of the pipeline. Names of classes become their labels.

        Raises:
            InputError: both, or neither where the pipeline has no classes; nothing in them, one text, or no such column.
        """
        if train_conditions is not None and train_dataset is not None:
            raise InputError("Give train_conditions or train_dataset, not both.")
        if isinstance(train_conditions, str):  # its letters would be prompts
            raise InputError(f"train_conditions is a list, got the text {train_conditions!r}; put it in brackets.")
        if train_dataset is not None:
            names = [name for name in CONDITION_COLUMNS if name in train_dataset.column_names]
            if not names:
                raise InputError(
                    f"The dataset has the columns {train_dataset.column_names}; one of {list(CONDITION_COLUMNS)} is needed."
                )
            rows = [dict(row) for row in train_dataset]
            values = [row.pop(names[0]) for row in rows]
        elif train_conditions is not None:
            values = list(train_conditions)
            rows = [{}] * len(values)
        elif hasattr(pipeline, "id2label"):
            values, rows = list(pipeline.id2label), [{}] * len(pipeline.id2label)
        else:
            raise InputError(f"{type(pipeline).__name__} has no classes; give its prompts as train_conditions.")
        if not values:
            raise InputError("There are no conditions to train on.")
        values = [value.item() if hasattr(value, "item") else value for value in values]  # numbers of numpy and torch
        labels = {name: label for label, name in getattr(pipeline, "id2label", {}).items()}
        return cls([labels.get(value, value) for value in values], rows)

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Sequence[int]) -> list:
        """The conditions of some rows."""
        return [self.values[row] for row in rows]

    def metadata_of(self, rows: Sequence[int]) -> list[Mapping]:
        """The metadata of some rows."""
        return [self.metadata[row] for row in rows]

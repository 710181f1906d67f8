# SPDX-License-Identifier: Apache-2.0
"""Images by class, from the Hub, from a folder, or scikit-learn's digits; everything wrong with them is said at once.

Whatever the source, it is read by `datasets` and ends as two torch data sets (`images.py`). An item depends on its
index alone, which exact resume needs: mirroring is not random, it adds items.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch.utils.data import Dataset

from .decoding import whole_images
from .images import WithMirrorImages, image_form, labelled_images, processed_form
from .labels import in_order


if TYPE_CHECKING:
    import datasets


__all__ = ["ImageClasses", "load_image_classes", "load_images"]


@dataclass(frozen=True)
class ImageClasses:
    """Labelled images for training and validation.

    Attributes:
        train, validation: Items {"images": float32 (channels, resolution, resolution) in [-1, 1], or as a model's
            image processor makes them, "labels": int}.
        class_names: By label: the source's order, but numbers by what they say (0, 1, 2, 10).
        channels: 1 (gray) or 3.
        resolution: Height and width in pixels.
        image_processor: How they are made of pictures, as preprocessor_config.json says it, if it is known.
    """

    train: Dataset[dict[str, Any]]
    validation: Dataset[dict[str, Any]]
    class_names: list[str]
    channels: int
    resolution: int
    image_processor: dict[str, Any] | None = None


def load_image_classes(
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    resolution: int | None = None,
    center_crop: bool = True,
    random_flip: bool = False,
    validation_fraction: float = 0.2,
    seed: int = 0,
    broken_images: Literal["error", "skip"] = "error",
    pool_splits: bool = False,
    image_processor: Any = None,
    channels: int = 3,
) -> ImageClasses:
    """Load images by class; without a name and a folder, scikit-learn's 1,797 handwritten digits of 8 x 8 gray pixels.

    Args:
        dataset_name: A data set on the Hub, or the path of one.
        dataset_config_name: Its configuration.
        train_data_dir: A folder with one folder of images per class; `train` and `validation` folders of such are
            taken as the splits.
        image_column, label_column: Where the images and the labels are; labels may be classes, numbers or texts.
        resolution: Of the images handed out; `None` takes them as they are, if all are squares of one size.
        center_crop: Resize the shorter side, and cut a centred square from an image that is none; else it is squeezed
            into one.
        random_flip: Train on the mirror image of each image, too: it is an item of its own.
        validation_fraction: Of the images, for validation, where the source has no validation (or test) split.
        seed: Of that split; independent of the training's, so that runs are compared on the same images.
        broken_images: What to do about files of `train_data_dir` that cannot be decoded: refuse, or leave them out.
        pool_splits: Take the source's splits as one set, of which `validation_fraction` is for validation: the splits
            of few-shot sets (miniImageNet) are by class, so that each lacks the classes of the others.
        image_processor: Of the model that is to take the images: it decides on size, cropping, resampling, mean, and
            standard deviation, and `center_crop` does not count.
        channels: That this model takes, 1 or 3; else images are gray if all of them are.

    Raises:
        ValueError: Naming what is missing or broken, before any training.
    """
    if dataset_name is not None and train_data_dir is not None:
        raise ValueError(f"dataset_name={dataset_name!r} and train_data_dir={train_data_dir!r}: give one of them.")
    if resolution is not None and resolution <= 0:
        raise ValueError(f"resolution={resolution} must be positive.")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must lie between 0 and 1.")
    if broken_images not in ("error", "skip"):
        raise ValueError(f"broken_images={broken_images!r} must be 'error' or 'skip'.")
    columns = image_column, label_column
    if train_data_dir is not None:
        source = f"train_data_dir={train_data_dir!r}"
        if not Path(train_data_dir).is_dir():
            raise ValueError(f"{source} is not a folder.")
        splits = _load(source, columns, "imagefolder", data_dir=train_data_dir)
    elif dataset_name is not None:
        source = f"dataset_name={dataset_name!r}"
        splits = _load(source, columns, dataset_name, dataset_config_name)
    else:
        splits, source = {"train": _digits()}, "scikit-learn's digits"
    for split in splits.values():
        _check_columns(split.features, *columns, source)
    splits = _train_and_validation(splits, label_column, source, pool_splits)
    _class_names_and_labels(splits, label_column, source)  # what is wrong with them is said before images are opened
    splits, kinds = whole_images(splits, image_column, source, broken_images)
    if image_processor is None:
        form = image_form(kinds, source, resolution=resolution, center_crop=center_crop)
    else:
        form = processed_form(kinds, source, image_processor, channels=channels, resolution=resolution)
    class_names, labels = _class_names_and_labels(splits, label_column, source)
    if "validation" not in splits:
        rows = _draw_validation(labels["train"], validation_fraction, seed)
        labels = {name: labels["train"][index] for name, index in rows.items()}
        splits = {name: splits["train"].select(index) for name, index in rows.items()}
    train, validation = (
        labelled_images(splits[name], image_column, labels[name], form) for name in ("train", "validation")
    )
    return ImageClasses(
        train=WithMirrorImages(train) if random_flip else train,
        validation=validation,
        class_names=class_names,
        channels=form.channels,
        resolution=form.resolution,
        image_processor=form.as_processor,
    )


def _digits() -> "datasets.Dataset":
    """scikit-learn's digits with the columns of an image classification set on the Hub."""
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray(pixels) for pixels in (digits.images * (255 / 16)).round().astype(np.uint8)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def _load(source: str, columns: tuple[str, str], *name: str | None, **arguments: str) -> dict[str, "datasets.Dataset"]:
    """The splits of a source; where it says before the download what columns it has, that is checked first."""
    import datasets

    empty = f"{source} holds no images: it needs one folder of images per class"
    try:
        builder = datasets.load_dataset_builder(*name, **arguments)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{empty} ({error}).") from error
    if builder.info.features:
        _check_columns(builder.info.features, *columns, source)
    try:
        builder.download_and_prepare()
        return dict(builder.as_dataset())
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            f"{source} cannot be read ({error.__cause__ or error}). An archive with one folder of images per class "
            "has to be unpacked first."
        ) from error
    except ValueError as error:
        raise ValueError(f"{empty} ({error}).") from error


def _check_columns(features: "datasets.Features", image_column: str, label_column: str, source: str) -> None:
    import datasets

    if image_column not in features:
        raise ValueError(f"image_column={image_column!r} is no column of {source}, which has {list(features)}.")
    if not isinstance(features[image_column], datasets.Image):
        raise ValueError(
            f"image_column={image_column!r} of {source} holds no images, but {features[image_column]}; its "
            f"columns are {list(features)}."
        )
    if label_column not in features:
        raise ValueError(
            f"label_column={label_column!r} is no column of {source}, which has {list(features)}. A folder has "
            "labels when there are several folders in it, one per class."
        )
    if not isinstance(feature := features[label_column], (datasets.ClassLabel, datasets.Value)):
        raise ValueError(f"label_column={label_column!r} of {source} is {feature}, not one label an image.")


def _train_and_validation(
    splits: dict[str, "datasets.Dataset"], label_column: str, source: str, pool_splits: bool
) -> dict[str, "datasets.Dataset"]:
    """The training split and the source's own validation split, if it has one with labels; or all of them in one."""
    import datasets

    labelled = {name: split for name, split in splits.items() if len(split) and _has_labels(split, label_column)}
    if pool_splits:
        found = {"train": datasets.concatenate_datasets(list((labelled or splits).values()))}
    elif "train" in splits:
        own = [labelled[name] for name in ("validation", "valid", "val", "test") if name in labelled]
        found = {"train": splits["train"], **({"validation": own[0]} if own else {})}
    else:
        raise ValueError(f"{source} has no split 'train', but {sorted(splits)}.")
    if (count := len(found["train"])) < 2:
        raise ValueError(f"{source} has {count} images; training and validation take more.")
    return found


def _has_labels(split: "datasets.Dataset", label_column: str) -> bool:
    """Test sets of competitions come without: None or -1."""
    return not {None, -1} & set(split[label_column])


def _class_names_and_labels(
    splits: dict[str, "datasets.Dataset"], label_column: str, source: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The classes of the training split and, by split, the label of each image as an index into them, (n,)."""
    import datasets

    values, feature = list(splits["train"][label_column]), splits["train"].features[label_column]
    if missing := sum(value is None or value == -1 for value in values):
        raise ValueError(f"label_column={label_column!r} of {source}: {missing} of {len(values)} labels are missing.")
    texts = {name: _texts(split, label_column) for name, split in splits.items()}
    known = set(texts["train"])
    if len(known) < 2:
        raise ValueError(f"{source} has only images of {texts['train'][0]!r}: one class is not enough.")
    if unknown := sorted(set(texts.get("validation", ())) - known):
        raise ValueError(
            f"{source} has classes in its validation split that it has no training images of: {unknown[:5]}."
        )
    listed = feature.names if isinstance(feature, datasets.ClassLabel) else map(str, sorted(set(values)))
    names = in_order(listed)
    index = {name: label for label, name in enumerate(names)}
    return names, {name: np.array([index[text] for text in split]) for name, split in texts.items()}


def _texts(split: "datasets.Dataset", label_column: str) -> list[str]:
    import datasets

    values, feature = split[label_column], split.features[label_column]
    return [feature.names[value] if isinstance(feature, datasets.ClassLabel) else str(value) for value in values]


def _draw_validation(labels: np.ndarray, fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Rows of images (n,) to train on and for validation; a class is never for validation only."""
    import datasets

    rows = datasets.Dataset.from_dict({"row": range(len(labels))}).train_test_split(test_size=fraction, seed=seed)
    train, validation = (np.array(rows[name]["row"]) for name in ("train", "test"))
    lost = np.setdiff1d(labels[validation], labels[train])
    moved = [int(np.flatnonzero(labels[validation] == label)[0]) for label in lost]
    train, validation = np.append(train, validation[moved]).astype(int), np.delete(validation, moved)
    if not len(validation):
        raise ValueError(f"{len(labels)} images of {len(np.unique(labels))} classes are too few to validate on any.")
    return {"train": train, "validation": validation}


def load_images(
    args: Namespace,
    *,
    random_flip: bool = False,
    pool_splits: bool = False,
    resolution: int | None = None,
    image_processor: Any = None,
    channels: int = 3,
) -> ImageClasses:
    """The images that `args` name, of the resolution that they say or, if they say none, this one; see
    `load_image_classes`."""
    return load_image_classes(
        args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        image_column=args.image_column,
        label_column=args.label_column,
        resolution=args.resolution or resolution,
        center_crop=args.center_crop,
        random_flip=random_flip,
        seed=args.seed,
        broken_images=args.broken_images,
        pool_splits=pool_splits,
        image_processor=image_processor,
        channels=channels,
    )

# SPDX-License-Identifier: Apache-2.0
"""Images by class, from the Hub, from a folder, or scikit-learn's digits; everything wrong with them is said at once.

Whatever the source, it is read by `datasets` and ends as two torch data sets (`images.py`). An item depends on its
index alone, which exact resume needs: mirroring is not random, it adds items.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .images import ImageForm, WithMirrorImages, labelled_images


if TYPE_CHECKING:
    import datasets


__all__ = ["ImageClasses", "load_image_classes"]


@dataclass(frozen=True)
class ImageClasses:
    """Labelled images for training and validation.

    Attributes:
        train, validation: Items {"images": float32 (channels, resolution, resolution) in [-1, 1], "labels": int}.
        class_names: By label.
        channels: 1 (gray) or 3.
        resolution: Height and width in pixels.
    """

    train: Dataset[dict[str, Any]]
    validation: Dataset[dict[str, Any]]
    class_names: list[str]
    channels: int
    resolution: int


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
) -> ImageClasses:
    """Load images by class; without a name and a folder, scikit-learn's 1,797 handwritten digits of 8 x 8 gray pixels.

    Args:
        dataset_name: A data set on the Hub, or the path of one.
        dataset_config_name: Its configuration.
        train_data_dir: A folder with one folder of images per class; `train` and `validation` folders of such are
            taken as the splits.
        image_column, label_column: Where the images and the labels are; labels may be classes, numbers or texts.
        resolution: Of the images handed out; `None` takes them as they are, if all are squares of one size.
        center_crop: Cut the largest centred square from an image that is none; else it is squeezed into one.
        random_flip: Train on the mirror image of each image, too: it is an item of its own.
        validation_fraction: Of the images, for validation, where the source has no validation (or test) split.
        seed: Of that split; independent of the training's, so that runs are compared on the same images.
        broken_images: What to do about files of `train_data_dir` that cannot be decoded: refuse, or leave them out.
        pool_splits: Take the source's splits as one set, of which `validation_fraction` is for validation: the splits
            of few-shot sets (miniImageNet) are by class, so that each lacks the classes of the others.

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
    import datasets

    if train_data_dir is not None:
        splits = _load_folder(train_data_dir, image_column, broken_images)
        source = f"train_data_dir={train_data_dir!r}"
    elif dataset_name is not None:
        splits = dict(datasets.load_dataset(dataset_name, dataset_config_name))
        source = f"dataset_name={dataset_name!r}"
    else:
        splits, source = {"train": _digits()}, "scikit-learn's digits"
    for split in splits.values():
        _check_columns(split, image_column, label_column, source)
    if pool_splits:
        labelled = [split for split in splits.values() if _has_labels(split, label_column)]
        splits = {"train": datasets.concatenate_datasets(labelled or list(splits.values()))}
    train, validation = _train_and_validation(splits, label_column, validation_fraction, seed, source)

    class_names = _class_names(splits["train"], label_column, source)
    train_labels = _labels(train, label_column, class_names, source)
    validation_labels = _labels(validation, label_column, class_names, source)
    if len(present := set(train_labels.tolist())) < 2:
        raise ValueError(f"{source} has only images of {class_names[min(present)]!r}: one class is not enough.")

    first = train[0][image_column]
    channels = 1 if first.mode in ("1", "L") else 3
    if resolution is None:
        if first.width != first.height:
            raise ValueError(
                f"resolution=None, but {source} has images of {first.width} x {first.height} pixels: give one."
            )
        resolution, exact = first.width, True
    else:
        exact = False
    form = ImageForm(channels, resolution, center_crop, exact)
    prepared = labelled_images(train, image_column, train_labels, form)
    return ImageClasses(
        train=WithMirrorImages(prepared) if random_flip else prepared,
        validation=labelled_images(validation, image_column, validation_labels, form),
        class_names=class_names,
        channels=channels,
        resolution=resolution,
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


def _load_folder(folder: str, image_column: str, broken_images: str) -> dict[str, "datasets.Dataset"]:
    """The splits of a folder of images, without the files that cannot be decoded."""
    import datasets

    if not Path(folder).is_dir():
        raise ValueError(f"train_data_dir={folder!r} is not a folder.")
    try:
        splits = dict(datasets.load_dataset("imagefolder", data_dir=folder))
    except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"train_data_dir={folder!r} holds no images ({error}): it needs one folder of images per class."
        ) from error
    if image_column != "image" and image_column not in next(iter(splits.values())).column_names:
        return splits  # the check of the columns, which comes next, says so
    whole: dict[str, datasets.Dataset] = {}
    broken: list[str] = []
    for name, split in splits.items():
        files = [row["path"] for row in split.cast_column(image_column, datasets.Image(decode=False))[image_column]]
        with ThreadPoolExecutor() as threads:
            decodes = list(tqdm(threads.map(_decodes, files), desc="check images", total=len(files), delay=2))
        broken += [file for file, good in zip(files, decodes, strict=True) if not good]
        whole[name] = split.select(np.flatnonzero(decodes))
    if broken:
        listed = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        message = f"train_data_dir={folder!r}: {len(broken)} images cannot be decoded: {listed}"
        if broken_images == "error" or not all(len(split) for split in whole.values()):
            raise ValueError(f"{message}. Mend or delete them, or leave them out with broken_images='skip'.")
        datasets.utils.logging.get_logger(__name__).warning(f"{message}. They are left out.")
    return whole


def _decodes(file: str) -> bool:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.draft("L", (1, 1))  # lets JPEG be read to its end without being computed in full
            image.load()
    except Exception:  # Pillow's formats raise many things: OSError, SyntaxError, struct.error, DecompressionBombError
        return False
    return True


def _check_columns(split: "datasets.Dataset", image_column: str, label_column: str, source: str) -> None:
    import datasets

    if image_column not in split.column_names:
        raise ValueError(f"image_column={image_column!r} is no column of {source}, which has {split.column_names}.")
    if not isinstance(split.features[image_column], datasets.Image):
        raise ValueError(
            f"image_column={image_column!r} of {source} holds no images, but {split.features[image_column]}; its "
            f"columns are {split.column_names}."
        )
    if label_column not in split.column_names:
        raise ValueError(
            f"label_column={label_column!r} is no column of {source}, which has {split.column_names}. A folder has "
            "labels when there are several folders in it, one per class."
        )


def _train_and_validation(
    splits: dict[str, "datasets.Dataset"], label_column: str, fraction: float, seed: int, source: str
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """The training split, and a validation split with labels: the source's own, or a part of the training split."""
    if "train" not in splits:
        raise ValueError(f"{source} has no split 'train', but {sorted(splits)}.")
    for name in ("validation", "valid", "val", "test"):
        if name in splits and _has_labels(splits[name], label_column):
            return splits["train"], splits[name]
    if len(splits["train"]) < 2:
        raise ValueError(f"{source} has {len(splits['train'])} images; training and validation take more.")
    parts = splits["train"].train_test_split(test_size=fraction, seed=seed)
    return parts["train"], parts["test"]


def _has_labels(split: "datasets.Dataset", label_column: str) -> bool:
    """Test sets of competitions come without: None or -1."""
    return not {None, -1} & set(split[label_column])


def _class_names(split: "datasets.Dataset", label_column: str, source: str) -> list[str]:
    import datasets

    values, feature = split[label_column], split.features[label_column]
    if missing := sum(value is None or value == -1 for value in values):
        raise ValueError(f"label_column={label_column!r} of {source}: {missing} of {len(values)} labels are missing.")
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    try:
        return [str(value) for value in sorted(set(values))]
    except TypeError as error:  # lists, dicts
        raise ValueError(f"label_column={label_column!r} of {source} is {feature}, not one label an image.") from error


def _labels(split: "datasets.Dataset", label_column: str, class_names: list[str], source: str) -> np.ndarray:
    """The label of each image as an index into `class_names`, (n,)."""
    import datasets

    feature, index = split.features[label_column], {name: i for i, name in enumerate(class_names)}
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    texts = [str(value) if names is None else names[value] for value in split[label_column]]
    if unknown := sorted(set(texts) - set(index)):
        raise ValueError(
            f"{source} has classes in its validation split that it has no training images of: {unknown[:5]}."
        )
    return np.array([index[text] for text in texts])

# SPDX-License-Identifier: Apache-2.0
import io
import json
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from diffusers_learngene.data import image_classes as data_module
from diffusers_learngene.data import images as images_module
from diffusers_learngene.data.image_classes import load_image_classes


def picture(color, size=(12, 12), mode="RGB"):
    return Image.new(mode, size, color)


@pytest.fixture
def folder(tmp_path):
    """3 classes of 4 images, 12 x 12."""
    for index, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            picture((80 * index, 20 * number, 0)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def digits():
    return load_image_classes()


def test_the_digits_are_the_default(digits):
    data = digits
    assert (len(data.train), len(data.validation)) == (1437, 360)
    assert (data.channels, data.resolution, data.class_names) == (1, 8, [str(digit) for digit in range(10)])
    item = data.train[0]
    assert item["images"].shape == (1, 8, 8) and item["images"].dtype == torch.float32
    pixels = torch.stack([item["images"] for item in data.validation])
    assert pixels.min() == -1 and pixels.max() == 1 and type(item["labels"]) is int
    assert len({item["labels"] for item in data.validation}) == 10


def test_the_split_is_a_function_of_its_seed(digits):
    again, other = load_image_classes(), load_image_classes(seed=1)
    assert torch.equal(again.train[0]["images"], digits.train[0]["images"])
    assert not torch.equal(other.train[0]["images"], digits.train[0]["images"])


def test_a_mirror_image_is_an_item_of_its_own(digits):
    plain, doubled = digits, load_image_classes(random_flip=True)
    assert len(doubled.train) == 2 * 1437 and len(doubled.validation) == 360
    assert torch.equal(doubled.train[1437 + 5]["images"], plain.train[5]["images"].flip(-1))
    assert doubled.train[1437 + 5]["labels"] == plain.train[5]["labels"]
    with pytest.raises(IndexError):
        doubled.train[2 * 1437]


def test_a_folder(folder):
    data = load_image_classes(train_data_dir=str(folder), validation_fraction=0.25)
    assert data.class_names == ["ant", "bee", "cat"] and (data.channels, data.resolution) == (3, 12)
    assert (len(data.train), len(data.validation)) == (9, 3)
    for item in (*data.train, *data.validation):
        assert item["images"][0, 0, 0] == pytest.approx(80 * item["labels"] / 127.5 - 1)


def test_large_sets_are_decoded_lazily_and_alike(folder, monkeypatch):
    arguments = {"train_data_dir": str(folder), "resolution": 8, "random_flip": True}
    eager = load_image_classes(**arguments)
    monkeypatch.setattr(images_module, "IN_MEMORY_BYTES", 0)
    lazy = load_image_classes(**arguments)
    assert isinstance(eager.validation.pixels, np.ndarray) and not isinstance(lazy.validation.pixels, np.ndarray)
    for a, b in zip(eager.train, lazy.train, strict=True):
        assert torch.equal(a["images"], b["images"]) and a["labels"] == b["labels"]


def test_a_validation_folder_is_the_validation_split(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "both" / split).mkdir(parents=True)
        for name in ("bee", "cat"):
            target = tmp_path / "both" / split / name
            target.mkdir()
            picture((255, 0, 0)).save(target / "a.png")
    data = load_image_classes(train_data_dir=str(tmp_path / "both"))
    assert (len(data.train), len(data.validation)) == (2, 2)


def test_crop_or_squeeze(tmp_path):
    left = Image.new("L", (16, 8))
    left.paste(255, (0, 0, 4, 8))  # white, then 12 black columns
    for name in ("a", "b"):
        (tmp_path / "wide" / name).mkdir(parents=True)
        for number in range(2):
            left.save(tmp_path / "wide" / name / f"{number}.png")
    arguments = {"train_data_dir": str(tmp_path / "wide"), "resolution": 8}
    cropped, squeezed = load_image_classes(**arguments), load_image_classes(**arguments, center_crop=False)
    assert (cropped.channels, cropped.resolution) == (1, 8)
    assert (cropped.train[0]["images"] == -1).all()
    assert squeezed.train[0]["images"][0, 0].tolist()[0] > 0.9 > squeezed.train[0]["images"][0, 0].tolist()[4]
    with pytest.raises(ValueError, match="16 x 8 pixels: give one"):
        load_image_classes(train_data_dir=str(tmp_path / "wide"))


def test_sizes_that_differ_need_a_resolution(folder):
    picture((0, 0, 0), (10, 10)).save(folder / "ant" / "small.png")
    with pytest.raises(ValueError, match="12 x 12 and of 10 x 10|10 x 10 and of 12 x 12"):
        load_image_classes(train_data_dir=str(folder))
    assert load_image_classes(train_data_dir=str(folder), resolution=12).resolution == 12


def test_broken_images_are_counted_and_named(folder):
    (folder / "ant" / "0.png").write_bytes(b"no image")
    whole = (folder / "bee" / "1.png").read_bytes()
    (folder / "bee" / "1.png").write_bytes(whole[: len(whole) // 2])
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cat" / "cut.jpg")
    whole = (folder / "cat" / "cut.jpg").read_bytes()
    (folder / "cat" / "cut.jpg").write_bytes(whole[:-80])
    with pytest.raises(
        ValueError, match=r"3 images cannot be decoded: .*0\.png.*1\.png.*cut\.jpg.*broken_images='skip'"
    ):
        load_image_classes(train_data_dir=str(folder))
    data = load_image_classes(train_data_dir=str(folder), broken_images="skip")
    assert len(data.train) + len(data.validation) == 10


def encoded(images):
    """Images as a table of the Hub holds them, a file's bytes in a cell."""
    rows = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    return rows


def test_broken_images_of_a_table(tmp_path):
    rows = encoded(PICTURES)
    rows[2]["bytes"], rows[4] = rows[2]["bytes"][:45], {"bytes": b"no image", "path": "five.png"}
    path = saved(tmp_path, {"image": rows, "label": [0, 1] * 3}, image_features())
    with pytest.raises(ValueError, match=r"dataset_name=.*: 2 images cannot be decoded: train\[2\], five.png\. Mend"):
        load_image_classes(path)
    data = load_image_classes(path, broken_images="skip", validation_fraction=0.25)
    assert len(data.train) == 3 and len(data.validation) == 1


def zipped(folder, target, **lines):
    """A folder with one archive in it."""
    target.mkdir()
    with zipfile.ZipFile(target / "train.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
        for name, text in lines.items():
            archive.writestr(f"{name}.jsonl", text)
    return str(target)


@pytest.mark.parametrize("argument", ["train_data_dir", "dataset_name"])
def test_broken_images_of_an_archive(folder, tmp_path, argument):
    (folder / "bee" / "1.png").write_bytes(b"no image")
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.png"))
    lines = "".join(json.dumps({"file_name": str(file), "label": file.parts[0]}) + "\n" for file in files)
    path = {argument: zipped(folder, tmp_path / "zip", metadata=lines)}
    with pytest.raises(ValueError, match=r"1 images cannot be decoded: .*bee/1\.png"):
        load_image_classes(**path)
    data = load_image_classes(**path, broken_images="skip")
    assert len(data.train) + len(data.validation) == 11 and data.class_names == ["ant", "bee", "cat"]


def test_an_archive_of_class_folders_has_to_be_unpacked(folder, tmp_path):
    """`datasets` takes the archive's own folder for the class."""
    with pytest.raises(ValueError, match="train_data_dir=.* cannot be read .*has to be unpacked"):
        load_image_classes(train_data_dir=zipped(folder, tmp_path / "zip"))


def test_sixteen_bits_are_scaled(tmp_path):
    steps = np.linspace(0, 2**16 - 1, 16).round().reshape(4, 4)
    rows = []
    for pixels, suffix in ((steps.astype(np.uint16), "PNG"), (steps.astype(np.int32), "TIFF")):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, suffix)
        rows += [{"bytes": file.getvalue(), "path": None}] * 3
    path = saved(tmp_path, {"image": rows, "label": [0, 1] * 3}, image_features())
    data = load_image_classes(path, validation_fraction=0.5)
    assert data.channels == 1
    expected = torch.linspace(-1, 1, 16).view(1, 4, 4)
    for item in (*data.train, *data.validation):
        torch.testing.assert_close(item["images"], expected, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("pixels", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 2**16, np.int32)])
def test_pixels_without_a_range_are_refused(tmp_path, pixels):
    (tmp_path / "rows").mkdir()
    for name in ("a", "b"):
        (tmp_path / "rows" / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / "rows" / name / "x.tiff")
    with pytest.raises(ValueError, match=r"images of mode \['(F|I;32)'\], in which no number stands for white"):
        load_image_classes(train_data_dir=str(tmp_path / "rows"))


@pytest.mark.parametrize("odd, channels", [("LA", 1), ("I;16", 1), ("RGB", 3), ("P", 3)])
def test_all_images_decide_on_the_channels(tmp_path, odd, channels):
    """One of ten, wherever the seed puts it."""
    images = [picture(20 * i, (4, 4), "L") for i in range(9)] + [Image.new(odd, (4, 4))]
    path = saved(tmp_path, {"image": encoded(images), "label": [0, 1] * 5}, image_features())
    assert {load_image_classes(path, seed=seed).channels for seed in range(6)} == {channels}


def test_a_class_is_never_for_validation_only(tmp_path):
    path = saved(tmp_path, {"image": encoded(PICTURES * 2), "label": [0] * 10 + [1, 2]}, image_features())
    for seed in range(10):
        data = load_image_classes(path, seed=seed, validation_fraction=0.5)
        assert {item["labels"] for item in data.train} == {0, 1, 2} and len(data.train) + len(data.validation) == 12


@pytest.mark.parametrize(
    "labels, arguments, message",
    [
        ([1] * 6, {}, "has only images of '1'"),
        ([0, 1] * 3, {"label_column": "kind"}, "label_column='kind' is no column"),
        ([0, 1] * 3, {"image_column": "label"}, "image_column='label' .* holds no images"),
    ],
)
def test_what_a_table_says_is_checked_before_images_are_opened(tmp_path, monkeypatch, labels, arguments, message):
    path = saved(tmp_path, {"image": encoded(PICTURES), "label": labels}, image_features())
    monkeypatch.setattr(data_module, "whole_images", None)
    with pytest.raises(ValueError, match=message):
        load_image_classes(path, **arguments)


def test_what_the_hub_says_of_columns_is_checked_before_the_download(tmp_path, monkeypatch):
    path = Path(saved(tmp_path, {"image": encoded(PICTURES), "label": [0, 1] * 3}, image_features()))
    features = [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": "int64"}]
    card = {"dataset_info": {"features": features, "splits": [{"name": "train", "num_bytes": 1, "num_examples": 6}]}}
    (path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", None)
    with pytest.raises(ValueError, match="label_column='kind' is no column"):
        load_image_classes(str(path), label_column="kind")


def test_skipping_may_not_take_a_class(folder):
    for name in ("ant", "bee"):
        for file in (folder / name).glob("*.png"):
            file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="has only images of 'cat'"):
        load_image_classes(train_data_dir=str(folder), broken_images="skip")


def test_many_broken_images_are_not_all_listed(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    for broken_images in ("error", "skip"):  # nothing is left to train on
        with pytest.raises(ValueError, match=r"12 images cannot be decoded: ([^,]*, ){5}\.\.\."):
            load_image_classes(train_data_dir=str(folder), broken_images=broken_images)


def saved(tmp_path, columns, features=None):
    """The path of a data set in the layout of a Hub repository."""
    splits = columns if "train" in columns else {"train": columns}
    for name, split in splits.items():
        path = tmp_path / "hub" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(split, features=features).to_parquet(path)
    return str(tmp_path / "hub")


def image_features():
    return datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})


PICTURES = [picture((40 * i, 0, 0), (4, 4)) for i in range(6)]


@pytest.mark.parametrize("labels", [["b", "a"] * 3, [30, 10] * 3])
def test_labels_may_be_texts_and_numbers(tmp_path, labels):
    path = saved(tmp_path, {"picture": PICTURES, "kind": labels})
    data = load_image_classes(path, image_column="picture", label_column="kind")
    assert data.class_names == [str(name) for name in sorted(set(labels))]
    assert {item["labels"] for item in (*data.train, *data.validation)} == {0, 1}
    for item in data.train:  # 0, 80, 160 are the first of the two labels, the second in order
        assert item["labels"] == (1 if round((item["images"][0, 0, 0].item() + 1) * 127.5) % 80 == 0 else 0)


def test_a_test_split_without_labels_is_no_validation_split(tmp_path):
    columns = {"image": PICTURES, "label": [0, 1] * 3}
    path = saved(tmp_path, {"train": columns, "test": {**columns, "label": [-1] * 6}})
    data = load_image_classes(path, validation_fraction=0.5)
    assert (len(data.train), len(data.validation)) == (3, 3)


def test_splits_by_class_can_be_pooled(tmp_path):
    splits = {"train": [0, 1], "validation": [2, 3], "test": [4, 5]}
    columns = {name: {"image": PICTURES, "label": labels * 3} for name, labels in splits.items()}
    columns["unlabelled"] = {"image": PICTURES, "label": [-1] * 6}
    path = saved(tmp_path, columns)
    with pytest.raises(ValueError, match="that it has no training images of"):
        load_image_classes(path)
    data = load_image_classes(path, validation_fraction=0.5, pool_splits=True)
    assert data.class_names == ["0", "1", "2", "3", "4", "5"]
    assert sorted(item["labels"] for item in (*data.train, *data.validation)) == [i // 3 for i in range(18)]


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"img": PICTURES, "label": [0, 1] * 3}, {}, r"image_column='image' is no column of .*\['img', 'label'\]"),
        ({"image": PICTURES, "fine": [0, 1] * 3}, {}, r"label_column='label' is no column of .*\['image', 'fine'\]"),
        ({"image": ["a.png"] * 6, "label": [0, 1] * 3}, {}, "holds no images, but Value"),
        ({"image": PICTURES, "label": [1] * 6}, {}, "has only images of '1'"),
        ({"image": PICTURES, "label": [0, None] * 3}, {}, "3 of 6 labels are missing"),
        ({"image": PICTURES, "label": [[0, 1]] * 6}, {}, "not one label an image"),
        ({"image": PICTURES, "label": [{"a": 1}] * 6}, {}, "not one label an image"),
    ],
)
def test_columns_are_checked(tmp_path, columns, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_image_classes(saved(tmp_path, columns), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "resolution=0"),
        ({"validation_fraction": 1}, "validation_fraction=1"),
        ({"broken_images": "ignore"}, "broken_images='ignore'"),
        ({"dataset_name": "a", "train_data_dir": "b"}, "give one of them"),
        ({"train_data_dir": "nowhere"}, "'nowhere' is not a folder"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_image_classes(**arguments)


def test_folders_without_images_or_classes(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_image_classes(train_data_dir=str(tmp_path / "empty"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="holds no images"):
        load_image_classes(train_data_dir=str(tmp_path / "texts"))
    (tmp_path / "flat").mkdir()
    picture((0, 0, 0)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(ValueError, match="label_column='label' is no column.*one per class"):
        load_image_classes(train_data_dir=str(tmp_path / "flat"))


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("size, resolution", [((12, 12), None), ((12, 12), 8), ((32, 20), 8), ((20, 32), 16)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_processor_of_transformers_makes_the_same(tmp_path, center_crop, size, resolution, mode):
    draws = np.random.default_rng(0)
    smooth = draws.integers(0, 255, (4, 4, 3), np.uint8)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            image = Image.fromarray(smooth).rotate(90 * number).resize(size, Image.Resampling.BICUBIC).convert(mode)
            image.save(tmp_path / "images" / name / f"{number}.png")
    where = {"train_data_dir": str(tmp_path / "images")}
    data = load_image_classes(**where, resolution=resolution, center_crop=center_crop)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(data.image_processor))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    again = load_image_classes(**where, image_processor=processor, channels=data.channels)
    assert (again.channels, again.resolution) == (data.channels, data.resolution)
    for one, other in zip(data.train, again.train, strict=True):
        torch.testing.assert_close(one["images"], other["images"], rtol=0, atol=1e-6)
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()

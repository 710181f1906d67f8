# SPDX-License-Identifier: Apache-2.0
import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_learngene.training import images as images_module
from diffusers_learngene.training.data import load_image_classes


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

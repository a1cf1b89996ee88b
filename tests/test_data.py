"""Data sources, columns, splits, batches."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from maskpack_cli.options import Rows
from PIL import Image

from maskpack.errors import ConfigError, DataError
from maskpack.preprocess import ImagePreprocess, Interpolation, TextPreprocess, preprocess_from_json, preprocess_to_json
from maskpack.training.data.base import SOURCES, Data, EpochSampler, Splits, empty_classes, load_data, loader, readable


def image_tree(root: Path, modes: tuple[str, ...] = ("RGB",), size: int = 12) -> Path:
    for split, count in (("train", 5), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = (90 * number + 30 * i) % 256
                Image.new("RGB", (size, size), (colour, 255 - colour, 9)).convert(modes[i % len(modes)]).save(
                    folder / f"{i}.png"
                )
    return root


def csv_folder(root: Path) -> Path:
    (root / "train.csv").write_text("text,category\nhello there,b\nbye,a\nhi,b\n")
    (root / "test.csv").write_text("text,category\nsee you,a\n")
    return root


def test_every_source_has_the_contract() -> None:
    assert [source.id for source in SOURCES.all()] == [
        "csv",
        "digits",
        "hub",
        "image_folder",
        "json",
        "parquet",
        "text",
    ]
    for source in SOURCES.all():
        assert source.__doc__
        assert source.reference.startswith("https://")
        assert isinstance(source.priority, int)


def test_digits() -> None:
    data = load_data("digits:5-9")
    assert data.class_names == ("5", "6", "7", "8", "9")
    assert (len(data.train), len(data.test)) == (718, 178)
    image, label = data.train[0]
    assert (image.size, image.mode, data.class_names[label]) == ((8, 8), "RGB", "6")
    assert data.digest == load_data("digits:5-9").digest != load_data("digits:0-4").digest
    with pytest.raises(DataError, match="cannot read 'digits:9-5'; expected digits:A-B with A < B"):
        load_data("digits:9-5")


def test_image_folder_of_any_mode_becomes_rgb(tmp_path: Path) -> None:
    data = load_data(str(image_tree(tmp_path, ("RGB", "L", "P", "RGBA", "1"))))
    assert (data.task, data.class_names, data.id) == ("image-classification", ("cat", "dog"), tmp_path.name)
    assert [label for _, label in data.train] == [0] * 5 + [1] * 5
    assert {image.mode for image, _ in data.train} == {"RGB"}


def test_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = load_data(str(image_tree(tmp_path / "a"))).digest
    assert load_data(str(image_tree(tmp_path / "b"))).digest == one
    Image.new("RGB", (12, 12)).save(tmp_path / "b/test/cat/0.png")
    assert load_data(str(tmp_path / "b")).digest != one


def test_csv_finds_text_and_label(tmp_path: Path) -> None:
    data = load_data(str(csv_folder(tmp_path)))
    assert (data.task, data.class_names) == ("text-classification", ("a", "b"))
    assert list(data.train) == [("hello there", 1), ("bye", 0), ("hi", 1)]
    assert list(data.test) == [("see you", 0)]


def test_parquet_with_class_names_in_the_schema(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"picture": datasets.Image(), "fine": names, "other": datasets.Value("string")})
    rows = {"picture": [Image.new("L", (9, 9), i) for i in range(4)], "fine": [0, 1, 1, 0], "other": list("abcd")}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    data = load_data(str(tmp_path))
    assert data.class_names == ("no", "yes")
    assert data.test is None
    assert [label for _, label in data.train] == [0, 1, 1, 0]


def test_numbers_as_labels_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,10\nb,9\nc,10\n")
    assert load_data(str(tmp_path)).class_names == ("9", "10")


def test_columns_can_be_named_and_must_be_known(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("one,two,three\nx,a,p\ny,b,q\n")
    data = load_data(str(tmp_path), input_column="one", label_column="three")
    assert list(data.train) == [("x", 0), ("y", 1)]
    with pytest.raises(DataError, match="cannot tell which column holds the labels among one, two, three; name it"):
        load_data(str(tmp_path))
    with pytest.raises(DataError, match="cannot tell which column holds the inputs among one, two, three; name it"):
        load_data(str(tmp_path), label_column="two")
    with pytest.raises(DataError, match="the data have no column 'four'; they have: one, two, three"):
        load_data(str(tmp_path), label_column="four")
    with pytest.raises(DataError, match="the data have no column 'five'"):
        load_data(str(tmp_path), label_column="two", input_column="five")


def test_class_names_of_an_adapter_number_the_labels(tmp_path: Path) -> None:
    data = load_data(str(csv_folder(tmp_path)), class_names=["z", "b", "a"])
    assert [label for _, label in data.train] == [1, 2, 1]
    with pytest.raises(DataError, match=r"the train split has labels that the class names lack: b; known are a"):
        load_data(str(tmp_path), class_names=["a"])


def test_rows_without_a_label_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,\nc,y\n")
    with pytest.raises(DataError, match="the train split has rows without a label in column 'label'; remove them"):
        load_data(str(tmp_path))
    (tmp_path / "train.csv").write_text("text,label\na,-1\nb,1\n")
    assert load_data(str(tmp_path)).class_names == ("-1", "1"), "a number like others where no schema names classes"
    schema = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    for missing in (-1, None):
        folder = tmp_path / str(missing)
        folder.mkdir()
        rows = {"text": list("xyz"), "label": [0, 1, missing]}
        datasets.Dataset.from_dict(rows, features=schema).to_parquet(folder / "train.parquet")
        for names in (None, ["b", "a"]):
            with pytest.raises(DataError, match="the train split has rows without a label in column 'label'"):
                load_data(str(folder), class_names=names)


def test_splits_that_are_missing_or_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (image_tree(tmp_path) / "test").rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match="the test split of '.*' has no rows"):
        load_data(str(tmp_path))

    class Foreign:
        """A plug-in whose splits have other names."""

        id, reference, priority = "foreign", "", 1

        @staticmethod
        def matches(reference: str) -> bool:
            return reference == "foreign:x"

        @staticmethod
        def load(reference: str) -> Splits:
            return Splits({"more": None, "extra": None}, "x", "")

    monkeypatch.setattr(SOURCES, "_classes", {**SOURCES._classes, "foreign": Foreign})
    with pytest.raises(DataError, match="the data 'foreign:x' have neither a train nor a test split: more, extra"):
        load_data("foreign:x")


def test_labels_only_in_the_test_split_are_an_error(tmp_path: Path) -> None:
    csv_folder(tmp_path)
    (tmp_path / "test.csv").write_text("text,category\nwhat,c\n")
    with pytest.raises(DataError, match="the test split has labels that the class names lack: c"):
        load_data(str(tmp_path))


def indices(data: Data) -> tuple[list[int], list[int]]:
    assert data.train is not None
    assert data.validation is not None
    return list(data.train.indices), list(data.validation.indices)


def test_validation_is_split_off_the_training_rows_by_seed() -> None:
    train, held = indices(load_data("digits:5-9", validation_fraction=0.2, seed=1))
    assert (len(held), len(train)) == (144, 574)
    assert sorted(train + held) == list(range(718))
    assert indices(load_data("digits:5-9", validation_fraction=0.2, seed=1)) == (train, held)
    assert indices(load_data("digits:5-9", validation_fraction=0.2, seed=2)) != (train, held)
    # whoever has few labels has few for validation too
    few, held = indices(load_data("digits:5-9", validation_fraction=0.2, labels_fraction=0.1, seed=1))
    assert (len(few), len(held)) == (57, 14)
    kept = load_data("digits:5-9", labels_fraction=0.1, seed=1).train
    assert kept is not None
    assert sorted(few + held) == list(kept.indices)


def test_own_validation_split(tmp_path: Path) -> None:
    folder = str(csv_folder(tmp_path))
    assert load_data(folder).validation is None
    (tmp_path / "val.csv").write_text("text,category\nnew,b\n")
    data = load_data(folder)
    assert data.validation is not None
    assert (list(data.validation), len(data.train), list(data.test)) == ([("new", 1)], 3, [("see you", 0)])
    assert len(load_data(folder, validation_fraction=0.34).validation) == 1
    assert load_data(folder, validation_fraction=0).validation is None
    (tmp_path / "test.csv").unlink()
    data = load_data(folder)  # what there is to measure on is the test split
    assert (data.validation, list(data.test)) == (None, [("new", 1)])


def test_a_file_is_its_rows(tmp_path: Path) -> None:
    data = load_data(str(csv_folder(tmp_path) / "train.csv"))
    assert (len(data.train), data.test) == (3, None)


def test_shares_are_checked() -> None:
    for name, value in [
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("labels_fraction", 0),
        ("labels_fraction", 2),
    ]:
        with pytest.raises(
            ConfigError, match=r"validation_fraction must be in \[0, 1\) and labels_fraction in \(0, 1\]"
        ):
            load_data("digits:5-9", **{name: value})


def test_empty_classes_are_named() -> None:
    data = load_data("digits:0-9", labels_fraction=0.001)
    assert data.train is not None
    assert len(empty_classes(data.train, data.class_names)) == 9


def test_broken_data_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # no waiting for a network that is not there
    with pytest.raises(DataError, match="cannot read the data '/no/where'; expected a Hub data set id, a parquet"):
        load_data("/no/where")
    with pytest.raises(DataError, match=r"cannot read the data './where'; expected a Hub data set id, a parquet"):
        load_data("./where")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/train.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="cannot read the csv files in .*empty: .*; expected rows in each, with the sa"):
        load_data(str(tmp_path / "empty"))
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot read the parquet files in"):
        load_data(str(tmp_path))
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "flat/a.png")
    with pytest.raises(DataError, match="the labels among image; .* put the images of each class into a folder"):
        load_data(str(tmp_path / "flat"))
    with pytest.raises(DataError, match="cannot load 'user/nothing', which is no local folder, from the Hub"):
        load_data("user/nothing")


def test_rows_of_ones_own_to_validate_on(tmp_path: Path) -> None:
    for name, rows in {"data/train": 8, "data/test": 2, "mine": 5}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "no,b\n" * rows + "yes,a\n" * (rows > 2))
    read = Rows(validation=str(tmp_path / "mine.csv")).load(str(tmp_path / "data"))
    assert (len(read.train or ()), len(read.validation or ()), len(read.test or ())) == (9, 6, 2)
    assert read.validation is not None
    assert read.class_names[read.validation[0][1]] == "b", "numbered as in the training rows"
    with pytest.raises(ConfigError):
        Rows(validation="x", validation_fraction=0.1).load(str(tmp_path / "data"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_costs_only_itself(tmp_path: Path, workers: int) -> None:
    root = image_tree(tmp_path)
    (root / "train/cat/2.png").write_bytes(b"\x89PNG broken")
    (root / "train/dog/0.png").write_bytes(b"")
    data = load_data(str(root))
    assert data.train is not None
    batches = list(readable(loader(data.train, ImagePreprocess(8, 8), batch_size=3, workers=workers)))
    assert sum(len(y) for _, y in batches) == 8
    assert data.train.unreadable == {2, 5}


def test_batches_are_what_the_backbone_expects() -> None:
    data = load_data("digits:5-9")
    assert data.train is not None
    x, y = next(readable(loader(data.train, ImagePreprocess(8, 8, mean=(0, 0, 0), std=(1, 1, 1)), batch_size=4)))
    assert (x.shape, x.dtype, y.shape) == ((4, 3, 8, 8), torch.float32, (4,))
    image, _ = data.train[1]
    plain = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    assert torch.allclose(x[1], plain)
    with pytest.raises(DataError, match="the backbone expects text inputs, and column 'image' holds images"):
        loader(data.train, TextPreprocess())


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    data = load_data(str(csv_folder(tmp_path)))
    assert data.train is not None
    with pytest.raises(DataError, match="texts need the backbone's tokenizer"):
        loader(data.train, TextPreprocess())
    with pytest.raises(DataError, match="the backbone expects image inputs, and column 'text' holds texts"):
        loader(data.train, ImagePreprocess())


def test_order_follows_from_seed_and_epoch() -> None:
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    assert list(sampler) == first
    sampler.epoch = 1
    assert list(sampler) != first


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_pixels_are_those_of_the_classes_of_torchvision(interpolation: Interpolation) -> None:
    """Figures of adapters that exist rest on them."""
    from torchvision.transforms import v2

    how = ImagePreprocess(8, 10, interpolation)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8))
    crops = {"none": v2.CenterCrop(8), "crop": v2.RandomCrop(8, padding=1, padding_mode="edge")}
    for augment in ("none", "crop", "flip", "crop-flip"):
        steps = [v2.ToImage(), v2.Resize(10, interpolation=v2.InterpolationMode(interpolation), antialias=True)]
        steps += [crops["crop" if "crop" in augment else "none"]]
        steps += [v2.RandomHorizontalFlip()] if "flip" in augment else []
        whole = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(how.mean, how.std)])
        for seed in range(3):
            torch.manual_seed(seed)
            expected = whole(image)
            torch.manual_seed(seed)
            assert torch.equal(how.transform(augment)(image), expected.as_subclass(torch.Tensor))


def test_augmentation_moves_and_mirrors() -> None:
    image = Image.new("RGB", (16, 16))
    image.putpixel((3, 5), (255, 255, 255))
    how = ImagePreprocess(16, 16, mean=(0, 0, 0), std=(1, 1, 1))
    seen = {tuple(how.transform("crop-flip")(image)[0].argmax().unsqueeze(0).tolist()) for _ in range(60)}
    assert len(seen) > 10
    assert {int(how.transform("flip")(image)[0].argmax()) for _ in range(30)} == {5 * 16 + 3, 5 * 16 + 12}
    assert {int(how.transform()(image)[0].argmax()) for _ in range(5)} == {5 * 16 + 3}


def test_preprocessing_survives_json() -> None:
    for one in (ImagePreprocess(32, 40, "bicubic", (0.1, 0.2, 0.3), (1, 2, 3)), TextPreprocess(7)):
        assert preprocess_from_json({**preprocess_to_json(one), "later": 1}) == one
    with pytest.raises(ConfigError, match="unknown kind of preprocessing 'sound'; known: image, text"):
        preprocess_from_json({"kind": "sound"})
    with pytest.raises(ConfigError, match=r"preprocess\.resize is 8, expected an integer from 9 to 8192"):
        ImagePreprocess(9, 8)
    with pytest.raises(ConfigError, match=r"preprocess\.mean is"):
        ImagePreprocess(8, 8, mean=(1.0,))
    with pytest.raises(ConfigError, match=r"preprocess\.size is"):
        preprocess_from_json({"kind": "image", "size": "big"})

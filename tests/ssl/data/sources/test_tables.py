"""Parquet files and Hugging Face data sets: columns, splits, labels, and what is refused."""

from __future__ import annotations

import builtins
import io
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unlabeled.ssl.config.schema import DataConfig
from unlabeled.ssl.core.errors import ConfigError, DataError
from unlabeled.ssl.data.registry import open_source
from unlabeled.ssl.data.source import DecodeError, ImageSource

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 6), shade).save(file, "PNG")
    return file.getvalue()


def cells(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": encoded(start + index), "path": None} for index in range(count)]


def write(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def opened(path: Path | None, split: str = "train", name: str = "parquet", **settings: Any) -> ImageSource:
    return open_source(DataConfig(name=name, path=path, **settings), split)


def shades(source: ImageSource) -> list[int]:
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source))]


def labels_of(source: ImageSource) -> list[int] | None:
    labels = source.labels()
    return None if labels is None else labels.tolist()


def marked(count: int) -> Any:
    """A data set with the types of images and class labels, labels in turn."""
    features = datasets.Features(
        {"id": datasets.Value("int64"), "pic": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    columns = {"id": list(range(count)), "pic": cells(count), "kind": [index % 2 for index in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    ("column", "kind"),
    [(cells(6), "struct"), ([cell["bytes"] for cell in cells(6)], "binary"), (cells(6), "named")],
)
def test_image_columns_without_metadata_are_found(tmp_path: Path, column: list[Any], kind: str) -> None:
    columns = {"key": list(range(6)), "pixels": column}
    path = write(tmp_path / "x.parquet", **columns)
    source = opened(path, image_column="pixels" if kind == "named" else None)
    assert shades(source) == [0, 1, 2, 3, 4, 5]
    assert source.read(0).shape == (3, 6, 4)
    assert source.labels() is None
    assert source.describe(2) == f"row 2 of {path}"


def test_types_of_hugging_face_are_preferred(tmp_path: Path) -> None:
    marked(12).to_parquet(tmp_path / "x.parquet")
    train, test = (opened(tmp_path / "x.parquet", split, test_fraction=0.5) for split in ("train", "test"))
    assert train.classes == ["cat", "dog"]
    for source in (train, test):
        values = shades(source)
        assert labels_of(source) == [value % 2 for value in values]
        assert sum(value % 2 for value in values) == 3
    assert sorted(shades(train) + shades(test)) == list(range(12))


def test_labels_do_not_decode(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", image=[b"broken"] * 10, label=[0, 1] * 5)
    source = opened(path)
    assert sorted(labels_of(source) or []) == [0] * 4 + [1] * 4
    with pytest.raises(DecodeError, match=r"^row \d of .*x\.parquet: is not an image of a known format"):
        source.read(0)


@pytest.mark.parametrize("name", ["label", "labels", "fine_label", "class"])
@pytest.mark.parametrize("values", [["owl", "ant"], [7, 3], [True, False]])
def test_label_columns_by_name(tmp_path: Path, name: str, values: list[Any]) -> None:
    path = write(tmp_path / "x.parquet", image=cells(8), **{name: values * 4})
    source = opened(path, test_fraction=0.25)
    assert source.classes == [str(value) for value in sorted(values)]
    assert labels_of(source) == [1 - shade % 2 for shade in shades(source)]


def test_label_column_by_setting(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", image=cells(8), label=[0, 1] * 4, other=["b"] * 4 + ["a"] * 4)
    source = opened(path, label_column="other")
    assert source.classes == ["a", "b"]
    assert labels_of(source) == [int(shade < 4) for shade in shades(source)]


@pytest.mark.parametrize("held", ["test-00000.parquet", "validation.parquet", "val/0.parquet", "test/more/0.parquet"])
def test_files_named_for_splits(tmp_path: Path, held: str) -> None:
    write(tmp_path / "train-00000.parquet", image=cells(3), label=[1, 2, 3])
    write(tmp_path / "train-00001.parquet", image=cells(2, start=3), label=[1, 2])
    write(tmp_path / held, image=cells(2, start=100), label=[3, 1])
    train, test = (opened(tmp_path, split) for split in ("train", "test"))
    assert shades(train) == [0, 1, 2, 3, 4]
    assert shades(test) == [100, 101]
    assert labels_of(test) == [2, 0]


def test_patterns_and_unnamed_files_are_one_table(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", image=cells(5, start=5))
    write(tmp_path / "a.parquet", image=cells(5))
    write(tmp_path / "skipped.pq.parquet", image=cells(5, start=50))
    assert shades(opened(tmp_path / "?.parquet")) == list(range(10))
    assert len(opened(tmp_path)) == 15


def test_names_may_look_like_patterns(tmp_path: Path) -> None:
    write(tmp_path / "[x] *" / "a[1].parquet", image=cells(3))
    assert shades(opened(tmp_path / "[x] *" / "a[1].parquet")) == [0, 1, 2]
    assert shades(opened(tmp_path / "[x] *")) == [0, 1, 2]


def test_test_path_is_the_test_split(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=cells(5), label=[0, 1, 0, 1, 0])
    write(tmp_path / "b.parquet", image=cells(2, start=9), label=[1, 0])
    settings = {"test_path": tmp_path / "b.parquet"}
    assert shades(opened(tmp_path, **settings)) == [0, 1, 2, 3, 4]
    assert shades(opened(tmp_path, "test", **settings)) == [9, 10]


def test_found_labels_with_gaps_count_as_none(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", image=cells(4), label=[0, None, 1, 0])
    source = opened(path)
    assert labels_of(source) is None
    assert source.classes is None
    assert len(source) == 4
    with pytest.raises(DataError, match=r"^data\.label_column: 1 of 4 rows have no 'label'; fill or drop them$"):
        opened(path, label_column="label")


def test_cells_can_name_files_or_be_empty(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 33).save(tmp_path / "a.png")
    rows = [{"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": None, "path": None}, cells(1)[0]]
    source = opened(write(tmp_path / "x.parquet", image=rows))
    assert int(source.read(0)[0, 0, 0]) == 33
    assert int(source.read(2)[0, 0, 0]) == 0
    with pytest.raises(DecodeError, match=r"^row 1 of .*: its cell 'image' holds no encoded image$"):
        source.read(1)


def test_tables_pickle_small(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", image=[encoded(7) + b"\0" * 100_000] * 20, label=[0, 1] * 10)
    source = opened(path)
    data = pickle.dumps(source)
    assert len(data) < 20_000
    assert torch.equal(pickle.loads(data).read(3), source.read(3))


@pytest.mark.parametrize("split_names", [("train", "test"), ("train", "validation"), ("all",)])
def test_saved_data_sets(tmp_path: Path, split_names: tuple[str, ...]) -> None:
    whole = marked(10)
    if len(split_names) == 1:
        whole.save_to_disk(tmp_path / "saved")
    else:
        parts = {split_names[0]: whole.select(range(8)), split_names[1]: whole.select(range(8, 10))}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    train, test = (opened(tmp_path / "saved", split, name="hf") for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2)
    assert train.classes == ["cat", "dog"]
    assert sorted(shades(train) + shades(test)) == list(range(10))
    assert labels_of(test) == [shade % 2 for shade in shades(test)]


def test_local_data_set_folders(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "test/dog/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), int(name[-5])).save(tmp_path / name)
    test = opened(tmp_path, "test", name="hf")
    assert shades(test) == [3]
    assert labels_of(test) == [1]
    assert shades(opened(tmp_path, name="hf")) == [1, 2]


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", image=cells(4), label=[0.5, 1.5, 0.5, 1.5])
    with pytest.raises(ConfigError, match=r"^data\.image_column: .* has no column 'imag'; did you mean 'image'\?$"):
        opened(path, image_column="imag")
    with pytest.raises(ConfigError, match=r"^data\.label_column: .* has no column 'lable'; did you mean 'label'\?$"):
        opened(path, label_column="lable")
    with pytest.raises(DataError, match=r"^data\.label_column: 'label' holds no class labels but Value\("):
        opened(path, label_column="label")
    assert opened(path).labels() is None
    path = write(tmp_path / "y.parquet", text=["a"], number=[1])
    with pytest.raises(DataError, match=r"^data\.image_column: .* has no column of images; its columns are text"):
        opened(path)


def test_test_labels_outside_the_training_labels_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", image=cells(2), label=[0, 1])
    write(tmp_path / "test.parquet", image=cells(2), label=[0, 5])
    with pytest.raises(DataError, match=r"^data\.label_column: test label 5 is not among the 2 training labels$"):
        opened(tmp_path, "test")


def test_paths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path: not given; set data\.path=FILES$"):
        opened(None)
    with pytest.raises(DataError, match=r"^data\.path: .*/nowhere\.parquet does not exist"):
        opened(tmp_path / "nowhere.parquet")
    with pytest.raises(DataError, match=r"^data\.path: no parquet files at "):
        opened(tmp_path)
    with pytest.raises(DataError, match=r"^data\.path: no parquet files at .*\*\.parquet"):
        opened(tmp_path / "*.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"^data: .*bad\.parquet cannot be opened as a data set \(.+\); check it$"):
        opened(tmp_path / "bad.parquet")
    with pytest.raises(ConfigError, match=r"^data\.path: the hf source needs either"):
        opened(None, name="hf")
    with pytest.raises(DataError, match=r"^data\.path: .*/nowhere does not exist; give a saved data set$"):
        opened(tmp_path / "nowhere", name="hf")


def test_a_missing_test_split_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", image=cells(4))
    with pytest.raises(DataError, match=r"^data\.path: .* has no test split and no labels to hold a part out by"):
        opened(path, "test")


@pytest.mark.parametrize("name", ["parquet", "hf"])
def test_the_missing_package_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_datasets(module: str, *rest: Any, **named: Any) -> Any:
        if module == "datasets":
            raise ImportError(module)
        return imported(module, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ConfigError, match=r"needs the package datasets; run pip install 'unlabeled\[hf\]'$"):
        opened(tmp_path, name=name)

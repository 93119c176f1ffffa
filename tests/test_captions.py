"""Captions files of every published format give the same table; splits are by image; mistakes get one clear line."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_scratch.config import CFG
from clip_scratch.data.captions import check_images, image_folder, make_train_valid_dfs, read_captions, split_of
from clip_scratch.data.huggingface import _ImageFiles
from clip_scratch.data.readers import Columns, read_file
from clip_scratch.data.source import open_data
from clip_scratch.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared"
PAIRS = [("a.jpg", "A dog runs ."), ("a.jpg", "A dog , brown , runs ."), ("b.jpg", 'A "big" cat .')]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def pairs(path: Path, form: str = "auto", **columns: str) -> list[tuple[str, str]]:
    table = read_file(path, form, Columns(**columns))
    return list(zip(table["image"], table["caption"], strict=True))


def draw_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name)


def caption_file(folder: Path, n: int = 10) -> Path:
    """A captions file of n images with two captions each."""
    rows = [f"{i}.png,{text} {i}" for i in range(n) for text in ("one", "two")]
    return write(folder / "captions.csv", "\n".join(["image,caption", *rows]))


def refused(fragment: str, **config: object) -> str:
    """The message of the UserError that read_captions ends in; it holds `fragment`."""
    with pytest.raises(UserError) as caught:
        read_captions(CFG(**config))
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- formats

QUOTED = 'image,caption\na.jpg,A dog runs .\na.jpg,"A dog , brown , runs ."\nb.jpg,"A ""big"" cat ."\n'
FORMATS = {
    "kaggle": QUOTED,
    "crlf": QUOTED.replace("\n", "\r\n"),
    "bom": "\ufeff" + QUOTED,
    "blank lines": QUOTED.replace("\n", "\n\n"),
    "unquoted": 'image,caption\na.jpg,A dog runs .\na.jpg,A dog , brown , runs .\nb.jpg,A "big" cat .\n',
    "unpaired quotes": 'image\tcaption\na.jpg\tA dog runs .\na.jpg\tA dog , brown , runs .\nb.jpg\t"A ""big"" cat ."\n',
    "no header": QUOTED.split("\n", 1)[1],
    "tutorial": 'id,image,caption\n0,a.jpg,A dog runs .\n0,a.jpg,"A dog , brown , runs ."\n1,b.jpg,"A ""big"" cat ."\n',
    "index first": ',image,caption\n0,a.jpg,A dog runs .\n1,a.jpg,"A dog , brown , runs ."\n2,b.jpg,A "big" cat .\n',
    "tabs": 'Text\tFile Name\nA dog runs .\ta.jpg\nA dog , brown , runs .\ta.jpg\n"A ""big"" cat ."\tb.jpg\n',
    "semicolons": 'image;caption\na.jpg;A dog runs .\na.jpg;A dog , brown , runs .\nb.jpg;"A ""big"" cat ."\n',
    "flickr8k": 'a.jpg#0\tA dog runs .\na.jpg#1\tA dog , brown , runs .\nb.jpg#0\tA "big" cat .\n'
    "2258277193_586949ec62.jpg.1#0\tA boy .\n",
    "flickr30k": "image_name| comment_number| comment\na.jpg| 0| A dog runs .\n"
    'a.jpg| 4   A dog , brown , runs .\nb.jpg| 0| A "big" cat .\n',
    "karpathy": json.dumps(
        {
            "dataset": "x",
            "images": [
                {"filename": "a.jpg", "split": "train", "sentences": [{"raw": text} for _, text in PAIRS[:2]]},
                {"filename": "b.jpg", "split": "val", "sentences": [{"raw": PAIRS[2][1]}]},
            ],
        }
    ),
    "json": json.dumps([{"image": image, "caption": text} for image, text in PAIRS], indent=1),
    "json in an object": json.dumps({"data": [{"img": image, "text": text} for image, text in PAIRS]}),
    "json lines": "\n".join(json.dumps({"image_path": image, "product_title": text}) for image, text in PAIRS),
    "lists": '{"image": "a.jpg", "captions": ["A dog runs .", "A dog , brown , runs ."]}\n'
    '{"image": "./b.jpg", "captions": ["A \\"big\\" cat ."]}\n',
    "numbered": 'file,caption_0,caption_1\na.jpg,A dog runs .,"A dog , brown , runs ."\nb.jpg,"A ""big"" cat .",\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognised(tmp_path, name):
    found = [pair for pair in pairs(write(tmp_path / "captions", FORMATS[name])) if pair[1]]
    assert found == PAIRS


@pytest.mark.parametrize("form", ["flickr8k", "flickr30k", "karpathy", "json"])
def test_a_format_can_be_set(tmp_path, form):
    assert pairs(write(tmp_path / "captions", FORMATS[form]), form) == PAIRS


def test_columns_can_be_set(tmp_path):
    path = write(tmp_path / "x.csv", "photo id,title,words,kind\n1.jpg,no,yes,shoe\n")
    cfg = CFG(
        captions_path=path, image_column="photo id", caption_column="words", label_column="kind", valid_fraction=0
    )
    table = read_captions(cfg)
    assert table[["image", "caption", "label", "split"]].values.tolist() == [["1.jpg", "yes", "shoe", "train"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg,0,a dog runs\nb.jpg,1,a cat, asleep\n", [("a.jpg", "a dog runs"), ("b.jpg", "a cat, asleep")]),
        ("a.jpg,3 dogs run\nb.jpg,2,3 cats\n", [("a.jpg", "3 dogs run"), ("b.jpg", "2,3 cats")]),
        ('a.jpg, "a dog, red"\nb.jpg, a cat\n', [("a.jpg", "a dog, red"), ("b.jpg", "a cat")]),
        ('image, caption\na.jpg, "a ""red"" dog"\nb.jpg, "a cat"\n', [("a.jpg", 'a "red" dog'), ("b.jpg", "a cat")]),
        ('image,caption\na.jpg,a dog, "red"\n', [("a.jpg", 'a dog, "red"')]),
    ],
)
def test_csv_as_people_write_it(tmp_path, text, expected):
    assert pairs(write(tmp_path / "x.csv", text)) == expected


@pytest.mark.parametrize("end", ["b.jpg,a cat\n", 'b.jpg,a cat"\nc.jpg,a cow\n', 'b.jpg,"a cat"\n'])
def test_an_unclosed_quote_swallows_no_row(tmp_path, capsys, end):
    path = write(tmp_path / "x.csv", 'image,caption\na.jpg,"a dog\n' + end)
    assert [image for image, _ in pairs(path)] == ["a.jpg", "b.jpg", "c.jpg"][: 1 + end.count("\n")]
    assert "x.csv, row 2: double quotes do not pair" in capsys.readouterr().err


def test_nan_and_null_are_no_captions(tmp_path, capsys):
    rows = [
        '{"image": "a.jpg", "caption": NaN}',
        '{"image": NaN, "caption": "x"}',
        '{"image": "b.jpg", "caption": null}',
    ]
    rows += ['{"image": "c.jpg", "caption": ["y", null, NaN, ""]}']
    table = read_captions(CFG(captions_path=write(tmp_path / "x.jsonl", "\n".join(rows)), valid_fraction=0))
    assert table[["image", "caption"]].values.tolist() == [["c.jpg", "y"]]
    assert "Left out 3 rows with no image or no caption (the first: x.jsonl, row 1)" in capsys.readouterr().err


def test_text_that_cannot_be_encoded(tmp_path):
    path = write(tmp_path / "x.json", '[{"image": "a.jpg", "caption": "half an emoji \\ud83d"}]')
    assert pairs(path) == [("a.jpg", "half an emoji ?")]


def test_utf16_as_excel_saves_it(tmp_path):
    assert pairs(write(tmp_path / "x.txt", "image\tcaption\na.jpg\tżółty\n", "utf-16")) == [("a.jpg", "żółty")]


def test_coco_images_keep_their_folder(tmp_path):
    image = {"filepath": "val2014", "filename": "a.jpg", "split": "restval", "sentences": [{"raw": "A dog ."}]}
    table = read_captions(
        CFG(captions_path=write(tmp_path / "c.json", json.dumps({"images": [image]})), valid_fraction=0)
    )
    assert table[["image", "split"]].values.tolist() == [["val2014/a.jpg", "train"]]


def test_row_is_the_line_of_the_file(tmp_path):
    path = write(tmp_path / "x.csv", 'image,caption\n\na.jpg,"two\nlines"\nb.jpg,one\n')
    assert read_file(path, "auto", Columns())["row"].tolist() == [3, 5]


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(text.filter(str.strip), min_size=1, max_size=5), st.sampled_from(",\t;|"), st.sampled_from(["\n", "\r\n"])
)
def test_what_the_csv_library_writes_is_read_back(tmp_path, captions, delimiter, end):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["image", "caption"], *(["a.jpg", caption] for caption in captions)])
    read = pairs(write(tmp_path / "x.csv", out.getvalue()))
    assert [caption for _, caption in read] == [" ".join(caption.split()) for caption in captions]


# ---- the table


def test_ids_cleaning_and_repeats(tmp_path, capsys):
    path = write(tmp_path / "x.csv", "image,caption\nb.png,x\na.png,y\nb.png,x\nb.png, z  z \na.png,\n,w\n")
    table = read_captions(CFG(captions_path=path, valid_fraction=0.5))
    assert table[["image", "caption", "image_id"]].values.tolist() == [
        ["b.png", "x", 0],
        ["a.png", "y", 1],
        ["b.png", "z z", 0],
    ]
    assert "Left out 2 rows with no image or no caption (the first: x.csv, row 6)" in capsys.readouterr().err


def test_class_or_instance(tmp_path):
    class Mine(CFG):
        captions_path = str(caption_file(tmp_path))

    train, valid = make_train_valid_dfs(Mine)
    assert (train["image"].nunique(), valid["image"].nunique()) == (9, 1)
    assert make_train_valid_dfs(Mine())[0].equals(train)


def test_built_in_scenes_are_read_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = CFG(n_scenes=30)
    table = read_captions(cfg)
    assert table.groupby("split")["image"].nunique().sum() == 30
    assert set(table["split"]) == {"train", "valid", "test"}
    assert len(check_images(table, image_folder(cfg, table), "error", progress=False)) == len(table)


# ---- splits


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 40), st.floats(0, 0.4), st.floats(0, 0.4), st.integers(0, 5), st.randoms())
def test_seeded_split(tmp_path_factory, n, valid, test, seed, random):
    path = caption_file(tmp_path_factory.getbasetemp(), n)
    cfg = CFG(captions_path=path, valid_fraction=valid, test_fraction=test, seed=seed)
    table = read_captions(cfg)
    assert (table.groupby("image")["split"].nunique() == 1).all()
    assert set(table["split"]) == {"train"} | ({"valid"} if valid else set()) | ({"test"} if test else set())
    assert abs((table["split"] == "valid").sum() / 2 - n * valid) <= 1
    header, *rows = path.read_text().split("\n")
    random.shuffle(rows)
    shuffled = read_captions(
        CFG(
            captions_path=write(path, "\n".join([header, *rows])),
            **{name: getattr(cfg, name) for name in ("valid_fraction", "test_fraction", "seed")},
        )
    )
    assert dict(zip(shuffled["image"], shuffled["split"], strict=True)) == dict(
        zip(table["image"], table["split"], strict=True)
    )


def test_published_lists(tmp_path, capsys):
    path = caption_file(tmp_path, 4)
    write(tmp_path / "My.trainImages.txt", "0.png\r\n1.png\n")
    write(tmp_path / "devImages.txt", "2.png\nabsent.png\n")
    table = read_captions(CFG(captions_path=path))
    assert dict(zip(table["image"], table["split"], strict=True)) == {
        "0.png": "train",
        "1.png": "train",
        "2.png": "valid",
    }
    assert "Left out 1 images" in capsys.readouterr().err


def test_lists_of_another_data_set_are_ignored(tmp_path):
    write(tmp_path / "trainImages.txt", "other.png\n")
    assert len(read_captions(CFG(captions_path=caption_file(tmp_path, 4)))) == 8


def test_split_column(tmp_path):
    path = write(tmp_path / "x.csv", "image,caption,split\n1,x,train\n2,x,Validation\n3,x,test\n")
    assert read_captions(CFG(captions_path=path))["split"].tolist() == ["train", "valid", "test"]


def test_training_gives_the_validation_part_that_is_not_published(tmp_path, capsys):
    rows = [f"{i},x,{'test' if i < 3 else 'train'}" for i in range(13)]
    path = write(tmp_path / "x.csv", "\n".join(["image,caption,split", *rows]))
    table = read_captions(CFG(captions_path=path))
    assert table["split"].value_counts().to_dict() == {"train": 9, "test": 3, "valid": 1}
    assert table["image"].tolist() == [str(i) for i in range(13)]
    assert "has no validation split: 10% of its training images" in capsys.readouterr().err


def test_further_files_hold_the_other_splits(tmp_path):
    valid, test = (write(tmp_path / f"{name}.csv", f"image,caption\n{name}.png,x\n") for name in ("v", "t"))
    cfg = CFG(captions_path=caption_file(tmp_path, 3), valid_captions_path=valid, test_captions_path=test)
    table = read_captions(cfg)
    assert table[["image", "split", "file", "row"]].values.tolist()[-2:] == [
        ["v.png", "valid", "v.csv", 2],
        ["t.png", "test", "t.csv", 2],
    ]
    assert (table["split"] == "train").sum() == 6


@pytest.mark.parametrize(
    "names",
    [
        {"train": "train_data.json", "valid": "val_data.json", "test": "test_data.json"},
        {"train": "train.jsonl", "valid": "dev.jsonl"},
        {"train": "my-training.captions.csv", "valid": "my-Validation.captions.csv"},
        {"valid": "val.tsv", "test": "test.tsv"},
    ],
)
def test_a_folder_with_a_file_for_each_split(tmp_path, names):
    for split, name in names.items():
        draw_images(tmp_path / "photos", [f"{split}.png"])
        row = {"image": f"photos/{split}.png", "title": f"of {split}", "class": f"a {split}"}
        text = json.dumps(row) if "json" in name else "\t".join(row) + "\n" + "\t".join(row.values())
        write(tmp_path / name, text)
    cfg = CFG(captions_path=tmp_path)
    table = read_captions(cfg)
    assert table[["image", "caption", "image_id", "split", "file", "row", "label"]].values.tolist() == [
        [f"photos/{split}.png", f"of {split}", i, split, name, 1 if "json" in name else 2, f"a {split}"]
        for i, (split, name) in enumerate(names.items())
    ]
    assert image_folder(cfg, table) == image_folder(cfg) == tmp_path


def test_split_files_and_the_settings_for_further_files(tmp_path, capsys):
    for name in ("train", "test"):
        rows = [f"{name}{i}.png,x" for i in range(10)]
        write(tmp_path / "set" / f"{name}.csv", "\n".join(["image,caption", *rows]))
    counts = read_captions(CFG(captions_path=tmp_path / "set"))["split"].value_counts().to_dict()
    assert counts == {"train": 9, "valid": 1, "test": 10}
    assert "train.csv has no validation split" in capsys.readouterr().err
    other = write(tmp_path / "other.csv", "image,caption\nother.png,x\n")
    table = read_captions(CFG(captions_path=tmp_path / "set", test_captions_path=other, valid_fraction=0))
    assert table["split"].value_counts().to_dict() == {"train": 10, "test": 1}


def test_an_image_in_two_split_files_is_refused(tmp_path):
    for name in ("train", "val"):
        write(tmp_path / f"{name}.csv", "image,caption\na.png,x\n")
    refused("a.png is both in train (train.csv, row 2) and in valid (val.csv, row 2)", captions_path=tmp_path)


def test_an_error_in_a_split_file_names_it(tmp_path):
    write(tmp_path / "train.jsonl", '{"image": "a.png", "caption": "x"}\n')
    write(tmp_path / "val.jsonl", '{"image": "b.png", "caption": "x"}\n{"image": \n')
    refused("val.jsonl, row 2: cannot be read as JSON", captions_path=tmp_path)


# ---- folders and images


def test_a_folder_is_searched_for_its_captions_file(tmp_path):
    draw_images(tmp_path / "set/Flicker8k_Dataset", ["a.jpg", "b.jpg"])
    write(tmp_path / "set/text/Flickr8k.token.txt", FORMATS["flickr8k"])
    write(tmp_path / "set/text/Flickr8k.lemma.token.txt", "other")
    cfg = CFG(captions_path=tmp_path / "set")
    table = read_captions(cfg)
    assert len(table) == 3
    assert image_folder(cfg, table) == image_folder(cfg) == tmp_path / "set/Flicker8k_Dataset"


@pytest.mark.parametrize("place", [".", "Images", "photos"])
def test_images_are_found_beside_the_captions(tmp_path, place):
    draw_images(tmp_path / place, ["0.png", "1.png"])
    (tmp_path / "empty").mkdir()
    assert image_folder(CFG(captions_path=caption_file(tmp_path, 2))) == tmp_path / place


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ([".thumbs", "Images", "a-small"], "Images"),
        ([".thumbs", "photos"], "photos"),
        ([".thumbs"], "."),
        (["a", "images", "flickr30k_images"], "images"),
    ],
)
def test_hidden_folders_are_skipped_and_usual_names_preferred(tmp_path, capsys, folders, found):
    for folder in folders:
        draw_images(tmp_path / folder, ["0.png", "1.png"])
    cfg = CFG(captions_path=caption_file(tmp_path, 2))
    for _ in range(2):  # it is printed once
        assert image_folder(cfg, read_captions(cfg)) == tmp_path / found
    assert capsys.readouterr().err == f"images: {tmp_path / found} (--image-path sets another folder)\n"


def test_open_data_looks_once(tmp_path, monkeypatch, capsys):
    draw_images(tmp_path / "photos", [f"{i}.png" for i in range(10)])
    source = open_data(CFG(captions_path=caption_file(tmp_path)))
    assert source.image_folder == image_folder(source.cfg) == tmp_path / "photos"
    assert len(source.split("train")) == 18 and source.name == source.cfg.captions_path
    monkeypatch.setattr("clip_scratch.data.captions.locate", None)
    assert image_folder(source.cfg, source.table) == tmp_path / "photos"
    with pytest.raises(UserError, match="no image folder"):
        open_data(CFG(captions_path=tmp_path / "captions.csv", image_path=tmp_path / "phtos"))


def test_the_built_in_scenes_have_their_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = open_data(CFG(n_scenes=30, image_path=tmp_path / "elsewhere"))
    assert source.cfg.image_path == str(Path("data/scenes-30-42/Images")) and source.name == "the built-in data set"
    # Once drawn, nobody needs the lock
    monkeypatch.setattr("clip_scratch.data.scenes.write.sole_writer", None)
    assert open_data(CFG(n_scenes=30)).table.equals(source.table)


def test_bad_images_are_all_named_or_left_out(tmp_path, capsys):
    draw_images(tmp_path, [f"{i}.png" for i in range(20)])
    table = read_captions(CFG(captions_path=caption_file(tmp_path, 20)))
    assert check_images(table, tmp_path, "error", progress=False) is table
    (tmp_path / "3.png").unlink()
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:40])
    with pytest.raises(UserError, match="2 of 20 images") as caught:
        check_images(table, tmp_path, "error", progress=False)
    assert "3.png (captions.csv, row 8): no such file" in str(caught.value)
    assert "4.png (captions.csv, row 10): cannot be decoded" in str(caught.value)
    kept = check_images(table, tmp_path, "skip", progress=False)
    assert kept["image"].nunique() == 18
    assert "3.png" in capsys.readouterr().err
    for i in range(5, 18):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(UserError, match="and 5 more"):
        check_images(table, tmp_path, "error", progress=False)


def test_an_image_name_that_is_too_long_is_a_missing_image(tmp_path):
    draw_images(tmp_path / "Images", [f"{i}.png" for i in range(10)])
    name = "x" * 300 + ".png"
    with caption_file(tmp_path).open("a") as file:
        file.write(f"\n{name},three")
    with pytest.raises(UserError, match=rf"1 of 11 images .*\n  {name} \(captions.csv, row 22\): no such file"):
        open_data(CFG(captions_path=tmp_path / "captions.csv"))


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_no_image_at_all_is_the_wrong_folder(tmp_path, on_bad_image):
    table = read_captions(CFG(captions_path=caption_file(tmp_path)))
    with pytest.raises(
        UserError, match=r"^none of the 10 images .* is in .* for example 0.png .*--image-path"
    ) as caught:
        check_images(table, tmp_path, on_bad_image, progress=False)
    assert "\n" not in str(caught.value)


# ---- mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \r\n", "is empty"),
        (b"\x89PNG\r\n\0\0", "is a binary file"),
        (b"image,caption\na.jpg,caf\xe9\n", "row 2: not UTF-8"),
        (b"image,caption\n", "has a header but no captions"),
        (b"image,captoin\na.jpg,x\n", "no column that is known as the caption. Did you mean captoin? It has: image"),
        (b"caption,image\nA dog , brown,a.jpg\n", "row 2: 3 columns where the header has 2"),
        (b'[{"image": "a.jpg",\n "caption": }]', "line 2: cannot be read as JSON"),
        (b'{"image": "a.jpg", "caption": "x"}\n{"image": \n', "row 2: cannot be read as JSON"),
        (b"[" * 100_000, "line 1: cannot be read as JSON"),
        (b'[{"image": "a.jpg", "caption": ' + b"1" * 5000 + b"}]", "line 1: cannot be read as JSON"),
        (b'{"images": [7, {"sentences": []}]}', "no column that is known as the image"),
        (b'{"images": [{"filepath": 7, "sentences": [{"raw": "x"}], "split": "val"}, 7]}', "row 2: expected a record"),
        (b'["a.jpg"]', "row 1: expected a record"),
        (b"image,caption\na.jpg,\n", "and all other rows have no image or no caption"),
        (b"image,caption,split\na.jpg,x,treino\n", "row 2: unknown split 'treino'. A split is one of train"),
        (b"image,caption,split\na.jpg,x,train\na.jpg,y,val\n", "both in train (x, row 2) and in valid (x, row 3)"),
        (b"image,caption\na.jpg,x\n", "1 images are too few"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "x"
    path.write_bytes(content)
    refused(message, captions_path=path)


FIELDS = ["image", "caption", "split", "label", "images", "sentences", "raw", "filepath"]
LEAVES = (
    st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["train", "a.jpg", "a\0b", "~"])
)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JSON, min_size=1, max_size=3))
def test_any_json_is_a_table_or_one_clear_line(tmp_path, values):
    for content in (json.dumps(values), "\n".join(map(json.dumps, values))):
        try:
            table = open_data(CFG(captions_path=write(tmp_path / "x.json", content), valid_fraction=0)).table
            assert (table["caption"] != "").all()
        except UserError as error:
            assert "\n" not in str(error)


def test_a_missing_column_suggests_one(tmp_path):
    message = refused(
        "no column 'captions'. Did you mean caption?", captions_path=caption_file(tmp_path), caption_column="captions"
    )
    assert "It has: image, caption." in message


def test_missing_files_suggest_others(tmp_path):
    caption_file(tmp_path)
    refused("Did you mean captions.csv?", captions_path=tmp_path / "caption.csv")
    refused("no captions file", captions_path=tmp_path / ("x" * 300))
    refused("no captions file", captions_path=tmp_path / "captions.csv", valid_captions_path=tmp_path / ("x" * 300))
    refused("no captions file ~nobody-has-this-name/x.csv", captions_path="~nobody-has-this-name/x.csv")
    refused("There is no folder", captions_path=tmp_path / "no/captions.csv")
    refused("has no captions file", captions_path=(tmp_path / "empty").mkdir() or tmp_path / "empty")
    with pytest.raises(UserError, match="no image folder .* Set --image-path"):
        image_folder(CFG(captions_path=tmp_path / "captions.csv", image_path=tmp_path / "Imagse"))
    with pytest.raises(UserError, match="no image folder .* Set --image-path"):
        image_folder(CFG(captions_path=tmp_path / "captions.csv", image_path=tmp_path / ("x" * 300)))


def test_a_folder_with_several_captions_files_asks_which(tmp_path):
    for names in (
        ["one.json", "two.json"],
        ["train.csv", "train.json"],
        ["train.json", "x.json"],
        ["train_test.csv", "val.csv"],
    ):
        folder = tmp_path / "-".join(names)
        for name in names:
            write(folder / name, "[]")
        refused(f"has several captions files ({', '.join(names)})", captions_path=folder)


def test_a_split_without_images_says_which_there_are(tmp_path):
    table = read_captions(CFG(captions_path=caption_file(tmp_path)))
    with pytest.raises(
        UserError, match=r"x has no images in the split 'test'; it has train \(9 .*and valid \(1 .*--test-"
    ):
        split_of(table, "test", "x")


# ---- Hugging Face data sets


@pytest.fixture
def hub_records(tmp_path, monkeypatch):
    """A data set of 3 images with 2 captions each, one record per caption, in two splits."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "source", ["0.png", "1.png", "2.png"])
    features = datasets.Features(
        {"pixels": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
    )

    def part(numbers):
        records = [
            {
                "pixels": {"bytes": (tmp_path / f"source/{i}.png").read_bytes(), "path": None},
                "text": f"{t} {i}",
                "label": 1,
            }
            for i in numbers
            for t in ("one", "two")
        ]
        return datasets.Dataset.from_list(records, features=features)

    return datasets.DatasetDict({"train": part([0, 1]), "validation": part([2])})


def test_saved_hugging_face_data_set(tmp_path, hub_records):
    hub_records.save_to_disk(tmp_path / "saved")
    cfg = CFG(captions_path="saved")
    table = read_captions(cfg)
    assert table["caption"].tolist() == ["one 0", "two 0", "one 1", "two 1", "one 2", "two 2"]
    assert table["image_id"].tolist() == [0, 0, 1, 1, 2, 2]
    assert table["split"].tolist() == ["train"] * 4 + ["valid"] * 2
    assert set(table["label"]) == {"y"}
    folder = image_folder(cfg, table)
    assert folder == Path("data/saved-images")
    assert len(list(folder.glob("*.png"))) == 3
    assert len(check_images(table, folder, "error", progress=False)) == 6
    # A second reading finds what is written and needs no library
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    assert read_captions(cfg).equals(table)
    assert written == {file: file.stat().st_mtime_ns for file in folder.glob("*.png")}


def test_parquet_folder_and_set_columns(tmp_path, hub_records):
    (tmp_path / "pq/data").mkdir(parents=True)
    for split, dataset in hub_records.items():
        dataset.to_parquet(tmp_path / f"pq/data/{split}-00000-of-00001.parquet")
    cfg = CFG(captions_path="pq", image_path="out", image_column="pixels", caption_column="text")
    assert len(read_captions(cfg)) == 6
    assert image_folder(cfg) == Path("out")
    refused("has other files in it", captions_path="pq", image_path="source")
    refused("no column 'txt'. Did you mean text?", captions_path="pq", image_path="new", caption_column="txt")
    (tmp_path / "pq/data/validation-00000-of-00001.parquet").unlink()
    refused("out has other files in it. Remove it", captions_path="pq", image_path="out")  # an earlier export
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_an_export_that_fails_leaves_nothing(tmp_path, hub_records, monkeypatch):
    hub_records.save_to_disk(tmp_path / "saved")
    monkeypatch.setattr("clip_scratch.data.huggingface._ImageFiles.add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_captions(CFG(captions_path="saved"))
    assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir()]


def test_exported_names_differ_in_more_than_case(tmp_path):
    files = _ImageFiles(tmp_path)
    names = [
        files.add({"path": name, "bytes": name.encode()}, f"train-{i}") for i, name in enumerate(["a.jpg", "A.JPG"])
    ]
    assert names == ["a.jpg", "train-1.image"]


def test_image_folder_with_metadata(tmp_path, hub_records):
    write(tmp_path / "source/metadata.csv", "file_name,text\n0.png,x\n1.png,y\n2.png,z\n")
    table = read_captions(CFG(captions_path="source"))
    assert table[["image", "caption"]].values.tolist() == [["0.png", "x"], ["1.png", "y"], ["2.png", "z"]]
    assert table["split"].value_counts().to_dict() == {"train": 2, "valid": 1}


def test_hub_without_a_network_fails_at_once(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    refused("data set someone/nothing: http://127.0.0.1:9 cannot be reached and", captions_path="someone/nothing")
    assert not (tmp_path / "data").exists()


def test_without_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused("pip install clip_scratch[datasets]", captions_path="someone/nothing")


# ---- real data


@pytest.mark.real_data
@pytest.mark.skipif(not (SHARED / "flickr8k").exists(), reason="no ../shared/flickr8k")
def test_flickr8k_as_published():
    cfg = CFG(captions_path=SHARED / "flickr8k")
    table = read_captions(cfg)
    assert len(read_file(SHARED / "flickr8k/captions.txt", "auto", Columns())) == 35000
    assert len(table) == 34991  # nine training captions stand twice for their image
    assert table.groupby("split")["image"].nunique().to_dict() == {"train": 6000, "valid": 1000}
    assert len(split_of(table, "valid", "")) == 5000
    official = (SHARED / "flickr8k/Flickr_8k.devImages.txt").read_text().split()
    assert set(split_of(table, "valid", "")["image"]) == set(official)
    assert image_folder(cfg, table) == SHARED / "flickr8k/Images"


@pytest.mark.real_data
@pytest.mark.skipif(not (SHARED / "fashion").exists(), reason="no ../shared/fashion")
def test_fashion_in_two_files():
    fashion = SHARED / "fashion"
    cfg = CFG(captions_path=fashion)
    table = read_captions(cfg)
    by_name = CFG(captions_path=fashion / "train_data.json", valid_captions_path=fashion / "val_data.json")
    assert table.equals(read_captions(by_name))
    assert table["split"].value_counts().to_dict() == {"train": 1400, "valid": 300}
    assert table.iloc[0][["image", "caption", "label"]].tolist() == [
        "images/34547.jpg",
        "Puma Men Leather Black Belt",
        "Belts",
    ]
    folder = image_folder(cfg, table)
    assert folder == fashion
    assert len(check_images(table.tail(50), folder, "error", progress=False)) == 50

"""The data doctor: planted faults of every kind are found in their rows, and the cleaned file is clean."""

import io
import json
import re
import tarfile
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torch.nn.functional import normalize

from clip_scratch import CFG, prepare
from clip_scratch.data.captions import read_captions
from clip_scratch.data.doctor import FINDINGS, examine, repaired
from clip_scratch.data.duplicates import MOST_BITS, duplicate_pairs, near_pairs, signature
from clip_scratch.data.scenes.write import write_scenes
from clip_scratch.data.source import open_data
from clip_scratch.errors import UserError
from clip_scratch.evaluation.misfits import fit

RNG = np.random.default_rng(0)
PHOTOS = [cv2.resize(RNG.integers(0, 256, (7, 9, 3), np.uint8), (90, 70), interpolation=2) for _ in range(20)]


def photo(i):
    return Image.fromarray(PHOTOS[i])


def jpeg(image, quality=90):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class DataSet:
    """A folder with captions.csv (`rows`, from line 2) and Images/; clean, unless faults are added."""

    def __init__(self, folder, n=20):
        self.images, self.path, self.rows = folder / "Images", folder / "captions.csv", []
        self.images.mkdir(parents=True)
        for i in range(n):
            split = "train" if i < 12 else "val" if i < 16 else "test"
            self.add(f"{i:02d}.jpg", f"the photo with number {i}", split, jpeg(photo(i)))

    def add(self, image, caption, split="train", content=None):
        """Returns the line of the row."""
        if content is not None:
            (self.images / image).write_bytes(content)
        self.rows.append((image, caption, split))
        return len(self.rows) + 1

    def examine(self, **options):
        columns = ["image", "caption", "split"]
        pd.DataFrame(self.rows, columns=columns).to_csv(self.path, index=False)
        return examine(self.path, self.images, progress=False, **options)


@pytest.fixture
def data(tmp_path):
    return DataSet(tmp_path / "data")


def lines_of(report, name):
    return report.findings[name]["row"].tolist() if name in report.findings else []


def test_a_clean_data_set_has_no_findings(data):
    report = data.examine()
    assert not report.findings, report.text()
    assert "Nothing is wrong" in report.text() and "Nothing is wrong" in report.html()
    assert report.text().splitlines()[1].split()[:3] == ["train", "12", "12"]
    assert "read as table: image = image, caption = caption, split = split" in report.text()


def test_faults_of_images_are_all_found(data, capsys):
    whole = jpeg(photo(3))
    planted = {
        "missing": [data.add("gone.jpg", "one"), data.add("21.JPG", "in other letters")],
        "truncated": [data.add("cut.jpg", "two", content=whole[: len(whole) // 2])],
        "corrupt": [data.add("page.jpg", "three", content=b"<html>404"), data.add("void.jpg", "four", content=b"")],
    }
    buffer = io.BytesIO()
    photo(5).transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG")
    planted["extension"] = [data.add("png.jpg", "five", content=buffer.getvalue())]
    planted["tiny"] = [data.add("tiny.jpg", "six", content=jpeg(photo(6).resize((31, 300))))]
    planted["huge"] = [data.add("huge.jpg", "seven", content=jpeg(Image.new("L", (5001, 5000))))]
    data.add("mpo.jpg", "eight", content=jpeg(photo(0).rotate(180)))  # of a camera: a JPEG too
    with Image.open(io.BytesIO(jpeg(photo(1).rotate(180)))) as one:
        one.save(data.images / "mpo.jpg", "MPO", save_all=True, append_images=[photo(2)])
    (data.images / "21.jpg").write_bytes(jpeg(photo(7).rotate(90)))
    report = data.examine()
    assert {name: lines_of(report, name) for name in report.findings if name != "unused"} == planted
    assert report.findings["unused"]["image"].tolist() == ["21.jpg"]
    details = pd.concat(report.findings.values())["detail"].tolist()
    assert details[:2] == ["no such file", "no such file, but 21.jpg"] and "truncated" in details[2]
    assert details[3:5] == [f"cannot be decoded (the file is {what})" for what in ("a web page", "empty")]
    assert "31 x 300 pixels" in details and "5,001 x 5,000 pixels" in details and "the content is PNG" in details
    assert not capsys.readouterr().err  # no warnings of PIL


def test_faults_of_captions_are_all_found(data):
    planted = {
        "empty": [data.add("01.jpg", ""), data.add("", "of no image"), data.add("02.jpg", "  ")],
        "repeated": [data.add("03.jpg", "The  photo with number 3")],
        "encoding": [
            data.add("04.jpg", "un cafÃ©"),
            data.add("05.jpg", "lost � here"),
            data.add("06.jpg", "itâ€\x99s"),
        ],
        "long": [data.add("07.jpg", "word " * 198 + "end.")],
        "unknown_split": [data.add("08.jpg", "eight", "holdout")],
        "two_splits": [11, data.add("09.jpg", "nine", "val")],
    }
    data.add("08.jpg", "word " * 150)  # long, but not too long
    data.add("10.jpg", "a café, “quoted”, of naïve Müller ¡VOILÀ! «SÍ»")
    data.add("00.jpg", "The photo with number 11")
    planted["shared"] = [13]
    report = data.examine()
    assert {name: sorted(lines_of(report, name)) for name in report.findings} == planted
    details = report.findings["encoding"]["detail"].tolist()
    assert details == ["meant: un café", "characters are wrong or lost", "meant: it\u2019s"]
    assert report.findings["long"]["detail"].tolist() == ["at least 202 tokens, of which 200 are used"]


def test_tokens_are_counted_by_the_models_tokenizer(data, tiny_tokenizer):
    line = data.add("01.jpg", "xylophone " * 4)
    report = data.examine(tokenizer=tiny_tokenizer, max_length=24)
    n = len(tiny_tokenizer("xylophone " * 4)["input_ids"])
    assert n > 24 and lines_of(report, "long") == [line]
    assert report.findings["long"]["detail"][0] == f"{n} tokens, of which 24 are used"


def test_duplicates_within_and_across_splits(data):
    data.add("copy.jpg", "a copy", content=jpeg(photo(1)))
    data.add("small.jpg", "smaller", content=jpeg(photo(2).resize((60, 47)), 60))
    data.add("leak.jpg", "in test", "test", content=jpeg(ImageEnhance.Brightness(photo(3)).enhance(0.9), 50))
    data.add("exact.jpg", "in valid", "val", content=jpeg(photo(1)))
    report = data.examine()
    pairs = {
        name: set(zip(report.findings[name]["image"], report.findings[name]["other"], strict=True))
        for name in report.findings
    }
    assert pairs == {
        "leaks": {("03.jpg", "leak.jpg"), ("01.jpg", "exact.jpg")},
        "duplicates": {("01.jpg", "copy.jpg")},
        "near_duplicates": {("02.jpg", "small.jpg")},
    }
    report.write_cleaned(data.path.parent / "out.csv")
    left = set(pd.read_csv(data.path.parent / "out.csv")["image"])
    assert not {"01.jpg", "copy.jpg", "03.jpg"} & left and {"exact.jpg", "leak.jpg", "02.jpg", "small.jpg"} <= left


@settings(max_examples=40)
@given(st.data())
def test_near_pairs_are_those_of_a_full_scan(data):
    centres = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = st.lists(st.integers(0, 63), max_size=9)
    hashes = [
        data.draw(st.sampled_from(centres)) ^ int(sum(1 << bit for bit in set(data.draw(flips)))) for _ in range(25)
    ]
    most = data.draw(st.integers(0, MOST_BITS))
    expected = [(i, j) for i, j in combinations(range(25), 2) if (hashes[i] ^ hashes[j]).bit_count() <= most]
    assert near_pairs(np.array(hashes, np.uint64), most).tolist() == [list(pair) for pair in expected]


def test_many_copies_are_few_pairs():
    table = pd.DataFrame([signature(PHOTOS[0])] * 300 + [signature(PHOTOS[1])])
    hashes, thumbnails = table["phash"].to_numpy(np.uint64), np.stack(table["thumbnail"])
    pairs = duplicate_pairs(table["digest"], hashes, thumbnails, pd.Series(["train"] * 301))
    assert len(pairs) == 299 and pairs["exact"].all() and set(pairs["first"]) == {0}


@pytest.mark.parametrize("text", ["plain", "Müller", "«SÍ»", "CAFÉ®", "£5", "naïve “quote”", "日本", "é»»", "ÎÂ", ""])
def test_right_text_is_not_repaired(text):
    assert repaired(text) is None


@pytest.mark.parametrize("text", ["Müller", "it\u2019s “so”", "日本語", "Привет", "👍", "£5 à la carte", "naïve café"])
def test_text_that_was_decoded_wrongly_is_repaired(text):
    wrong = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in text.encode())
    assert wrong != text and repaired(wrong) == text
    assert repaired(text.encode().decode("latin-1")) == text
    assert repaired("".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in wrong.encode())) == text


def test_a_file_that_is_not_utf8_is_read_and_cleaned(data, tmp_path):
    data.examine()
    text = data.path.read_text().replace("the photo with number 4,", "the café,")
    data.path.write_bytes(text.encode("cp1252"))
    report = examine(data.path, data.images, progress=False)
    assert list(report.findings) == ["not_utf8"] and lines_of(report, "not_utf8") == [6]
    report.write_cleaned(tmp_path / "out.csv")
    assert "the café" in read_captions(CFG(captions_path=tmp_path / "out.csv"))["caption"].tolist()


def with_rows_that_cannot_be_read(data, form):
    """Write `data` as CSV or JSON Lines with five such rows, the first of JSON at the top; their numbers."""
    columns = ["image", "caption", "split"]
    if form == "table":
        data.examine()
        lines = data.path.read_text().splitlines()
        for row in (3, 5, 7, 9, 11):
            lines.insert(row - 1, "00.jpg,a dog, red,train,extra")
        data.path.write_text("\n".join(lines))
        return data.path, [3, 5, 7, 9, 11]
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in data.rows]
    for row, line in ((1, '{"image": "00.jpg'), (4, "[1]"), (6, '"x"'), (8, '{"image": }'), (9, "{" + "[" * 100_000)):
        lines.insert(row - 1, line)
    path = data.path.with_suffix(".jsonl")
    path.write_text("\n".join(lines))
    return path, [1, 4, 6, 8, 9]


@pytest.mark.parametrize("form", ["table", "json"])
def test_rows_that_cannot_be_read_are_listed_and_left_out(data, form, tmp_path, capsys):
    data.add("gone.jpg", "one")
    path, numbers = with_rows_that_cannot_be_read(data, form)
    with pytest.raises(UserError, match=rf"^{path}, row {numbers[0]}: .*prepare check {path} lists all such rows.$"):
        read_captions(CFG(captions_path=path))
    report = examine(path, data.images, progress=False)
    assert {name: len(rows) for name, rows in report.findings.items()} == {"malformed": 5, "missing": 1}
    assert lines_of(report, "malformed") == numbers and len(report.table) == 21
    said = report.text()
    assert "Rows that cannot be read: 5. Training refuses the file at the first." in said
    assert f"\n  ({path.name}, row {numbers[0]}): " in said and f"and 2 more: rows {numbers[3]}, {numbers[4]}" in said
    assert "columns where the header has 3" in said if form == "table" else "cannot be read as JSON" in said
    assert 'id="malformed"' in report.html()
    prepare.main(["check", str(path), str(data.images), "--fix", str(tmp_path / "out.csv")])
    assert "left out 5 rows that cannot be read\n" in capsys.readouterr().out
    assert len(read_captions(CFG(captions_path=tmp_path / "out.csv"))) == 20


def test_a_file_of_rows_that_cannot_be_read_is_one_clear_line(data):
    data.path.write_text("caption,image\n" + "a dog,b.jpg,c,d\n" * 3)
    with pytest.raises(UserError, match="row 2: 4 columns where the header has 2"):
        examine(data.path, data.images, progress=False)


def faulty(data):
    data.add("gone.jpg", "one")
    data.add("cut.jpg", "two", content=jpeg(photo(3))[:900])
    data.add("01.jpg", "")
    data.add("03.jpg", "The photo with number 3")
    data.add("04.jpg", "un cafÃ©, <script>alert('x')</script>")
    data.add("09.jpg", "nine", "val")
    data.add("10.jpg", "ten", "holdout")
    data.add("9.jpg", "nearly nine, whose photo is in valid too", content=jpeg(photo(9), 40))
    data.add("leak.jpg", "in test", "test", content=jpeg(photo(5), 40))
    data.add("<i>&.jpg", "in <b>test</b>", "test", content=jpeg(photo(6), 40))
    return data.examine()


def test_the_cleaned_file_is_clean_and_the_source_is_untouched(data, tmp_path, capsys):
    faulty(data)
    before = {path: path.read_bytes() for path in data.path.parent.rglob("*") if path.is_file()}
    out, page = tmp_path / "out.csv", tmp_path / "report.html"
    prepare.main(["check", str(data.path), str(data.images), "--fix", str(out), "--html", str(page)])
    said = capsys.readouterr().out
    assert f"With pictures:  {page}" in said and page.read_text().startswith("<!doctype html>")
    assert "out.csv: 21 rows" in said and "left out 2 rows of images that cannot be read" in said
    assert {path: path.read_bytes() for path in data.path.parent.rglob("*") if path.is_file()} == before

    table = open_data(CFG(captions_path=out, image_path=data.images, image_cache=False)).table  # as training reads it
    assert set(table["image"]) == {f"{i:02d}.jpg" for i in range(20) if i not in (5, 6)} | {"leak.jpg", "<i>&.jpg"}
    assert table.loc[table["image"] == "09.jpg", "split"].tolist() == ["valid"]
    assert "un café, <script>alert('x')</script>" in table["caption"].tolist()
    assert set(examine(out, data.images, progress=False).findings) == {"unused"}

    with pytest.raises(UserError, match="out.csv exists, and no file is overwritten"):
        prepare.check(str(data.path), fix=str(out))
    with pytest.raises(UserError, match="captions.csv exists, and"):
        prepare.check(str(data.path), fix=str(data.path))
    with pytest.raises(UserError, match="must end in .html"):
        prepare.check(str(data.path), html=str(data.path))


def test_the_page_is_self_contained_and_escaped(data):
    report = faulty(data)
    html = report.html()
    for text in ("<script", "<i>&", "<b>test"):
        assert text not in html
    assert "un cafÃ©, &lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in html and "&lt;i&gt;&amp;.jpg" in html
    assert not re.findall(r"(?:src|href)=\"(?!data:image/jpeg;base64,|#)", html) and "url(" not in html
    assert "@import" not in html and "http" not in html
    for name in report.findings:
        assert f'id="{name}"' in html and f'href="#{name}"' in html
    pair = html[html.index('id="leaks"') :]
    assert re.search(r'<figure class="pair"><div><img alt="" src="data:[^>]*><img alt="" src="data:', pair)
    assert report._repr_html_().startswith("<style>") and "<html" not in report._repr_html_()


def test_every_finding_says_what_training_does(data):
    for name, (title, effect) in FINDINGS.items():
        assert title and effect.endswith("."), name


def test_other_formats_are_understood_and_examined(tmp_path):
    data = DataSet(tmp_path / "data")
    lines = [json.dumps({"file_name": image, "text": caption, "category": "x"}) for image, caption, _ in data.rows]
    (data.path.parent / "train.jsonl").write_text("\n".join(lines[:12]))
    (data.path.parent / "val.jsonl").write_text("\n".join([*lines[12:], json.dumps({"file_name": "", "text": "none"})]))
    report = examine(data.path.parent, progress=False)
    assert [line.split(", ")[0].split()[-2:] for line in report.understood[:2]] == [
        ["(all", "train)"],
        ["(all", "valid)"],
    ]
    assert report.understood[0].endswith("read as json: image = file_name, caption = text, label = category")
    assert {name: lines_of(report, name) for name in report.findings} == {"empty": [9]}
    assert "x</text>" in report.html()  # the chart of the labels


def test_columns_of_other_names(data, capsys):
    table = pd.DataFrame([row[:2] for row in data.rows], columns=["picture_id", "words"])
    table.to_csv(data.path, index=False)
    with pytest.raises(UserError, match="Set --image-column"):
        prepare.main(["check", str(data.path)])
    prepare.main(["check", str(data.path), "--image-column", "picture_id", "--caption-column", "words"])
    assert "Nothing is wrong with it." in capsys.readouterr().out


def test_images_in_no_published_split(tmp_path):
    data = DataSet(tmp_path / "data")
    (data.path.parent / "Flickr8k.token.txt").write_text("".join(f"{i}#0\t{c}\n" for i, c, _ in data.rows))
    for name, images in (("train", data.rows[:10]), ("dev", data.rows[10:19])):
        (data.path.parent / f"Flickr_8k.{name}Images.txt").write_text("\n".join(image for image, *_ in images))
    report = examine(data.path.parent, data.images, progress=False)
    assert report.findings["unlisted"]["image"].tolist() == ["19.jpg"]
    assert "read as flickr8k" in report.text() and set(report.table["split"]) == {"train", "valid"}


def test_shards_are_examined(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i in range(4):
            content = jpeg(photo(min(i, 2))) if i else jpeg(photo(0))[:500]
            for name, data in ((f"{i}.jpg", content), (f"{i}.txt", f"photo {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    report = examine(str(tmp_path / "*.tar"), progress=False, valid_fraction=0.25)
    assert report.findings["truncated"]["image"].tolist() == ["00000.tar/0.jpg"]
    assert {"leaks", "duplicates"} & set(report.findings)
    assert "shards" in report.understood[0] and "data:image" in report.html()


def test_what_cannot_be_read_at_all_is_one_clear_line(data, tmp_path):
    for content, message in ((b"\0\1\2", "binary file"), (b"  \n", "is empty"), (b"a,b\n1,2", "no column"),
                             (b"image,caption\nx.jpg,\n,y", "all 2 rows have no image or no caption")):  # fmt: skip
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(UserError, match=message):
            examine(tmp_path / "bad.csv", progress=False)
    with pytest.raises(UserError, match="no image folder"):
        examine(data.examine().source, tmp_path / "nowhere")


def test_nothing_left_is_an_error(data, tmp_path):
    for image, *_ in data.rows:
        (data.images / image).write_bytes(b"")
    with pytest.raises(UserError, match="no rows would be left"):
        data.examine().write_cleaned(tmp_path / "out.csv")
    assert not Path(tmp_path / "out.csv").exists()


# ---- with a trained model


def test_a_caption_is_compared_with_its_image_and_the_others_of_it():
    torch.manual_seed(0)
    images = normalize(torch.randn(200, 64), dim=1)
    own = torch.arange(200).repeat_interleave(5)
    texts = normalize(images[own] + 0.1 * torch.randn(1000, 64), dim=1)
    swapped = torch.tensor([3, 100, 250, 400])
    texts[swapped] = texts[swapped.roll(1)]
    scores = fit(images, texts, own)
    assert set(scores.argsort()[:4].tolist()) == set(swapped.tolist())
    assert scores.shape == (1000,) and fit(images[:1], texts[:1], own[:1]).isfinite().all()


def test_swapped_captions_are_the_worst_fits_of_a_run(tmp_path, capsys):
    """The released model knows the built-in scenes; near duplicates are confirmed by its embeddings."""
    write_scenes(tmp_path / "scenes", 60, seed=5, progress=False)
    captions = pd.read_csv(tmp_path / "scenes/captions.txt")
    chosen = captions.index[7::25][:12]
    captions.loc[chosen, "caption"] = captions["caption"][np.roll(chosen, 1)].to_numpy()
    with Image.open(tmp_path / "scenes/Images" / captions["image"][0]) as image:
        image.resize([side * 2 for side in image.size]).save(tmp_path / "scenes/Images/bigger.png")
    captions.loc[len(captions)] = captions.loc[0].to_dict() | {"image": "bigger.png"}
    captions.to_csv(tmp_path / "captions.csv", index=False)
    prepare.main(["check", str(tmp_path / "captions.csv"), str(tmp_path / "scenes/Images"), "--run", "scenes-tiny"])
    said = capsys.readouterr().out
    worst = re.findall(r"row (\d+)\): fit [-+][\d.]+ ", said)
    assert len(worst) == 3 and set(map(int, worst)) <= {row + 2 for row in chosen}
    assert "Captions that fit their images worst: 100." in said
    assert re.search(r"bigger.png: hashes differ in \d of 64 bits.*, cosine (1\.00|0\.9\d)", said)

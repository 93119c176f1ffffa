"""Zero-shot classification: metrics against numpy and scikit-learn, prompt ensembles by hand, the command."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from clip_scratch import classify, encode_image, encode_text, load
from clip_scratch.classify import Arguments, main
from clip_scratch.errors import UserError
from clip_scratch.evaluation.classification import UNSEEN, Classified, measure_classes
from clip_scratch.evaluation.labels import folder_labels, image_labels, read_lines, targets_of
from clip_scratch.evaluation.measure import count_ambiguous
from clip_scratch.evaluation.zero_shot import label_embeddings

NAMES = list("abcdefghij")

# ---- metrics


def test_figures_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    found = measure_classes(scores, [0, 0, 0, 1], ["cat", "dog"])
    assert found.metrics == {
        "acc@1": 3 / 4, "mean_per_class_recall": pytest.approx((2 / 3 + 1) / 2),
        "per_class_recall": {"cat": pytest.approx(2 / 3), "dog": 1.0}, "n_images": 4, "n_classes": 2,
    }  # fmt: skip
    assert found.matrix.tolist() == [[2, 1], [0, 1]]


@pytest.mark.parametrize("k", [2, 5, 10])
def test_figures_are_those_of_sklearn(k):
    rng = np.random.default_rng(k)
    targets = np.concatenate([np.arange(k), rng.integers(0, k, 190)])
    scores = rng.normal(size=(len(targets), k)) + 1.5 * (targets[:, None] == np.arange(k))
    result = measure_classes(torch.from_numpy(scores), targets, NAMES[:k])
    found = result.metrics
    guesses = scores.argmax(1)
    assert found["acc@1"] == pytest.approx((guesses == targets).mean(), abs=1e-6)
    assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(targets, guesses), abs=1e-6)
    assert ("acc@5" in found) == (k >= 5)
    if k > 5:
        assert found["acc@5"] == pytest.approx(top_k_accuracy_score(targets, scores, k=5), abs=1e-6)
    assert np.array_equal(result.matrix.numpy(), sklearn_confusion(targets, guesses))


@given(data=st.data(), n=st.integers(1, 12), k=st.integers(1, 7))
@settings(max_examples=80)
def test_ties_count_against_the_model_and_the_matrix_agrees(data, n, k):
    cells = st.sampled_from([0.0, 0.5, 1.0, float("nan")])
    scores = data.draw(st.lists(st.lists(cells, min_size=k, max_size=k), min_size=n, max_size=n))
    targets = data.draw(st.lists(st.integers(UNSEEN, k - 1), min_size=n, max_size=n))
    result = measure_classes(torch.tensor(scores), targets, NAMES[:k])
    found, matrix = result.metrics, result.matrix

    def place(row, target):
        if target == UNSEEN:
            return k + 1
        return 1 + sum(not x < row[target] for i, x in enumerate(row) if i != target) + (row[target] != row[target])

    places = [place(row, target) for row, target in zip(scores, targets, strict=True)]
    assert found["acc@1"] == pytest.approx(np.mean([p == 1 for p in places]))
    if k >= 5:
        assert found["acc@5"] == pytest.approx(np.mean([p <= 5 for p in places]))
    if k > 1:  # of one class there is nothing else to be taken for
        assert matrix.diagonal().sum() == sum(p == 1 for p in places)
    assert matrix.sum() == sum(target != UNSEEN for target in targets)
    assert set(found["per_class_recall"]) == {NAMES[t] for t in targets if t != UNSEEN}


def test_a_model_that_says_one_thing_is_never_right():
    found = measure_classes(torch.zeros(6, 3), [0, 1, 2, 0, 1, 2], NAMES[:3])
    assert found.metrics["acc@1"] == found.metrics["mean_per_class_recall"] == 0
    assert found.matrix.diagonal().sum() == 0 and found.matrix.sum() == 6


def test_the_listing_shows_every_class_worst_first():
    targets = torch.arange(60) % 30
    scores = torch.eye(30)[targets]
    scores[7] = scores[7].flip(0)
    labels = [f"class {i}" for i in range(30)]
    found = measure_classes(scores, targets, labels)
    found.title = "title"
    lines = found.text().splitlines()
    assert lines[0] == "title" and lines[1] == "acc@1 98.3   acc@5 98.3   mean_per_class_recall 98.3"
    assert lines[3].startswith(" 50.0  class 7 (2)") and max(map(len, lines)) <= 120
    assert sum(line.count("class ") for line in lines[3:]) == 30 and len(lines) < 20


@pytest.mark.parametrize("k", [1, 2, 120])
def test_confusion_pictures(k, tmp_path):
    labels = [f"${i} {'long ' * (i % 12)}label" for i in range(k)]
    path = Classified({}, torch.eye(k, dtype=torch.long) * 3, labels).draw(tmp_path / "m.png")
    size = Image.open(path).size
    assert min(size) > 300 and max(size) < 4500


# ---- prompts


@pytest.fixture(scope="module")
def model(scene_run):
    return load(scene_run.folder)


def test_ensembles_are_normalised_averaged_renormalised(model):
    labels, templates = ["red circle", "blue square", "tree"], ["a {}.", "{} and {}", "no braces but {} {x}"]
    found = label_embeddings(model, labels, templates)
    for label, vector in zip(labels, found, strict=True):
        prompts = [f"a {label}.", f"{label} and {label}", f"no braces but {label} {{x}}"]
        mean = encode_text(model, prompts).numpy().mean(0)
        assert vector.numpy() == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)


def test_classify_ranks_by_the_same_vectors(model, tiny_data):
    images = sorted(tiny_data.image_path.glob("*"))[:5]
    labels = ["red", "green", "blue"]
    cosine = encode_image(model, images) @ label_embeddings(model, labels).T
    expected = F.softmax(model.logit_scale.detach() * cosine, -1)
    for row, ranked in zip(expected, classify(model, images, labels), strict=True):
        assert dict(ranked) == pytest.approx(dict(zip(labels, row.tolist(), strict=True)), abs=1e-6)
        assert [p for _, p in ranked] == sorted((p for _, p in ranked), reverse=True)


def test_underscores_are_spaces_in_prompts_but_not_in_answers(model, tiny_data):
    templates = ["a {}.", "snake_case {}"]
    found = label_embeddings(model, ["red_square", "blue"], templates)
    assert torch.equal(found, label_embeddings(model, ["red square", "blue"], templates))
    image = tiny_data.image_path / "00.png"
    (ranked,) = classify(model, image, ["red_square", "blue"], templates)
    assert {label for label, _ in ranked} == {"red_square", "blue"}


def test_labels_that_prompts_cannot_tell_apart(model):
    for one, other in (("Saree", "saree"), ("men  mojaris", "men mojaris"), ("dhoti pants", "dhoti_pants"), "aa"):
        with pytest.raises(UserError, match=f"cannot tell the labels '{one}' and '{other}' apart"):
            label_embeddings(model, [one, "gowns", other])


def test_label_and_template_files(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\ufeffflip flops\r\n\n  T-shirt \nSarees", encoding="utf-8")
    assert read_lines(path) == ["flip flops", "T-shirt", "Sarees"]
    path.write_bytes(b"\xff\xfe\xfa")
    for wrong in (path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match=f"cannot read {wrong}, a file of UTF-8 text"):
            read_lines(wrong)


# ---- true labels


def test_labels_of_folders(tmp_path):
    def folder(name, *files):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        return tmp_path / name

    labels = folder_labels(folder("a", "dog/1.jpg", "cat/sub/2.jpg"))
    assert labels.to_dict() == {"cat/sub/2.jpg": "cat", "dog/1.jpg": "dog"}
    assert not folder_labels(folder("b", "1.jpg", "2.jpg")).any()
    with pytest.raises(UserError, match=r"2.jpg is beside the folders"):
        folder_labels(folder("c", "dog/1.jpg", "2.jpg"))


def test_a_label_that_is_not_among_the_labels():
    def targets(true, labels):
        return targets_of(pd.Series(true, ["1.jpg", "2.jpg"]), labels)

    assert targets(["b", "a"], ["a", "b"]).tolist() == [1, 0]
    with pytest.raises(UserError, match="'Sari' of 2.jpg is not among the 2 labels. Did you mean Saris"):
        targets(["Tops", "Sari"], ["Tops", "Saris"])


def table_of(*rows):
    rows = [(*row, "f.csv", number) for number, row in enumerate(rows, 2)]
    return pd.DataFrame(rows, columns=["image", "caption", "label", "file", "row"])


def test_image_labels():
    table = table_of(("a", "x", "dog"), ("a", "y", " dog"), ("b", "z", 3))
    assert image_labels(table, "f.csv").to_dict() == {"a": "dog", "b": "3"}
    with pytest.raises(UserError, match="f.csv, row 3: a has a second label, 'cat'"):
        image_labels(table_of(("a", "x", "dog"), ("a", "y", "cat")), "f.csv")
    with pytest.raises(UserError, match="f.csv, row 3: b has no label"):
        image_labels(table_of(("a", "x", "dog"), ("b", "y", None)), "f.csv")
    with pytest.raises(UserError, match="f.csv has no column of labels"):
        image_labels(table.drop(columns="label"), "f.csv")


def test_ambiguous_captions():
    rows = [(0, "A dog."), (1, " a  DOG."), (0, "a dog."), (2, "a cat."), (2, "a cat."), (3, "a dog")]
    assert count_ambiguous(pd.DataFrame(rows, columns=["image_id", "caption"])) == 3


# ---- the command


@pytest.fixture
def labelled(tiny_data, tmp_path):
    """The tiny captions with their colour as label and its splits, and a file of the labels."""
    colours = ["red", "green", "blue", "yellow"]
    table = tiny_data.table.assign(label=[colours[i % 4] for i in tiny_data.table["image_id"]])
    table.to_csv(tmp_path / "labelled.csv", index=False)
    (tmp_path / "labels.txt").write_text("\n".join(colours) + "\n")
    return tmp_path


def run_command(run, labelled, tiny_data, **settings):
    target = labelled / "figures.json"
    settings = {"captions_path": str(labelled / "labelled.csv"), "image_path": str(tiny_data.image_path)} | settings
    main(Arguments(str(run.folder), device="cpu", json=str(target), **settings))
    return json.loads(target.read_text())


def test_the_command_equals_numpy(scene_run, model, labelled, tiny_data, capsys):
    matrix = labelled / "m.png"
    found = run_command(scene_run, labelled, tiny_data, labels=str(labelled / "labels.txt"), confusion=str(matrix))
    table = pd.read_csv(labelled / "labelled.csv")
    firsts = table[table["split"] == "valid"].drop_duplicates("image")
    colours = ["red", "green", "blue", "yellow"]
    prompts = [[f"a photo of a {c}.", f"a picture of a {c}.", f"an image of a {c}."] for c in colours]
    vectors = np.stack([encode_text(model, three).numpy().mean(0) for three in prompts])
    images = encode_image(model, [tiny_data.image_path / f"{name}" for name in firsts["image"]]).numpy()
    guesses = (images @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T).argmax(1)
    truth = np.array([colours.index(label) for label in firsts["label"]])
    assert found["acc@1"] == pytest.approx((guesses == truth).mean(), abs=1e-6) and "acc@5" not in found
    assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(truth, guesses), abs=1e-6)
    assert (found["split"], found["n_images"], found["n_classes"]) == ("valid", 6, 4)
    out = capsys.readouterr().out
    assert out.startswith("zero-shot, valid: 6 images, 4 classes, 3 templates") and "rsum" not in out
    assert Image.open(matrix).format == "PNG"
    same = run_command(scene_run, labelled, tiny_data)
    assert same["acc@1"] == found["acc@1"] and same["per_class_recall"] == found["per_class_recall"]


def test_templates_and_folders(scene_run, labelled, tiny_data, capsys):
    (labelled / "templates.txt").write_text("{}\na {} box\n")
    for i, image in enumerate(sorted(tiny_data.image_path.glob("*"))[:8]):
        folder = labelled / "photos" / ["red", "green", "blue", "yellow"][i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / image.name).write_bytes(image.read_bytes())
    settings = {"labels": str(labelled / "labels.txt"), "templates": str(labelled / "templates.txt")}
    settings |= {"captions_path": "", "image_path": ""}
    found = run_command(scene_run, labelled, tiny_data, **settings, images=str(labelled / "photos"))
    assert found["n_images"] == 8 and set(found["per_class_recall"]) == {"red", "green", "blue", "yellow"}
    assert "2 templates" in capsys.readouterr().out
    # Without sub-folders there is no truth: the three best labels
    photos = labelled / "photos/red"
    found = run_command(scene_run, labelled, tiny_data, **settings, images=str(photos))
    out = capsys.readouterr().out
    assert list(found["best_labels"]) == ["00.png", "04.png"] and "acc@1" not in found
    for name, ranked in found["best_labels"].items():
        assert len(ranked) == 3 and f"{name}  {ranked[0][0]} {ranked[0][1]:.2f}, " in out
    with pytest.raises(UserError, match="have no true labels"):
        run_command(scene_run, labelled, tiny_data, **settings, images=str(photos), confusion=str(labelled / "m.png"))


def test_mistakes(scene_run, labelled, tiny_data, tmp_path):
    def wrong(**settings):
        with pytest.raises(UserError) as error:
            run_command(scene_run, labelled, tiny_data, **settings)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "cannot read" in wrong(labels=str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    assert "at least one label and one template" in wrong(labels=str(tmp_path / "empty.txt"))
    (tmp_path / "few.txt").write_text("red\ngreen\nblue\nyelow\n")
    line = wrong(labels=str(tmp_path / "few.txt"))
    assert "the label 'yellow' of 23.png is not among the 4 labels. Did you mean yelow?" in line
    assert "no column of labels" in wrong(captions_path=str(tiny_data.captions_path))
    assert "there is no folder" in wrong(images=str(tmp_path / "nowhere"))
    assert "there is no folder" in wrong(confusion=str(tmp_path / "none/m.png"))
    assert "must end in .png" in wrong(confusion=str(tmp_path / "m.txt"))
    for name in ("labels", "templates", "images"):
        assert "leave out --labels, --templates and --images" in wrong(linear_probe=True, **{name: "x"})
    table = pd.read_csv(labelled / "labelled.csv")
    table.loc[table["image"] == "00.png", "label"] = "Red"
    table.to_csv(tmp_path / "twice.csv", index=False)
    line = wrong(captions_path=str(tmp_path / "twice.csv"))
    assert "prompts cannot tell the labels 'Red' and 'red' apart" in line


def test_a_bad_image_in_a_folder_is_skipped(scene_run, labelled, tiny_data, capsys):
    for i, image in enumerate(sorted(tiny_data.image_path.glob("*"))[:4]):
        folder = labelled / "photos" / ["red", "green"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / image.name).write_bytes(image.read_bytes() if i else b"no picture")
    found = run_command(scene_run, labelled, tiny_data, images=str(labelled / "photos"))
    assert found["n_images"] == 3 and "skipped 1 of 4 images" in capsys.readouterr().err


def test_the_function_stays_public_when_the_verb_of_its_name_is_imported():
    import clip_scratch

    assert clip_scratch.classify is classify and callable(clip_scratch.compare)

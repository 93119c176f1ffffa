"""The linear probe: scikit-learn used directly, the choice of C, classes that are rare or unseen, the command."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from clip_scratch import encode_image, load
from clip_scratch.classify import Arguments, main
from clip_scratch.errors import UserError
from clip_scratch.evaluation.linear_probe import C_GRID, choose_c, hold_out, linear_probe


def blobs(n, k, seed, noise=1.2):
    """n points on the sphere around k centres, and their labels: every class occurs."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(k, 12))
    numbers = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    points = centres[numbers] + noise * rng.normal(size=(n, 12))
    return points / np.linalg.norm(points, axis=1, keepdims=True), np.array([f"c{i}" for i in numbers])


@pytest.mark.parametrize("k", [2, 7])
def test_it_equals_sklearn(k):
    train, valid, test = (blobs(n, k, seed) for seed, n in enumerate((120, 60, 80)))
    probe = linear_probe(train, test, valid)
    right = [LogisticRegression(C=c, max_iter=1000).fit(*train).score(*valid) for c in C_GRID]
    best = C_GRID[int(np.argmax(right))]
    direct = LogisticRegression(C=best, max_iter=1000).fit(*train)
    assert probe.metrics["C"] == best and probe.labels == direct.classes_.tolist()
    assert probe.metrics["acc@1"] == pytest.approx(direct.score(*test), abs=1e-6)
    balanced = balanced_accuracy_score(test[1], direct.predict(test[0]))
    assert probe.metrics["mean_per_class_recall"] == pytest.approx(balanced, abs=1e-6)
    assert ("acc@5" in probe.metrics) == (k >= 5)
    if k >= 5:
        five = top_k_accuracy_score(test[1], direct.decision_function(test[0]), k=5)
        assert probe.metrics["acc@5"] == pytest.approx(five, abs=1e-6)
    assert (probe.metrics["n_images"], probe.metrics["n_train_images"], probe.metrics["n_unseen"]) == (80, 120, 0)


def test_without_a_validation_split_c_is_chosen_on_a_fifth_of_the_training_images():
    train, test = blobs(100, 4, 0), blobs(50, 4, 1)
    probe = linear_probe(train, test)
    held_out = hold_out(train[1])
    assert 20 <= held_out.sum() <= 24
    c = choose_c(*((train[0][mask], train[1][mask]) for mask in (~held_out, held_out)))
    direct = LogisticRegression(C=c, max_iter=1000).fit(*train)  # on all of them
    assert probe.metrics["C"] == c and probe.metrics["acc@1"] == pytest.approx(direct.score(*test), abs=1e-6)
    assert linear_probe(train, test).metrics == probe.metrics


def test_of_equals_the_strongest_penalty():
    features = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert choose_c((features, list("aabb")), (features, list("aabb"))) == C_GRID[0]


def test_images_of_unseen_classes_count_as_wrong():
    train, test = blobs(60, 3, 0, noise=0.1), blobs(30, 3, 1, noise=0.1)
    labels = test[1].copy()
    labels[:6] = "never seen"
    probe = linear_probe(train, (test[0], labels), test)
    assert probe.metrics["n_unseen"] == 6 and probe.matrix.sum() == 24
    assert probe.metrics["acc@1"] == pytest.approx(24 / 30)
    assert probe.metrics["mean_per_class_recall"] == 1 and "never seen" not in probe.metrics["per_class_recall"]


@given(labels=st.lists(st.sampled_from("abcdef"), min_size=2, max_size=80))
@settings(max_examples=100)
def test_every_fifth_image_of_a_class_is_held_out(labels):
    counts = {label: labels.count(label) for label in labels}
    mask = hold_out(np.array(labels))
    held_out = np.array(labels)[mask].tolist()
    for label, count in counts.items():
        assert held_out.count(label) == (count + 3) // 5 < count  # 0 of 1, 1 of 2 to 6, 2 of 7 to 11
    assert np.array_equal(mask, hold_out(np.array(labels)))


def test_one_image_a_class():
    with pytest.raises(UserError, match="only one training image"):
        linear_probe(blobs(4, 4, 0), blobs(4, 4, 1))


def test_one_class():
    with pytest.raises(UserError, match="needs two classes; all training images have the label 'c0'"):
        linear_probe(blobs(5, 1, 0), blobs(5, 1, 1))


# ---- the command


@pytest.fixture
def labelled(tiny_data, tmp_path):
    colours = ["red", "green", "blue", "yellow"]
    table = tiny_data.table.assign(label=[colours[i % 4] for i in tiny_data.table["image_id"]])
    table.to_csv(tmp_path / "labelled.csv", index=False)
    return tmp_path


def probe(run, labelled, tiny_data, **given):
    target = labelled / "figures.json"
    given = {"captions_path": str(labelled / "labelled.csv"), "image_path": str(tiny_data.image_path)} | given
    main(Arguments(str(run.folder), linear_probe=True, device="cpu", json=str(target), **given))
    return json.loads(target.read_text())


def test_the_command(scene_run, labelled, tiny_data, capsys):
    found = probe(scene_run, labelled, tiny_data)
    model = load(scene_run.folder)
    table = pd.read_csv(labelled / "labelled.csv").drop_duplicates("image")
    features = encode_image(model, [tiny_data.image_path / name for name in table["image"]]).double().numpy()
    is_train = (table["split"] == "train").to_numpy()
    direct = LogisticRegression(C=found["C"], max_iter=1000).fit(features[is_train], table["label"][is_train])
    assert found["acc@1"] == pytest.approx(direct.score(features[~is_train], table["label"][~is_train]), abs=1e-6)
    assert (found["split"], found["n_images"], found["n_train_images"]) == ("valid", 6, 20)
    out = capsys.readouterr().out
    assert out.startswith("linear probe, valid: 6 images, 4 classes, 20 training images, C ") and "rsum" not in out


def test_c_is_chosen_on_valid_when_test_is_reported(scene_run, labelled, tiny_data):
    table = pd.read_csv(labelled / "labelled.csv")
    table.loc[table["image"] >= "23.png", "split"] = "test"
    table.loc[table["image"] == "25.png", "label"] = "violet"
    table.to_csv(labelled / "labelled.csv", index=False)
    found = probe(scene_run, labelled, tiny_data, split="test")
    assert (found["n_images"], found["n_unseen"], found["n_train_images"]) == (3, 1, 20) and found["acc@1"] <= 2 / 3
    first = table.drop_duplicates("image")
    model = load(scene_run.folder)
    parts = {}
    for split in ("train", "valid"):
        rows = first[first["split"] == split]
        images = [tiny_data.image_path / name for name in rows["image"]]
        parts[split] = encode_image(model, images).double().numpy(), rows["label"].tolist()
    assert found["C"] == choose_c(parts["train"], parts["valid"])


def test_mistakes(scene_run, labelled, tiny_data, tmp_path):
    def wrong(**given):
        with pytest.raises(UserError) as error:
            probe(scene_run, labelled, tiny_data, **given)
        assert "\n" not in str(error.value)
        return str(error.value)

    table = pd.read_csv(labelled / "labelled.csv")
    table.drop(columns="split").to_csv(tmp_path / "one.csv", index=False)
    assert "one.csv has no splits" in wrong(captions_path=str(tmp_path / "one.csv"))
    table.drop(columns="label").to_csv(tmp_path / "bare.csv", index=False)
    assert "no column of labels" in wrong(captions_path=str(tmp_path / "bare.csv"))
    table[table["split"] == "valid"].to_csv(tmp_path / "valid.csv", index=False)
    assert "no images in the split 'train'" in wrong(captions_path=str(tmp_path / "valid.csv"))
    table.assign(label="red").to_csv(tmp_path / "red.csv", index=False)
    assert "needs two classes" in wrong(captions_path=str(tmp_path / "red.csv"))

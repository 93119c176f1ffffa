"""Decoding whatever people have into RGB, and the two transforms."""

import io
import pickle
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, features

from clip_scratch.config import CFG
from clip_scratch.data.images import image_transform, images_below, load_image, reading
from clip_scratch.errors import UserError

RNG = np.random.default_rng(0)
RGB = np.kron(RNG.integers(0, 256, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # (32, 48, 3), flat blocks


def saved(image, path, **options):
    image.save(path, **options)
    return path


# What each EXIF orientation asks a viewer to do, https://exiftool.org/TagNames/EXIF.html (0x0112)
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    path = saved(Image.fromarray(RGB), tmp_path / f"a.{suffix}", exif=exif, **options)
    found, expected = load_image(path), ORIENTATIONS[orientation](RGB)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (12 if suffix == "jpg" else 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_smaller(tmp_path, mode):
    """To at least twice the side that is wanted, whatever its mode and orientation; other files are not."""
    image = Image.fromarray(RGB).resize((1000, 700), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(image.convert(mode), tmp_path / "a.jpg", quality=95, exif=exif)
    whole, small = load_image(path), load_image(path, 80)  # a quarter: 700 / 4 >= 2 * 80
    assert whole.shape == (1000, 700, 3) and small.shape == (250, 175, 3)
    expected = np.array(Image.fromarray(whole).resize((175, 250), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - expected).mean() < 2
    np.testing.assert_array_equal(load_image(path, 200), whole)  # half would be 350 < 2 * 200
    assert load_image(saved(image, tmp_path / "a.png"), 80).shape == (700, 1000, 3)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(OSError, match="truncated"):
        load_image(path, 1)


def test_exif_orientation_of_a_pil_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(Image.fromarray(RGB), tmp_path / "a.png", exif=exif)
    with Image.open(path) as image:
        np.testing.assert_array_equal(load_image(image), load_image(path))


def test_greyscale(tmp_path):
    grey = RGB[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(load_image(saved(Image.fromarray(grey), tmp_path / "a.png")), expected)
    np.testing.assert_array_equal(load_image(grey), expected)
    np.testing.assert_array_equal(load_image(grey[..., None]), expected)


def test_black_and_white(tmp_path):
    found = load_image(saved(Image.fromarray(RGB[..., 0] > 127), tmp_path / "a.png"))
    np.testing.assert_array_equal(found[..., 2], np.where(RGB[..., 0] > 127, 255, 0))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_greyscale_keeps_its_tones(tmp_path, suffix):
    grey = RGB[..., 0].astype(np.uint16)
    path = saved(Image.fromarray(grey * 257), tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(load_image(path)[..., 1], grey)
    np.testing.assert_array_equal(load_image(grey * 257)[..., 1], grey)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_greyscale_in_16_bits_is_scaled_by_its_largest_value(tmp_path, suffix, white):
    """12-bit data, and 8-bit data, are often stored in 16 bits."""
    values = np.array([[0, white // 5, white]], np.uint16)  # 255, 4095 and 65535 are multiples of 5
    path = saved(Image.fromarray(values), tmp_path / f"a.{suffix}")
    assert load_image(path)[0].tolist() == [[0] * 3, [51] * 3, [255] * 3]
    nearly = (values * 0.5).astype(np.uint16)  # also where nothing is white
    if white > 255:
        assert load_image(nearly)[0, :, 0].tolist() == [0, 25, 127]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),  # mode I
        (np.array([[-5, 4095, 0]], np.int32), [0, 255, 0]),
        (np.array([[0, 600_000, 1_000_000]], np.int32), [0, 153, 255]),
        (np.array([[0, 0.2, 1]], np.float32), [0, 51, 255]),
        (np.array([[0, 51, 255]], np.float32), [0, 51, 255]),
        (np.array([[np.nan, np.inf, 0.4]], np.float32), [0, 0, 102]),
        (np.zeros((1, 3), np.float32), [0, 0, 0]),
        (np.zeros((1, 3), np.int32), [0, 0, 0]),
        (np.ones((1, 3), np.int32), [1, 1, 1]),
    ],
)
def test_integers_and_floats_are_scaled_by_their_largest_value(tmp_path, values, expected):
    found = load_image(saved(Image.fromarray(values), tmp_path / "a.tiff"))
    assert found.dtype == np.uint8 and found.shape == (1, 3, 3)
    assert found[0].T.tolist() == [expected] * 3


@pytest.mark.skipif(not features.check("avif"), reason="this pillow has no AVIF")
def test_avif(tmp_path):
    found = load_image(saved(Image.fromarray(RGB), tmp_path / "a.avif", quality=95))
    assert found.shape == RGB.shape and np.abs(found.astype(int) - RGB).mean() < 8


@pytest.fixture
def heic(tmp_path):
    """(path, pixels) of a HEIC file as a phone writes it, with the suffix that mail programs give it."""
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(RGB)).save(tmp_path / "a.jpg", quality=95)
    assert (tmp_path / "a.jpg").read_bytes()[4:8] == b"ftyp"
    return tmp_path / "a.jpg"


def forget_heif():
    for table in (Image.OPEN, Image.MIME):
        for name in ("HEIF", "HEIC"):
            table.pop(name, None)
    Image.ID[:] = [name for name in Image.ID if name != "HEIF"]


def test_heic(heic):
    forget_heif()
    found = load_image(heic)
    assert found.shape == RGB.shape and np.abs(found.astype(int) - RGB).mean() < 6


def test_heic_without_its_library_names_the_extra(heic, monkeypatch):
    forget_heif()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"a.jpg: cannot be decoded \(HEIC .* pip install 'clip_scratch\[heif\]'\)"), \
            reading(heic):  # fmt: skip
        load_image(heic)


def test_images_below(tmp_path):
    wanted = ["b.JPG", "sub/a.png", "sub/deep er/c.heic", "z.avif"]
    for name in [*wanted, "._b.JPG", ".thumbs/a.png", "sub/.hidden.png", "notes.txt", "sub/noending"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub/.cache.jpg").mkdir()
    assert images_below(tmp_path) == wanted
    with pytest.raises(UserError, match="there are no images below"):
        images_below(tmp_path / "folder.png")
    for name in ("nothing", "b.JPG", "x" * 300):
        with pytest.raises(UserError, match="there is no folder"):
            images_below(tmp_path / name)


def test_cmyk_jpeg(tmp_path):
    image = Image.new("RGB", (32, 32), (200, 40, 90))
    path = saved(image.convert("CMYK"), tmp_path / "a.jpg", quality=100)
    with Image.open(path) as file:
        assert file.mode == "CMYK"
    assert np.abs(load_image(path).astype(int) - (200, 40, 90)).max() < 8


def test_palette(tmp_path):
    image = Image.fromarray(RGB).quantize(32)
    assert image.mode == "P"
    found = load_image(saved(image, tmp_path / "a.gif"))
    assert found.shape == RGB.shape and np.abs(found.astype(int) - RGB).mean() < 1


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_transparency_lies_on_white(tmp_path, suffix):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="P")
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 750)
    path = saved(image, tmp_path / f"a.{suffix}", transparency=0)
    white, colour = [255, 255, 255], [200, 100, 50]
    assert load_image(path).tolist() == [[white, colour], [colour, white]]


def test_alpha_lies_on_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = 0, 0, 0, 0  # clear
    pixels[0, 1] = 10, 20, 30, 255  # opaque
    pixels[1] = 100, 0, 200, 128  # half
    found = load_image(saved(Image.fromarray(pixels), tmp_path / "a.png")).astype(int)
    assert found[0].tolist() == [[255, 255, 255], [10, 20, 30]]
    assert np.abs(found[1] - (177, 127, 227)).max() <= 1
    np.testing.assert_array_equal(load_image(pixels), found)
    grey = Image.fromarray(pixels).convert("LA")
    assert load_image(grey)[0, 0].tolist() == [255, 255, 255]


def test_one_transparent_colour_of_an_rgb_png_lies_on_white(tmp_path):
    pixels = np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)
    path = saved(Image.fromarray(pixels), tmp_path / "a.png", transparency=(1, 2, 3))
    assert load_image(path).tolist() == [[[255, 255, 255], [9, 9, 9]]]


def test_every_source_gives_the_same(tmp_path):
    path = saved(Image.fromarray(RGB), tmp_path / "a.png")
    for source in (path, str(path), Image.fromarray(RGB), RGB):
        found = load_image(source)
        np.testing.assert_array_equal(found, RGB)
        assert found.dtype == np.uint8
        found[:] = 0  # a copy that may be written to
    assert RGB.any()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_raises(tmp_path, kind):
    data = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(data, kind)
    for part in (0.9, 0.5, 0.01, 0):
        (tmp_path / "a").write_bytes(data.getvalue()[: int(part * len(data.getvalue()))])
        with pytest.raises((OSError, ValueError, SyntaxError)):
            load_image(tmp_path / "a")
    (tmp_path / "a").write_text("<html>404</html>")
    with pytest.raises(OSError):
        load_image(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.jpg")


# ---- transforms

PLAIN = {"crop_scale": 1, "horizontal_flip": 0, "color_jitter": 0, "hue_jitter": 0}


def seeded(transform, seed, image=RGB):
    transform.set_random_seed(seed)
    return transform(image=image)["image"]


@pytest.mark.parametrize("shape", [(1, 1), (31, 64), (200, 90), (64, 64)])
@pytest.mark.parametrize("train", [True, False])
def test_any_image_becomes_a_uint8_square(shape, train):
    image = np.full((*shape, 3), 77, np.uint8)
    for settings in ({}, PLAIN, {"hue_jitter": 0.5, "color_jitter": 1, "crop_scale": 0.01}):
        found = image_transform(CFG(size=40, **settings), train)(image=image)["image"]
        assert found.shape == (3, 40, 40) and found.dtype == torch.uint8


def test_evaluation_is_deterministic_and_sees_the_whole_image():
    one, other = (image_transform(CFG(size=16), train=False) for _ in range(2))
    assert torch.equal(one(image=RGB)["image"], seeded(other, 3))
    assert torch.equal(image_transform(CFG(size=64), False)(image=RGB)["image"][:, 0, 0], torch.from_numpy(RGB[0, 0]))
    bordered = np.zeros((90, 30, 3), np.uint8)
    bordered[:9] = bordered[-9:] = 255
    found = image_transform(CFG(size=20), False)(image=bordered)["image"]
    assert found[:, 0].min() == 255 and found[:, -1].min() == 255 and found[:, 10].max() == 0


def test_reducing_averages():
    """Nearest or bilinear reduction would alias a fine checkerboard; the area does not."""
    board = (255 * (np.indices((256, 256)).sum(0) % 2)).astype(np.uint8)
    found = image_transform(CFG(size=32), False)(image=np.repeat(board[..., None], 3, 2))["image"]
    assert (found.float() - 127.5).abs().max() <= 1


@pytest.mark.parametrize("shape", [(90, 120), (121, 63), (64, 64), (37, 53), (30, 200), (50, 64), (64, 50), (1, 3)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_evaluation_pixels_are_those_of_the_pretrained_models_own_processor(shape, interpolation, resize, backend):
    """CLIP's processor crops, SigLIP's stretches; transformers has either with two libraries underneath."""
    kind = {"crop": "CLIPImageProcessor", "stretch": "SiglipImageProcessor"}[resize]
    processor = getattr(transformers, kind + ("Pil" if backend == "pil" else ""))
    size = {"shortest_edge": 64} if resize == "crop" else {"height": 64, "width": 64}
    own = {"crop_size": {"height": 64, "width": 64}} if resize == "crop" else {}
    resample = Image.Resampling[interpolation.upper()]
    small = RNG.integers(0, 256, (shape[0] // 5 + 2, shape[1] // 5 + 2, 3), dtype=np.uint8)
    smooth = np.array(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC))
    noise = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    transform = image_transform(CFG(size=64, resize=resize, interpolation=interpolation), train=False)
    process = processor(size=size, resample=resample, do_rescale=False, do_normalize=False, **own)
    for image, largest in ((smooth, 3), (noise, 16)):  # torchvision rounds between the two directions
        expected = torch.as_tensor(process(Image.fromarray(image), return_tensors="pt")["pixel_values"][0])
        found = transform(image=image)["image"]
        assert found.dtype == torch.uint8
        error = (found.float() - expected.float()).abs()
        assert error.mean() < (0.5 if backend == "torchvision" else 1e-6)
        assert error.max() <= (largest if backend == "torchvision" else 0)


@pytest.mark.parametrize("interpolation", ["area", "bilinear", "bicubic"])
def test_a_crop_keeps_the_middle_and_the_shape(interpolation):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 30:90] = 200  # what is left and right of it is cut off
    wide[10:30, 50:70] = 90  # a square
    cfg = CFG(size=20, resize="crop", interpolation=interpolation)
    for image in (wide, wide.swapaxes(0, 1)):
        found = image_transform(cfg, train=False)(image=image)["image"]
        assert found.shape == (3, 20, 20)
        assert (found[:, 6:14, 6:14] - 90.0).abs().max() <= 3  # what bicubic overshoots
        assert (found[:, :3] == 200).all() and (found[:, :, -3:] == 200).all()


@pytest.mark.parametrize("interpolation", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_without_a_random_crop_training_has_the_geometry_of_evaluation(resize, interpolation):
    settings = {"size": 24, "resize": resize, "interpolation": interpolation}
    evaluation = image_transform(CFG(**settings), False)(image=RGB)["image"]
    for flip in (0, 1):
        train = image_transform(CFG(**settings, **PLAIN | {"horizontal_flip": flip}), True)
        assert torch.equal(seeded(train, 1), evaluation.flip(2) if flip else evaluation)


def test_the_transform_can_be_sent_to_another_process():
    for train in (True, False):
        transform = image_transform(CFG(size=24, resize="crop", interpolation="bicubic"), train)
        sent = pickle.loads(pickle.dumps(transform))
        assert torch.equal(seeded(sent, 3), seeded(transform, 3))


def test_random_crops_take_the_filter():
    tall = np.repeat(np.linspace(0, 255, 60, dtype=np.uint8)[:, None, None] // 32 * 32, 12, 1).repeat(3, 2)
    crops = [
        seeded(image_transform(CFG(size=90, interpolation=interpolation, **PLAIN | {"crop_scale": 0.5}), True), 4, tall)
        for interpolation in ("area", "bilinear", "bicubic")
    ]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[1], crops[2])
    assert (crops[1].float() - crops[2].float()).abs().mean() < 8  # the same crop


def test_seeded_training_is_reproducible():
    transform, again = image_transform(CFG(size=24), True), image_transform(CFG(size=24), True)
    images = [seeded(transform, seed) for seed in range(8)]
    np.random.default_rng().random()
    np.random.seed(1)
    torch.manual_seed(1)
    assert all(torch.equal(image, seeded(again, seed)) for seed, image in reversed(list(enumerate(images))))
    assert len({image.numpy().tobytes() for image in images}) == 8


def test_without_augmentation_training_sees_what_evaluation_sees():
    train, plain = (image_transform(CFG(size=24, **PLAIN), train) for train in (True, False))
    assert all(torch.equal(seeded(train, seed), plain(image=RGB)["image"]) for seed in range(4))


def test_flip_is_a_setting():
    plain = image_transform(CFG(size=24), False)(image=RGB)["image"]
    always = image_transform(CFG(size=24, **PLAIN | {"horizontal_flip": 1}), True)
    half = image_transform(CFG(size=24, **PLAIN | {"horizontal_flip": 0.5}), True)
    assert torch.equal(seeded(always, 0), plain.flip(2))
    share = np.mean([torch.equal(seeded(half, seed), plain) for seed in range(200)])
    assert 0.35 < share < 0.65


def test_colour_and_hue_are_settings():
    square = np.full((24, 24, 3), (200, 60, 40), np.uint8)
    jitter = image_transform(CFG(size=24, **PLAIN | {"color_jitter": 0.4}), True)
    hue = image_transform(CFG(size=24, **PLAIN | {"hue_jitter": 0.5}), True)
    seen = torch.stack([seeded(jitter, seed, square)[:, 0, 0] for seed in range(60)])
    assert (seen[:, 0] > seen[:, 1]).all() and len(seen.unique(dim=0)) > 30  # another red, but red
    turned = torch.stack([seeded(hue, seed, square)[:, 0, 0] for seed in range(60)])
    assert not (turned[:, 0] > turned[:, 1]).all()


def test_crop_keeps_at_least_the_share_it_is_told():
    ramp = np.repeat(np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 100, 0), 3, 2)
    transform = image_transform(CFG(size=50, **PLAIN | {"crop_scale": 0.6}), True)
    widths = [float(image.max()) - float(image.min()) for image in (seeded(transform, s, ramp) for s in range(60))]
    assert min(widths) > 100 * 0.6 * 3 / 4 - 6 and len({round(w) for w in widths}) > 5

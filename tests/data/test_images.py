"""Pictures as files: what becomes of them, and what is said of those that cannot be used."""

import os

import numpy as np
import pytest
from PIL import Image, features

from equidit.data import ImageError, image_folder, read_image
from equidit.data.images import left_out


def pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def saved(path, array, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options)
    return path


def test_a_square_of_the_right_size_is_left_as_it_is(tmp_path):
    array = pixels(16, 16)
    read = read_image(saved(tmp_path / "a.png", array), 16)
    np.testing.assert_array_equal(read, array.transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width"), [(16, 24), (27, 16), (17, 20)])
def test_the_middle_is_cut_out(tmp_path, height, width):
    array = pixels(height, width)
    read = read_image(saved(tmp_path / "a.png", array), min(height, width))
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    expected = array[top : top + side, left : left + side]
    np.testing.assert_array_equal(read, expected.transpose(2, 0, 1))


def test_twice_too_large_is_averaged_in_boxes(tmp_path):
    array = pixels(32, 32)
    read = read_image(saved(tmp_path / "a.png", array), 16)
    boxes = array.reshape(16, 2, 16, 2, 3).astype(float).mean(axis=(1, 3))
    # Rounded to whole grey levels twice: after the rows, and after the columns.
    assert np.abs(read.transpose(1, 2, 0) - boxes).max() <= 1


def test_in_between_is_scaled_to_the_shorter_side(tmp_path):
    gradient = np.repeat(np.linspace(0, 255, 90)[None], 60, 0)
    array = np.repeat(gradient[..., None], 3, 2).astype(np.uint8)
    read = read_image(saved(tmp_path / "a.png", array), 40)
    assert read.shape == (3, 40, 40)
    # The middle 60 of 90 columns, at 2 / 3 of the resolution.
    expected = np.linspace(0, 255, 90)[15:75].reshape(20, 3).mean(1)
    assert np.abs(read[0, 20].reshape(20, 2).mean(1) - expected).max() < 2


def test_grey_is_colour(tmp_path):
    array = pixels(16, 16, 1)
    read = read_image(saved(tmp_path / "a.png", array), 16)
    np.testing.assert_array_equal(read, np.repeat(array[None], 3, 0))


def test_a_palette_is_colour(tmp_path):
    image = Image.fromarray(pixels(16, 16)).quantize(16)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 16), expected)


def test_transparent_parts_are_white(tmp_path):
    array = pixels(16, 16, 4)
    array[..., 3] = 255
    array[:8, :, 3] = 0
    array[8, :, 3] = 128
    read = read_image(saved(tmp_path / "a.png", array), 16).transpose(1, 2, 0)
    assert (read[:8] == 255).all()
    np.testing.assert_array_equal(read[9:], array[9:, :, :3])
    half = array[8, :, :3] * (128 / 255) + 127
    assert np.abs(read[8] - half).max() <= 1


def test_16_bits_are_scaled_not_cut_off(tmp_path):
    array = (pixels(16, 16, 1).astype(np.uint16) * 257).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(array).save(tmp_path / name)
        read = read_image(tmp_path / name, 16)
        np.testing.assert_array_equal(read, np.repeat((array // 257)[None], 3, 0))


def test_a_camera_held_sideways(tmp_path):
    array = pixels(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it as it was
    path = saved(tmp_path / "a.png", array, exif=exif)
    np.testing.assert_array_equal(read_image(path, 16), np.rot90(array, -1).transpose(2, 0, 1))


def test_small_pictures(tmp_path):
    path = saved(tmp_path / "a.png", pixels(12, 40))
    with pytest.raises(ImageError, match=r"a\.png has 40x12 pixels, less than 16x16.*enlarge") as e:
        read_image(path, 16)
    assert not e.value.damaged
    assert read_image(path, 16, small="enlarge").shape == (3, 16, 16)


def test_no_pictures(tmp_path):
    whole = saved(tmp_path / "whole.png", pixels(64, 64)).read_bytes()
    for name, content in {
        "text.png": b"hello",
        "empty.jpg": b"",
        "cut.png": whole[: len(whole) // 2],
        "flipped.png": whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{name} is no picture, or damaged") as error:
            read_image(tmp_path / name, 16)
        assert error.value.damaged
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match=r"folder\.png"):
        read_image(tmp_path / "folder.png", 16)
    Image.fromarray(np.zeros((16, 16), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match="floating-point"):
        read_image(tmp_path / "float.tif", 16)
    Image.fromarray(np.full((16, 16), 1 << 20, np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(ImageError, match="more than 16 bits"):
        read_image(tmp_path / "deep.tif", 16)


def test_too_large_is_not_damaged(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", pixels(64, 64))
    for limit in (1000, 3000):  # refused by Pillow, and warned of
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match=r"a\.png is larger than Pillow.*exceeds limit") as e:
            read_image(path, 16)
        assert not e.value.damaged
    monkeypatch.undo()
    with pytest.raises(ValueError, match="size=0"):
        read_image(path, 0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "does not fit into memory"),
        (PermissionError(13, "Permission denied"), "cannot be read.*Permission denied"),
        (OSError(5, "Input/output error"), "cannot be read.*Input/output error"),
    ],
)
def test_what_the_system_refuses_is_not_damaged(tmp_path, monkeypatch, error, words):
    path = saved(tmp_path / "a.png", pixels(16, 16))

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match=rf"a\.png {words}") as found:
        read_image(path, 16)
    assert not found.value.damaged


def test_memory_that_is_short_later(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", pixels(16, 16, 4))

    def refuse(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "alpha_composite", refuse)
    with pytest.raises(ImageError, match="does not fit into memory"):
        read_image(path, 16)


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(8, 8)).save(path, "png")


def test_folder(tmp_path):
    put(tmp_path, "b/2.png", "b/1.PNG", "a/deep/3.png", "a/4.png", "a/deep/er/5.png")
    folder = image_folder(tmp_path)
    assert folder.classes == ("a", "b")
    names = ("a/4.png", "a/deep/3.png", "a/deep/er/5.png", "b/1.PNG", "b/2.png")
    assert folder.files == names
    assert folder.label.tolist() == [0, 0, 0, 1, 1]
    assert folder.ignored == 0
    assert left_out(folder) == ""


def test_what_is_left_out_is_counted_by_kind(tmp_path):
    put(tmp_path, "a/1.png", "b/2.png", "loose.png", "a/.hidden.png", ".cache/3.png")
    for name in ("a/notes.txt", "b/deep/MORE.TXT", "a/Makefile", "b/x.npy", "list.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "a" / "self.png").symlink_to("self.png")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "b" / "around").symlink_to(tmp_path)
    (tmp_path / "b" / "again").symlink_to(".")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    folder = image_folder(tmp_path)
    assert folder.files == ("a/1.png", "b/2.png")
    assert folder.kinds == {
        ".csv": 1,
        ".npy": 1,
        ".txt": 2,
        "broken link": 3,
        "hidden": 2,
        "link to a folder around it": 2,
        "no file": 1,
        "picture beside the class folders": 1,
        "without suffix": 1,
    }
    assert left_out(folder).startswith(f"left out of {tmp_path}: 1 .csv, 1 .npy, 2 .txt, 3 broken")


def test_links_are_followed(tmp_path):
    put(tmp_path, "elsewhere/1.png", "elsewhere/deep/2.png", "root/b/3.png")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "b" / "inside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "b" / "4.png").symlink_to("3.png")
    folder = image_folder(tmp_path / "root")
    inside = ("b/3.png", "b/4.png", "b/inside/1.png", "b/inside/deep/2.png")
    assert folder.files == ("a/1.png", "a/deep/2.png", *inside)
    assert folder.ignored == 0
    linked = tmp_path / "link"
    linked.symlink_to(tmp_path / "root")
    assert image_folder(linked).files == folder.files


# A suffix of each format that Pillow writes too, with what it loses.
WRITTEN = {
    ".avif": 20, ".bmp": 0, ".dds": 0, ".gif": 60, ".ico": 0, ".jfif": 40, ".jp2": 0,
    ".jpeg": 40, ".jpg": 40, ".mpo": 40, ".pcx": 0, ".png": 0, ".apng": 0, ".ppm": 0,
    ".qoi": 0, ".tga": 0, ".tif": 0, ".tiff": 0, ".webp": 40,
}  # fmt: skip


@pytest.mark.parametrize("suffix", WRITTEN)
def test_what_pillow_reads_is_read(tmp_path, suffix):
    grey = np.linspace(0, 255, 32)[:, None] * np.ones((1, 32))
    array = np.stack([grey, grey.T, 255 - grey], -1).astype(np.uint8)
    path = tmp_path / "a" / f"1{suffix}"
    path.parent.mkdir()
    Image.fromarray(array).save(path)
    folder = image_folder(tmp_path)
    assert folder.files == (f"a/1{suffix}",)
    off = np.abs(read_image(path, 32).astype(int) - array.transpose(2, 0, 1))
    assert off.max() <= WRITTEN[suffix]


def test_what_only_looks_like_a_picture_s_suffix(tmp_path):
    put(tmp_path, "a/1.png")
    for suffix in (".h5", ".pdf", ".eps", ".mpg", ".mp4", ".fits", ".pfm", ".emf", ".svg"):
        (tmp_path / "a" / f"2{suffix}").write_bytes(b"")
    folder = image_folder(tmp_path)
    assert folder.files == ("a/1.png",)
    assert folder.ignored == sum(folder.kinds.values()) == 9


def test_formats_that_pillow_was_built_without(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "a/2.avif", "a/3.jp2")
    monkeypatch.setattr(features, "check", lambda name: name == "jpg")
    assert image_folder(tmp_path).kinds == {".avif": 1, ".jp2": 1}


def test_the_first_picture_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for suffix in (".gif", ".webp", ".png"):
        path = tmp_path / f"a{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        assert read_image(path, 16)[:, 0, 0].tolist() == [255, 0, 0]


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_folder(tmp_path / "nowhere")
    saved(tmp_path / "a.png", pixels(8, 8))
    with pytest.raises(ValueError, match="no class folders: put the pictures into"):
        image_folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="a holds no pictures"):
        image_folder(tmp_path)


def test_folders_of_class_folders(tmp_path):
    put(tmp_path, "split/train/cat/1.png", "split/train/dog/2.png", "split/val/cat/3.png")
    with pytest.raises(
        ValueError, match=r"the splits train, val.*\(cat, dog\).*give .*split/train"
    ):
        image_folder(tmp_path / "split")
    assert image_folder(tmp_path / "split" / "train").classes == ("cat", "dog")
    put(tmp_path, "one/train/cat/1.png", "one/train/dog/2.png")
    with pytest.raises(ValueError, match=r"the one folder train.*\(cat, dog\)"):
        image_folder(tmp_path / "one")
    # A class of that name, folders within classes, and one class.
    for root, names in {
        "vehicles": ("train/1.png", "bus/2.png"),
        "kinds": ("cat/old/1.png", "cat/new/2.png", "dog/old/3.png"),
        "flowers": ("all/1.png",),
        "deep": ("all/images/1.png",),
    }.items():
        put(tmp_path, *(f"{root}/{name}" for name in names))
        assert len(image_folder(tmp_path / root).files) == len(names)

"""Pictures as files: what becomes of them, and what is said of those that cannot be used."""

import numpy as np
import pytest
from PIL import Image

from equidit.data import ImageError, image_folder, read_image


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


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", pixels(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"a\.png.*exceeds limit"):
        read_image(path, 16)


def test_folder(tmp_path):
    for name in ("b/2.png", "b/1.PNG", "a/deep/3.png", "a/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(8, 8)).save(tmp_path / name, "png")
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "a" / ".hidden.png").write_text("")
    (tmp_path / ".cache").mkdir()
    folder = image_folder(tmp_path)
    assert folder.classes == ("a", "b")
    assert folder.files == ("a/4.png", "a/deep/3.png", "b/1.PNG", "b/2.png")
    assert folder.label.tolist() == [0, 0, 1, 1]
    assert folder.ignored == 1


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_folder(tmp_path / "nowhere")
    saved(tmp_path / "a.png", pixels(8, 8))
    with pytest.raises(ValueError, match="no class folders: put the pictures into"):
        image_folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="a holds no pictures"):
        image_folder(tmp_path)

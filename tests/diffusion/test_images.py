"""Folders of images: rows, their accounting, and pixels."""

import json

import pytest
import torch
from PIL import Image

from qgraft.data.pictures import Picture
from qgraft.diffusion.images import pixels_of, read_images
from qgraft.errors import DataError


def write(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def picture(path, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    image.putdata([(x % 256, y % 256, (x * y) % 256) for y in range(size[1]) for x in range(size[0])])
    image.save(path)
    return path


def test_every_line_is_accounted_for(tmp_path):
    folder = tmp_path / "images"
    picture(folder / "a.png")
    picture(folder / "in" / "b.png")
    picture(tmp_path / "outside.png")
    picture(folder / "alone.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    write(folder, [
        {"file_name": "a.png", "text": "one"}, {"file_name": "in/b.png", "text": "two"},
        {"file_name": "none.png", "text": "x"}, {"file_name": "../outside.png", "text": "x"},
        {"file_name": "broken.png", "text": "x"}, {"file_name": "a.png", "text": " "}, {"text": "x"},
        {"file_name": "a.png", "text": True},
    ])  # fmt: skip
    rows, accounting = read_images(str(folder), 8)
    assert [row.caption for row in rows] == ["one", "two"]
    assert accounting.read == 8 and accounting.dropped == {
        "no such image": 1, "the image is outside of the folder": 1, "the image cannot be read": 1, "no caption": 2,
        "no file_name": 1,
    }  # fmt: skip
    assert accounting.examples["no such image"] == ["metadata.jsonl:3"]
    assert "alone.png" in accounting.notes[0] and "broken" not in accounting.notes[0]
    assert rows[0].places == (16, 20, 0, 1, 8, 8)  # 20x16 becomes 10x8, of which 8x8 at the middle


def test_one_caption_for_all_images(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.jpg")
    rows, _ = read_images(str(tmp_path), 8, instance_prompt="a photo of sks")
    assert [(row.path.name, row.caption) for row in rows] == [("a.png", "a photo of sks"), ("b.jpg", "a photo of sks")]


@pytest.mark.parametrize("size", [(20, 16), (16, 20), (33, 8), (9, 31), (8, 8)])
def test_pixels_are_those_of_torchvision(tmp_path, size):
    transforms = pytest.importorskip("torchvision.transforms")
    picture(tmp_path / "a.png", size)
    (row,) = read_images(str(tmp_path), 8, instance_prompt="x")[0]
    steps = [transforms.Resize(8), transforms.CenterCrop(8), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    assert torch.equal(pixels_of(row), transforms.Compose(steps)(Image.open(tmp_path / "a.png")))


def test_images_are_turned_as_they_say(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    (row,) = read_images(str(tmp_path), 8, instance_prompt="x")[0]
    assert pixels_of(row)[:, 7, 7].tolist() == [1.0] * 3 and pixels_of(row)[:, 0, 0].tolist() == [-1.0] * 3


def test_folders_without_images_are_refused(tmp_path):
    for folder, options, told in [
        ("none", {}, "no such folder"), (".", {}, "holds no metadata.jsonl"),
        (".", {"instance_prompt": "x"}, "holds no images"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=told):
            read_images(str(tmp_path / folder), 8, **options)
    write(tmp_path, [{"file_name": "a.png", "prompt": "x"}])
    with pytest.raises(DataError, match="no line has 'text'; there are: prompt"):
        read_images(str(tmp_path), 8)
    with pytest.raises(DataError, match="no image that can be learned"):
        read_images(str(tmp_path), 8, caption_column="prompt")


def test_grey_of_16_bits_is_not_white(tmp_path):
    """Pillow's own convert("RGB") clips it; of 16-bit colour it reads the upper 8 bits."""
    values = [(3 * number * 65535) // 1024 for number in range(256)]
    deep = Image.new("I;16", (16, 16))
    deep.putdata(values)
    deep.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "I;16" and max(stored.tobytes()) > 1
    (row,) = read_images(str(tmp_path), 16, instance_prompt="x")[0]
    expected = (torch.tensor([value >> 8 for value in values]).float() / 255 - 0.5) / 0.5
    assert torch.equal(pixels_of(row), expected.view(1, 16, 16).expand(3, 16, 16))
    assert Picture(tmp_path / "a.png").open().tobytes() == bytes(value >> 8 for value in values for _ in "RGB")
    for mode, value in (("I", 70000), ("F", 0.5)):
        Image.new(mode, (8, 8), value).save(tmp_path / f"{mode}.tif")
        with pytest.raises(DataError, match="no white is known"):
            Picture(tmp_path / f"{mode}.tif").open()
    assert read_images(str(tmp_path), 8, instance_prompt="x")[1].dropped == {"its pixels have 32 bits": 2}


def test_what_is_not_learned_of_an_image_is_told(tmp_path):
    picture(tmp_path / "in" / "below.png")
    (tmp_path / "phone.heic").write_bytes(b"ftypheic")
    (tmp_path / "run.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    for mode in ("RGBA", "LA"):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.png")
    Image.new("P", (8, 8)).save(tmp_path / "P.png", transparency=0)
    Image.new("LAB", (8, 8)).save(tmp_path / "LAB.tif")
    frames = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    rows, accounting = read_images(str(tmp_path), 8, instance_prompt="x")
    assert accounting.dropped == {"the image cannot be read": 1} and accounting.examples == {
        "the image cannot be read": ["run.png"]
    }  # PostScript is a program
    assert accounting.notes == [
        "3 images are transparent in places, and what lies beneath is learned, LA.png first",
        "1 images hold several pictures, the first of which is learned, two.gif first",
        "2 files of the folder are none that are read, or lie in folders below, in/below.png first",
    ]
    assert pixels_of(next(row for row in rows if row.path.name == "two.gif"))[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    write(tmp_path, [{"file_name": "./in/below.png", "text": "x"}, {"file_name": "P.png", "text": "x"}])
    assert (
        read_images(str(tmp_path), 8)[1].notes[1].startswith("6 files of the folder have no line in metadata.jsonl, LA")
    )


def test_an_image_that_would_not_fit_into_memory_is_dropped(tmp_path):
    Image.new("RGB", (1, 400)).save(tmp_path / "line.png")
    picture(tmp_path / "a.png")
    rows, accounting = read_images(str(tmp_path), 512, instance_prompt="x")  # 512 x 204800
    assert accounting.dropped == {"too long for its width at resolution 512": 1} and len(rows) == 1

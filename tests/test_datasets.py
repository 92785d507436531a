"""Small files in the layouts of MS-COCO and MJHQ: what is read, and what is refused by its count, digest or gaps."""

from __future__ import annotations

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from obclip_core import datasets


def annotations(n: int = 3) -> dict:
    images = [{"id": 10 * i + 5, "file_name": f"COCO_val2014_{10 * i + 5:012d}.jpg"} for i in reversed(range(n))]
    notes = [
        {"id": 100 * i + j, "image_id": 10 * i + 5, "caption": f"caption {j} of {i} \n"}
        for i in reversed(range(n))
        for j in (3, 1, 2)
    ]
    return {"images": images, "annotations": notes}


def picture(path, colour=(255, 0, 0), size=(12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, quality=95)


@pytest.fixture
def small(monkeypatch):
    """The same checks, with the counts and digests of small files."""
    text = json.dumps(annotations())
    monkeypatch.setattr(datasets, "COCO_IMAGES", 3)
    monkeypatch.setattr(datasets, "COCO_CAPTIONS", 9)
    monkeypatch.setattr(datasets, "COCO_30K", 2)
    monkeypatch.setattr(datasets, "MJHQ_PROMPTS", 6)
    monkeypatch.setattr(datasets, "MJHQ_CATEGORIES", 2)
    monkeypatch.setattr(datasets, "KNOWN", {"captions_val2014.json": "md5:" + hashlib.md5(text.encode()).hexdigest()})
    return text


def test_coco_takes_the_lowest_caption_of_each_picture_in_order(tmp_path, small):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_val2014.json").write_text(small)
    found = datasets.coco(tmp_path)
    assert found.texts == ("caption 1 of 0", "caption 1 of 1", "caption 1 of 2")
    assert found.ids[0] == "COCO_val2014_000000000005" and found.pictures == ()
    assert found.sha256 == hashlib.sha256(small.encode()).hexdigest()


def test_coco_layouts_agree(tmp_path, small):
    flat, packed = tmp_path / "flat", tmp_path / "packed"
    flat.mkdir(), packed.mkdir()
    (flat / "captions_val2014.json").write_text(small)
    with zipfile.ZipFile(packed / "annotations_trainval2014.zip", "w") as archive:
        archive.writestr("annotations/captions_val2014.json", small)
    for name in ("flat", "packed", "packed/annotations_trainval2014.zip"):
        assert datasets.coco(tmp_path / name).texts == datasets.coco(flat).texts


@pytest.mark.parametrize("place", ["val2014", "images/val2014", "images", "."])
def test_coco_pictures_are_found_where_people_have_them(tmp_path, small, place):
    (tmp_path / "captions_val2014.json").write_text(small)
    for image in annotations()["images"]:
        picture(tmp_path / place / image["file_name"])
    found = datasets.coco(tmp_path)
    assert [path.stem for path in found.pictures] == list(found.ids)
    found.pictures[1].unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 pictures, COCO_val2014_000000000015.jpg first"):
        datasets.coco(tmp_path)


def test_the_30k_list(tmp_path, small):
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\nCOCO_val2014_000000000042.jpg,"a dog, a cat"\nCOCO_val2014_000000000073.jpg,x\n'
    )
    found = datasets.coco(tmp_path)
    assert found.texts == ("a dog, a cat", "x") and found.ids[0] == "COCO_val2014_000000000042"
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,x\n")
    with pytest.raises(ValueError, match="has 1 captions, expected 2"):
        datasets.coco(tmp_path)
    assert len(datasets.coco(tmp_path, check=False)) == 1
    (tmp_path / "metadata.csv").write_text("file_name\na.jpg\n")
    with pytest.raises(ValueError, match="two columns"):
        datasets.coco(tmp_path)


def test_a_changed_caption_file_is_refused_by_digest_and_a_short_one_by_count(tmp_path, small):
    file = tmp_path / "captions_val2014.json"
    file.write_text(small.replace("caption 1 of 0", "caption 7 of 0"))
    with pytest.raises(ValueError, match="has md5 .*expected"):
        datasets.coco(tmp_path)
    assert datasets.coco(tmp_path, check=False).texts[0] == "caption 7 of 0"
    file.write_text(json.dumps(annotations(2)))
    with pytest.raises(ValueError, match="has 2 pictures, expected 3"):
        datasets.coco(tmp_path)
    short = annotations()
    short["annotations"].pop()
    file.write_text(json.dumps(short))
    with pytest.raises(ValueError, match="has 8 captions, expected 9"):
        datasets.coco(tmp_path)


def test_the_real_counts_are_those_of_the_real_files():
    assert (datasets.COCO_IMAGES, datasets.COCO_CAPTIONS, datasets.COCO_30K) == (40504, 202654, 30000)
    assert datasets.MJHQ_PROMPTS == 30000 == 3000 * datasets.MJHQ_CATEGORIES


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}'])
def test_what_is_no_caption_file_is_named(tmp_path, text):
    (tmp_path / "captions_val2014.json").write_text(text)
    with pytest.raises(ValueError, match="captions_val2014.json (cannot be read|is not a caption file)"):
        datasets.coco(tmp_path, check=False)


def test_a_folder_without_the_data_set_is_named(tmp_path):
    for call in (datasets.coco, datasets.mjhq):
        with pytest.raises(ValueError, match="expected one of"):
            call(tmp_path)
        with pytest.raises(ValueError, match="no M.* at .*nowhere"):
            call(tmp_path / "nowhere")
    (tmp_path / "annotations_trainval2014.zip").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        datasets.coco(tmp_path)


# MJHQ


def mjhq(folder, names=("a", "b", "c", "d", "e", "f")) -> dict:
    table = {one: {"category": "art" if i % 2 else "food", "prompt": f"prompt {one}"} for i, one in enumerate(names)}
    (folder / "meta_data.json").write_text(json.dumps(table))
    return table


def test_mjhq_prompts_with_category_and_pictures(tmp_path, small):
    table = mjhq(tmp_path)
    found = datasets.mjhq(tmp_path)
    assert found.texts[1] == "prompt b" and found.categories[:2] == ("food", "art") and found.pictures == ()
    for one, entry in table.items():
        picture(tmp_path / "mjhq30k_imgs" / entry["category"] / f"{one}.jpg")
    found = datasets.mjhq(tmp_path)
    assert found.pictures[1] == tmp_path / "mjhq30k_imgs/art/b.jpg"
    assert found.only("art").ids == ("b", "d", "f") and len(found.only("art").pictures) == 3
    with pytest.raises(ValueError, match="no category 'cats': expected one of art, food"):
        found.only("cats")


def test_mjhq_flat_pictures(tmp_path, small):
    for one in mjhq(tmp_path):
        picture(tmp_path / "imgs" / f"{one}.jpg")
    assert datasets.mjhq(tmp_path).pictures[0] == tmp_path / "imgs/a.jpg"


def test_mjhq_counts_and_form_are_checked(tmp_path, small):
    mjhq(tmp_path, "abcd")
    with pytest.raises(ValueError, match="has 4 prompts, expected 6"):
        datasets.mjhq(tmp_path)
    assert len(datasets.mjhq(tmp_path, check=False)) == 4
    table = mjhq(tmp_path)
    table["a"]["category"] = "art"
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="has 4 prompts of art, expected 3"):
        datasets.mjhq(tmp_path)
    (tmp_path / "meta_data.json").write_text('{"a": {"prompt": "x"}}')
    with pytest.raises(ValueError, match="category, prompt"):
        datasets.mjhq(tmp_path, check=False)


def test_mjhq_parquet_alone_has_no_prompts(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test-00000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="hold no prompts"):
        datasets.mjhq(tmp_path)


# Captions


def test_sample_repeats_and_is_even_over_categories(tmp_path, small):
    mjhq(tmp_path)
    found = datasets.mjhq(tmp_path)
    drawn = found.sample(4, seed=1)
    assert sorted(drawn.categories) == ["art", "art", "food", "food"]
    assert drawn == found.sample(4, seed=1) and list(drawn.ids) == sorted(drawn.ids)
    assert len({found.sample(2, seed=s).ids for s in range(20)}) > 3
    with pytest.raises(ValueError, match="7 captions asked of the 6"):
        found.sample(7)


def test_captions_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="no captions"):
        datasets.Captions("x", (), ())
    with pytest.raises(ValueError, match="2 ids but 1 texts"):
        datasets.Captions("x", ("a", "b"), ("t",))
    with pytest.raises(ValueError, match="'a' twice"):
        datasets.Captions("x", ("a", "a"), ("t", "u"))
    with pytest.raises(ValueError, match="no text for 'b'"):
        datasets.Captions("x", ("a", "b"), ("t", " "))


def test_pictures_come_square_and_in_order(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (0, 255, 0)  # only the middle is green
    Image.fromarray(wide).save(tmp_path / "wide.png")
    picture(tmp_path / "red.png", (255, 0, 0), (6, 6))
    captions = datasets.Captions("x", ("wide", "red"), ("t", "u"), (tmp_path / "wide.png", tmp_path / "red.png"))
    batches = list(datasets.pictures(captions, 4, batch=1))
    assert [b.shape for b in batches] == [(1, 3, 4, 4)] * 2
    assert torch.allclose(batches[0][0].mean(dim=(1, 2)), torch.tensor([0.0, 1.0, 0.0]), atol=0.02)
    assert torch.equal(batches[1][0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    (tmp_path / "red.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="red.png is not a picture"):
        list(datasets.pictures(captions, 4))
    with pytest.raises(ValueError, match="read without pictures"):
        next(datasets.pictures(datasets.Captions("x", ("a",), ("t",)), 4))

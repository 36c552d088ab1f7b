"""Decoded images: the right pixels, decoded once, and never more of them than there is room for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.catalog import read_architecture
from engine.chat.images import ImageSpec, pixels
from engine.data.prepared import StoredImage
from engine.errors import UserError
from engine.train.batches import ImagePixels, join, pad, refuse_unread
from tests.support.pictured_rows import SPEC, Pictured, picture, seeing, stored, write_pictured
from tests.support.tiny import MINISTRAL3, edit_config, write_model

IMAGES = [stored(picture(28 * (n + 1), 28, seed=n), n) for n in range(4)]
"""One, two, three and four tokens wide; a token is 28 x 28 pixels of three float32 numbers."""
TOKEN_BYTES = 28 * 28 * 3 * 4


class TestDecoding:
    def test_the_pixels_are_those_of_the_grid(self) -> None:
        for image in IMAGES:
            expected = pixels(image.content, image.rows, image.columns, SPEC)
            assert np.array_equal(ImagePixels(SPEC).read(image), expected)
            assert expected.shape == (3, 28, 28 * image.columns)

    def test_an_image_is_decoded_once(self) -> None:
        decoded = ImagePixels(SPEC)
        assert decoded.read(IMAGES[1]) is decoded.read(IMAGES[1])

    def test_what_was_prefetched_is_there(self) -> None:
        decoded = ImagePixels(SPEC)
        decoded.prefetch(IMAGES)
        first = [decoded.read(image) for image in IMAGES]
        assert all(decoded.read(i) is found for i, found in zip(IMAGES, first, strict=True))

    def test_the_least_recently_used_goes_when_there_is_no_room(self) -> None:
        decoded = ImagePixels(SPEC, cache_bytes=6 * TOKEN_BYTES)
        one, two = (decoded.read(image) for image in IMAGES[:2])
        assert decoded.read(IMAGES[0]) is one
        decoded.read(IMAGES[3])
        assert decoded.read(IMAGES[0]) is one
        again = decoded.read(IMAGES[1])
        assert again is not two
        assert np.array_equal(again, two)

    def test_an_image_beyond_all_room_is_decoded_all_the_same(self) -> None:
        decoded = ImagePixels(SPEC, cache_bytes=1)
        decoded.prefetch(IMAGES)
        assert decoded.read(IMAGES[3]).shape == (3, 28, 112)

    def test_a_damaged_image_is_a_sentence(self) -> None:
        broken = StoredImage(bytes(IMAGES[3].content)[:300], 1, 4, 9)
        with pytest.raises(UserError, match="image"):
            ImagePixels(SPEC).read(broken)


class TestJoin:
    def test_images_lie_behind_one_another_and_are_padded_with_zeros(self) -> None:
        chance = np.random.default_rng(1)
        flat, high = (chance.random((3, *size), np.float32) for size in ((28, 56), (56, 28)))
        found = join([flat, high])
        assert found["pixels"].shape == (2 * 3 * 28 * 56,)
        assert found["image_sizes"].tolist() == [[28, 56], [56, 28]]
        assert found["image_sizes"].dtype == torch.int64
        padded = pad(found["pixels"], found["image_sizes"].tolist())
        assert padded.shape == (2, 3, 56, 56)
        for place, image in zip(padded.numpy(), (flat, high), strict=True):
            own = place[:, : image.shape[1], : image.shape[2]]
            assert np.array_equal(own, image)
            assert place.sum() == pytest.approx(own.sum())

    def test_one_image_is_read_where_it_lies(self) -> None:
        found = join([np.ones((3, 28, 56), np.float32)])
        padded = pad(found["pixels"], found["image_sizes"].tolist())
        assert padded.shape == (1, 3, 28, 56)
        assert padded.data_ptr() == found["pixels"].data_ptr()

    def test_without_images_there_is_nothing(self) -> None:
        assert join([]) == {}


class TestRefusal:
    def refuse(self, folder: Path, config: dict[str, Any], **keys: object) -> None:
        rows = write_pictured(folder / "rows", [Pictured((picture(28, 28),))])
        model = write_model(folder / "model", config)
        if keys:
            edit_config(model, **keys)
        refuse_unread(read_architecture(model), rows.prepared)

    def test_a_model_that_reads_its_images_is_taken(self, tmp_path: Path) -> None:
        self.refuse(tmp_path, seeing(MINISTRAL3))

    def test_a_text_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="this model reads none"):
            self.refuse(tmp_path, MINISTRAL3)

    @pytest.mark.parametrize("keys", [{"spatial_merge_size": 1}, {"image_token_index": 14}])
    def test_other_patch_sizes_are_refused(self, tmp_path: Path, keys: dict[str, object]) -> None:
        with pytest.raises(UserError, match="do not cut images alike"):
            self.refuse(tmp_path, seeing(MINISTRAL3), **keys)

    def test_images_beyond_the_towers_positions_are_refused(self, tmp_path: Path) -> None:
        assert SPEC.longest == 112
        with pytest.raises(UserError, match="up to 112 pixels") as error:
            self.refuse(tmp_path, seeing(MINISTRAL3, image_size=90))
        assert "image_size: 84" in error.value.fix

    def test_rows_without_images_are_taken_by_any_model(self, tmp_path: Path) -> None:
        rows = write_pictured(tmp_path / "rows", [Pictured(())])
        refuse_unread(read_architecture(write_model(tmp_path / "m", MINISTRAL3)), rows.prepared)


def test_a_spec_of_another_patch_makes_other_pixels() -> None:
    image = IMAGES[0]
    assert ImagePixels(ImageSpec(16, 112, 2)).read(image).shape == (3, 32, 32)

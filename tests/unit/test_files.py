"""Folders that are there as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from forgelm.run.files import written_aside


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_takes_anothers_place(tmp_path: Path) -> None:
    place = tmp_path / "new/it"
    for name in ("first", "second"):
        with written_aside(place) as beside:
            (beside / "in").mkdir()
            (beside / "in" / name).write_text(name)
            beside_it = place.exists()
        assert names(tmp_path / "new") == ["it", "it/in", f"it/in/{name}"]
        assert beside_it is (name == "second")
    (tmp_path / "fresh").mkdir()
    assert place.stat().st_mode == (tmp_path / "fresh").stat().st_mode


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "it"
    place.mkdir()
    (place / "before").touch()

    def fill_the_disk() -> None:
        with written_aside(place) as beside:
            (beside / "half").touch()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert names(tmp_path) == ["it", "it/before"]

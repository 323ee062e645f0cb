"""Folders and lines that are complete or absent."""

import errno
import os
import sys

import pytest

from nanonexus import files
from nanonexus.cli import UserError
from nanonexus.files import append_line, new_folder, output_file, output_folder, read_lines


def make(out):
    """What prepare_data.py and export do."""
    with new_folder(out) as folder:
        with open(os.path.join(folder, "x"), "w") as f:
            f.write("whole")


def refused(out, message):
    """Before the work."""
    with pytest.raises(UserError, match=message), new_folder(out):
        raise AssertionError("the work has begun")


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "a" / "set"
    with pytest.raises(KeyError), new_folder(out) as folder:
        with open(os.path.join(folder, "x"), "w") as f:
            f.write("half")
        raise KeyError
    assert os.listdir(tmp_path / "a") == []
    os.makedirs(tmp_path / "a/set.partial")
    (tmp_path / "a/set.partial/.lock").touch()
    (tmp_path / "a/set.partial/left").write_text("by a process that was killed")
    make(out)
    assert os.listdir(tmp_path / "a") == ["set"] and os.listdir(out) == ["x"]
    refused(out, "not empty")
    assert (out / "x").read_text() == "whole"


def test_nobody_enters_a_new_folder_until_it_is_finished(tmp_path, monkeypatch):
    """Between the last byte and the new name, each file is flushed, which takes a while."""
    pytest.importorskip("fcntl", reason="locks need POSIX")
    out, tried = str(tmp_path / "new"), []

    def flush(path):
        refused(out, "another run is writing|is not empty")
        tried.append(path)

    monkeypatch.setattr(files, "flush", flush)
    with new_folder(out) as partial:
        refused(out, "another run is writing")
        (tmp_path / "new.partial" / "a").write_text("whole")
    assert tried == [os.path.join(partial, "."), os.path.join(partial, "a"), str(tmp_path)]
    assert os.listdir(tmp_path) == ["new"] and os.listdir(out) == ["a"]


def test_a_line_cut_short_is_replaced_by_the_next_and_a_damaged_one_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, dict(i=0))
    with open(path, "a") as f:
        f.write('{"i": 1, "te')
    assert read_lines(path) == [dict(i=0)]
    append_line(path, dict(i=2))
    assert read_lines(path) == [dict(i=0), dict(i=2)]
    for text in (b"}\n", b"null\n", b"{}\n", b"[" * 100_000 + b"\n", b"\xff\n"):
        path.write_bytes(b'{"i": 0}\n' + text)
        with pytest.raises(UserError, match="lines.jsonl, line 2, is damaged, or of another kind"):
            read_lines(path, "i")


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "other" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):  # the second does not exist
        os.symlink(tmp_path / "other" / name, tmp_path / name, target_is_directory=True)
        make(tmp_path / name)
        assert os.path.islink(tmp_path / name) and os.listdir(tmp_path / name) == ["x"]
    os.symlink(tmp_path / "new" / "x", tmp_path / "link.json")
    files.write_text(tmp_path / "link.json", "second")
    assert os.path.islink(tmp_path / "link.json")
    assert (tmp_path / "other/new/x").read_text() == "second"


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()

    def rmdir(path, **kwargs):  # what Linux says of a mount point
        raise OSError(errno.EBUSY, "Device or resource busy", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", rmdir)
        refused(out, "is a mount point")
    monkeypatch.chdir(out)
    refused(".", "in use: choose a new folder in it")
    assert os.listdir(out) == []
    (tmp_path / "out.partial").mkdir(exist_ok=True)
    (tmp_path / "out.partial" / "mine").write_text("precious")
    refused(out, "out.partial is in the way")
    assert (tmp_path / "out.partial" / "mine").read_text() == "precious"
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    refused(tmp_path / "loop", "exists and is not empty")


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@linux
def test_a_file_system_without_locks_and_flushes_of_folders(tmp_path, monkeypatch, capsys):
    """Lustre without flock, CIFS, FUSE; any other failure is one."""
    fsync = os.fsync

    def fails(number, folders_only=False):
        def call(file, *flags):
            if folders_only and not os.path.isdir(f"/proc/self/fd/{file}"):
                return fsync(file)
            raise OSError(number, os.strerror(number))
        return call

    for name, failure in (("fcntl.flock", fails(errno.EIO)), ("os.fsync", fails(errno.EINVAL)),
                          ("os.fsync", fails(errno.EIO, folders_only=True))):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/|Invalid argum"):
            patch.setattr(name, failure)  # the second: a file must be on disk
            make(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr("fcntl.flock", fails(errno.ENOLCK))
    monkeypatch.setattr(os, "fsync", fails(errno.ENOLCK, folders_only=True))
    make(tmp_path / "out")
    assert capsys.readouterr().err.count("note: no locks in") == 1


@linux
def test_windows_rules_of_renaming(tmp_path, monkeypatch):
    """No lock, no rename of a folder in which a file is open, or onto a folder; a file that someone
    is reading cannot be replaced until they have closed it."""
    replace, refusals = os.replace, []

    def windows(source, target):
        opened = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                  if os.path.lexists(f"/proc/self/fd/{n}")]
        if os.path.isdir(target) or any(path.startswith(f"{source}{os.sep}") for path in opened):
            raise OSError(errno.EACCES, "[WinError 5] Access is denied", source)
        if len(refusals) < 2:
            refusals.append(source)
            raise PermissionError(errno.EACCES, "[WinError 5] Access is denied", source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", windows)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError):  # for good, on other systems
        make(tmp_path / "never")
    monkeypatch.setattr(sys, "platform", "win32")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    assert os.listdir(tmp_path) == ["empty"] and len(refusals) == 2
    assert os.listdir(tmp_path / "empty") == ["x"]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output_file("a/b/scores.json")  # makes the folders
    output_folder("c/d")
    assert sorted(os.listdir()) == ["a", "c"] and os.listdir("a/b") == os.listdir("c/d") == []
    (tmp_path / "file").write_text("mine")
    os.symlink("file", "link")
    output_file("file", None, "c", "no/name")
    for use, *given in [*((output_file, path) for path in (
            "", "a", "new/", "file/x.json", "x" * 250 + ".json", os.devnull)),
            *((output_folder, path) for path in ("", "file", "file/new", "x" * 300)),
            (output_file, "file", "link"), (output_file, "file", None, "no/name", "./file")]:
        with pytest.raises(UserError, match="choose another"):
            use(*given)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    with pytest.raises(UserError, match="file can only be read"):
        output_file("file")
    assert sorted(os.listdir()) == ["a", "c", "file", "link"]
    assert (tmp_path / "file").read_text() == "mine"

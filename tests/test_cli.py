"""What a terminal, a pipe or a full disk does to a script's output: the work goes on."""

import io
import os
import sys

import pytest

from nanonexus.cli import Output, Parser, UserError, listed, positive_int, run_script, safe_streams


@pytest.fixture
def stdout(monkeypatch):
    """Put a stream in the place of standard output, as Python itself would."""
    def use(stream):
        for name in ("stdout", "__stdout__"):
            monkeypatch.setattr(sys, name, stream)
    return use


@pytest.mark.parametrize("encoding, want, buffering", [
    ("ascii", b"0.5 ? 0.1 ?\n", -1), ("cp1252", b"0.5 \xb1 0.1 ?\n", 0),
    ("utf-8", "0.5 ± 0.1 \ufffd\n".encode(), -1)])
def test_what_a_terminal_cannot_show_is_a_question_mark(tmp_path, stdout, encoding, want,
                                                        buffering):
    path = tmp_path / "out.txt"
    stdout(io.TextIOWrapper(open(path, "wb", buffering), encoding, write_through=not buffering,
                            newline="\n"))
    run_script(lambda: print("0.5 ± 0.1 \ufffd"))
    assert path.read_bytes().replace(b"\r", b"") == want
    assert isinstance(sys.stdout.buffer.raw, Output) and sys.stdout.encoding == encoding


def test_a_reader_that_goes_does_not_end_the_work(stdout):
    read, write = os.pipe()
    stdout(open(write, "w"))
    done = []

    def main():
        print("first", flush=True)
        os.close(read)
        for i in range(2000):
            print("a line that nobody reads", i, flush=i % 2)
            done.append(i)

    run_script(main)
    assert len(done) == 2000
    sys.stdout.flush()  # as Python does at its end


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_an_error_once(stdout, capfd):
    stdout(open("/dev/full", "w"))
    with pytest.raises(SystemExit) as end:
        run_script(lambda: print("the result"))
    assert end.value.code == 2 and "No space left on device" in capfd.readouterr().err
    sys.stdout.flush()


def test_closed_streams_go_nowhere_and_a_notebooks_are_left_alone(monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("stdin", "stdout", "stderr"):
            patch.setattr(sys, name, None)
        safe_streams()
        print("nobody hears this", file=sys.stderr)
        assert sys.stdin.read() == "" and not sys.stdout.isatty() and not sys.stderr.isatty()
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    run_script(lambda: print("±"))
    assert sys.stdout is stream and stream.getvalue() == "±\n"


@pytest.mark.parametrize("error, said", [
    (UserError("a flag\nof two lines"), ": error: a flag of two lines\n"),
    (MemoryError(), "out of memory: lower --micro_batch"), (RuntimeError("gloo"), "--resume"),
    (RuntimeError("a bug"), None)])
def test_a_mistake_is_one_line_and_a_bug_is_not(error, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit if said else RuntimeError) as end:
        run_script(main)
    out = capsys.readouterr().err
    assert not said or (end.value.code == 2 and said in out and out.count("\n") == 1)


def test_flags_and_their_mistakes(monkeypatch):
    parser = Parser("")
    parser.add_argument("--out")
    parser.add_argument("--layers", nargs="+", type=positive_int)
    parser.add_argument("--n", type=listed(positive_int))
    assert parser.parse_args(["--n", "2,1,2"]).n == [2, 1]
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, "/home/me")
    for given, want in (("~/run", "/home/me/run"), ("~a/b", "~a/b"), ("a~", "a~")):
        assert parser.parse_args([f"--out={given}"]).out == want  # a ~ that the shell leaves
    for argv in ("--out=", "--out=--", "--layers=", "--n=1,,2", "--out=\udcff"):
        with pytest.raises(UserError, match=(
                f"argument {argv.split('=')[0]}: (expected|invalid.* int|.*not UTF-8)")):
            parser.parse_args([argv])

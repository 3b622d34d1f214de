"""`trivium tokens`: as a library, as a command, in a pipe."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from trainer.chat.show import find_tokenizer, main, render, visible
from trainer.errors import UserError

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from trainer.chat.show import main; sys.exit(main(sys.argv[1:]))"


def tokens(
    directory: Path, *argv: str, stdin: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "--tokenizer", str(directory), *argv],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_json_tells_all(tokenizer, capsys):
    text = "def café():\n\treturn 中"
    assert main([text, "--tokenizer", str(tokenizer.directory), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [token["id"] for token in told["tokens"]] == tokenizer.encode(text)
    assert told["num_tokens"] == len(told["tokens"])
    assert told["num_bytes"] == len(text.encode())
    assert told["bytes_per_token"] == told["num_bytes"] / told["num_tokens"]


def test_every_token_stands_above_its_id(tokenizer, capsys):
    text = "The parser reads arguments\nand shows them"
    main([text, "--tokenizer", str(tokenizer.directory)])
    *lines, summary = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(lines)  # no colours: this is no terminal
    assert "".join(lines[0::2]).replace(" ", "") == visible(text)
    assert [int(label) for line in lines[1::2] for label in line.split()] == tokenizer.encode(text)
    assert f"{len(tokenizer.encode(text))} tokens · 41 characters · 41 bytes" in summary


@pytest.mark.parametrize("width", [20, 60])
def test_lines_keep_to_the_width_and_to_the_columns(tokenizer, width):
    ids = tokenizer.encode("argument parser 中文字符 " * 5)
    lines = [line.plain for line in render(tokenizer, ids, width)]
    assert max(map(cell_len, lines)) <= width
    assert len({cell_len(line) for line in lines[0:2]}) == 1
    assert [int(label) for line in lines[1::2] for label in line.split()] == ids


def test_neighbours_have_different_colours(tokenizer):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=200)
    for line in render(tokenizer, tokenizer.encode("a b c d e"), 200):
        console.print(line)
    assert {f"\x1b[30;10{colour}m" for colour in (6, 3, 2, 5)} <= {
        part[: part.index("m") + 1] for part in ("\x1b" + rest for rest in out.getvalue().split("\x1b")[1:])
    }


def test_control_characters_are_shown_not_obeyed(tokenizer, capsys):
    main(["a\x1b[31mred\x07", "--tokenizer", str(tokenizer.directory), "--no-ids"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b" in out
    assert "\\x07" in out
    assert visible("a b\n\t\r\x00\u202e") == "a·b↵→␍\\x00\\u202e"


def test_a_limit_says_what_it_leaves_out(tokenizer, capsys):
    main(["a b c d e f", "--tokenizer", str(tokenizer.directory), "--limit", "2"])
    assert "… 4 more tokens; --limit 0 shows them all" in capsys.readouterr().out
    main(["a b c d e f", "--tokenizer", str(tokenizer.directory), "--limit", "0"])
    assert "more tokens" not in capsys.readouterr().out


def test_empty_text(tokenizer, capsys):
    main(["", "--tokenizer", str(tokenizer.directory)])
    assert "0 tokens · 0 characters · 0 bytes · no tokens" in capsys.readouterr().out


def test_as_a_command_in_pipes(tokenizer, tmp_path):
    piped = tokens(tokenizer.directory, "-", "--json", stdin=b"caf\xc3\xa9 \xff")
    assert json.loads(piped.stdout)["num_bytes"] == len("café \ufffd".encode())
    assert b"not UTF-8 at byte 6" in piped.stderr
    ascii_only = tokens(tokenizer.directory, "é", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert ascii_only.returncode == 0
    assert b"2 bytes" in ascii_only.stdout
    (tmp_path / "big.txt").write_text("many words in a row\n" * 20_000)
    options = f"--tokenizer {tokenizer.directory} --limit 0 --file {tmp_path}/big.txt"
    command = f'"{sys.executable}" -c "{COMMAND}" {options}'
    cut = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, cwd=ROOT, timeout=60)
    assert cut.stderr == b""
    assert cut.stdout.decode().replace(" ", "") == "many·words·in·a·row↵\n"


def test_a_tokenizer_is_found_where_runs_and_data_keep_it(tokenizer, tmp_path, monkeypatch):
    def put(place: Path) -> Path:
        return Path(shutil.copytree(tokenizer.directory, place))

    run, data = tmp_path / "runs" / "quickstart", tmp_path / "data" / "sample"
    for step in ("step-9", "step-10", "step-11"):
        put(run / "checkpoints" / step / "tokenizer")
    for step in ("step-9", "step-10"):  # step-11 was cut off while it was written
        (run / "checkpoints" / step / "COMMITTED").touch()
    (data / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_tokenizer(None) == Path("runs/quickstart/checkpoints/step-10/tokenizer")
    assert find_tokenizer(str(put(run / "tokenizer").parent)) == run / "tokenizer"
    shutil.rmtree(run)
    with pytest.raises(UserError, match="make quickstart"):
        find_tokenizer(None)
    with pytest.raises(UserError, match="no tokenizer"):
        find_tokenizer(str(data / "train"))
    put(data / "tokenizer")
    assert find_tokenizer(str(data / "train")) == data / "tokenizer"
    assert find_tokenizer(None) == Path("data/sample/tokenizer")
    assert find_tokenizer(str(data / "tokenizer")) == data / "tokenizer"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--tokenizer", "/nowhere/at/all"], "no such directory"),
        (["x", "--file", "y"], "both"),
        (["--file", "/nowhere.txt"], "No such file"),
        (["x", "--wrong"], "unrecognized arguments: --wrong"),
        (["x", "--limit", "many"], "--limit"),
    ],
)
def test_mistakes_are_one_line(tokenizer, argv, message):
    named = argv if "--tokenizer" in argv else [*argv, "--tokenizer", str(tokenizer.directory)]
    with pytest.raises(UserError, match=message) as error:
        main(named)
    assert "\n" not in str(error.value)

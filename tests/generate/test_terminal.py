"""`trivium chat`: once, through pipes, and line by line in a real terminal."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
import torch
from generate_parts import by_full_forwards, tiny
from rich.console import Console

from trainer.errors import UserError
from trainer.generate.complete import Story, TextStream
from trainer.generate.engine import Generator
from trainer.generate.sampling import SamplingConfig
from trainer.generate.terminal import Repl, _writer, main


class Pipe(io.StringIO):
    """Standard input with the bytes below it."""

    def __init__(self, data: bytes):
        super().__init__()
        self.buffer = io.BytesIO(data)


def chat(load, capsys, *argv: str) -> str:
    assert main(["runs/x", *argv], load=load) == 0
    return capsys.readouterr().out


def test_a_prompt_gives_its_completion_and_no_more(load, loaded, capsys):
    settings = SamplingConfig(max_new_tokens=9, temperature=0.8, top_k=50, top_p=0.9)
    ids = loaded.tokenizer.encode("The")
    expected = by_full_forwards(loaded.model, ids, settings, 1, ("terminal", 0)).ids
    out = chat(
        load,
        capsys,
        "--prompt",
        "The",
        "--max-new-tokens",
        "9",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--seed",
        "1",
    )
    assert out == loaded.tokenizer.decode(expected) + "\n"
    other = chat(load, capsys, "--prompt", "The", "--max-new-tokens", "9", "--top-p", "0.9", "--seed", "2")
    assert other != out


def test_json_has_ids_and_logprobs(load, loaded, capsys):
    told = json.loads(
        chat(load, capsys, "--prompt", "The", "--max-new-tokens", "7", "--json", "--temperature", "0")
    )
    assert told["prompt"] == "The"
    assert told["completion"] == loaded.tokenizer.decode(told["ids"])
    assert told["stop_reason"] == "length"
    assert len(told["ids"]) == len(told["logprobs"]) == 7


def test_a_pipe_is_the_prompt(load, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Pipe("The café\n".encode()))
    piped = chat(load, capsys, "--json", "--max-new-tokens", "3")
    assert json.loads(piped)["prompt"] == "The café"
    assert piped == chat(load, capsys, "--prompt", "The café", "--json", "--max-new-tokens", "3")


def test_an_empty_prompt_starts_a_document(load, loaded, capsys):
    told = json.loads(
        chat(load, capsys, "--prompt", "", "--temperature", "0", "--json", "--max-new-tokens", "4")
    )
    start = [loaded.tokenizer.eos_id]
    assert (
        told["ids"]
        == Generator(loaded.model, eos_ids=[]).generate([start], SamplingConfig(4, 0), seed=0)[0].ids
    )


def test_top_next_tokens(load, loaded, capsys):
    told = json.loads(chat(load, capsys, "--prompt", "The cat", "--top", "5", "--json"))["top"]
    logits = loaded.model(torch.tensor([loaded.tokenizer.encode("The cat")]))[0, -1]
    best = torch.softmax(logits, -1).topk(5)
    assert [row["id"] for row in told] == best.indices.tolist()
    assert [row["probability"] for row in told] == pytest.approx(best.values.tolist())
    table = chat(load, capsys, "--prompt", "The cat", "--top", "5").splitlines()
    assert len(table) == 1 + 5 + 1
    assert "█" * 40 in table[1]
    assert f"{best.values[0].item():.2%}" in table[1]
    assert table[-1].startswith(f"together {best.values.sum().item():.1%}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "The cat " * 60], "context is 96"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "x", "--top-k", "many"], "--top-k"),
        (["--prompt", "x", "--top", "-2"], "top -2"),
        (["--prompt", "x", "--stop", ""], "stop_strings"),
        (["--color"], "unrecognized arguments: --color"),
    ],
)
def test_mistakes_are_one_line(load, argv, message):
    with pytest.raises(UserError, match=message) as error:
        main(["runs/x", *argv], load=load)
    assert "\n" not in str(error.value)


def test_a_hugging_face_checkpoint_says_what_transformers_says(tokenizer, tmp_path, capsys):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    directory = shutil.copytree(tokenizer.directory, tmp_path / "llama")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size + 6,  # padded, as real checkpoints are
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    auto = AutoTokenizer.from_pretrained(directory)
    ids = auto("The cat sat", return_tensors="pt", add_special_tokens=False)
    expected = model.generate(**ids, max_new_tokens=20, do_sample=False, eos_token_id=auto.eos_token_id)
    argv = [
        str(directory),
        "--prompt",
        "The cat sat",
        "--temperature",
        "0",
        "--max-new-tokens",
        "20",
        "--json",
    ]
    capsys.readouterr()
    assert main([*argv, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == expected[0, ids["input_ids"].shape[1] :].tolist()


def test_mistakes_of_the_loader_pass_through():
    def missing(path, device):
        raise UserError(f"{path}: no such run")

    with pytest.raises(UserError, match="runs/none: no such run"):
        main(["runs/none", "--prompt", "x"], load=missing)


def test_a_model_of_another_tokenizer_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"model\.vocab_size"):
        Story(tiny(vocab_size=100), tokenizer)


def test_a_diverged_checkpoint_is_one_line(tokenizer):
    model = tiny(vocab_size=tokenizer.vocab_size)
    torch.nn.init.constant_(model.norm.weight, float("inf"))
    with pytest.raises(UserError, match="diverged"):
        Story(model, tokenizer).proceed("The", lambda text: None)


def test_stop_strings_end_the_text_across_tokens(loaded):
    """Every two-character cut of the free text stops there, wherever the borders of tokens lie."""
    story = Story(loaded.model, loaded.tokenizer, SamplingConfig(30, 1.0))
    free = story.proceed("The", lambda text: None)
    data = b"".join(map(loaded.tokenizer.id_to_bytes, free.ids))
    asked = 0
    for at in range(0, 20, 3):
        stop = data[at : at + 2].decode(errors="ignore")
        if len(stop) < 2:
            continue
        asked += 1
        again = Story(loaded.model, loaded.tokenizer, SamplingConfig(30, 1.0, stop_strings=[stop]))
        done = again.proceed("The", lambda text: None)
        got = b"".join(map(loaded.tokenizer.id_to_bytes, done.ids))
        first = data.index(stop.encode())
        assert done.stop_reason == "stop"
        assert done.ids == free.ids[: len(done.ids)]
        assert first + 2 <= len(got) < first + 2 + len(loaded.tokenizer.id_to_bytes(done.ids[-1]))
    assert asked > 2


def test_streamed_text_holds_whole_characters(tokenizer):
    parts: list[str] = []
    stream = TextStream(tokenizer, parts.append)
    for token in [*"né".encode(), tokenizer.eos_id, *"中文".encode(), 0xE4, 0xB8]:
        stream.add(token)
    stream.close()
    assert parts == ["n", "é", "中", "文", "\ufffd"]


def test_text_of_a_model_cannot_drive_the_terminal():
    screen, pipe = io.StringIO(), io.StringIO()
    _writer(Console(file=screen, force_terminal=True))("a\x1b[31m\tb\n\x9b\r")
    _writer(Console(file=pipe))("a\x1b[31m")
    assert screen.getvalue() == "a\\x1b[31m\tb\n\\x9b␍"
    assert pipe.getvalue() == "a\x1b[31m"


def test_ctrl_c_keeps_what_was_written(loaded):
    story = Story(loaded.model, loaded.tokenizer, SamplingConfig(50, 0))
    whole = Story(loaded.model, loaded.tokenizer, SamplingConfig(50, 0)).proceed("The", lambda text: None)
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    done = story.proceed("The", write)
    assert done.stop_reason == "interrupt"
    assert done.ids == whole.ids[: len(done.ids)]
    assert story.ids == loaded.tokenizer.encode("The") + done.ids
    assert 3 <= len(done.ids) < 50


def test_turns_add_up_and_reset_begins_again(loaded):
    out = io.StringIO()
    story = Story(loaded.model, loaded.tokenizer, SamplingConfig(5))
    repl = Repl(story, Console(file=out, highlight=False, markup=False), "x")
    assert repl.handle("The")
    first = list(story.ids)
    assert repl.handle("")
    assert story.ids[: len(first)] == first
    assert len(story.ids) == len(first) + 5
    assert repl.handle("/reset")
    assert repl.handle("The")
    assert story.ids == first
    assert repl.handle("/temp 0")
    assert repl.handle("/topk 3")
    assert (story.sampling.temperature, story.sampling.top_k) == (0.0, 3)
    for line, message in {
        "/temp warm": "expected a number",
        "/topp 3": "top_p=3.0",
        "/top 0": "top 0",
        "/nope": "no such command",
        "/": "no such command",
        "/seed": "expected a number",
    }.items():
        with pytest.raises(UserError, match=message):
            repl.handle(line)
    assert story.sampling.top_p == 1.0  # a mistake changes nothing
    assert story.ids == first
    for _ in range(20):
        try:
            repl.handle("")
        except UserError as error:
            assert "/reset" in str(error)  # noqa: PT017
            break
    assert len(story.ids) == 96  # filled to the last place, then refused
    assert not repl.handle("/quit")


SCRIPT = """
import sys
from types import SimpleNamespace
sys.path[:0] = {paths!r}
from generate_parts import tiny
from trainer.chat.tokenizer import Tokenizer
from trainer.generate.terminal import main
tokenizer = Tokenizer.load({tokenizer!r})
model = tiny(vocab_size=tokenizer.vocab_size)
load = lambda path, device: SimpleNamespace(model=model, tokenizer=tokenizer, config=model.config, step=5)
sys.exit(main(["runs/x", "--max-new-tokens", "6"], load=load))
"""


def test_line_by_line_in_a_real_terminal(tokenizer, tmp_path):
    here = os.path.dirname(__file__)
    script = SCRIPT.format(paths=[here, os.path.join(here, "..", "..")], tokenizer=str(tokenizer.directory))
    control, terminal = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
        close_fds=True,
    )
    os.close(terminal)
    os.write(control, b"The cat\n/top 3\n/temp 9x\n\n/quit\n")
    seen = b""
    while True:
        try:
            data = os.read(control, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not data:
            break
        seen += data
    assert child.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert "runs/x, step 5" in text
    assert text.count("[6 tokens") == 2
    assert "probability" in text
    assert "/temp 9x: expected a number" in text
    assert "\x1b[2m" in seen.decode()  # in colours
    assert "Traceback" not in text
    assert "/top 3" in (tmp_path / "trivium" / "chat_history").read_text()

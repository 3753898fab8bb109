"""Data and tokenizer: files of every kind, packing, batches, the standard library, and the embedded model's corpus.

The tokenizer is a small one, trained here; no network, no model.
"""

import gzip
import json
import logging
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from mlx_mtp.errors import DataError, OptionError
from mlx_mtp.training.data import Batches, Document, pack, read_documents, split, standard_library
from mlx_mtp.training.small_target import train_tokenizer

CHAT = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Path(json.__file__).read_text(), Path(random.__file__).read_text()], made, 420)
    return made


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def some_texts() -> list[str]:
    """Lines of code, and characters from everywhere but U+2581: sentencepiece's own space."""
    source = random.Random(5)
    pool = [*map(chr, range(0x250)), *"   \n\n\t\r\u00a0\u3000\u200d\ufeff日本😀"]
    texts = Path(json.__file__).read_text().splitlines(keepends=True)
    for _ in range(100):
        texts.append("".join(source.choices(pool, k=source.randint(1, 60))))
        codes = [source.choice((source.randint(1, 0xD7FF), source.randint(0xE000, 0x10FFFF)))]
        texts.append("".join(map(chr, codes * 3)).replace("\u2581", ""))
        texts.append("".join(source.choices(" \n\t_x1", k=30)))
    return texts


def test_the_standard_library_is_read_where_no_data_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole files in their order; not tests, packages of others, or what is no UTF-8."""
    files = {"a.py": "a = 1\n", "b/c.py": "c = 1\n", "test/d.py": "d", "site-packages/e.py": "e", "f.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "g.py").write_bytes(b"\xff")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    documents = list(standard_library())
    assert [document.text for document in documents] == ["a = 1\n", "c = 1\n"]
    assert split(documents) == (documents[1:], documents[:1])
    learned, held_out = split(list(range(1000)))
    assert len(held_out) == 24 and sorted(learned + held_out) == list(range(1000))


def test_the_small_targets_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    """Every text comes back; an indentation is a piece of its own; it begins and asks as Gemma 4's does."""
    for text in some_texts():
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    indented, plain = (tokenizer.encode(text, add_special_tokens=False) for text in ("x\n    y", "y"))
    assert indented[-len(plain) :] == plain and len(indented) == 3 + len(plain)
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(9))
    assert tokenizer("import x").input_ids[0] == 2 and tokenizer("import x").input_ids.count(2) == 1
    system = [{"role": "system", "content": "Be brief."}, CHAT[0]]
    assert tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True) == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nWhat is 3 + 4?<turn|>\n<|turn>model\n"
    )
    with pytest.raises(OptionError, match="vocabulary must be at least 265"):
        train_tokenizer(["text"], tmp_path, 200)


def test_reads_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_bytes("\ufeffé".encode())
    (tmp_path / "deep" / "b.md").write_text("b")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.md").write_text("d")
    records = [{"text": "u\u2028v"}, {"prompt": "p", "completion": "c"}, {"messages": CHAT}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / "c.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    found = list(read_documents([str(tmp_path)]))
    assert [d.text for d in found] == ["é", "u\u2028v", None, None, "b"]
    assert [turn["content"] for turn in found[2].messages or []] == ["p", "c"]
    assert [d.text for d in read_documents([str(tmp_path / "**" / "*.md")])] == ["b"]


@pytest.mark.parametrize(
    "line",
    ['{"text": 3}', "[1]", "{", '{"txt": "a"}', '{"messages": []}', '{"prompt": "p"}',
     '{"messages": [{"role": "robot", "content": "x"}]}', '{"text": "\\ud800"}',
     '{"text": "\udcff"}'],
)  # fmt: skip
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: expected .* found .*; "):
        list(read_documents([str(file)]))


def test_suffixes_in_any_case_and_lists_of_rows(tmp_path: Path) -> None:
    """JSON is never learned as raw text; what is given twice is read once; whatever is no text is refused."""
    row = {"messages": CHAT}
    (tmp_path / "a.JSONL").write_text(json.dumps(row) + "\n")
    (tmp_path / "b.Json").write_text(json.dumps([row, {"text": "b"}], indent=1))
    (tmp_path / "c.json").write_text("\ufeff" + json.dumps({"prompt": "c"}))
    (tmp_path / "d.TXT").write_text("d")
    (tmp_path / "e.ndjson").write_text(json.dumps({"text": "e"}))
    (tmp_path / "f.json").write_text(" ")
    assert [d.text for d in read_documents([str(tmp_path)])] == [None, "d", "e"]  # settings are .json files too
    named = [str(tmp_path / name) for name in ("a.JSONL", "b.Json", "c.json", "f.json")]
    found = list(read_documents([*named, str(tmp_path), named[0]], prompts=True))
    asked = [{"role": "user", "content": "c"}]
    assert [d.messages or d.text for d in found] == [CHAT, CHAT, "b", asked, "d", "e"]
    assert found[2].module == f"{tmp_path / 'b.Json'}, item 2"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("a.json", b"{}\n{}\n", "expected JSON, found .*name the file .jsonl"), ("a.ZIP", b"PK", "packed file"),
     ("a.json", b'[{"text": "a"}, 3]', "item 2: expected a JSON object"), ("a.json", b'{"name": "x"}', "found 'name'"),
     ("a.JSON", b"\xff", "line 1: expected UTF-8"), ("a.bin", b"a\0b", "binary"),
     ("a.json", b'[{"text": "a"}, {"messages": [{"role": "x", "content": ""}]}]', "item 2: expected turns with"),
     ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0), "packed file; unpack it"),
     ("a.txt", "a".encode("utf-16"), "binary|UTF-8")],
)  # fmt: skip
def test_what_is_not_training_data_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*(?:{words})"):
        list(read_documents([str(tmp_path / name)], prompts=True))


def test_a_chat_that_the_template_refuses_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the template raises: an exception of its own, or one of Python's."""
    late = [*CHAT, {"role": "system", "content": "Be brief."}]
    with pytest.raises(DataError, match="FILE, line 7: .*system message first"):
        pack([Document("m", messages=CHAT), Document("FILE, line 7", messages=late)], tokenizer)
    for error in (TypeError("can only join"), KeyError("role"), RecursionError("deep")):
        monkeypatch.setattr(tokenizer, "apply_chat_template", mock.Mock(side_effect=error))
        with pytest.raises(DataError, match="FILE, line 7: Expected messages that"):
            pack([Document("FILE, line 7", messages=CHAT)], tokenizer)


def test_missing_path(tmp_path: Path) -> None:
    for source in (tmp_path / "none.txt", tmp_path / "*.txt", tmp_path):
        with pytest.raises(DataError, match="expected"):
            list(read_documents([str(source)]))


def test_batches_are_a_pure_function_of_the_step() -> None:
    ids = np.arange(5003, dtype=np.uint16)
    batches = Batches(ids, 4, 50, seed=7, lookahead=3)
    later = batches.batch(60)
    for step in range(60):
        batches.batch(step)
    assert later.shape == (4, 54) and later.dtype == np.int32
    assert np.array_equal(later, Batches(ids, 4, 50, seed=7, lookahead=3).batch(60))
    assert np.array_equal(later, later[:, :1] + np.arange(54))
    assert not np.array_equal(later, Batches(ids, 4, 50, seed=8, lookahead=3).batch(60))


def test_an_epoch_never_repeats_a_token_and_moves_its_windows() -> None:
    batches = Batches(np.arange(5003, dtype=np.uint16), 4, 50, seed=7)
    count = batches.steps_per_epoch
    steps = (range(count), range(count, 2 * count))
    epochs = [np.concatenate([batches.batch(s)[:, :-1].ravel() for s in epoch]) for epoch in steps]
    for seen in epochs:
        assert len(set(seen.tolist())) == seen.size >= 0.9 * 5003
    assert epochs[0].min() % 50 != epochs[1].min() % 50


def test_bad_batch_options_and_too_little_data() -> None:
    with pytest.raises(OptionError):
        Batches(np.arange(100), 0, 10, 0)
    with pytest.raises(DataError, match="tokens"):
        Batches(np.arange(30), 4, 10, 0)


def test_the_name_of_data_is_of_the_ids_not_of_their_type() -> None:
    ids = np.arange(100, dtype=np.uint16)
    names = [Batches(found, 2, 10, 0).name for found in (ids, ids.astype(np.int32), ids[::-1])]
    assert names[0] == names[1] != names[2]

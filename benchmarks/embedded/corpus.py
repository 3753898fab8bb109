"""Documents for the embedded model: the running Python's standard library, as source and as questions and answers.

Read with `ast`; nothing is imported, so no module's code runs. `is_held_out` says on which side of the split a module
lies, the caller filters. The order is that of the sorted paths, so one Python release always gives the same documents.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mlx_mtp.training.data import Document, standard_library

# Tables written by scripts: bytes that teach nothing about Python.
GENERATED = ("html/entities.py", "stringprep.py", "_sysconfigdata", "msilib/schema.py", "msilib/sequence.py",
             "msilib/text.py")  # fmt: skip
# Pure Python twins of C modules; asked about, and held out, under the name that people import.
PUBLIC_NAMES = {"_pydecimal": "decimal", "_pyio": "io", "_pydatetime": "datetime", "_pylong": "int",
                "_collections_abc": "collections.abc"}  # fmt: skip
HELD_OUT_PERCENT = 4
# Chosen once, before any training, because packages differ much in size: of 3.11 this split holds out 3.8 % of the
# source and 4.0 % of the questions, in seven packages of different kinds (ast, pdb, smtplib, tomllib, turtle, ...).
SPLIT = 264
DOCSTRING_CHARACTERS = 700

QUESTIONS = {
    "module": ("What is the module `{}` for?", "What does the `{}` module do?", "Tell me about the module `{}`."),
    "class": ("What is `{}`?", "What is the class `{}` for?", "Explain the class `{}`."),
    "function": ("What does `{}` do?", "How do I call `{}`?", "Explain `{}`.", "What is `{}` for?"),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_held_out(module: str) -> bool:
    """Whether a module's documents are for evaluation; decided by its top-level package, the same on every machine."""
    return _hash(f"{SPLIT} {module.partition('.')[0]}") % 100 < HELD_OUT_PERCENT


def modules_and_questions() -> Iterator[Document]:
    """Every module's source text, each followed by its questions and answers; what is not Python is left out."""
    for document in standard_library():
        path = Path(document.module).relative_to(sysconfig.get_path("stdlib"))
        if path.as_posix().startswith(GENERATED):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # invalid escapes in old modules are not ours to report
                tree = ast.parse(document.text or "")
        except (SyntaxError, ValueError):  # templates, deliberate errors
            continue
        module = _module_name(path)
        yield Document(module, text=document.text)
        if not any(part.startswith("_") for part in module.split(".")):
            yield from _questions(module, tree)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _module_name(relative: Path) -> str:
    parts = list(relative.with_suffix("").parts)
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    parts[0] = PUBLIC_NAMES.get(parts[0], parts[0])
    return ".".join(parts)


def _questions(module: str, tree: ast.Module) -> Iterator[Document]:
    docstring = ast.get_docstring(tree)
    if docstring:
        yield _chat(module, "module", module, f"import {module}", docstring)
    asked: set[str] = set()  # a property's setter and an `else:` branch repeat a name
    for name, node in _definitions(module, tree.body):
        docstring = ast.get_docstring(node)
        if docstring and name not in asked:
            asked.add(name)
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield _chat(module, kind, name, _signature(node), docstring)


def _definitions(prefix: str, body: list[ast.stmt]) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes and functions with their dotted names, also those inside classes and module-level branches."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(name, node.body)
        elif isinstance(node, (ast.If, ast.Try)):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            yield from _definitions(prefix, [*node.body, *handlers, *node.orelse])


def _signature(node: ast.ClassDef | Function) -> str:
    if not isinstance(node, ast.ClassDef):
        keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}"
    bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
    lines = [f"class {node.name}({bases})" if bases else f"class {node.name}"]
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            lines.append(f"{node.name}({_without_self(member.args)})")
            break
    return "\n".join(lines)


def _without_self(arguments: ast.arguments) -> str:
    text = ast.unparse(arguments)
    first, comma, rest = text.partition(", ")
    return rest if comma and "=" not in first else "" if first in ("self", "/") else text


def _chat(module: str, kind: str, name: str, signature: str, docstring: str) -> Document:
    templates = QUESTIONS[kind]
    question = templates[_hash(name) % len(templates)].format(name)
    answer = f"```python\n{signature}\n```\n\n{_first_paragraphs(docstring)}"
    return Document(module, messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _first_paragraphs(docstring: str) -> str:
    """Whole paragraphs up to the limit; a first paragraph longer than the limit is cut at a line's end."""
    kept: list[str] = []
    for paragraph in docstring.split("\n\n"):
        if kept and len("\n\n".join([*kept, paragraph])) > DOCSTRING_CHARACTERS:
            break
        kept.append(paragraph)
    text = "\n\n".join(kept)
    if len(text) > DOCSTRING_CHARACTERS and "\n" in text[:DOCSTRING_CHARACTERS]:
        text = text[:DOCSTRING_CHARACTERS].rpartition("\n")[0]
    return text.strip()

"""The demo model's corpus, built from the standard library of the running Python, and the tokenizer trained on it.

The library is read without importing it and gives two kinds of documents: plain text (whole source files, single
functions, the language reference that `help()` shows) and chats derived from docstrings, so that the model is trained
on its chat template.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import random
import re
import sys
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as LANGUAGE_REFERENCE
from types import ModuleType

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, END = "<|endoftext|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
SPECIAL_TOKENS = [END_OF_TEXT, *ROLES, END]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Tests are repetitive, encodings are tables, idlelib and lib2to3 are separate programs.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "idle_test",
    "turtledemo",
    "ensurepip",
    "__pycache__",
}
DOCUMENTED_IN_C = [
    "builtins",
    "math",
    "itertools",
    "time",
    "sys",
    "_functools",
    "_operator",
    "_collections",
    "_struct",
    "zlib",
    "posix",
    "_random",
    "_json",
    "_socket",
]
SYSTEM_PROMPT = "You are a helpful assistant who knows the Python standard library."
SMALL_TALK = [
    ("Hello!", "Hello! I am a small demo model. Ask me about the Python standard library."),
    ("Hi", "Hi! Ask me what a Python function or module does."),
    ("How are you?", "I am fine, thank you. What would you like to know about Python?"),
    ("Who are you?", "I am a very small language model, trained on the Python standard library to show ulysses_infer."),
    ("What can you do?", "I can describe modules, classes and functions of the Python standard library."),
    ("What is your name?", "I am the demo model of ulysses_infer."),
    ("Can you write code?", "A little: I have read the Python standard library, and I imitate its style."),
    ("Thank you!", "You are welcome!"),
    ("Goodbye", "Goodbye!"),
    ("What is Python?", "Python is a high-level programming language with a large standard library."),
]
CHATS_PER_ENTRY = 2  # the same fact as the answer to two questions: chats make up a fifth of all tokens
PUBLIC_NAMES = {"posixpath": "os.path", "posix": "os"}
SMALL_TALK_COPIES = 12  # ten exchanges among thousands are only learned if repeated

Message = dict[str, str]
Chat = list[Message]


@dataclass(frozen=True)
class Corpus:
    """Documents as text; a document and everything derived from it are on the same side of the split."""

    train: list[str]
    held_out: list[str]
    files: int


@dataclass(frozen=True)
class Entry:
    """One documented name of the library, the material of a chat."""

    name: str
    kind: str
    summary: str
    signature: str = ""
    code: str = ""


def build_corpus(held_out_every: int, max_files: int | None, seed: int) -> Corpus:
    """Read the library and split its documents into train and held-out, by a hash of the module name."""
    train: list[str] = []
    held_out: list[str] = []
    files = source_files(max_files)
    for module, path in files:
        side = held_out if zlib.crc32(module.encode()) % held_out_every == 0 else train
        side.extend(documents_of_file(module, path, seed))
    if max_files is None:
        train.extend(documents_of_runtime(seed))
    train.extend(render_chat(chat) for chat in small_talk())
    if not held_out:  # possible for a corpus of a few files
        held_out.append(train.pop(0))
    return Corpus(train, held_out, len(files))


def source_files(max_files: int | None) -> list[tuple[str, Path]]:
    """Module name and path of each standard library file to read, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS.intersection(parts) and not parts[0].startswith(("_sysconfigdata", "config-")):
            module = ".".join(part for part in parts if part != "__init__")
            found.append((PUBLIC_NAMES.get(module, module), path))
    return found[:max_files]


def documents_of_file(module: str, path: Path, seed: int) -> Iterator[str]:
    """The file itself, each of its short functions, and chats about the names it documents."""
    text = path.read_text(encoding="utf-8", errors="replace").expandtabs(4)
    yield text
    tree = ast.parse(text)
    yield from short_functions(text, tree)
    entries = [entry for entry in documented(module, text, tree) if entry.summary]
    yield from (render_chat(chat) for chat in chats_about(entries, random.Random(f"{seed}/{module}")))


def documents_of_runtime(seed: int) -> Iterator[str]:
    """The language reference behind `help()`, and chats about builtins and modules written in C."""
    yield from LANGUAGE_REFERENCE.values()
    entries = [
        Entry(f"`{topic}`", "topic", first_paragraph(strip_markup(text))) for topic, text in LANGUAGE_REFERENCE.items()
    ]
    for name in DOCUMENTED_IN_C:
        if name in sys.builtin_module_names or importlib.util.find_spec(name):
            entries.extend(documented_in_c(importlib.import_module(name)))
    chats = chats_about([entry for entry in entries if entry.summary], random.Random(seed))
    yield from (render_chat(chat) for chat in chats)


def short_functions(text: str, tree: ast.Module, longest: int = 40) -> Iterator[str]:
    """Top-level functions as separate documents, so that a prompt may begin with `def`."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and 3 <= (node.end_lineno or 0) - node.lineno <= longest:
            yield source_of(text, node) + "\n"


def source_of(text: str, node: ast.FunctionDef) -> str:
    """A function's source at indentation zero, without decorators."""
    lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(lines)).rstrip()


def documented(module: str, text: str, tree: ast.Module) -> Iterator[Entry]:
    """Every public name of a module that has a docstring, the module first."""
    yield Entry(module, "module", first_paragraph(ast.get_docstring(tree)))
    yield from documented_in_body(module, text, tree.body)


def documented_in_body(prefix: str, text: str, body: list[ast.stmt]) -> Iterator[Entry]:
    """Entries of the functions and classes in `body`, and of the classes' methods."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name, summary = f"{prefix}.{node.name}", first_paragraph(ast.get_docstring(node))
        if isinstance(node, ast.ClassDef):
            yield Entry(name, "class", summary)
            yield from documented_in_body(name, text, node.body)
        else:
            code = source_of(text, node)
            short = code if code.count("\n") < 16 else ""
            yield Entry(name, "function", summary, f"{node.name}({ast.unparse(node.args)})", short)


def documented_in_c(module: ModuleType) -> Iterator[Entry]:
    """Public names of a module without Python source; a builtin goes by its bare name."""
    public = PUBLIC_NAMES.get(module.__name__, module.__name__.removeprefix("_"))
    prefix = "" if module is builtins else public + "."
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or not callable(member):
            continue
        is_class = isinstance(member, type)
        yield Entry(prefix + name, "class" if is_class else "function", runtime_summary(member))
        if is_class and not issubclass(member, BaseException):  # exceptions inherit all their methods
            for method, value in sorted(vars(member).items()):
                if callable(value) and not method.startswith("_"):
                    yield Entry(f"{prefix}{name}.{method}", "function", runtime_summary(value))


def runtime_summary(member: object) -> str:
    """First paragraph of a C docstring that is not just the call's signature."""
    paragraphs = (inspect.getdoc(member) or "").split("\n\n")
    prose = [part for part in paragraphs if not re.match(r"^[\w.]+\(.*", part)]
    return first_paragraph(prose[0]) if prose else ""


def strip_markup(text: str) -> str:
    """A language reference topic without its underlined title."""
    return re.sub(r"\A.*\n[*=~-]{3,}\n+", "", text)


def first_paragraph(doc: str | None, longest: int = 400) -> str:
    """The first paragraph on one line, cut after a whole sentence; '' if it is not prose."""
    paragraph = " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())
    if len(paragraph) > longest:
        paragraph = paragraph[: paragraph.rfind(". ", 0, longest) + 1]
    return paragraph if re.match(r"^[A-Z`'\"]", paragraph) and len(paragraph) > 12 else ""


def chats_about(entries: list[Entry], rng: random.Random) -> Iterator[Chat]:
    """Conversations about each entry, some with a system prompt or a second question."""
    for entry in entries * CHATS_PER_ENTRY:
        chat = exchange(entry, rng)
        if rng.random() < 0.2:
            chat += exchange(rng.choice(entries), rng)
        yield with_system_prompt(chat) if rng.random() < 0.15 else chat


def exchange(entry: Entry, rng: random.Random) -> Chat:
    """A question about `entry` and the answer its docstring gives."""
    if entry.code and rng.random() < 0.3:
        question = rng.choice(["Show me the code of {}.", "How is {} implemented?", "How is {} written?"])
        return turn(question.format(entry.name), f"{entry.summary}\n```python\n{entry.code}\n```")
    question = rng.choice(QUESTIONS[entry.kind]).format(entry.name)
    if entry.signature and rng.random() < 0.3:
        return turn(f"How do I call {entry.name}?", f"`{entry.signature}`: {entry.summary}")
    return turn(question, entry.summary)


QUESTIONS = {
    "module": ["What is the {} module?", "What does the {} module do?", "What is {} for?", "Tell me about {}."],
    "class": ["What is {}?", "What is the class {} for?", "What is {} for?", "Tell me about {}."],
    "function": ["What does {} do?", "What does {}() do?", "What is {} for?", "Explain {}."],
    "topic": ["Explain {} in Python.", "What is {} in Python?", "Tell me about {}."],
}


def small_talk() -> Iterator[Chat]:
    """Greetings and questions about the model itself; half of them follow a system prompt."""
    for copy in range(SMALL_TALK_COPIES):
        for question, answer in SMALL_TALK:
            chat = turn(question, answer)
            yield with_system_prompt(chat) if copy % 2 else chat


def turn(question: str, answer: str) -> Chat:
    """One question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def with_system_prompt(chat: Chat) -> Chat:
    """The same conversation after the standard system prompt."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, *chat]


def render_chat(chat: Chat) -> str:
    """The conversation as `CHAT_TEMPLATE` renders it (a test checks that they agree)."""
    return "".join(f"<|{message['role']}|>\n{message['content']}{END}\n" for message in chat)


def train_tokenizer(documents: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training documents, wrapped so that AutoTokenizer loads it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=[*ROLES, END],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[np.ndarray]:
    """Each document's token ids, followed by the end-of-text token."""
    end = [tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    encodings = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    return [np.array(encoding.ids + end, dtype=np.int32) for encoding in encodings]

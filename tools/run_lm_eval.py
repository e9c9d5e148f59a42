"""Evaluate a running server with lm-eval's `local-completions`, on small tasks made from Python's standard library.

    pip install "lm_eval[api]"
    ulysses-infer serve models/demo parallel.sp=2 --port 8000
    python3 tools/run_lm_eval.py --base-url http://127.0.0.1:8000 --model demo --checkpoint models/demo --compare

Three tasks: choice of the line, out of four, that continues a function (log-likelihoods of given text: `echo` with
`logprobs`), perplexity of whole functions (`loglikelihood_rolling`), and completion up to a stop string
(`generate_until`). With `--compare` the same tasks also run on transformers in this process, in float32, and the
results must agree; start the server with model.dtype=float32 for that.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MODULES = ("argparse", "ast", "cmd", "configparser", "copy", "csv", "fractions", "shutil", "tarfile", "textwrap")
MOST_CHARACTERS = 600
COMMON = """\
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
"""
TASKS = {
    "stdlib_choice": """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "stdlib_perplexity": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "stdlib_completion": """\
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{line}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def main() -> None:
    """Run the tasks on the server and, with `--compare`, on transformers; exits with 1 if the results differ."""
    options = _options()
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit('error: this tool needs lm_eval; install: pip install "lm_eval[api]"')
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), options.limit)
        served = evaluate(folder, "local-completions", _server_arguments(options))
        show("server", served)
        if options.compare:
            local = evaluate(folder, "hf", f"pretrained={options.checkpoint},dtype=float32,device=cpu")
            show("transformers", local)
            sys.exit(compare(served, local))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="the model's name on the server")
    parser.add_argument("--checkpoint", required=True, help="the checkpoint, for its tokenizer")
    parser.add_argument("--limit", type=int, default=40, help="functions per task")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--compare", action="store_true", help="run the same tasks on transformers and compare")
    return parser.parse_args()


def _server_arguments(options: argparse.Namespace) -> str:
    return (
        f"model={options.model},tokenizer={options.checkpoint},tokenizer_backend=huggingface,"
        f"base_url={options.base_url}/v1/completions,num_concurrent={options.concurrency},max_retries=1,"
        "tokenized_requests=True,max_length=1024"
    )


def evaluate(
    folder: str, model: str, arguments: str, tasks: Sequence[str] = tuple(TASKS), **more: Any
) -> dict[str, dict[str, float]]:
    """Each task's metrics. more: arguments of lm-eval's `simple_evaluate`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=folder),
        bootstrap_iters=0,
        verbosity="ERROR",
        **more,
    )
    return {task: _numbers(values) for task, values in results["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        name.partition(",")[0]: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "stderr" not in name and "," in name
    }


def show(title: str, results: dict[str, dict[str, float]]) -> None:
    """Print one line per metric."""
    for task, metrics in results.items():
        for name, value in metrics.items():
            print(f"{title:<14} {task:<20} {name:<18} {value:10.4f}")


def compare(served: dict[str, dict[str, float]], local: dict[str, dict[str, float]]) -> int:
    """Print the largest relative difference; returns 0 if it is at most 1e-3."""
    pairs = [(served[task][name], value) for task, metrics in local.items() for name, value in metrics.items()]
    worst = max(abs(ours - theirs) / max(abs(theirs), 1e-9) for ours, theirs in pairs if ours != theirs or theirs)
    print(f"largest relative difference: {worst:.2e}")
    return int(worst > 1e-3)


def write_tasks(folder: Path, count: int) -> None:
    """Write the tasks' YAML files and documents for lm-eval."""
    documents = make_documents(count)
    data = folder / "functions.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    for name, text in TASKS.items():
        common = COMMON.replace("DATA", json.dumps(str(data)))
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}", encoding="utf-8")


def make_documents(count: int) -> list[dict[str, Any]]:
    """Functions cut before the first statement after the docstring, with four candidates for that line."""
    found = [pair for module in MODULES for pair in functions(module)][: count + 3]
    documents = []
    for index, (context, line) in enumerate(found[:count]):
        others = [other for _, other in found[index + 1 :] + found if other != line]
        choices = [*list(dict.fromkeys(others))[:3], line]
        choices = choices[index % 4 :] + choices[: index % 4]
        known = {"context": context, "line": line, "text": context + line}
        documents.append({**known, "choices": choices, "answer": choices.index(line)})
    return documents


def functions(module: str) -> Iterator[tuple[str, str]]:
    """(the function before its first statement after the docstring, that statement's line) for each function."""
    source = inspect.getsource(__import__(module))
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            first = node.body[1].lineno
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : first]))
            context, _, line = text.rpartition("\n")
            if len(text) <= MOST_CHARACTERS and line.strip():
                indent = len(line) - len(line.lstrip()) - 1  # tokenizers join the last space with the next word
                yield f"{context}\n{line[:indent]}", line[indent:]


if __name__ == "__main__":
    main()

"""The package `llm-comply`: answers and events against the schemas of three APIs, with its own requests.

It has the specification of Open Responses, and follows the compliance tests of that project.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tools.clients.checking import Results, Server, main

FORMATS = ("open-responses", "openai-chat", "anthropic")


def program(server: Server, results: Results) -> None:
    """Run every format's tests, and write the result of each that was not skipped."""
    for name in FORMATS:
        command = [str(Path(sys.executable).with_name("llm-comply")), "--json", "--format", name, "--timeout", "600"]
        command += ["--base-url", f"{server.url}/v1", "--api-key", "none", "--model", server.model]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        for result in json.loads(done.stdout)["results"]:
            if result["status"] != "skipped":
                results.write(f"{name}: {result['id']}", "; ".join(result.get("errors", ())) or None)


if __name__ == "__main__":
    main(program)

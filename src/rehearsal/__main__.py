"""`python -m src.rehearsal`: a request a line of JSON on stdin, a result a line on stdout."""

from __future__ import annotations

import json
import os
import sys

from src.errors import report_errors
from src.rehearsal.guard import load_guard
from src.rehearsal.request import Request


def main() -> None:
    with report_errors():
        # What libraries print while they are imported must not be among the results.
        results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        requests = [Request.from_json(json.loads(line)) for line in sys.stdin]
        load_rest_of_guard = load_guard()
        import torch

        load_rest_of_guard()
        from src.rehearsal.run import run

        torch.set_num_threads(1)
        for request in requests:
            print(json.dumps(run(request).to_json()), file=results, flush=True)


if __name__ == "__main__":
    main()

"""A server of a checkpoint that completes prompts and tells their log-probs as vLLM does: CHECKPOINT PORT.

What it is sent is in `requests.jsonl` beside the checkpoint: headers and body.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Handler(BaseHTTPRequestHandler):
    model: Any
    tokenizer: Any
    log: Path

    def do_GET(self) -> None:
        self._send({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.log.open("a") as log:
            log.write(json.dumps({"headers": dict(self.headers), "body": body}) + "\n")
        choices = [self._complete(ids, body) | {"index": n} for n, ids in enumerate(body["prompt"])]
        self._send({"choices": choices})

    @torch.inference_mode()
    def _complete(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        prompt = torch.tensor([ids])
        output = self.model.generate(prompt, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0)[0]
        if not body.get("echo"):
            text = self.tokenizer.decode(output[len(ids) :], skip_special_tokens=True)
            for stop in body["stop"]:
                text = text.partition(stop)[0]
            return {"text": text}
        logps = self.model(output[None, :]).logits[0, :-1].float().log_softmax(-1)
        of_tokens = logps.gather(1, output[1:, None])[:, 0].tolist()
        top = [{str(int(row.argmax())): float(row.max())} for row in logps]
        return {"text": "", "logprobs": {"token_logprobs": [None, *of_tokens], "top_logprobs": [None, *top]}}

    def _send(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def main(checkpoint: str, port: str) -> None:
    torch.set_num_threads(1)
    Handler.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    Handler.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    Handler.log = Path(checkpoint).parent / "requests.jsonl"
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])

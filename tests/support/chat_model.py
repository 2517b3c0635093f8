"""The embedded model with a ChatML template, whose control tokens users may write into their texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.commands import ROOT

EMBEDDED = ROOT / "src" / "data" / "mini_tldr_base"
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_model(folder: Path) -> Path:
    """Write the model. Its control tokens replace the last two of the vocabulary: the weights stay as they are."""
    shutil.copytree(EMBEDDED, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.get)[-2:]
    removed = {token: vocabulary.pop(token) for token in last}
    merges = tokenizer["model"]["merges"]
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]
    tokenizer["model"]["merges"] = [m for m, pair in zip(merges, pairs, strict=True) if "".join(pair) not in removed]
    special = tokenizer["added_tokens"][0]
    for content, identity in zip(CONTROL_TOKENS, removed.values(), strict=True):
        vocabulary[content] = identity
        tokenizer["added_tokens"].append({**special, "id": identity, "content": content})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

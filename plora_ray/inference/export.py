"""One user's model as a directory that Hugging Face PEFT loads: what the user is served, without this library.

    adapter_config.json, adapter_model.safetensors    the PEFT checkpoint
    head.safetensors                                  the user's task head: weight [outputs, hidden], bias [outputs]
    plora.json                                        labels, pooling, max_length, generation, model and its weight hash
    README.md                                         how to put the three together

The directory appears whole or not at all. Knows nothing of HTTP; needs no PEFT.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from plora_ray.adapters.peft_export import can_merge, head_tensors, peft_config, peft_tensors
from plora_ray.errors import ConfigError, StoreError
from plora_ray.inference.loading import LoadedGeneration, load_generation
from plora_ray.store import AdapterStore, UserAdapter

README = """# A user's model

Generation {generation}, a personalised LoRA on `{model}`. Load it with PEFT (0.17 or newer):

```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, {model_class}

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = PeftModel.from_pretrained({model_class}.from_pretrained("{model}"), "<this directory>").eval()
head = load_file("<this directory>/head.safetensors")
tokens = tokenizer(["a text"], truncation=True, max_length={max_length}, return_tensors="pt")
with torch.inference_mode():
    hidden = model(**tokens).last_hidden_state  # [1, tokens, hidden]
    logits = {pooled} @ head["weight"].T + head["bias"]
```

{meaning}
{merging}
If `{model}` is an installed package rather than a hub name, give `from_pretrained` the model directory inside that package.
The weights must be those whose SHA-256 `plora.json` names. These files are personal data of one user.
"""
POOLED = {"mean": "hidden.mean(dim=1)", "first": "hidden[:, 0]", "last": "hidden[:, -1]"}


def export_user(store: AdapterStore, user_id: str, out: Path) -> None:
    """Write the adapter that `user_id` is served with (the newest, fresh ones included) into the new directory `out`.

    Raises ConfigError if `out` is anything but missing or an empty directory, StoreError if the user has no adapter.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory: name a new one")
    loaded = load_generation(store, fold=False)
    adapter = store.pull(loaded.reader, store.key(user_id))
    if adapter is None:
        raise StoreError(
            f"this user has no adapter in generation {loaded.name} and none of their own since: there is nothing to export "
            "(`plora users show` tells what the store holds)"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename at the end stays within one file system; readable by its owner only.
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            _write(loaded, adapter, draft)
            draft.rename(out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error.strerror or error}") from error


def _write(loaded: LoadedGeneration, adapter: UserAdapter, folder: Path) -> None:
    vector = torch.from_numpy(np.array(adapter.record, np.float32))
    save_file(peft_tensors(loaded.model, vector), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    save_file(head_tensors(loaded.model, vector), folder / "head.safetensors", metadata={"format": "pt"})
    about = {
        "generation": loaded.name,
        "updated_at": adapter.updated_at,
        "examples": adapter.examples,
        "model": loaded.model.spec.model,
        "model_weight_hash": loaded.reader.manifest.model.weight_hash,
        "labels": loaded.labels.to_json(),
        "pooling": loaded.model.family.pooling,
        "max_length": loaded.max_length,
    }
    for name, values in (("adapter_config.json", peft_config(loaded.model)), ("plora.json", about)):
        (folder / name).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(loaded), encoding="utf-8")


def _readme(loaded: LoadedGeneration) -> str:
    labels = loaded.labels
    regression = f"The label is `logits[0, 0] * {labels.std!r} + {labels.mean!r}`."
    classes = "`softmax(logits)` are the probabilities of the labels in `plora.json`, in that order."
    merging = "" if can_merge(loaded.model) else (
        "The adapted layers of this model have no bias, so PEFT serves the adapter but can't merge it (`merge_and_unload` refuses).\n"
    )  # fmt: skip
    return README.format(
        generation=loaded.name,
        model=loaded.model.spec.model,
        model_class=type(loaded.model.plm).__name__,
        max_length=loaded.max_length,
        pooled=POOLED[loaded.model.family.pooling],
        meaning=regression if labels.task == "regression" else classes,
        merging=merging,
    )

"""An exported user is the same model in PEFT as in the engine that serves him."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from plora_ray.adapters.fit import UserPrior
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel, pool
from plora_ray.adapters.pretrained import weight_hash
from plora_ray.errors import ConfigError, StoreError
from plora_ray.inference import InferenceEngine, load_generation
from plora_ray.inference.bring import import_user
from plora_ray.inference.export import export_user
from plora_ray.store import AdapterStore, ModelRef, UserAdapter, new_version

# PEFT warns of layers that can't be merged, and takes a bias of B for a shard.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor.s. have invalid shape"),
]
USER, USER_DIM = "somebody", 5
TEXT = "w1 w2 w3 w5 w8"
SIZES = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**SIZES, max_position_embeddings=32),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0),
}


@pytest.fixture(autouse=True)
def no_outside_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_STORE_KEY", raising=False)


@pytest.fixture(scope="module", params=list(CONFIGS))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    """A generation of one user on a random tiny model of the family."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModel.from_config(CONFIGS[request.param]).save_pretrained(folder / "plm")
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number for number in range(2, 16)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder / "plm")
    spec = AdapterSpec(
        model=str(folder / "plm"), task="classification", outputs=3, rank=4, alpha=6.0, user_dim=USER_DIM, dropout=0.1, head_terms="taste"
    )
    model = PersonalizedModel.from_pretrained(spec)
    with torch.no_grad():
        for parameter in model.shared_parameters().values():
            parameter.normal_(std=0.3)
    store = AdapterStore(f"file://{folder}/store")
    writer = store.begin("g1")
    prior = UserPrior(torch.zeros(USER_DIM, dtype=torch.float64), torch.eye(USER_DIM, dtype=torch.float64))
    writer.write_shared({**{name: p.detach() for name, p in model.shared_parameters().items()}, **prior.tensors()}, {})
    record = np.random.default_rng(0).normal(size=(1, USER_DIM)).astype(np.float32)
    writer.write_segment(0, np.frombuffer(store.key(USER), np.uint8).reshape(1, 16), record, np.array([7]))
    labels = LabelSpace("classification", ("x", "y", "z"))
    config = {"spec": spec.to_json(), "labels": labels.to_json(), "max_length": 16}
    writer.commit(expected_users=1, model=ModelRef(name=spec.model, weight_hash=weight_hash(spec.model)), adapter_config=config)
    return store


def probabilities_by_peft(folder: Path) -> dict[str, float]:
    """The answer for TEXT from the exported files, Transformers and PEFT alone."""
    from peft import PeftModel

    about = json.loads((folder / "plora.json").read_text())
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(about["model"]), str(folder)).eval()
    ids = torch.tensor([[int(word[1:]) for word in TEXT.split()]])
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    head = load_file(folder / "head.safetensors")
    logits = pool(hidden, torch.ones_like(ids), about["pooling"]) @ head["weight"].T + head["bias"]
    return dict(zip(about["labels"]["classes"], torch.softmax(logits[0].double(), 0).tolist(), strict=True))


def probabilities_by_engine(store: AdapterStore) -> dict[str, float]:
    loaded = load_generation(store)
    engine = InferenceEngine(loaded)
    try:
        adapter = store.pull(loaded.reader, store.key(USER))
        assert adapter is not None
        engine.admit(adapter)
        answer = engine.predict([(USER, TEXT)])[0]
    finally:
        engine.close()
    assert answer.personalization == "adapter"
    return answer.prediction.scores


def test_peft_gives_the_hidden_states_and_answers_of_the_engine(store: AdapterStore, tmp_path: Path) -> None:
    from peft import PeftModel

    export_user(store, USER, tmp_path / "out")
    loaded = load_generation(store)
    vector = torch.from_numpy(np.array(loaded.reader.get(store.key(USER)).record))  # type: ignore[union-attr]
    ids = torch.tensor([[2, 5, 7, 11, 3], [4, 4, 9, 0, 0]])
    mask = (ids != 0).long()
    peft = PeftModel.from_pretrained(AutoModel.from_pretrained(loaded.model.spec.model), str(tmp_path / "out")).eval()
    with torch.inference_mode():
        hidden = pool(peft(input_ids=ids, attention_mask=mask).last_hidden_state, mask, loaded.model.family.pooling)
        expected = loaded.model.represent(ids, mask, vector.expand(2, -1))
        population = loaded.model.represent(ids, mask, None)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
    assert (hidden - population).abs().max() > 1e-2  # the user matters in this test
    assert probabilities_by_peft(tmp_path / "out") == pytest.approx(probabilities_by_engine(store), abs=1e-5)


def test_every_exported_tensor_is_one_that_peft_expects(store: AdapterStore, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    export_user(store, USER, tmp_path / "out")
    model = get_peft_model(
        AutoModel.from_pretrained(load_generation(store).model.spec.model), LoraConfig.from_pretrained(str(tmp_path / "out"))
    )
    expected = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    assert {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()} == expected


def test_the_readme_says_when_peft_cannot_merge(store: AdapterStore, tmp_path: Path) -> None:
    from peft import PeftModel

    export_user(store, USER, tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(load_generation(store).model.spec.model), str(tmp_path / "out"))
    if "can't merge" in (tmp_path / "out" / "README.md").read_text():
        with pytest.raises(RuntimeError, match="Impossible to merge"):
            model.merge_and_unload()
    else:
        model.merge_and_unload()


def test_an_exported_user_comes_back_as_the_same_record_and_answers_alike_in_peft(store: AdapterStore, tmp_path: Path) -> None:
    from peft import PeftModel

    export_user(store, USER, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "plora.json").read_text())
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(about["model"]), str(tmp_path / "out"))
    (tmp_path / "again").mkdir()
    model.save_pretrained(str(tmp_path / "again"))  # as PEFT itself writes it, without head and about
    original = store.pull(store.open_generation(), store.key(USER))
    for user, folder, examples in (("mover", "out", 7), ("by-peft", "again", 0)):
        brought = import_user(store, user, tmp_path / folder)
        served = store.pull(store.open_generation(), store.key(user))
        assert served is not None and original is not None and served.source == "fresh" and served.version == brought.version
        np.testing.assert_allclose(served.record, original.record, atol=1e-5, rtol=0)
        assert served.examples == examples
    export_user(store, "mover", tmp_path / "moved")
    assert probabilities_by_peft(tmp_path / "moved") == pytest.approx(probabilities_by_peft(tmp_path / "out"), abs=1e-5)


def test_exporting_needs_no_peft(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    export_user(store, USER, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "plora.json").read_text())
    assert (about["generation"], about["examples"], about["labels"]["classes"], about["max_length"]) == ("g1", 7, ["x", "y", "z"], 16)


def test_the_newest_adapter_is_exported(store: AdapterStore, tmp_path: Path) -> None:
    key, basis = store.key("newcomer"), store.open_generation().basis
    store.put_fresh(UserAdapter(key, np.ones(USER_DIM, np.float32), 2, "g1", new_version(), "2030-01-01T00:00:00+00:00", "fresh", basis))
    export_user(store, "newcomer", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "plora.json").read_text())["examples"] == 2


def test_a_user_without_an_adapter_is_an_error_and_nothing_is_written(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="this user has no adapter in generation g1"):
        export_user(store, "nobody", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(store: AdapterStore, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ConfigError, match="not an empty directory"):
            export_user(store, USER, taken)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_export_that_fails_leaves_no_half_of_a_folder(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plora_ray.inference.export._readme", full_disk)
    with pytest.raises(ConfigError, match="No space left"):
        export_user(store, USER, tmp_path / "out")
    assert not list(tmp_path.iterdir())

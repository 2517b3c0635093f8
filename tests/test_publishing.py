"""What alignment publishes, adapters or a model in save_dtype, is exactly what everything after it computes with."""

import json
import shutil
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from src.config.schema import Lora, Training
from src.errors import ConfigError, DamagedFile
from src.model.adapters import is_adapter, merge_adapter, save_adapter
from src.model.files import check_model_files
from src.model.loading import load_pretrained, save_checkpoint
from src.model.numerics import FLOAT32, NumericsConfig, cast_for_inference_
from src.planning.resources import Resources
from src.stages.generate import whole_model
from src.training.strategies import make_engine
from tests.support.commands import SMALL, train
from tests.support.training_runs import start, step

pytestmark = pytest.mark.usefixtures("one_thread")

LR = 1e-3


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


class Template:
    tokenizer = NoTokenizer()


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def published(folder, *, lora=None, dtype=torch.float32, lr=LR):
    """Train two steps and publish as the align stage does; return the model that it then validates with."""
    with closing(make_engine(Resources(device="cpu"), Training(lr=lr, max_grad_norm=1.0), lora, 0)) as engine:
        engine.save_dtype = dtype
        engine.prepare(start, FLOAT32)
        for number in range(2):
            step(engine, number)
        model = engine.gather_model()
        if engine.adapter is None:
            save_checkpoint(model, Template, folder, dtype)
        else:
            save_adapter(engine.adapter, "base", folder, dtype)
    return weights_of(model)


def loaded(folder):
    if is_adapter(folder):
        return weights_of(merge_adapter(start(), folder))
    return weights_of(load_pretrained(AutoModelForCausalLM, str(folder), str(folder)))


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, Lora(rank=4), Lora(rank=4, publish="merged")])
def test_what_is_loaded_is_bit_by_bit_what_was_validated(lora, dtype, tmp_path):
    validated = published(tmp_path, lora=lora, dtype=dtype)
    assert_equal(loaded(tmp_path), validated)
    (file,) = tmp_path.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}
    moved = sum(not torch.equal(validated[name], weight) for name, weight in weights_of(start()).items())
    assert moved, "the control: it was trained"


def test_adapters_are_published_alone_and_peft_reads_them(tmp_path):
    merged = published(tmp_path / "merged", lora=Lora(rank=4, publish="merged"))
    published(tmp_path / "adapter", lora=Lora(rank=4))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["peft_type"]) == ("base", 4, "LORA")
    assert config["target_modules"] == sorted(config["target_modules"]) and config["inference_mode"]
    assert_equal(loaded(tmp_path / "adapter"), merged)
    whole, adapter = ((tmp_path / name).glob("*.safetensors") for name in ("merged", "adapter"))
    assert next(adapter).stat().st_size < next(whole).stat().st_size / 4
    switched_off = PeftModel.from_pretrained(start(), str(tmp_path / "adapter"))
    with switched_off.disable_adapter():
        ids = torch.arange(3, 20)[None]
        assert torch.equal(switched_off(ids).logits, start()(ids).logits), "its base is what training started from"


def test_adapters_of_another_model_are_refused(tmp_path):
    published(tmp_path, lora=Lora(rank=4))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name: weight[..., :-1].contiguous() for name, weight in weights.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(DamagedFile, match="its adapters cannot be loaded"):
        merge_adapter(start(), tmp_path)


def test_adapters_are_no_model_path(tmp_path):
    published(tmp_path, lora=Lora(rank=4))
    with pytest.raises(ConfigError, match=r"a LoRA adapter .*model\.lora\.publish=merged"):
        check_model_files(str(tmp_path))


def test_a_server_gets_awhole_model_with_the_values_that_are_scored(tmp_path):
    upstream = {"checkpoint": tmp_path / "adapter", "reference": tmp_path / "initial"}
    validated = published(upstream["checkpoint"], lora=Lora(rank=4))
    save_checkpoint(start(), Template, upstream["reference"])
    attempt = SimpleNamespace(checkpoints=tmp_path, is_main_process=True)
    served = whole_model(SimpleNamespace(model=None), None, upstream, Template, attempt)
    assert served == tmp_path / "merged" and not is_adapter(served)
    assert_equal(loaded(served), validated)
    upstream["checkpoint"] = upstream["reference"]  # the control: whole already
    assert whole_model(SimpleNamespace(), None, upstream, Template, attempt) == upstream["reference"]


def test_in_a_bf16_computation_nothing_is_lost_by_publishing_bf16(tmp_path):
    """There weights are rounded to bf16 anyway, and rounding twice is rounding once."""
    bf16 = NumericsConfig("bf16")
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        published(tmp_path / str(dtype), dtype=dtype, lr=3e-7)
        model = load_pretrained(AutoModelForCausalLM, str(tmp_path / str(dtype)), "published")
        models.append(model)
    exact, rounded = map(weights_of, models)
    assert any(not torch.equal(exact[name], rounded[name]) for name in exact), "the control: as float32 they differ"
    assert_equal(*(weights_of(cast_for_inference_(model, bf16)) for model in models))
    shutil.rmtree(tmp_path)


def share_of_update(start_weights, trained, publish):
    """Return the projection of the published update on the trained one, and the norm of what is not along it."""
    update = torch.cat([(trained[n] - w).flatten().double() for n, w in start_weights.items()])
    kept = torch.cat([(publish(trained[n]) - w).flatten().double() for n, w in start_weights.items()])
    share = float(kept @ update / (update @ update))
    return share, float((kept - share * update).norm() / update.norm())


def to_bf16(weight):
    return weight.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("lr", [3e-7, 1e-6])
def test_from_a_float32_start_the_update_survives_bf16_in_the_mean_under_larger_noise(lr, tmp_path):
    """The figures of docs/reference.md come from a longer training; this is the property behind them."""
    before, after = weights_of(start()), published(tmp_path, lr=lr)
    share, noise = share_of_update(before, after, to_bf16)
    assert share > 0.5 and noise > 10
    assert share_of_update(before, after, lambda weight: weight) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))


@pytest.mark.parametrize("lr", [3e-7, 1e-6])
def test_from_a_bf16_start_the_update_is_swallowed(lr, tmp_path):
    before, after = weights_of(start()), published(tmp_path, lr=lr)
    on_grid = {name: to_bf16(weight) for name, weight in before.items()}
    moved = {name: on_grid[name] + (after[name] - weight) for name, weight in before.items()}
    share, _ = share_of_update(on_grid, moved, to_bf16)
    assert share < 0.2


@pytest.mark.slow
def test_samples_and_results_are_those_of_a_merged_model_and_damage_is_found(tmp_path):
    point = [*SMALL, "method=dpo", "beta=0.1", "model.lora.rank=4"]
    for publish in ("adapter", "merged"):
        train(*point, f"model.lora.publish={publish}", f"output_dir={tmp_path / publish}")
    one, other = (
        sorted(path.read_text() for path in (tmp_path / name / "store").glob("generate/*/samples.jsonl"))
        for name in ("adapter", "merged")
    )
    assert one == other and len(one) == 2, "of the policy and of the baseline"
    validation = [
        next((tmp_path / name / "store").glob("align/*/validation.jsonl")).read_text() for name in ("adapter", "merged")
    ]
    assert validation[0] == validation[1]
    (file,) = (tmp_path / "adapter" / "store").glob("align/*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = train(*point, "evaluation.generation.temperature=0.5", f"output_dir={tmp_path / 'adapter'}")
    assert "adapter_model.safetensors" in again.stderr and "is computed again" in again.stderr

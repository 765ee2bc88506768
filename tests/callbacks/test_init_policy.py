"""InitPolicy: formulas of torch.nn.init, variance through 30 layers, and what is left alone."""

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_distill import student_from_teacher
from lightning_distill.callbacks import InitPolicy
from lightning_distill.students.activations import LAYERS, following_activations
from lightning_distill.students.initialization import generator_for, initialize, materialize, residual_factors
from lightning_distill.students.untouched import untouched_parameters
from tests.callbacks.registry import Batches, Regression, trainer
from tests.helpers.models import bert, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def deep(activation: type[nn.Module], width: int = 256) -> nn.Sequential:
    # On the meta device first: torch's own draw would be thrown away.
    layers = (part for _ in range(30) for part in (nn.Linear(width, width, device="meta"), activation()))
    return nn.Sequential(*layers).to_empty(device="cpu")


def variances(model: nn.Module) -> tuple[float, float]:
    hidden = torch.randn(64, model[0].in_features, generator=torch.Generator().manual_seed(1))
    means = []
    for module in model:
        hidden = module(hidden)
        if not isinstance(module, nn.Linear):
            means.append(hidden.pow(2).mean().item())
    return means[4], means[-1]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.SELU])
@torch.no_grad()
def test_thirty_layers_keep_their_variance_under_auto(activation: type[nn.Module]) -> None:
    # He keeps the variance in the mean over draws. One draw wanders by sqrt(5 x 25 layers / width) in log variance: by
    # a factor of 2 at width 256 (seen: mean 1.12 with standard error 0.11 over 60 draws), of 1.4 at width 1024.
    model = deep(activation, width=1024)
    initialize(model, "auto")
    early, late = variances(model)
    assert 0.5 < late / early < 2


@pytest.mark.parametrize(
    ("activation", "wrong"), [(nn.ReLU, "xavier_normal"), (nn.SELU, "transformer"), (nn.Tanh, "transformer")]
)
@torch.no_grad()
def test_thirty_layers_vanish_under_the_wrong_rule(activation: type[nn.Module], wrong: Any) -> None:
    model = deep(activation)
    initialize(model, wrong)
    assert variances(model)[1] < 1e-5


@torch.no_grad()
def test_thirty_layers_explode_under_the_wrong_rule() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(30)))  # nothing bends: He is twice too much
    initialize(model, "kaiming_normal")
    x = torch.randn(64, 256)
    assert model(x).var() > 1e5 * x.var()


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [
        ("xavier_uniform", {"gain": 5 / 3}),
        ("xavier_normal", {"gain": 5 / 3}),
        ("kaiming_uniform", {"a": 0.0}),
        ("kaiming_normal", {"a": 0.0}),
        ("orthogonal", {"gain": 5 / 3}),
    ],
)
def test_values_equal_those_of_torch(policy: Any, arguments: dict[str, float]) -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh())
    initialize(model, policy, seed=3)
    expected = torch.empty(20, 12)
    getattr(nn.init, f"{policy}_")(expected, **arguments, generator=generator_for("0.weight", 3))
    assert torch.equal(model[0].weight, expected)


def test_activations_are_found_through_functions_and_other_modules() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.tanh(self.norm(self.a(nn.functional.leaky_relu(self.b(x), negative_slope=0.3)))))

    expected = {"b": ("leaky_relu", 0.3), "a": ("tanh", 0.0), "c": ("linear", 0.0)}
    assert following_activations(Model()) == expected


def test_activations_of_what_cannot_be_traced_and_of_transformers() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.act, self.odd, self.mish, self.head = nn.ReLU(), nn.Linear(4, 4), nn.Mish(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.act(self.body(x))
            return self.head(self.mish(self.odd(x))) if x.sum() > 0 else x

    expected = {"body.0": "tanh", "body.2": "relu", "odd": "unknown", "head": "unknown"}
    assert {name: activation for name, (activation, _) in following_activations(Branches()).items()} == expected
    assert {line.rule for line in initialize(Branches())[2:]} == {"kaiming_normal"}

    model = bert(initializer_range=0.05)
    assert {activation for activation, _ in following_activations(model).values()} == {"gelu"}
    audit = initialize(model)
    assert {line.rule for line in audit} == {"transformer", "normal"}
    assert {round(line.target_std, 4) for line in audit} == {0.05, 0.044}
    relu = following_activations(bert(hidden_act="relu"))
    assert relu["bert.encoder.layer.1.intermediate.dense"] == ("relu", 0.0)
    assert relu["bert.encoder.layer.1.output.dense"] == ("linear", 0.0)


def test_tied_weights_padding_rows_norms_and_biases() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(9, 4, padding_idx=2), "head": nn.Linear(4, 9), "n": nn.LayerNorm(4)}
    )
    model["head"].weight = model["embedding"].weight
    nn.init.constant_(model["n"].weight, 3.0)
    audit = initialize(model, "auto")
    assert [line.parameter for line in audit] == ["embedding.weight"]
    assert model["embedding"].weight[2].abs().max() == 0
    assert torch.equal(model["n"].weight, torch.ones(4))


def test_gpt2_scales_as_transformers_does_and_keeps_its_transposed_weights() -> None:
    config = transformers.GPT2Config(n_layer=3, n_embd=128, n_head=4, vocab_size=50)
    theirs, ours = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    initialize(ours, "transformer", residual="gpt2")
    for (name, wanted), got in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        # A normal cut at two standard deviations is narrower by 12 %.
        narrower = 0.8796 if wanted.ndim > 1 and "c_" in name else 1.0
        torch.testing.assert_close(got.std(), wanted.std() * narrower, rtol=0.06, atol=1e-6)
    assert ours.lm_head.weight is ours.transformer.wte.weight


def test_deepnorm_is_the_papers() -> None:
    # Encoder of N layers: Xavier with gain (8 N)^(-1/4) for values, outputs and feed-forward, 1 for queries and keys.
    model = bert(layers=4, hidden_size=128, intermediate_size=256)
    audit = {line.parameter: line for line in initialize(model, "xavier_normal", residual="deepnorm")}
    beta = 32**-0.25
    for part, gain in (("query", 1), ("key", 1), ("value", beta)):
        line = audit[f"bert.encoder.layer.2.attention.self.{part}.weight"]
        assert line.measured_std == pytest.approx(gain * 128**-0.5, rel=0.03)
        assert line.target_std == pytest.approx(gain * 128**-0.5)
    for part in ("intermediate.dense", "output.dense"):
        assert audit[f"bert.encoder.layer.2.{part}.weight"].measured_std == pytest.approx(beta * 192**-0.5, rel=0.03)
    assert audit["bert.pooler.dense.weight"].rule == "xavier_normal"

    joint = transformers.GPT2Model(transformers.GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=50))
    initialize(joint, "xavier_normal", residual="deepnorm")
    query, key, value = joint.h[0].attn.c_attn.weight.chunk(3, dim=1)
    assert key.std().item() == pytest.approx(query.std().item(), rel=0.05)
    assert value.std().item() == pytest.approx(beta * query.std().item(), rel=0.05)
    with pytest.raises(ValueError, match="`residual` to be None for a model without residual blocks"):
        initialize(nn.Sequential(nn.Linear(2, 2)), residual="gpt2")


def setup(policy: InitPolicy, module: L.LightningModule) -> list[str]:
    """What a policy draws in a module, without training it."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    policy.setup(trainer, module, "fit")
    return [line.parameter for line in policy.audit]


class Holder(L.LightningModule):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_new_leaves_alone_what_was_loaded_copied_trained_or_frozen(tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    plain, copied, trained, frozen = (nn.Linear(4, 4) for _ in range(4))
    plain.load_state_dict(copied.state_dict())
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    trained(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    restored_bert = bert()
    norms = {name: torch.rand_like(value) for name, value in restored_bert.state_dict().items() if "LayerNorm" in name}
    restored_bert.load_state_dict(restored_bert.state_dict() | norms)
    module = Holder(
        loaded=loaded,
        carried=student_from_teacher(bert(), num_layers=1),
        restored=restored_bert,
        plain=plain,
        copied=copy.deepcopy(copied),
        trained=trained,
        frozen=frozen.requires_grad_(False),
        head=nn.Linear(4, 2),
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    # The body was loaded, and its head was not: transformers notes which.
    assert setup(InitPolicy(), module) == ["loaded.classifier.weight", "head.weight"]
    kept = [name for name in before if not name.startswith(("loaded.classifier", "head"))]
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in kept)


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=1)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        )
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, head_dim=8, num_key_value_heads=2)
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
    "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_architectures_are_new_follow_their_activation_and_scale_their_residual(name: str) -> None:
    model = MODELS[name]()
    layers = [layer for layer, module in model.named_modules() if isinstance(module, LAYERS)]
    found = {activation for activation, _ in following_activations(model).values()}
    expected = {"gpt2": {"gelu"}, "modernbert": {"gelu"}, "qwen3": {"silu"}, "t5": {"relu", "linear"}}
    assert found == expected.get(name, {"relu", "unknown"})
    parameters = {parameter for parameter, _ in model.named_parameters()}
    assert {f"{layer}.weight" for layer in layers} & parameters <= untouched_parameters(model)
    with torch.device("meta"):
        meta = MODELS[name]()
    assert untouched_parameters(meta) >= {f"{layer}.weight" for layer in layers} & parameters
    materialize(meta)
    assert all(value.isfinite().all() for value in meta.state_dict().values())
    if name != "resnet":
        # Two layers of two residual branches; T5's decoder has three, and so has its encoder two.
        count = 10 if name == "t5" else 4
        assert len(residual_factors(model, "gpt2")) == count
        assert residual_factors(model, "gpt2").popitem()[1] == (count**-0.5, 1.0)


@pytest.mark.parametrize("policy", ["auto", "from_teacher"])
def test_everything_of_a_fresh_model_is_new(policy: Any) -> None:
    fresh = bert(layers=1, pad_token_id=3)
    arguments = {} if policy == "auto" else {"teacher": bert(pad_token_id=3)}
    drawn = setup(InitPolicy(policy, **arguments), Holder(student=fresh, norm=nn.BatchNorm1d(4)))
    assert len(drawn) == sum(p.ndim > 1 for p in fresh.parameters())


@pytest.mark.parametrize("model", [bert, llama])
@pytest.mark.parametrize("width", [1.0, 0.5])
def test_from_teacher_is_student_from_teacher(model: Any, width: float) -> None:
    teacher = model(layers=4)
    made = student_from_teacher(teacher, num_layers=2, width=width, layers="last")
    module = Holder(teacher=teacher, student=type(teacher)(made.config))
    # What is not chosen keeps its own weights, what the teacher does not have gets "auto".
    module.extra = nn.Linear(3, 3)
    drawn = setup(InitPolicy("from_teacher", layers="last"), module)
    for (name, wanted), got in zip(made.named_parameters(), module.student.parameters(), strict=True):
        assert torch.equal(got, wanted), name
    assert drawn[-1] == "extra.weight"
    wrong = Holder(teacher=teacher, student=model(layers=2, intermediate_size=24))
    with pytest.raises(ValueError, match="`student` to have the sizes of a student of this teacher"):
        setup(InitPolicy("from_teacher"), wrong)
    with pytest.raises(ValueError, match="`teacher` to be a model, a folder or a hub id"):
        setup(InitPolicy("from_teacher"), Holder(student=model()))


def test_from_teacher_fills_the_chosen_modules_alone() -> None:
    teacher, student = bert(layers=4), bert(layers=2)
    before = {name: value.clone() for name, value in student.named_parameters()}
    setup(InitPolicy("from_teacher", only="student.bert.encoder.*"), Holder(teacher=teacher, student=student))
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {
        name
        for name in before
        if name.startswith("bert.encoder") and name.endswith("weight") and "LayerNorm" not in name
    }
    made = student_from_teacher(teacher, num_layers=2)
    wanted, got = (model.bert.encoder.layer[0].output.dense.weight for model in (made, student))
    assert torch.equal(got, wanted)


def test_meta_device_models_get_memory_and_the_same_numbers() -> None:
    def parts() -> dict[str, nn.Module]:
        tied = nn.ModuleDict({"embedding": nn.Embedding(9, 4, padding_idx=2), "head": nn.Linear(4, 9)})
        tied["norm"] = nn.BatchNorm1d(4)
        tied["head"].weight = tied["embedding"].weight
        return {"bert": bert("MaskedLM"), "tied": tied}

    real = Holder(**parts())
    with torch.device("meta"):
        meta = Holder(**parts())
    assert setup(InitPolicy(), meta) == setup(InitPolicy(), real)
    for (name, wanted), (_, got) in zip(real.named_parameters(), meta.named_parameters(), strict=True):
        assert torch.equal(got, wanted), name
    for (name, wanted), (_, got) in zip(real.named_buffers(), meta.named_buffers(), strict=True):
        assert torch.equal(got, wanted), name
    assert meta.tied["head"].weight is meta.tied["embedding"].weight
    assert meta.bert.cls.predictions.decoder.weight is meta.bert.bert.embeddings.word_embeddings.weight
    with torch.device("meta"):
        stuck = Holder(lstm=nn.LSTM(2, 2), free=nn.ParameterList([nn.Parameter(torch.empty(2))]), head=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="meta device to have `reset_parameters`, but got 'free', a `ParameterList`"):
        setup(InitPolicy(), stuck)


class AsInCheckpoint(L.Callback):
    """Compares the weights with those of a checkpoint in the first hooks after it was loaded."""

    def __init__(self, path: Path) -> None:
        self.expected = torch.load(path, weights_only=True)["state_dict"]
        self.looked = 0

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.looked += 1
        for name, value in pl_module.state_dict().items():
            assert torch.equal(value, self.expected[name]), name

    on_fit_start = on_sanity_check_start = on_train_start = on_train_epoch_start = look


def test_never_on_resume_nor_on_a_second_fit(tmp_path: Path) -> None:
    whole = trainer(tmp_path, InitPolicy("orthogonal", only="all", output_dir=tmp_path / "a"))
    whole.fit(Regression())
    look = AsInCheckpoint(tmp_path / "step=3.ckpt")
    again = InitPolicy("orthogonal", only="all", output_dir=tmp_path / "b")
    # Before and after: whatever the order of callbacks, no hook sees other weights.
    trainer(tmp_path / "c", look, again, look).fit(Regression(), ckpt_path=tmp_path / "step=3.ckpt")
    assert look.looked >= 4
    assert again.audit == []
    assert not (tmp_path / "b").exists()

    module, policy = Regression(), InitPolicy("orthogonal", only="all", output_dir=tmp_path / "a")
    run = trainer(tmp_path / "d", policy, max_steps=2)
    run.fit(module)
    after = [p.detach().clone() for p in module.parameters()]
    run.fit_loop.max_epochs = run.current_epoch
    run.fit(module)
    assert all(torch.equal(a, b) for a, b in zip(after, module.parameters(), strict=True))


class Late(Regression):
    """Builds its head only in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.head = nn.Linear(32, 1)


def test_what_configure_model_builds_is_drawn_as_well(tmp_path: Path) -> None:
    late, early = InitPolicy(output_dir=tmp_path), InitPolicy(output_dir=tmp_path)
    trainer(tmp_path / "late", late, max_steps=1).fit(Late())
    trainer(tmp_path / "early", early, max_steps=1).fit(Regression())
    assert [line.as_dict() for line in late.audit] == [line.as_dict() for line in early.audit]


def test_audit_and_picture(tmp_path: Path) -> None:
    trainer(tmp_path, InitPolicy("xavier_uniform"), max_steps=2).fit(Regression())
    saved = json.loads((tmp_path / "init_policy.json").read_text())
    first = saved["weights"][0]
    assert {name: first[name] for name in ("parameter", "activation", "rule", "fan_in", "fan_out")} == {
        "parameter": "body.0.weight", "activation": "tanh", "rule": "xavier_uniform", "fan_in": 4, "fan_out": 32,
    }  # fmt: skip
    assert first["measured_std"] == pytest.approx(first["target_std"], rel=0.2)
    assert saved["left_alone"] == []
    assert (tmp_path / "init_policy.png").read_bytes()[:4] == b"\x89PNG"

    module = Regression()
    initialize(module, "xavier_uniform")
    x, y = next(iter(Batches()))
    first_output = module.body[0](x)
    second_output = module.body[2](module.body[1](first_output))
    third_output = module.head(module.body[3](second_output))
    outputs = [first_output, second_output, third_output]
    gradients = torch.autograd.grad(nn.functional.mse_loss(third_output, y), outputs)
    assert [line["layer"] for line in saved["variances"]] == ["body.0", "body.2", "head"]
    for line, output, gradient in zip(saved["variances"], outputs, gradients, strict=True):
        assert line["activation"] == pytest.approx(output.square().mean().item(), rel=1e-4)
        assert line["gradient"] == pytest.approx(gradient.square().mean().item(), rel=1e-4)


def test_the_picture_of_a_scaled_loss_is_not_scaled(tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    for name, plugins in (("full", None), ("scaled", plugin)):
        trainer(tmp_path / name, InitPolicy(output_dir=tmp_path / name), max_steps=1, plugins=plugins).fit(Regression())
    files = (tmp_path / name / "init_policy.json" for name in ("full", "scaled"))
    full, scaled = ([line["gradient"] for line in json.loads(file.read_text())["variances"]] for file in files)
    assert scaled == pytest.approx(full, rel=0.02)


def test_nothing_new_is_worth_a_warning(tmp_path: Path) -> None:
    module = Regression()
    module.load_state_dict(Regression().state_dict())
    with pytest.warns(UserWarning, match="InitPolicy has left everything alone"):
        trainer(tmp_path, InitPolicy(), max_steps=1).fit(module)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`only` to match names of modules, but 'x\*' matches none.*body"):
        trainer(tmp_path, InitPolicy(only="x*"), max_steps=1).fit(Regression())
    with pytest.raises(ValueError, match="on the meta device"):
        initialize(nn.Sequential(nn.Linear(1, 1, device="meta")))


def test_another_seed_or_name_gives_other_numbers() -> None:
    drawn = [torch.rand(3, generator=generator_for(name, seed)) for name in ("a", "b") for seed in (0, 1, 2**32)]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn)

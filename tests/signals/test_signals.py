import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_distill.signals.description import describe, find_decoder, find_layers
from lightning_distill.signals.recorder import Recorder, capture
from lightning_distill.signals.signals import Request
from tests.models import registry
from tests.models.registry import ARCHITECTURES, inputs

DEPTH = 3
ENCODER_DECODERS = ["T5", "Bart"]
RECORDED = [name for name, row in ARCHITECTURES.items() if row.has_attention]


def build(name: str) -> Any:
    torch.manual_seed(0)
    return registry.build(name, layers=DEPTH, hidden_size=32, num_attention_heads=4)


EVERYTHING = Request(hidden_states=frozenset(range(DEPTH)), embedding=True, attention=frozenset({0, DEPTH - 1}))


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("padded", [True, False])
def test_capture_changes_no_bit_and_equals_what_transformers_gives(name: str, padded: bool) -> None:
    model, batch = build(name).eval(), inputs(name)
    if not padded:
        batch.pop("attention_mask", None)
    plain = model(**batch)
    output, captured = capture(model, EVERYTHING, **batch)
    assert torch.equal(plain.logits, output.logits)

    model.set_attn_implementation("eager")
    eager = model(**batch, output_hidden_states=True, output_attentions=True)
    prefix = "encoder_" if name in ENCODER_DECODERS else ""
    states, maps = getattr(eager, f"{prefix}hidden_states"), getattr(eager, f"{prefix}attentions")
    torch.testing.assert_close(captured["embedding"], states[0])
    # A padded query may see no key at all (ModernBERT's local attention); what it then gives differs and is no matter.
    mask = batch.get("attention_mask")
    real = torch.ones(states[0].shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    for layer in range(DEPTH):
        expected = states[layer + 1]
        if name == "ViT" and layer == DEPTH - 1:
            expected = model.vit.layernorm(expected)
        torch.testing.assert_close(captured["hidden_states"][layer][real], expected[real], atol=2e-6, rtol=1e-5)
    for layer in EVERYTHING.attention:
        own, expected = (x.transpose(1, 2)[real] for x in (captured["attention"][layer].probabilities(), maps[layer]))
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", RECORDED)
def test_gradients_are_the_same_bits_and_the_model_is_left_as_it_was(name: str) -> None:
    model, batch = build(name).train(), inputs(name)
    before = snapshot(model)

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        model(**batch).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    recorder = Recorder(model, EVERYTHING)
    recorded = gradients()
    recorder.remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert snapshot(model) == before


def snapshot(model: nn.Module) -> Any:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    return hooks, [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


def test_eager_attention_stays_eager() -> None:
    model, batch = build("Llama").eval(), inputs("Llama")
    model.set_attn_implementation("eager")
    maps = model(**batch, output_attentions=True).attentions
    output, captured = capture(model, EVERYTHING, **batch, output_attentions=True)
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(captured["attention"][0].probabilities(), maps[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(output.attentions[0], maps[0])


def test_gradient_checkpointing_records_once_and_with_its_gradient() -> None:
    def gradients(checkpointing: bool) -> tuple[list[Tensor], Recorder]:
        model = build("Bert").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        recorder = Recorder(model, EVERYTHING)
        torch.manual_seed(2)
        logits = model(**inputs("Bert")).logits
        captured = recorder.take()
        maps = sum(attention.probabilities().square().sum() for attention in captured["attention"].values())
        (logits.sum() + maps + captured["hidden_states"][1].square().sum()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None], recorder

    plain, _ = gradients(False)
    checkpointed, recorder = gradients(True)
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)
    # Backward has run the layers again by now; that run must not be kept.
    assert not recorder._captured


def test_reentrant_gradient_checkpointing_is_refused_where_it_would_lose_the_gradient() -> None:
    model = build("Bert").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    recorder = Recorder(model, EVERYTHING)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**inputs("Bert"))
    recorder.remove()


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_student_compile(name: str) -> None:
    model, batch = build(name).train(), inputs(name)
    model.config.attention_dropout = model.config.attention_probs_dropout_prob = model.config.hidden_dropout_prob = 0.0
    model.eval()
    _, plain = capture(model, EVERYTHING, **batch)
    recorder = Recorder(model, EVERYTHING)
    model.compile(backend="aot_eager")
    for _ in range(2):
        logits = model(**batch).logits
        captured = recorder.take()
        for layer in range(DEPTH):
            torch.testing.assert_close(captured["hidden_states"][layer], plain["hidden_states"][layer])
        torch.testing.assert_close(captured["attention"][0].query, plain["attention"][0].query)
        assert not recorder._captured
    (captured["hidden_states"][1].sum() + captured["attention"][2].probabilities().square().sum()).backward()
    assert (
        find_layers(model)[0]
        .get_submodule("attention.self.query" if name == "Bert" else "self_attn.q_proj")
        .weight.grad.abs()
        .sum()
        > 0
    )
    assert logits.shape[0] == 2


def test_autocast() -> None:
    model, batch = build("Bert").eval(), inputs("Bert")
    with torch.autocast("cpu", torch.bfloat16):
        _, captured = capture(model, EVERYTHING, **batch)
        maps = captured["attention"][0].probabilities()
    assert captured["attention"][0].query.dtype == torch.bfloat16
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))


def test_copy_and_pickle_after_remove() -> None:
    model, batch = build("Bert").eval(), inputs("Bert")
    recorder = Recorder(model, EVERYTHING)
    logits = model(**batch).logits
    recorder.remove()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(**batch).logits, logits)


def test_take_forgets_and_says_what_did_not_run() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    recorder = Recorder(model, Request(modules=frozenset({"0"})))
    model(torch.zeros(2, 3))
    assert recorder.take()["modules"]["0"].shape == (2, 4)
    with pytest.raises(RuntimeError, match=r"modules.*'0'"):
        recorder.take()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(hidden_states=frozenset({3})), r"\[3\].*3 layers"),
        (Request(attention=frozenset({7})), r"\[7\].*3 layers"),
        (Request(modules=frozenset({"bert.encoder.layr.0"})), r"bert\.encoder\.layer\.0"),
    ],
)
def test_what_a_model_cannot_give_is_refused(request_: Request, message: str) -> None:
    model = build("Bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        Recorder(model, request_)
    assert snapshot(model) == before


def test_a_plain_module_has_no_layers() -> None:
    with pytest.raises(ValueError, match="Name modules by path"):
        Recorder(nn.Sequential(nn.Linear(2, 2)), Request(hidden_states=frozenset({0})))
    info = describe(nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    assert (info.depth, info.width, info.modules) == (None, None, {"0": 6, "1": 6, "2": None})


def test_describe_reads_grouped_heads() -> None:
    info = describe(build("Llama"))
    assert (info.depth, info.width, info.num_heads, info.num_key_value_heads) == (3, 32, 4, 2)
    assert describe(build("Bert")).num_key_value_heads == 4


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_decoder_of_an_encoder_decoder_is_named_by_path(name: str) -> None:
    model, batch = build(name).eval(), inputs("T5")
    batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :7]
    decoder = find_decoder(model)
    assert decoder is not None
    stack = {"T5": "block", "Bart": "layers"}[name]
    paths = frozenset(f"{decoder}.{stack}.{layer}" for layer in (0, 1))
    plain = model(**batch)
    output, captured = capture(model, Request(attention=paths, modules=paths), **batch)
    assert torch.equal(plain.logits, output.logits)

    model.set_attn_implementation("eager")
    eager = model(**batch, output_hidden_states=True, output_attentions=True)
    for path in paths:
        layer = int(path[-1])
        torch.testing.assert_close(
            captured["modules"][path], eager.decoder_hidden_states[layer + 1], atol=2e-6, rtol=1e-5
        )
        # Its attention to itself, not the one to the encoder.
        torch.testing.assert_close(
            captured["attention"][path].probabilities(), eager.decoder_attentions[layer], atol=1e-6, rtol=1e-5
        )
    assert "_attention_sink" not in vars(model.get_submodule(next(iter(paths))))

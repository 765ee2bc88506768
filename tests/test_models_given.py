"""Models as people hand them over: compiled, inside peft, LightningModules, without a head, with another tokenizer."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lightning_distill import DistillationModule, student_from_teacher
from lightning_distill.data import train_tokenizer
from lightning_distill.generation import generate
from lightning_distill.models.calling import call_model, gives_logits
from lightning_distill.objectives import (
    AttentionRelation,
    HardLabel,
    HiddenState,
    HiddenStateCosine,
    SoftTarget,
    UniversalLogit,
)
from tests.helpers.models import SMALL, batch, bert, llama
from tests.test_module import loader, net, points, trainer


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("wrap", [compiled, in_place])
def test_compiled_models_are_the_models_they_hold(wrap: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = bert(num_labels=3, layers=3), bert(num_labels=3)
    objectives = [SoftTarget(), HiddenState("last"), AttentionRelation()]
    plain = DistillationModule(*copy.deepcopy(pair), copy.deepcopy(objectives))
    module = DistillationModule(*(wrap(model) for model in pair), objectives)
    assert module.task == "classification"
    assert module.student is pair[1]
    assert module.student._compiled_call_impl is not None
    data = batch("classification", classes=3)
    for made in (plain, module):
        made.eval()
    module.load_state_dict(plain.state_dict())
    expected, found = plain.losses(data), module.losses(data)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss)
    module.train()
    trainer(tmp_path).fit(module, loader(), loader())
    module.export(tmp_path / "student")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    torch.testing.assert_close(again(**data).logits, module.student.eval()(**data).logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's compiler
def test_a_student_whose_layers_are_compiled_is_exported_under_the_names_it_had(tmp_path: Path) -> None:
    student = bert(num_labels=3)
    names = set(student.state_dict())
    stack = student.bert.encoder.layer
    for index, layer in enumerate(stack):
        stack[index] = compiled(layer)
    module = DistillationModule(bert(num_labels=3), student, [SoftTarget(), HiddenState("last"), AttentionRelation()])
    trainer(tmp_path).fit(module, loader())
    assert set(student.state_dict()) == names
    module.export(tmp_path / "student")
    data = batch("classification", classes=3)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    torch.testing.assert_close(again(**data).logits, student.eval()(**data).logits)


def test_what_was_compiled_still_runs_afterwards_and_its_copies_are_plain() -> None:
    teacher = compiled(net(8).eval())
    x = torch.randn(3, 4)
    before = teacher(x)
    module = DistillationModule(teacher, net(4))
    module.losses((x, torch.tensor([0, 1, 2])))
    assert torch.equal(teacher(x), before)
    assert copy.deepcopy(module).teacher._compiled_call_impl is None


def test_a_compiled_teacher_makes_a_student_and_a_compiled_model_writes() -> None:
    student: Any = student_from_teacher(compiled(bert(layers=4)), num_layers=2)
    assert type(student) is transformers.BertForSequenceClassification
    model = llama().eval()
    texts = [generate(m, [[1, 5]], max_new_tokens=5, do_sample=False)["input_ids"] for m in (model, compiled(model))]
    assert torch.equal(*texts)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_a_peft_model_takes_what_its_base_takes() -> None:
    peft = pytest.importorskip("peft")
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, num_hidden_layers=1)).eval()
    adapted = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    data = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    torch.testing.assert_close(call_model(adapted, data).logits, call_model(base, data).logits)
    module = DistillationModule(base, adapted, [SoftTarget()]).eval()
    assert module.task == "causal_lm"
    assert module.losses(data)["soft_target"].item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="merge_and_unload"):
        student_from_teacher(adapted, num_layers=1)


class Lit(L.LightningModule):
    """A LightningModule as people write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class WithoutForward(L.LightningModule):
    """One that computes all in its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).sum()


def test_lightning_modules_are_teacher_and_student(tmp_path: Path) -> None:
    teacher = Lit(16)
    trainer(tmp_path).fit(teacher, points())
    module = DistillationModule(teacher, Lit(8))
    kept, before = copy.deepcopy(teacher.state_dict()), copy.deepcopy(module.student.state_dict())
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(module, points(), points())
    run.test(module, points(), verbose=False)
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    assert not any(torch.equal(before[name], value) for name, value in module.student.state_dict().items())
    assert (module.export(tmp_path / "student") / "model.safetensors").is_file()


@pytest.mark.parametrize("broken", [WithoutForward, nn.Module, lambda: nn.ModuleList([nn.Linear(4, 3)])])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_module_without_a_forward_is_refused(broken: Any, role: str) -> None:
    with pytest.raises(TypeError, match=rf"`{role}` to be a module with a forward, but got a `\w+`.*Define `forward`"):
        DistillationModule(**{"student": net(4), "teacher": net(4), role: broken()})


def test_steps_of_the_users_own_need_no_forward() -> None:
    class Own(DistillationModule):
        """Calls the networks inside."""

        def student_step(self, batch: Any) -> Any:
            return self.forwards.run("student", self.student.net, batch)

        teacher_step = student_step

    losses = Own(WithoutForward(), WithoutForward()).losses((torch.randn(2, 4), torch.tensor([0, 1])))
    # Its teacher's step asks the student, from which only dropout tells it apart.
    assert losses["soft_target"] < 0.01 < losses["hard_label"]


def body(**config: Any) -> Any:
    return transformers.BertModel(transformers.BertConfig(**{**SMALL, "num_hidden_layers": 2, **config}))


def clip() -> Any:
    text = {**SMALL, "num_hidden_layers": 2, "hidden_size": 16}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 4}, projection_dim=8)
    return transformers.CLIPModel(config)


@pytest.mark.parametrize("make", [body, clip])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_without_logits_is_refused_where_an_objective_reads_them(make: Any, role: str) -> None:
    models = {"student": bert(), "teacher": bert(), role: make()}
    name = "BertModel" if make is body else "CLIPModel"
    with pytest.raises(TypeError, match=rf"`{role}` to be a model that gives `logits`, which \['soft.*got a `{name}`"):
        DistillationModule(**models, task="classification")


def test_models_without_heads_learn_from_each_others_hidden_states(tmp_path: Path) -> None:
    module = DistillationModule(body(), body(), [HiddenStateCosine("last")], task="classification")
    data = loader()
    before = module.student.encoder.layer[0].output.dense.weight.clone()
    run = trainer(tmp_path)
    run.fit(module, data, data)
    assert not torch.equal(before, module.student.encoder.layer[0].output.dense.weight)
    assert set(run.validate(module, data, verbose=False)[0]) == {"val_loss", "val_hidden_state_cosine"}


def test_a_student_with_a_head_learns_from_a_teacher_without_one(tmp_path: Path) -> None:
    objectives = [HardLabel(), HiddenStateCosine("last")]
    module = DistillationModule(body(), bert(num_labels=3), objectives)
    run, data = trainer(tmp_path), loader()
    run.fit(module, data, data)
    found = run.test(module, data, verbose=False)[0]
    assert set(found) == {"test_loss", "test_hard_label", "test_hidden_state_cosine", "test_accuracy"}


def test_clip_learns_from_clip() -> None:
    objectives = [HiddenStateCosine([("text_model.encoder.layers.1", "text_model.encoder.layers.1")])]
    module = DistillationModule(clip(), clip(), objectives, task="classification")
    data = {"input_ids": torch.tensor([[5, 6, 2], [7, 8, 2]]), "pixel_values": torch.randn(2, 3, 8, 8)}
    assert 0 < module.losses(data)["hidden_state_cosine"].item() < 2


def test_which_classes_say_that_they_give_logits() -> None:
    class Own(transformers.BertModel):
        """What it returns is not said."""

        def forward(self, input_ids: Any):  # type: ignore[no-untyped-def]
            return super().forward(input_ids).pooler_output

    class Said(transformers.BertModel):
        """What it returns is."""

        def forward(self, input_ids: Any) -> BaseModelOutputWithPooling:
            return super().forward(input_ids)

    config = transformers.BertConfig(**SMALL, num_hidden_layers=1)
    assert gives_logits(Own(config))
    assert not gives_logits(Said(config))
    assert not gives_logits(transformers.BertForQuestionAnswering(config))
    assert gives_logits(bert("TokenClassification"))
    assert gives_logits(nn.Linear(1, 1))


def folders(root: Path, kind: Any, words: tuple[str, str], **config: Any) -> list[str]:
    paths = []
    for side, text in zip(("teacher", "student"), words, strict=True):
        paths.append(str(root / side))
        kind(**{"vocab_size": 100, "layers": 1, **config}).save_pretrained(paths[-1])
        train_tokenizer([text] * 3, vocab_size=60).save_pretrained(paths[-1])
    return paths


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM"])
def test_other_tokenizers_are_refused_in_every_task(head: str, tmp_path: Path) -> None:
    paths = folders(tmp_path, lambda **c: bert(head, **c), ("alpha beta gamma delta", "one two three four"))
    with pytest.raises(ValueError, match=r"to have the same tokenizer, but those of .* give other ids"):
        DistillationModule(*paths)
    # So for models that were loaded from there, and where no objective reads tokens: both read the same ids.
    models = [transformers.AutoModel.from_pretrained(path) for path in paths]
    with pytest.raises(ValueError, match="same tokenizer"):
        DistillationModule(*models, [HiddenStateCosine("last")], task="classification")
    same = folders(tmp_path / "same", lambda **c: bert(head, **c), ("alpha beta", "alpha beta"))
    DistillationModule(*same)


def test_the_batch_must_hold_what_another_tokenizer_reads(tmp_path: Path) -> None:
    paths = folders(tmp_path, bert, ("alpha beta gamma delta", "one two three four"))
    module = DistillationModule(*paths, own_teacher_inputs=True)
    data = batch("classification")
    with pytest.raises(ValueError, match="teacher's own inputs, because its tokenizer is not the student's"):
        module.losses(data)
    module.losses({**data, "teacher_input_ids": torch.full((4, 3), 5)})
    assert module.hparams["own_teacher_inputs"] is True
    # The objective that compares sorted probabilities asks for it too.
    words = folders(tmp_path / "words", lambda **c: bert("MaskedLM", **c), ("alpha beta gamma", "one two three four"))
    module = DistillationModule(*words, [UniversalLogit()])
    data = batch("masked_lm")
    with pytest.raises(ValueError, match="teacher's own inputs"):
        module.losses(data)
    module.losses({**data, **{f"teacher_{name}": value for name, value in data.items()}})


def test_tokenizers_are_told_apart_without_a_tokenizer_json_and_by_their_added_tokens(tmp_path: Path) -> None:
    paths = folders(tmp_path, bert, ("alpha beta", "alpha beta"))
    for path, words in zip(paths, ("a\nb\n", "b\na\n"), strict=True):
        (Path(path) / "tokenizer.json").unlink()
        (Path(path) / "vocab.txt").write_text(words)
    with pytest.raises(ValueError, match="same tokenizer"):
        DistillationModule(*paths)
    paths = folders(tmp_path / "added", bert, ("alpha beta", "alpha beta"))
    for path, token in zip(paths, ("<a>", "<b>"), strict=True):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens([token])
        tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match="same tokenizer"):
        DistillationModule(*paths)

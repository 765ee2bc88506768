"""What a model cannot read is refused by name before it reads it: ids, token types, rows beyond the positions."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.models.calling import call_model
from lightning_distill.models.inputs import InputCheck, attend_across_documents
from lightning_distill.objectives import HiddenStateCosine, SoftTarget
from tests.helpers.models import SMALL, bert, llama

SIZES: dict[str, Any] = {**SMALL, "num_hidden_layers": 1, "pad_token_id": 1, "max_position_embeddings": 24}


def roberta(head: str = "SequenceClassification", **config: Any) -> Any:
    return getattr(transformers, f"RobertaFor{head}")(
        transformers.RobertaConfig(**{**SIZES, "type_vocab_size": 1, **config})
    )


def rows(length: int, token: int = 5, **more: Any) -> dict[str, Tensor]:
    ids = torch.full((2, length), token)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_ids_and_token_types_beyond_a_model_are_refused_in_every_task(head: str, role: str) -> None:
    large, small = bert(head, vocab_size=80), bert(head)
    models = {"student": large, "teacher": large, role: small}
    if head == "MaskedLM":
        models = {"student": small, "teacher": bert(head)}
    module = DistillationModule(objectives=[SoftTarget()], **models)
    with pytest.raises(ValueError, match=r"the token ids for the \w+ to be in \[0, 63\], but got 70"):
        module.losses(rows(4, 70))
    with pytest.raises(ValueError, match=r"token ids .* but got -1"):
        module.losses(rows(4, -1))
    types = torch.full((2, 4), 2)
    with pytest.raises(ValueError, match=r"`token_type_ids`\) for the \w+ to be in \[0, 1\], but got 2"):
        module.losses(rows(4, token_type_ids=types))


def test_a_roberta_teacher_has_one_token_type_and_two_positions_less() -> None:
    module = DistillationModule(roberta(), bert(max_position_embeddings=24), [SoftTarget()])
    module.losses(rows(22))
    with pytest.raises(ValueError, match=r"`token_type_ids`\) for the teacher to be in \[0, 0\], but got 1"):
        module.losses(rows(4, token_type_ids=torch.ones(2, 4, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"into the 22 positions of the models, but got 23 .* for the teacher"):
        module.losses(rows(23))
    # Padding takes none of its positions.
    padded = rows(24)
    padded["input_ids"][:, 22:] = 1
    module.losses(padded)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": {},
    "DistilBertForMaskedLM": {},
    "MPNetForSequenceClassification": {},
    "GPT2ForSequenceClassification": {},
    "GPTJForSequenceClassification": {"rotary_dim": 4},
    "OPTForSequenceClassification": {"ffn_dim": 16},
    "DebertaV2ForSequenceClassification": {"position_biased_input": False, "relative_attention": True},
    "BloomForSequenceClassification": {},
    "RoFormerForSequenceClassification": {"embedding_size": 16},
    "NystromformerForSequenceClassification": {},
    "BartModel": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8},
    "T5EncoderModel": {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_heads": 2, "num_layers": 1},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_are_refused_from_the_length_on_that_the_model_itself_cannot_read(name: str) -> None:
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**{**SIZES, **ARCHITECTURES[name]})).eval()
    for length in (20, 21, 22, 23, 24, 25, 26, 27):
        fits = refused = None
        try:
            with torch.no_grad():
                call_model(model, rows(length))
        except (RuntimeError, IndexError) as error:
            fits = error
        check = InputCheck(model, "student")
        try:
            check.before(rows(length))
        except ValueError as error:
            refused = error
        check.remove()
        assert (fits is None) == (refused is None), (length, fits, refused)


def test_positions_that_are_given_are_looked_at() -> None:
    module = DistillationModule(bert(), bert(), [SoftTarget()])
    with pytest.raises(ValueError, match="32 positions of the models, but got 33"):
        module.losses(rows(3, position_ids=torch.tensor([[0, 1, 32]] * 2)))


def test_a_rotary_teacher_past_its_length_is_said_once() -> None:
    teacher, student = llama(max_position_embeddings=8), llama()
    module = DistillationModule(teacher, student, [SoftTarget()])
    module.losses(rows(8))
    with pytest.warns(UserWarning, match="The teacher reads 9 tokens in a row and was trained on at most 8"):
        module.losses(rows(9))
    module.losses(rows(10))  # warnings are errors
    # A student would be trained where it was not meant to be.
    with pytest.raises(ValueError, match="8 positions of the models, but got 9 tokens in a row for the student"):
        DistillationModule(student, llama(max_position_embeddings=8), [SoftTarget()]).losses(rows(9))


class Plain(nn.Module):
    """A model of the user's own."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(words, 4), nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.head((self.words(ids) + self.places(input=places)).mean(1))


def test_a_plain_module_names_its_embedding() -> None:
    module = DistillationModule(Plain(30), Plain(40))
    labels = torch.tensor([0, 1])
    module.losses((torch.full((2, 6), 29), labels))
    with pytest.raises(
        ValueError, match=r"the embedding `words` of the teacher looks up to be in \[0, 29\], but got 30"
    ):
        module.losses((torch.full((2, 6), 30), labels))
    with pytest.raises(ValueError, match=r"the embedding `places` of the teacher .* \[0, 5\], but got 6"):
        module.losses((torch.full((2, 7), 3), labels))
    module.release_hooks()
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_every_stage_looks_and_so_does_predict(tmp_path: Path) -> None:
    def loader(token: int) -> Any:
        data = [{"input_ids": torch.tensor([5, token]), "labels": torch.tensor(0)} for _ in range(2)]
        return DataLoader(data, batch_size=2)  # type: ignore[arg-type]

    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, enable_checkpointing=False, enable_model_summary=False, **settings)
    module = DistillationModule(bert(), bert())
    for run in (trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(ValueError, match=r"token ids for the student .* 64"):
            run(module, loader(64))
    with pytest.raises(ValueError, match=r"token ids for the student .* 64"):
        trainer.fit(module, loader(5), loader(64))


@pytest.mark.parametrize("compiled", [False, True])
def test_off_the_cpu_the_first_batch_is_looked_at_and_the_first_of_the_next_stage(compiled: bool) -> None:
    model = bert()
    if compiled:
        model.compile(backend="eager")
    check = InputCheck(model, "student")
    elsewhere = rows(4)
    elsewhere["input_ids"] = elsewhere["input_ids"].to("meta")  # a look of its values would fail
    check.after()
    check.before(elsewhere)
    check.look_again()
    check.before(rows(4))
    with pytest.raises(ValueError, match="but got 70"):
        check.before(rows(4, 70))
    check.remove()


def test_the_bodies_of_two_models_are_looked_at_too() -> None:
    pair = [transformers.BertModel(transformers.BertConfig(**SIZES)) for _ in range(2)]
    module = DistillationModule(*pair, [HiddenStateCosine("last")], task="classification")
    with pytest.raises(ValueError, match=r"token ids for the student .* 70"):
        module.losses({"input_ids": torch.tensor([[70]])})


def test_the_teachers_own_inputs_are_looked_at() -> None:
    module = DistillationModule(bert(vocab_size=40), bert(), [SoftTarget()], own_teacher_inputs=True)
    own = {f"teacher_{key}": value for key, value in rows(3, 39).items()}
    module.losses({**rows(4, 60), **own})
    with pytest.raises(ValueError, match=r"token ids for the teacher .* 41"):
        module.losses({**rows(4, 60), "teacher_input_ids": torch.full((2, 3), 41)})
    with pytest.raises(ValueError, match=r"teacher's own inputs.*'attention_mask', 'input_ids'.*`teacher_input_ids`"):
        module.losses(rows(4))


def test_packed_documents_beside_a_mask_are_said_once() -> None:
    module = DistillationModule(llama(layers=3), llama(), [SoftTarget()])
    packed = {
        "input_ids": torch.full((2, 6), 5),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]),
    }
    module.losses(packed)  # warnings are errors
    masked = {**packed, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with pytest.warns(UserWarning, match="attend to each other. Leave `attention_mask` out") as found:
        module.losses(masked)
    assert len(found) == 1
    module.losses(masked)


def test_padding_on_the_left_is_no_document() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    for positions in ([[1, 1, 0, 1, 2]], [[0, 0, 0, 1, 2]], [[3, 2, 0, 1, 2]]):
        batch = {"input_ids": torch.full((1, 5), 5), "position_ids": torch.tensor(positions), "attention_mask": mask}
        assert not attend_across_documents(batch)
    # A mask of its own for each query keeps documents apart.
    whole = {"position_ids": torch.tensor([[0, 1, 0, 1]]), "attention_mask": torch.ones(1, 1, 4, 4)}
    assert not attend_across_documents(whole)

"""Encoder-decoders: the loss is that of transformers, and everything else takes them as it takes other models."""

from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.callbacks import GPTQ, EarlyExit, TeacherCache
from lightning_distill.models.calling import call_model, decoder_input_ids
from lightning_distill.objectives import AttentionMap, AttentionRelation, HardLabel, HiddenState, SoftTarget
from lightning_distill.quantization import load
from lightning_distill.signals import head as vocabulary
from lightning_distill.signals.head import find_head
from lightning_distill.tasks import infer_task
from tests.helpers.models import VOCAB, batch, seq2seq

KINDS = ("T5", "Bart", "Marian", "MBart", "Pegasus", "M2M100", "Blenderbot")
every_kind = pytest.mark.parametrize("kind", KINDS)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "log_every_n_steps": 1, "default_root_dir": folder}
    return L.Trainer(accelerator="cpu", **{"max_epochs": 1, **quiet, **options})


def loader(rows: int = 4) -> DataLoader:
    return DataLoader([batch("seq2seq_lm", rows, seed=seed) for seed in range(4)], batch_size=None)


class Rows(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()

    def val_dataloader(self) -> DataLoader:
        return loader()


def hard_label(model: Any, data: dict[str, Tensor]) -> Tensor:
    return DistillationModule(None, model).eval().losses(data)["hard_label"]


# -- losses ----------------------------------------------------------------------------------------------------------


@every_kind
def test_hard_label_is_the_loss_of_transformers(kind: str) -> None:
    torch.manual_seed(0)
    model = seq2seq(kind)
    assert infer_task(model) == "seq2seq_lm"
    for seed in range(2):
        data = batch("seq2seq_lm", seed=seed)
        assert data["labels"].shape != data["input_ids"].shape
        torch.testing.assert_close(hard_label(model, data), model(**data).loss)


def test_the_other_forms_of_t5_and_two_models_in_one() -> None:
    for settings in ({"feed_forward_proj": "gated-gelu"}, {"tie_word_embeddings": False}):
        model, data = seq2seq("T5", **settings), batch("seq2seq_lm")
        torch.testing.assert_close(hard_label(model, data), model(**data).loss)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.BertConfig(**sizes, intermediate_size=16)
    decoder = transformers.BertConfig(**sizes, intermediate_size=16, is_decoder=True, add_cross_attention=True)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    model = transformers.EncoderDecoderModel(both).eval()
    with pytest.warns(FutureWarning, match="encoder-decoder"):
        theirs = model(**data).loss
    torch.testing.assert_close(hard_label(model, data), theirs)


def test_label_smoothing_and_soft_targets_are_over_the_words_that_count() -> None:
    torch.manual_seed(0)
    teacher, student, data = seq2seq("Bart", layers=3).eval(), seq2seq("Bart").eval(), batch("seq2seq_lm")
    module = DistillationModule(teacher, student, [SoftTarget(2.0), HardLabel(0.1)]).eval()
    losses = module.losses(data)
    logits, counts = student(**data).logits, data["labels"] != -100
    smoothed = F.cross_entropy(logits[counts], data["labels"][counts], label_smoothing=0.1)
    torch.testing.assert_close(losses["hard_label"], smoothed)
    of_teacher = (teacher(**data).logits[counts] / 2).log_softmax(-1)
    kl = F.kl_div((logits[counts] / 2).log_softmax(-1), of_teacher, reduction="batchmean", log_target=True)
    torch.testing.assert_close(losses["soft_target"], 4 * kl)


@every_kind
def test_a_row_without_labels_counts_nothing(kind: str) -> None:
    model, data = seq2seq(kind), batch("seq2seq_lm")
    fewer = {name: value[:3] for name, value in data.items()}
    without = {**data, "labels": data["labels"].clone()}
    without["labels"][3] = -100
    torch.testing.assert_close(hard_label(model, without), hard_label(model, fewer))


@every_kind
def test_a_decoder_reads_what_transformers_lets_it_read_and_no_loss_is_computed(kind: str) -> None:
    model, data = seq2seq(kind).eval(), batch("seq2seq_lm")
    output = call_model(model, data)
    assert output.loss is None
    torch.testing.assert_close(output.logits, model(**data).logits)
    assert not (decoder_input_ids(model, data["labels"]) == -100).any()


def test_decoder_inputs_of_ones_own() -> None:
    model, data = seq2seq("Bart").eval(), batch("seq2seq_lm")
    read = decoder_input_ids(model, data["labels"])
    given = {**data, "decoder_input_ids": read}
    torch.testing.assert_close(hard_label(model, given), hard_label(model, data))
    del given["labels"]
    module = DistillationModule(seq2seq("Bart"), model, [SoftTarget()]).eval()
    masked = {**given, "decoder_attention_mask": (data["labels"] != -100).long()}
    torch.testing.assert_close(module.losses(masked)["soft_target"], module.losses(data)["soft_target"])
    assert module.losses(given)["soft_target"] > 0


# -- large vocabularies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["T5", "Bart", "Marian", "MBart", "M2M100"])
def test_losses_without_logits_are_those_of_whole_logits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    for words in (16_000, 10):
        monkeypatch.setattr(vocabulary, "LARGE", words)
        torch.manual_seed(0)
        teacher, student = seq2seq(kind, layers=3), seq2seq(kind)
        for model in (teacher, student):
            if hasattr(model, "final_logits_bias"):
                model.final_logits_bias.normal_()
        module = DistillationModule(
            teacher,
            student,
            [SoftTarget(2.0, weight=0.7), HardLabel(0.1, weight=0.3), HiddenState(weight=0.2)],
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        widths: list[int] = []
        student.lm_head.register_forward_hook(lambda *args, widths=widths: widths.append(args[2].shape[:-1].numel()))
        run = trainer(tmp_path, accumulate_grad_batches=2)
        run.fit(module, loader(), loader())
        assert (set(widths) == {1}) == (words == 10)
        found.append({**student.state_dict(), **run.callback_metrics})
    whole, deferred = found
    assert {"train_soft_target", "val_perplexity", "val_agreement"} <= whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(deferred[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_head_is_the_whole_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "LARGE", 10)
    for kind in ("T5", "Marian"):
        model, hidden = seq2seq(kind), torch.randn(1, 3, 16)
        bias = 0.0
        if kind == "Marian":
            bias = model.final_logits_bias.normal_()
        head = find_head(model)
        assert head is not None
        torch.testing.assert_close(head.projection(hidden).logits(), model.lm_head(hidden) + bias)


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stack"), [("T5", "block"), ("Bart", "layers")])
def test_signals_of_either_stack_do_not_depend_on_padding(kind: str, stack: str) -> None:
    torch.manual_seed(0)
    base = "" if kind == "T5" else "model."
    encoder = [(f"{base}encoder.{stack}.1", f"{base}encoder.{stack}.2")]
    decoder = [(f"{base}decoder.{stack}.1", f"{base}decoder.{stack}.2")]

    def objectives(**stacks: Any) -> list[Any]:
        return [
            kind_of(layers, **settings, name=f"{kind_of.__name__}-{place}")
            for place, layers in stacks.items()
            for kind_of, settings in ((HiddenState, {}), (AttentionMap, {"divergence": "kl"}), (AttentionRelation, {}))
        ]

    teacher, student = seq2seq(kind, layers=3), seq2seq(kind)
    module = DistillationModule(teacher, student, objectives(encoder=encoder, decoder=decoder)).eval()
    short, data = batch("seq2seq_lm", 3), batch("seq2seq_lm", 3)
    data["input_ids"] = F.pad(data["input_ids"], (0, 3), value=7)
    data["attention_mask"] = F.pad(data["attention_mask"], (0, 3))
    data["labels"] = F.pad(data["labels"], (0, 4), value=-100)
    losses, padded = module.losses(short), module.losses(data)
    module.release_hooks()
    numbered = DistillationModule(teacher, student, objectives(numbered=[(1, 2)])).eval().losses(data)
    for name, loss in losses.items():
        assert loss > 0, name
        torch.testing.assert_close(padded[name], loss, msg=lambda m, n=name: f"{n}: {m}")
    if kind == "Bart":  # whose layers end in a norm of their own, as its stacks do not
        for name in ("HiddenState", "AttentionMap", "AttentionRelation"):
            torch.testing.assert_close(numbered[f"{name}-numbered"], losses[f"{name}-encoder"])


@pytest.mark.parametrize(
    ("kind", "path"),
    [("T5", "decoder.block.1.layer.1"), ("T5", "decoder.block.1.layer.1.EncDecAttention"),
     ("Bart", "model.decoder.layers.1.encoder_attn")],
)  # fmt: skip
def test_attention_to_the_encoder_is_refused(kind: str, path: str) -> None:
    for objective in (AttentionMap([(path, path)]), AttentionRelation([(path, path)])):
        with pytest.raises(
            ValueError, match=rf"attend to their own tokens, but got '{path}'.*Name the decoder's layer"
        ):
            DistillationModule(seq2seq(kind, layers=3), seq2seq(kind), [objective])
    states = DistillationModule(seq2seq(kind, layers=3), seq2seq(kind), [HiddenState([(path, path)])])
    assert states.losses(batch("seq2seq_lm"))["hidden_state"] > 0


# -- what is made of them ----------------------------------------------------------------------------------------------


def test_a_cache_tells_targets_apart_and_finds_rows_in_other_batches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, student = seq2seq("T5", layers=3).eval(), seq2seq("T5")
    one = batch("seq2seq_lm", 4)
    other = {**one, "labels": one["labels"].roll(1, 0)}  # the same sources, other targets
    rows = [one, other]
    objectives = [SoftTarget(1.0), HiddenState(weight=0.1)]
    signals = ["logits", "hidden_states"]
    cache = TeacherCache(str(tmp_path / "cache"), top_k=None, dtype="float32", signals=signals)
    module = DistillationModule(teacher, student, objectives)
    expected = [module.eval().losses(each) for each in rows]
    module.train()
    run = trainer(tmp_path, callbacks=[cache], max_epochs=2, limit_val_batches=0)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    module = DistillationModule(teacher, student, objectives, optimizer=optimizer)
    run.fit(module, DataLoader(rows, batch_size=None))
    mean = {name: sum(each[name] for each in expected) / 2 for name in expected[0]}
    torch.testing.assert_close(run.callback_metrics["train_soft_target"], expected[1]["soft_target"])
    assert mean["soft_target"] > 0
    # In batches of one, shorter and longer, and without the teacher's weights.
    padded = {"input_ids": (0, 2), "attention_mask": (0, 2), "labels": (0, 5)}
    apart = [
        {
            name: F.pad(each[name][row : row + 1], by, value=-100 if name == "labels" else 0)
            for name, by in padded.items()
        }
        for each in rows
        for row in range(4)
    ]
    module = DistillationModule(TeacherCache.teacher(str(tmp_path / "cache")), student, objectives, optimizer=optimizer)
    cache = TeacherCache(str(tmp_path / "cache"), top_k=None, dtype="float32", signals=signals)
    trainer(tmp_path, callbacks=[cache], limit_val_batches=0).fit(module, DataLoader(apart, batch_size=None))


@pytest.mark.filterwarnings("ignore:Expected at least as many calibration tokens")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks it
def test_gptq_bf16_checkpointing_adapters_and_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 16}
    student = seq2seq("T5", **settings)
    module = DistillationModule(seq2seq("T5", layers=3, **settings), student, gradient_checkpointing=True)
    run = trainer(tmp_path, precision="bf16-mixed")
    run.fit(module, loader(), loader())
    assert all(value.isfinite() for value in run.callback_metrics.values())
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(module.export(tmp_path / "student"))
    data = batch("seq2seq_lm")
    torch.testing.assert_close(again(**data).loss, student.eval()(**data).loss)
    gptq = GPTQ(8, group_size=32, folder=str(tmp_path), max_drop=None, monitor="val_perplexity")
    trainer(tmp_path, callbacks=[gptq]).validate(DistillationModule(None, student), Rows(), verbose=False)
    few = load(tmp_path / "student-gptq")
    assert 0 < (few(**data).loss - again(**data).loss).abs() < 0.1

    lora = peft.get_peft_model(seq2seq("Bart"), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"]))
    module = DistillationModule(seq2seq("Bart", layers=3), lora)
    assert module.task == "seq2seq_lm"
    trainer(tmp_path).fit(module, loader(), loader())
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(module.export(tmp_path / "merged"))
    torch.testing.assert_close(again(**data).logits, lora.eval()(**data).logits)


def test_encoder_decoders_do_not_leave_early(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'seq2seq_lm'. Language models do not leave early here"):
        trainer(tmp_path, callbacks=[EarlyExit()]).fit(DistillationModule(None, seq2seq("T5")), loader())


# -- bad input -------------------------------------------------------------------------------------------------------


def test_what_a_decoder_cannot_read_is_refused() -> None:
    model, data = seq2seq("Bart"), batch("seq2seq_lm")
    module = DistillationModule(seq2seq("Bart", max_position_embeddings=64), model)
    long = torch.ones(4, 33, dtype=torch.long)
    with pytest.raises(ValueError, match=r"32 positions of the models, but got 33 tokens .* decoder of the student"):
        module.losses({**data, "labels": long})
    with pytest.raises(ValueError, match="32 positions of the models, but got 33 tokens in a row for the student"):
        module.losses({**data, "input_ids": long, "attention_mask": long})
    with pytest.raises(ValueError, match=r"ids for the decoder of the student to be in \[0, 63\], but got 64"):
        module.losses({**data, "decoder_input_ids": long[:, :6] * 64})
    for labels, found in (
        (None, "the keys"),
        (torch.zeros(4), "torch.float32 of shape"),
        (torch.zeros(4).long(), "torch.int64"),
    ):
        given = {**data, "labels": labels} if labels is not None else {"input_ids": data["input_ids"]}
        with pytest.raises(ValueError, match=f"`labels` \\[rows, tokens\\].*but got {found}"):
            module.losses(given)


def test_labels_beyond_the_words_are_refused(tmp_path: Path) -> None:
    data = batch("seq2seq_lm")
    data["labels"][0, 0] = VOCAB
    with pytest.raises(ValueError, match=r"labels of a batch of the train data to be in \[0, 63\], but got 64"):
        trainer(tmp_path).fit(DistillationModule(None, seq2seq("Marian")), DataLoader([data], batch_size=None))


@pytest.mark.parametrize("kind", ["T5", "Bart", "M2M100"])
@pytest.mark.parametrize("name", ["decoder_start_token_id", "pad_token_id"])
def test_a_config_that_does_not_say_where_a_decoder_starts(kind: str, name: str) -> None:
    model = seq2seq(kind)
    setattr(model.config, name, None)
    with pytest.raises(ValueError, match=r"to have `decoder_start_token_id` and `pad_token_id`.*None"):
        hard_label(model, batch("seq2seq_lm"))


def test_models_of_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="to have the same `vocab_size`, but got 80 and 64"):
        DistillationModule(seq2seq("Bart"), seq2seq("Bart", vocab_size=80))


def test_decoders_that_read_pictures_are_another_task() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = transformers.LlamaConfig(vocab_size=20, **sizes)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=4, patch_size=2)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=19)
    )
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration"):
        infer_task(model)
